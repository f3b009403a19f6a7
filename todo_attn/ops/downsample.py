"""Downsample tokens to a coarser grid, in plain torch: every device, dtype and tracer, with torch's autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..config.modes import check_mode
from . import checks


def _float32(x: float) -> float:
    """Round ``x`` to float32 by arithmetic alone, which every tracer can follow (Dekker's splitting, 24 of 53 bits)."""
    shifted = x * 536870913.0  # 2^29 + 1
    return shifted - (shifted - x)


def _source_index(size: int, coarse: int, exact: bool, device: torch.device) -> torch.Tensor:
    """The positions that ``interpolate`` picks along an axis of ``size``: (coarse,) int64."""
    position = torch.arange(coarse, dtype=torch.float32, device=device)
    position = (position + 0.5 if exact else position) * _float32(size / coarse)
    return position.long().clamp_(max=size - 1)


def coarse_tokens(x: torch.Tensor, grid: tuple[int, int], coarse: tuple[int, int], mode: str) -> torch.Tensor:
    """:func:`downsample_tokens` to the grid ``coarse``, unchecked; ``x`` may have any dimensions after (B, gh*gw)."""
    (gh, gw), (ch, cw) = grid, coarse
    if gh == ch and gw == cw:
        return x
    fh, fw = gh // ch, gw // cw
    divisible = gh == fh * ch and gw == fw * cw
    if mode == "mean":
        if divisible:
            return x.unflatten(1, (ch, fh, cw, fw)).mean((2, 4)).flatten(1, 2)
        image = x.flatten(2).transpose(1, 2).unflatten(2, (gh, gw))
        return F.adaptive_avg_pool2d(image, (ch, cw)).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
    exact = mode == "nearest-exact"
    if divisible:
        # The scale is an integer, so a strided view replaces the index.
        y, x_ = (fh // 2, fw // 2) if exact else (0, 0)
        return x.unflatten(1, (gh, gw))[:, y::fh, x_::fw].flatten(1, 2)
    rows = _source_index(gh, ch, exact, x.device)
    columns = _source_index(gw, cw, exact, x.device)
    return x.index_select(1, (rows[:, None] * gw + columns).flatten())


def downsample_tokens(
    x: torch.Tensor, grid: tuple[int, int], factor: float | tuple[float, float] = 1, *, mode: str = "nearest"
) -> torch.Tensor:
    """Downsample tokens to a coarser grid (ToDo, arXiv 2402.13573, section 3.2).

    Commutes with a linear layer: exactly for the nearest modes, up to rounding for "mean". So tokens may be downsampled
    before ``to_k`` and ``to_v``, which then project only the coarse ones.

    Args:
        x: (B, gh*gw, C) tokens, row-major; fp32, fp16, bf16 or fp64; any strides and device.
        grid: (gh, gw), height and width in tokens.
        factor: tokens per coarse token along each axis, a number of at least 1 or (fh, fw). The coarse grid is
            (gh / fh, gw / fw), rounded down: with 1.5, (96, 96) becomes (64, 64).
        mode: "nearest", "nearest-exact" or "mean": as ``torch.nn.functional.interpolate`` resizes to the coarse
            grid in float32 ("mean" is its "area", and may be called so).

    Returns:
        (B, M, C), M tokens of the coarse grid. ``x`` itself if that is the whole grid, as with factor 1; otherwise a
        new tensor. Differentiable.

    Raises:
        ArgumentError: a shape, dtype, grid, factor or mode that does not fit, naming the argument.
    """
    checks.tokens("x", x)
    grid = checks.grid(grid, x.shape[1], "x")
    return coarse_tokens(x, grid, checks.coarse_grid(factor, grid), check_mode(mode))
