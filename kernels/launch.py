"""Launch the two kernels: ``pack.py`` copies the coarse keys and values, ``attention.py`` attends to them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention import attention_kernel
from .configs import KernelConfig, Tiles, attention_config, capability, has_tma, tiles
from .pack import pack, strides

LOG2_E = 1.4426950408889634


class Packed(NamedTuple):
    """Keys and values as :func:`attend` reads them, and the configuration and GPU that they are packed for."""

    key: torch.Tensor  # (B*H*rows, k_columns)
    value: torch.Tensor  # (B*H*rows, v_columns)
    keys: int  # of one head; rows is this, rounded up to the tile of keys
    config: KernelConfig
    tile: Tiles
    use_tma: bool


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    mode: str,
    scale: float,
    config: KernelConfig | None = None,
    tile: Tiles | None = None,
) -> torch.Tensor:
    """(B, N, H, D), (B, gh*gw, H, D), (B, gh*gw, H, D) -> (B, N, H, D), contiguous.

    ``todo_attn.ops`` has checked the arguments; head_dim is a multiple of 8 up to 256, dtype fp16, bf16 or fp32.
    ``config`` and ``tile`` override the choice of ``configs.py``.
    """
    if query.numel() == 0:
        return query.new_empty(query.shape)
    coarse = (grid[0] // factor[0], grid[1] // factor[1])
    with torch.cuda.device_of(query):
        return attend(query, packed(key, value, grid, coarse, mode, scale < 0, config, tile), scale)


def packed(
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    coarse: tuple[int, int],
    mode: str = "nearest",
    negative: bool = False,
    config: KernelConfig | None = None,
    tile: Tiles | None = None,
) -> Packed:
    """Launch the packing kernel, on the current device; ``negative`` negates the keys, for a negative scale."""
    head_dim = key.shape[3]
    gpu = capability(key)
    half = key.dtype != torch.float32
    config = config or attention_config(gpu, head_dim, half)
    tile = tile or tiles(gpu, head_dim)
    keys = math.prod(coarse)
    rows = triton.cdiv(keys, config.block_n) * config.block_n
    return Packed(*pack(key, value, grid, coarse, mode, negative, rows, tile), keys, config, tile, has_tma(gpu, half))


def attend(query: torch.Tensor, kv: Packed, scale: float) -> torch.Tensor:
    """Launch the attention kernel, on the current device: (B, N, H, D) -> (B, N, H, D), contiguous."""
    batch, tokens, heads, head_dim = query.shape
    config, tile = kv.config, kv.tile
    rows = kv.key.shape[0] // (batch * heads)
    out = query.new_empty(query.shape)
    unit, stride = strides(query)
    log2_scale, log2_power = log2_scales(scale)

    def descriptor(x: torch.Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, [config.block_n, columns])

    attention_kernel[(triton.cdiv(tokens, config.block_m) * batch * heads,)](
        query,
        descriptor(kv.key, tile.k[0]),
        descriptor(kv.key, tile.k[1] or tile.k[0]),
        descriptor(kv.value, tile.v[0]),
        descriptor(kv.value, tile.v[1] or tile.v[0]),
        kv.key,
        kv.value,
        out,
        *stride,
        heads,
        tokens,
        kv.keys,
        rows,
        log2_scale,
        log2_power,
        UNIT=unit,
        **constants(head_dim, tile, config, kv.use_tma, rows > kv.keys, log2_scale > 1),
        **config.options,
    )
    return out


def constants(
    head_dim: int, tile: Tiles, config: KernelConfig, use_tma: bool, tail: bool, large_scale: bool = False
) -> dict[str, object]:
    """The compile-time arguments of :func:`attention_kernel`, but UNIT."""
    return {
        "HEAD_DIM": head_dim,
        "K_A": tile.k[0],
        "K_B": tile.k[1],
        "V_A": tile.v[0],
        "V_B": tile.v[1],
        "V_COLUMNS": tile.v_columns,
        "ONES": tile.ones,
        "TAIL": tail and not tile.ones,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "LARGE_SCALE": large_scale,
        "POLYNOMIAL": config.polynomial,
        "USE_TMA": use_tma,
        "WARP_SPECIALIZE": config.warp_specialize,
    }


def log2_scales(scale: float) -> tuple[float, float]:
    """|scale| * log2(e) and the smallest power of two that is at least that; both 0 for a scale of about 0."""
    # Clamped to fp32: infinity times a difference of 0 would be NaN, and subnormal numbers may be flushed to 0.
    fp32 = torch.finfo(torch.float32)
    log2_scale = min(abs(scale) * LOG2_E, fp32.max)
    if log2_scale < fp32.tiny:
        return 0.0, 0.0
    return log2_scale, 2.0 ** min(127, math.ceil(math.log2(log2_scale)))
