"""How each kernel is launched: the column tiles of a head dim, and a table of configurations for each architecture.

The configurations were chosen from compiled code (registers, spills, shared memory, clocks per score in the main loop).
``python -m benchmarks.compile_report`` prints these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Triton 3.10 fuses multiply-adds only on request; 3.9 warns unless the choice is explicit.
COMPILER: dict[str, object] = {"enable_fp_fusion": True}
CPU_CAPABILITY = (8, 0)  # on CPU tensors only the interpreter runs, which takes any configuration


def capability(x: torch.Tensor) -> tuple[int, int]:
    """The compute capability of the device of ``x``."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else CPU_CAPABILITY


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


def tiles(head_dim: int) -> Tiles:
    """The tiles for a head dim that is a multiple of 8 and at most 256."""
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(0, head_dim - first)
    second = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    if first == second:  # together the next power of two: one tile
        first, second = 2 * first, 0
    k = (first, second)
    # On Hopper P V costs less with 64 columns than with 32 + 16: a small wgmma is no cheaper to issue.
    v = (64, 0) if k == (32, 16) else k
    ones = sum(v) > head_dim
    return Tiles(k=k, v=v, k_columns=sum(k), v_columns=min(sum(v), -(-(head_dim + ones) // 16) * 16), ones=ones)


@dataclass(frozen=True)
class KernelConfig:
    """Queries and keys per tile, warps per program, stages of the software pipeline.

    ``polynomial``: compute one exp2 in eight by polynomial. For loops that exp2 limits, in fp16 and bf16.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    polynomial: bool = False

    @property
    def options(self) -> dict[str, object]:
        """Options of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **COMPILER}


# (columns of a packed K row, configuration): the first row with enough columns applies. The default runs on any GPU
# from compute capability 8.0 on: it fits 99 KB of shared memory and does not spill.
_DEFAULT = [
    (48, KernelConfig(128, 64, 8, 3)),  # 128 registers on sm_80: two programs per SM
    (80, KernelConfig(128, 64, 8, 2)),
    (160, KernelConfig(128, 32, 8, 2)),
    (256, KernelConfig(64, 32, 4, 2)),
]
_HOPPER = [
    (64, KernelConfig(128, 256, 8, 2, polynomial=True)),
    (160, KernelConfig(128, 128, 8, 2)),
    (256, KernelConfig(128, 64, 8, 2)),
]
_BLACKWELL = [(64, KernelConfig(128, 128, 8, 2)), *_DEFAULT]
_HALF = {90: _HOPPER, 100: _BLACKWELL, 103: _BLACKWELL}
# Exact fp32 products run on the FMA units, with operands in registers.
_FP32: list[tuple[int, KernelConfig]] = [(96, KernelConfig(32, 16, 4, 1)), (256, KernelConfig(16, 16, 8, 1))]


def attention_config(capability: tuple[int, int], head_dim: int, half: bool) -> KernelConfig:
    """For compute capability (major, minor); ``half``: fp16 or bf16. A GPU without a table gets the default."""
    table = _HALF.get(capability[0] * 10 + capability[1], _DEFAULT) if half else _FP32
    columns = tiles(head_dim).k_columns
    return next(config for limit, config in table if columns <= limit)


def has_tma(capability: tuple[int, int]) -> bool:
    """Whether the GPU copies tiles by descriptor (Tensor Memory Accelerator): from Hopper on."""
    return capability >= (9, 0)


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
