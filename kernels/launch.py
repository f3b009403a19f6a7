"""Launch the two kernels: ``pack.py`` copies the coarse keys and values, ``attention.py`` attends to them."""

from __future__ import annotations

import math

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention import attention_kernel
from .configs import KernelConfig, Tiles, capability, has_tma, tiles
from .pack import Pack, strides
from .plan import Launch, layout, planned
from .tuned import attention_config

LOG2_E = 1.4426950408889634


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    coarse: tuple[int, int],
    mode: str,
    scale: float,
    config: KernelConfig | None = None,
    tile: Tiles | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, N, H, D), (B, gh*gw, H, D), (B, gh*gw, H, D) -> (B, N, H, D), contiguous.

    ``todo_attn.ops`` has checked the arguments; head_dim is a multiple of 8 up to 256, dtype fp16, bf16 or fp32.
    ``coarse``: height and width of the coarse grid. ``config`` and ``tile`` override the choice of ``tuned.py`` and
    ``configs.py``. ``lse``: (B, H, N) fp32, contiguous; the log-sum-exp of the scaled scores, in units of log2, is
    written there.
    """
    if query.numel() == 0:
        return query.new_empty(query.shape)
    settings = settings_for(query, config, tile)
    layouts = layout(query), layout(key), layout(value)
    with torch.cuda.device_of(query):
        plan = planned(
            (layouts, grid, coarse, mode, scale, settings, lse is None),
            lambda: Plan(query, key, value, grid, coarse, mode, scale, *settings),
        )
        return plan.attend(query, *plan.pack(key, value), lse)


def settings_for(
    x: torch.Tensor, config: KernelConfig | None = None, tile: Tiles | None = None
) -> tuple[KernelConfig, Tiles, bool]:
    """``config`` and ``tile``, or else what suits tensors like ``x``; whether to use TMA."""
    gpu, half = capability(x), x.dtype != torch.float32
    return config or attention_config(x), tile or tiles(gpu, x.shape[3]), has_tma(gpu, half)


class Plan:
    """Both launches of :func:`attention`, for tensors of one layout."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: tuple[int, int],
        coarse: tuple[int, int],
        mode: str,
        scale: float,
        config: KernelConfig,
        tile: Tiles,
        use_tma: bool,
    ) -> None:
        keys = math.prod(coarse)
        self.pack = Pack(key, value, grid, coarse, mode, scale < 0, rows_of(keys, config), tile)
        self.attend = Attend(query, keys, config, tile, use_tma, scale)


def rows_of(keys: int, config: KernelConfig) -> int:
    """``keys``, rounded up to the tile of keys."""
    return triton.cdiv(keys, config.block_n) * config.block_n


class Attend:
    """The launch of the attention kernel for queries of one layout."""

    def __init__(
        self, query: torch.Tensor, keys: int, config: KernelConfig, tile: Tiles, use_tma: bool, scale: float
    ) -> None:
        batch, tokens, heads, head_dim = query.shape
        rows = rows_of(keys, config)
        unit, stride = strides(query)
        log2_scale, log2_power = log2_scales(scale)
        # The blocks of the four descriptors; None if there is none: without TMA, or without a second column tile.
        self._blocks = [[config.block_n, columns] if use_tma and columns else None for columns in (*tile.k, *tile.v)]
        self._launch = Launch(
            attention_kernel,
            triton.cdiv(tokens, config.block_m) * batch * heads,
            [*stride, heads, tokens, keys, rows, log2_scale, log2_power],
            {"UNIT": unit, **constants(head_dim, tile, config, use_tma, rows > keys, log2_scale > 1)},
            config.options,
        )

    def __call__(
        self,
        query: torch.Tensor,
        packed_key: torch.Tensor,
        packed_value: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        described = zip((packed_key, packed_key, packed_value, packed_value), self._blocks, strict=True)
        descriptors = [TensorDescriptor.from_tensor(x, block) if block else None for x, block in described]
        self._launch(query, *descriptors, packed_key, packed_value, out, lse)
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
