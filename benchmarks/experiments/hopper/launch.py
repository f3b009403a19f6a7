"""How the kernel of ``kernel.py`` is launched: its configurations, and a function with the shipped one's signature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.experiments.hopper import step
from benchmarks.experiments.hopper.kernel import attention_kernel
from todo_attn.kernels.configs import COMPILER, Tiles, tiles
from todo_attn.kernels.launch import LOG2_E, log2_scales
from todo_attn.kernels.pack import Pack

ROWS: int = step.ROWS.value  # queries of a consumer
MAX_HEAD_DIM = 160
OPTIONS: dict[str, object] = {"num_warps": 4, **COMPILER}  # warps of the first consumer


@dataclass(frozen=True)
class Run:
    """Keys per tile, slots of the ring (a power of two), consumer warpgroups (2 or 3).

    ``ahead``: issue the next tile's products before this tile's exp2. ``halves``: issue half of P V before the exp2 of
    the other half. ``persistent``: one program for each SM, which takes block after block, and loads a block's keys
    while it still works on the one before.

    Raises:
        ValueError: a number that the kernel is not written for.
    """

    block_n: int
    stages: int
    consumers: int = 2
    ahead: bool = True
    halves: bool = True
    persistent: bool = True

    def __post_init__(self) -> None:
        if self.block_n not in (64, 128):
            raise ValueError(f"block_n must be 64 or 128, got {self.block_n}")
        if self.stages not in (2, 4, 8):
            raise ValueError(f"stages must be 2, 4 or 8, got {self.stages}")
        if self.consumers not in (2, 3):
            raise ValueError(f"consumers must be 2 or 3, got {self.consumers}")


@dataclass(frozen=True)
class Plan:
    """The compile-time argument of the kernel: of a head dim's :class:`Tiles` and of a :class:`Run` what it reads."""

    head_dim: int
    k_a: int
    k_b: int
    v_a: int
    v_b: int
    ones: bool
    polynomial: bool
    consumers: int
    block_n: int
    stages: int
    ahead: bool
    halves: bool


# (columns of a K tile, configuration): the first row whose columns suffice is taken.
_RUNS = [(64, Run(128, 4)), (MAX_HEAD_DIM, Run(64, 4))]


_NONE = {"ahead": False, "halves": False}
# Worth a measurement, by head dim, the chosen one first. Programs that differ in ``persistent`` alone share code.
RUNS: dict[int, list[Run]] = {
    40: [
        Run(128, 4),
        Run(128, 4, halves=False),
        Run(128, 4, **_NONE),
        Run(128, 4, persistent=False),
        Run(128, 4, 3, ahead=False),
        Run(128, 4, 3, **_NONE),
        Run(64, 4, 3),
    ],
    64: [Run(128, 4), Run(128, 4, halves=False), Run(128, 4, **_NONE), Run(128, 4, 3, ahead=False)],
    80: [Run(64, 4), Run(64, 4, **_NONE), Run(128, 2), Run(128, 2, **_NONE), Run(64, 4, 3, **_NONE)],
    160: [Run(64, 4), Run(64, 4, halves=False), Run(64, 4, **_NONE)],
}


def configuration(head_dim: int) -> Run:
    """The configuration of a head dim.

    Raises:
        ValueError: a head dim that the kernel does not take.
    """
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {head_dim}")
    return next(run for limit, run in _RUNS if tiles((9, 0), head_dim).k_columns <= limit)


def plan(head_dim: int, tile: Tiles, run: Run) -> Plan:
    """What the kernel is compiled for."""
    return Plan(
        head_dim,
        *tile.k,
        *tile.v,
        ones=tile.ones,
        polynomial=tile.k_columns <= 64,
        consumers=run.consumers,
        block_n=run.block_n,
        stages=run.stages,
        ahead=run.ahead,
        halves=run.halves,
    )


def layout(dtype: torch.dtype, run: Run, columns: int) -> gl.NVMMASharedLayout:
    """How a tile of keys or values lies in shared memory."""
    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([run.block_n, columns], kind)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    coarse: tuple[int, int],
    mode: str,
    scale: float,
    run: Run,
    processors: int,
) -> torch.Tensor:
    """Both kernels, whatever the device. ``processors``: how many SMs it has."""
    batch, tokens, heads, head_dim = query.shape
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    tile = tiles((9, 0), head_dim)
    keys = math.prod(coarse)
    rows = triton.cdiv(keys, run.block_n) * run.block_n
    work = triton.cdiv(tokens, run.consumers * ROWS) * batch * heads
    packed_key, packed_value = Pack(key, value, grid, coarse, mode, scale < 0, rows, tile)(key, value)

    def box(x: torch.Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, [run.block_n, columns], layout(x.dtype, run, columns))

    attention_kernel[(min(work, processors) if run.persistent else work,)](
        query,
        box(packed_key, tile.k[0]),
        box(packed_key, tile.k[1] or tile.k[0]),
        box(packed_value, tile.v[0]),
        box(packed_value, tile.v[1] or tile.v[0]),
        out,
        *query.stride(),
        *out.stride(),
        batch * heads,
        heads,
        tokens,
        keys,
        rows,
        *log2_scales(scale),
        PLAN=plan(head_dim, tile, run),
        **OPTIONS,
    )
    return out


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    coarse: tuple[int, int],
    mode: str,
    scale: float,
    run: Run | None = None,
) -> torch.Tensor:
    """Launch both kernels: (B, N, H, D), (B, gh*gw, H, D), (B, gh*gw, H, D) -> (B, N, H, D), contiguous.

    ``coarse``: the coarse grid. ``run``: None is the :func:`configuration` of the head dim. What the shipped kernel's
    callers check is not checked again.

    Raises:
        ValueError: a dtype, head dim, scale or device that this kernel does not take.
    """
    usual = configuration(query.shape[3])
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"query must be float16 or bfloat16, got {query.dtype}")
    if not abs(scale) * LOG2_E <= 1:  # products times it may leave fp32
        raise ValueError(f"scale must be from -log(2) to log(2) = 0.693, got {scale}")
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) != (9, 0):
        raise ValueError(f"query must be on a GPU of compute capability 9.0, got one on {query.device}")
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    with torch.cuda.device_of(query):
        return launch(query, key, value, grid, coarse, mode, scale, run or usual, processors)
