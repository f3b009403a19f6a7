"""Measurements of todo_attn against its peers, run from a checkout: ``python -m benchmarks.unet``."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"  # where rows go, and figures come from
