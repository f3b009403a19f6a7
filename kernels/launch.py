"""How each kernel is launched: the tile split of a head dim, and one table of settings per architecture.

The settings were chosen from compiled code (registers, spills, shared memory, clocks per score of the hot loop):
``python -m benchmarks.compile_report`` prints what they give.
"""

from __future__ import annotations

from dataclasses import dataclass

# Triton 3.10 no longer fuses multiply-adds unless asked; 3.9 warns where nothing is said.
COMPILER: dict[str, object] = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tiles:
    """The column tiles of one head dim. A tile is a power of two, so 40 is read as 32 + 16 and not as 64.

    ``k``: the tiles of Q K^T (second 0 where one will do). ``v``: those of P V. ``k_columns``, ``v_columns``: the
    length of a packed row, a multiple of 16 bytes; a tile longer than its row is filled with zeros as it is loaded.
    ``ones``: whether V has a spare column for the ones whose product with P is the softmax's sum.
    """

    k: tuple[int, int]
    v: tuple[int, int]
    k_columns: int
    v_columns: int
    ones: bool


def tiles(head_dim: int) -> Tiles:
    """The tiles for a head dim that is a multiple of 8 and at most 256."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - first)
    second = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    if first == second:  # two tiles as wide as the next power of two: one will do
        first, second = 2 * first, 0
    k = (first, second)
    # As a product of 64 columns P V costs less on Hopper than as 32 + 16 (a small wgmma is no cheaper to issue).
    v = (64, 0) if k == (32, 16) else k
    ones = sum(v) > head_dim
    return Tiles(k=k, v=v, k_columns=sum(k), v_columns=min(sum(v), -(-(head_dim + ones) // 16) * 16), ones=ones)


@dataclass(frozen=True)
class Settings:
    """Queries and keys per tile, warps per program, depth of the software pipeline.

    ``polynomial``: one exp2 in eight by polynomial, where exp2 holds the loop back and results are fp16 or bf16.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    polynomial: bool = False

    @property
    def options(self) -> dict[str, object]:
        """What the compiler is told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **COMPILER}


# (columns of a K tile, settings): the first row whose columns suffice is taken. The default is safe on any GPU from
# compute capability 8.0 on: it fits 99 KB of shared memory and does not spill.
_DEFAULT = [
    (48, Settings(128, 64, 8, 3)),  # 128 registers on sm_80: two programs on a multiprocessor
    (80, Settings(128, 64, 8, 2)),
    (160, Settings(128, 32, 8, 2)),
    (256, Settings(64, 32, 4, 2)),
]
_HOPPER = [
    (64, Settings(128, 256, 8, 2, polynomial=True)),
    (160, Settings(128, 128, 8, 2)),
    (256, Settings(128, 64, 8, 2)),
]
_BLACKWELL = [(64, Settings(128, 128, 8, 2)), *_DEFAULT]
_HALF = {90: _HOPPER, 100: _BLACKWELL, 103: _BLACKWELL}
# Exact fp32 products run on the FMA units, operands in registers.
_FP32: list[tuple[int, Settings]] = [(96, Settings(32, 16, 4, 1)), (256, Settings(16, 16, 8, 1))]


def settings(capability: tuple[int, int], head_dim: int, half: bool) -> Settings:
    """The settings for compute capability (major, minor); an untuned GPU gets the default row."""
    table = _HALF.get(capability[0] * 10 + capability[1], _DEFAULT) if half else _FP32
    columns = tiles(head_dim).k_columns
    return next(row for limit, row in table if columns <= limit)


def has_copy_engine(capability: tuple[int, int]) -> bool:
    """Whether a GPU of that capability copies tiles by descriptor (TMA): from Hopper on."""
    return capability >= (9, 0)


# Queries and keys per tile of the match kernel. Both operands stream through shared memory in pieces of 128 bytes of
# channels, so any channel count fits. First fp16 and bf16, then fp32 (exact products, operands in registers).
_MATCH_HOPPER = Settings(128, 128, 8, 4)
_MATCH_HALF = Settings(128, 64, 8, 3)
_MATCH_FP32 = Settings(32, 32, 4, 2)


def match_settings(capability: tuple[int, int], half: bool) -> Settings:
    """The match kernel's settings for compute capability (major, minor)."""
    if not half:
        return _MATCH_FP32
    return _MATCH_HOPPER if capability == (9, 0) else _MATCH_HALF
