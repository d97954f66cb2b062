"""Models: families as data, the checkpoints they come in, and the one decoder that computes them."""
