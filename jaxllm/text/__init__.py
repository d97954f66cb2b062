"""Text without JAX: tokenizers, chat templates, detokenization, stop strings."""
