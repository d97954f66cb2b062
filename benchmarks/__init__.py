"""Benchmarks: each is a module to run, `benchmarks/README.md` says what it measures."""
