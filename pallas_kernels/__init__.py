"""Kernels of an inference engine: one folder per op, one entry point per op, several backends."""
