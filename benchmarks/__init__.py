"""Measurements of todo_attn against its peers, run from a checkout: ``python -m benchmarks.unet``."""
