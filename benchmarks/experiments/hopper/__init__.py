"""The attention kernel warp-specialised for Hopper, in Gluon: a warp that copies, warpgroups that compute.

Its tests need no GPU and are not in the default suite: ``python -m pytest benchmarks/experiments``. On a Hopper GPU its
check against the oracle comes first (``python -m benchmarks.experiments.hopper.check``), then the shipped kernel's time
(``python -m benchmarks.experiments.hopper.tune``).
"""
