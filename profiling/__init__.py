"""Profiles and benchmarks; nothing in `aime_fast` or `kernels` imports this package."""
