"""Several hosts that share a model: host 0 plans, and every host does the same commands in the same order."""
