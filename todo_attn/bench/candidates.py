"""The launch configurations that are worth timing on a GPU: what :mod:`.tuning` and ``benchmarks.tune`` try.

docs/kernel-notes.md says why. Each row is for head dims with at most so many columns of a packed K row, like the rows
of ``kernels/configs.py``. A shipped row needs no entry: it is always timed.
"""

from __future__ import annotations

from ..kernels import configs
from ..kernels.configs import KernelConfig

_Table = list[tuple[int, list[KernelConfig]]]

# Two programs of 4 warps on an SM overlap by themselves; one of 8 warps has the lower bound.
_HOPPER: _Table = [
    (
        64,
        [
            KernelConfig(128, 256, 8, 2, polynomial=True),  # copies as late as they may be
            KernelConfig(128, 256, 8, 3, polynomial=False),
            KernelConfig(128, 128, 8, 3, polynomial=True),
            KernelConfig(128, 64, 4, 3, polynomial=True),
            KernelConfig(128, 64, 4, 4, polynomial=True),
            KernelConfig(256, 64, 8, 3, polynomial=True),
            KernelConfig(64, 128, 4, 3, polynomial=True),
        ],
    ),
    (
        128,
        [
            KernelConfig(128, 128, 8, 2),
            KernelConfig(128, 128, 8, 4),
            KernelConfig(128, 64, 8, 4),
            KernelConfig(128, 64, 4, 3),
            KernelConfig(64, 64, 4, 3),
        ],
    ),
    (
        160,
        [
            KernelConfig(128, 128, 8, 2),
            KernelConfig(128, 64, 8, 2),
            KernelConfig(128, 64, 8, 4),
            KernelConfig(64, 64, 4, 3),
        ],
    ),
    (256, [KernelConfig(128, 64, 8, 2), KernelConfig(128, 32, 8, 2), KernelConfig(64, 32, 4, 3)]),
]
# Outputs in tensor memory. With warp specialization one program fits on an SM, without it two. With 4 warps and more
# than 48 columns they spill.
_BLACKWELL: _Table = [
    (
        48,
        [
            KernelConfig(128, 128, 8, 3, polynomial=True),
            KernelConfig(128, 128, 8, 2),
            KernelConfig(128, 128, 4, 3),
            KernelConfig(128, 128, 4, 3, warp_specialize=True),
        ],
    ),
    (
        96,
        [
            KernelConfig(128, 128, 8, 3, polynomial=True),
            KernelConfig(128, 128, 8, 2),
            KernelConfig(128, 64, 8, 3),
            KernelConfig(128, 128, 4, 3, warp_specialize=True),
        ],
    ),
    (160, [KernelConfig(128, 64, 8, 3), KernelConfig(128, 64, 8, 2)]),
    (256, [KernelConfig(128, 32, 8, 2), KernelConfig(128, 32, 8, 3)]),
]
# 16 queries a warp (8 warps) read shared memory twice as often as 32, but leave more registers; few keys or few
# queries at a time let more programs fit on an SM.
_DEFAULT: _Table = [
    (
        32,
        [
            KernelConfig(128, 64, 4, 3),
            KernelConfig(128, 64, 8, 4),
            KernelConfig(64, 64, 4, 4),
            KernelConfig(128, 32, 4, 3),
        ],
    ),
    (
        48,
        [
            KernelConfig(128, 64, 4, 3),
            KernelConfig(128, 32, 4, 5),
            KernelConfig(128, 64, 8, 4),
            KernelConfig(64, 64, 4, 4),
            KernelConfig(128, 64, 4, 4, polynomial=True),
        ],
    ),
    (
        64,
        [
            KernelConfig(128, 64, 4, 4),
            KernelConfig(128, 32, 4, 4),
            KernelConfig(128, 64, 8, 3),
            KernelConfig(64, 64, 4, 3),
        ],
    ),
    (
        96,
        [
            KernelConfig(128, 64, 8, 3),
            KernelConfig(128, 32, 4, 3),
            KernelConfig(64, 64, 4, 3),
            KernelConfig(64, 32, 4, 4),
        ],
    ),
    (160, [KernelConfig(128, 32, 8, 2), KernelConfig(64, 32, 4, 3), KernelConfig(64, 32, 4, 2)]),
    (256, [KernelConfig(64, 16, 4, 3), KernelConfig(64, 32, 8, 2)]),
]
_ATTENTION = {9: _HOPPER, 10: _BLACKWELL}

_MATCH_HOPPER = [KernelConfig(128, 128, 8, 3), KernelConfig(128, 64, 4, 4), KernelConfig(64, 128, 4, 4)]
_MATCH = [KernelConfig(128, 128, 8, 2), KernelConfig(128, 64, 4, 3), KernelConfig(64, 64, 4, 4)]


def of_attention(capability: tuple[int, int], head_dim: int) -> list[KernelConfig]:
    """For fp16 and bf16 on a GPU of compute capability (major, minor): the shipped configuration first."""
    columns = configs.tiles(capability, head_dim).k_columns
    table = _ATTENTION.get(capability[0], _DEFAULT)
    others = next(found for limit, found in table if columns <= limit)
    return _unique(configs.attention_config(capability, head_dim, half=True), others)


def of_match(capability: tuple[int, int]) -> list[KernelConfig]:
    """The match kernel's, likewise."""
    others = _MATCH_HOPPER if capability[0] in (9, 10) else _MATCH
    return _unique(configs.match_config(capability, half=True), others)


def _unique(shipped: KernelConfig, others: list[KernelConfig]) -> list[KernelConfig]:
    return list(dict.fromkeys([shipped, *others]))
