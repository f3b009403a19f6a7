"""Kernels that may replace a shipped one once a GPU says so; no part of the package.

What each must pass first: the tests of ``tests/candidates`` without a GPU, its check against the oracle on one
(``python -m benchmarks.candidates.check``), and then the shipped kernel's time.
"""
