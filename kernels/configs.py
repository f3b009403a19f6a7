"""How each kernel is launched: the column tiles of a head dim, and a table of configurations for each architecture.

The configurations were chosen from compiled code (registers, spills, shared memory, clocks per score in the main loop).
``python -m benchmarks.compile_report`` prints these.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Triton 3.10 fuses multiply-adds only on request; 3.9 warns unless the choice is explicit.
COMPILER: dict[str, object] = {"enable_fp_fusion": True}
CPU_CAPABILITY = (8, 0)  # on CPU tensors only the interpreter runs, which takes any configuration


def capability(x: torch.Tensor) -> tuple[int, int]:
    """The compute capability of the device of ``x``."""
    return _capability_of(x.device) if x.is_cuda else CPU_CAPABILITY


@functools.cache  # a launch asks more than once, and torch answers in microseconds
def _capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Tiles:
    """The column tiles of one head dim. A tile is a power of two, so 40 is read as 32 + 16, not as 64.

    ``k``, ``v``: widths of the tiles of K and V; the second is 0 if one suffices. ``k_columns``, ``v_columns``: length
    of a packed row, a multiple of 16 bytes; loads beyond it give zeros. ``ones``: V has a spare column, which holds
    ones, so that P V also computes the row sum.
    """

    k: tuple[int, int]
    v: tuple[int, int]
    k_columns: int
    v_columns: int
    ones: bool


@functools.cache
def tiles(capability: tuple[int, int], head_dim: int) -> Tiles:
    """The tiles on a GPU of compute capability (major, minor), for a head dim that is a multiple of 8 up to 256."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - first)
    second = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    if first == second:  # together the next power of two: one tile
        first, second = 2 * first, 0
    k = (first, second)
    # The matrix instructions of Hopper and sm_100 take P V whole: those of 64 columns cost less than of 32 and of 16.
    # Everywhere else it is made of instructions of 8 columns, and 48 cost three quarters of 64.
    v = (64, 0) if k == (32, 16) and capability[0] in (9, 10) else k
    ones = sum(v) > head_dim
    return Tiles(k=k, v=v, k_columns=sum(k), v_columns=min(sum(v), -(-(head_dim + ones) // 16) * 16), ones=ones)


@dataclass(frozen=True)
class KernelConfig:
    """Queries and keys per tile, warps per program, stages of the software pipeline.

    ``polynomial``: compute one exp2 in eight by polynomial. For loops that exp2 limits, in fp16 and bf16.
    ``warp_specialize``: copies, products and exp2 run in warps of their own (Triton on sm_100). No row has it: with 12
    warps of 168 registers one program fits on an SM, where two of the others do.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    polynomial: bool = False
    warp_specialize: bool = False

    def __str__(self) -> str:
        """Queries x keys x warps x stages, such as "128x256x8x3:poly"; ":ws" for warp specialization."""
        numbers = (self.block_m, self.block_n, self.num_warps, self.num_stages)
        return "x".join(map(str, numbers)) + ":poly" * self.polynomial + ":ws" * self.warp_specialize

    @property
    def problem(self) -> str | None:
        """Why no kernel of ours can be compiled so on any GPU, as half a sentence; None if it may be."""
        for name in ("block_m", "block_n", "num_warps", "num_stages"):
            if type(getattr(self, name)) is not int:
                return f"{name} must be an integer, got {getattr(self, name)!r}"
        for name in ("polynomial", "warp_specialize"):
            if type(getattr(self, name)) is not bool:
                return f"{name} must be true or false, got {getattr(self, name)!r}"
        for name, tile in (("block_m", self.block_m), ("block_n", self.block_n)):
            if not 16 <= tile <= 512 or tile & (tile - 1):
                return f"{name} must be a power of two from 16 to 512, got {tile}"
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            return f"num_warps must be a power of two up to 32, got {self.num_warps}"
        if not 1 <= self.num_stages <= 8:
            return f"num_stages must be from 1 to 8, got {self.num_stages}"
        return None

    @property
    def options(self) -> dict[str, object]:
        """Options of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **COMPILER}


# (columns of a packed K row, configuration): the first row with enough columns applies. A copy is issued at least a
# trip of the loop before its wait, and 800 clocks: that takes three stages, or two on sm_100. No row spills.
#
# The default runs on any GPU from compute capability 8.0 on: it fits 99 KB of shared memory. There each warp reads all
# of K and V from shared memory, so 32 queries a warp (4 warps) cost half of what 16 (8 warps) do, and two programs fit
# on an SM. Four stages and more if tiles are so small that a trip alone does not cover a load.
_DEFAULT = [
    (16, KernelConfig(128, 64, 4, 4)),
    (32, KernelConfig(128, 32, 4, 5)),  # with 64 keys they spill if the scale is above 1
    (48, KernelConfig(128, 64, 4, 4)),
    (64, KernelConfig(128, 64, 4, 3)),
    (80, KernelConfig(128, 32, 4, 4)),  # with 64 keys they spill
    (160, KernelConfig(128, 32, 8, 3)),  # with 4 warps they spill
    (256, KernelConfig(64, 32, 4, 2)),  # with a third stage they spill
]
# wgmma reads K and V by itself. Tiles are as large as registers allow: a trip costs 130 instructions whatever its size.
_HOPPER = [
    (64, KernelConfig(128, 256, 8, 3, polynomial=True)),
    (128, KernelConfig(128, 128, 8, 3)),  # with 256 keys they spill from 80 columns on
    (160, KernelConfig(128, 64, 8, 3)),  # larger tiles leave no room for a third stage
    (256, KernelConfig(128, 32, 8, 3)),
]
# The outputs are in tensor memory, so registers allow 128 keys. Two programs fit on an SM up to 48 columns.
_BLACKWELL = [
    (96, KernelConfig(128, 128, 8, 3)),
    (160, KernelConfig(128, 128, 8, 2)),
    (256, KernelConfig(128, 64, 8, 2)),
]
_HALF = {90: _HOPPER, 100: _BLACKWELL, 103: _BLACKWELL}
# Exact fp32 products run on the FMA units. What a thread reads from shared memory limits them, and it reads less for
# each product the larger its tile is: the largest that do not spill.
_FP32 = [
    (48, KernelConfig(64, 32, 4, 3)),
    (96, KernelConfig(32, 32, 4, 3)),
    (160, KernelConfig(32, 16, 4, 3)),
    (256, KernelConfig(32, 16, 8, 3)),
]


def attention_config(capability: tuple[int, int], head_dim: int, half: bool) -> KernelConfig:
    """For compute capability (major, minor); ``half``: fp16 or bf16. A GPU without a table gets the default."""
    table = _HALF.get(capability[0] * 10 + capability[1], _DEFAULT) if half else _FP32
    columns = tiles(capability, head_dim).k_columns
    return next(config for limit, config in table if columns <= limit)


def has_tma(capability: tuple[int, int], half: bool) -> bool:
    """Whether tiles are copied by descriptor (Tensor Memory Accelerator): from Hopper on, in fp16 and bf16.

    In fp32 the operands of a product are in registers, which do not suffice for a tile that arrives all at once.
    """
    return half and capability >= (9, 0)


@dataclass(frozen=True)
class BackwardConfig:
    """Of the kernels in ``backward.py``: ``query`` writes the gradient of queries, ``key`` those of keys and values."""

    query: KernelConfig
    key: KernelConfig


# As above: the first row with enough columns, for fp16 and bf16. No row spills. Up to 160 columns a copy is issued at
# least a trip of the loop before its wait, and 800 clocks.
#
# On the default GPUs products take longest even with 16 rows a warp, which read the most from shared memory. Smaller
# tiles leave room for more programs on an SM.
_BACKWARD_DEFAULT = [
    (16, BackwardConfig(KernelConfig(128, 64, 4, 5), KernelConfig(32, 128, 4, 5))),
    (32, BackwardConfig(KernelConfig(128, 32, 4, 5), KernelConfig(32, 128, 4, 4))),
    (48, BackwardConfig(KernelConfig(64, 32, 4, 4), KernelConfig(64, 64, 4, 3))),
    (64, BackwardConfig(KernelConfig(64, 32, 4, 4), KernelConfig(32, 64, 4, 3))),
    (80, BackwardConfig(KernelConfig(64, 32, 4, 3), KernelConfig(32, 64, 4, 3))),
    (128, BackwardConfig(KernelConfig(128, 32, 8, 3), KernelConfig(16, 128, 8, 3))),
    (160, BackwardConfig(KernelConfig(64, 16, 4, 3), KernelConfig(16, 32, 4, 3))),
    (256, BackwardConfig(KernelConfig(32, 32, 4, 3), KernelConfig(16, 32, 4, 3))),
]
# sm_80 multiplies twice as fast, so shared memory limits it: 32 rows a warp, if they do not spill.
_BACKWARD_AMPERE = [
    (16, BackwardConfig(KernelConfig(128, 64, 4, 5), KernelConfig(32, 128, 4, 5))),
    (32, BackwardConfig(KernelConfig(128, 64, 4, 4), KernelConfig(32, 128, 4, 4))),
    (48, BackwardConfig(KernelConfig(128, 32, 4, 4), KernelConfig(32, 128, 4, 4))),
    (80, BackwardConfig(KernelConfig(128, 32, 8, 3), KernelConfig(16, 128, 4, 4))),
    (128, BackwardConfig(KernelConfig(128, 32, 8, 3), KernelConfig(16, 128, 8, 3))),
    (160, BackwardConfig(KernelConfig(64, 32, 4, 3), KernelConfig(16, 64, 4, 3))),
    (256, BackwardConfig(KernelConfig(32, 32, 4, 3), KernelConfig(16, 32, 4, 3))),
]
_BACKWARD_HOPPER = [
    (32, BackwardConfig(KernelConfig(128, 128, 8, 3), KernelConfig(64, 128, 8, 4))),
    (80, BackwardConfig(KernelConfig(128, 128, 8, 3), KernelConfig(64, 128, 8, 3))),
    (96, BackwardConfig(KernelConfig(128, 64, 8, 3), KernelConfig(64, 128, 8, 3))),
    (128, BackwardConfig(KernelConfig(128, 64, 8, 3), KernelConfig(32, 128, 8, 3))),  # larger tiles spill
    (160, BackwardConfig(KernelConfig(128, 64, 8, 3), KernelConfig(16, 128, 8, 4))),
    # The gradients of 64 keys and values, as many as wgmma takes, do not fit the registers.
    (256, BackwardConfig(KernelConfig(128, 32, 8, 3), KernelConfig(16, 32, 4, 3))),
]
_BACKWARD_BLACKWELL = [
    (32, BackwardConfig(KernelConfig(128, 64, 4, 3), KernelConfig(64, 128, 8, 4))),
    (64, BackwardConfig(KernelConfig(128, 64, 4, 3), KernelConfig(64, 128, 8, 3))),
    (80, BackwardConfig(KernelConfig(128, 64, 4, 4), KernelConfig(64, 128, 8, 3))),
    (96, BackwardConfig(KernelConfig(128, 64, 8, 4), KernelConfig(64, 128, 8, 3))),
    (160, BackwardConfig(KernelConfig(128, 64, 8, 3), KernelConfig(64, 128, 8, 3))),
    (256, BackwardConfig(KernelConfig(128, 32, 8, 2), KernelConfig(32, 64, 8, 2))),
]
_BACKWARD = {80: _BACKWARD_AMPERE, 90: _BACKWARD_HOPPER, 100: _BACKWARD_BLACKWELL, 103: _BACKWARD_BLACKWELL}


def backward_config(capability: tuple[int, int], head_dim: int) -> BackwardConfig:
    """For compute capability (major, minor), in fp16 and bf16. A GPU without a table gets the default."""
    table = _BACKWARD.get(capability[0] * 10 + capability[1], _BACKWARD_DEFAULT)
    columns = sum(backward_tiles(capability, head_dim).k)
    return next(config for limit, config in table if columns <= limit)


def backward_tiles(capability: tuple[int, int], head_dim: int) -> Tiles:
    """The tiles of the backward: those of V in the forward, for K as well, padded with zeros."""
    k = tiles(capability, head_dim).v
    return Tiles(k=k, v=k, k_columns=sum(k), v_columns=sum(k), ones=False)


# The match kernel streams both operands through shared memory, 128 bytes of channels at a time, so any number of
# channels fits. In fp32 products are exact, with operands in registers.
_MATCH_HOPPER = KernelConfig(128, 128, 8, 4)
_MATCH_HALF = KernelConfig(128, 64, 8, 3)
_MATCH_FP32 = KernelConfig(32, 32, 4, 2)


def match_config(capability: tuple[int, int], half: bool) -> KernelConfig:
    """The match kernel's configuration for compute capability (major, minor); ``half``: fp16 or bf16."""
    if not half:
        return _MATCH_FP32
    return _MATCH_HOPPER if capability == (9, 0) else _MATCH_HALF
