"""Layers of a decoder, as Flax NNX modules that declare parameters and read as mathematics.

Activations are either token-major [T, features...] or feature-major [features..., T]; every layer
takes a `feature_major` flag when it is built. On a CPU a product of a weight [out, in] with a few
columns runs up to four times faster than one of a few rows with its transpose.
"""
