"""The oracle: every op of :mod:`todo_attn.ops` in plain torch, with the same arguments.

Nothing here is fast and nothing here is clever. Tests hand it float64 tensors and hold the kernels against the answer.
It shares no code with the ops: the coarse grid is taken by ``torch.nn.functional.interpolate`` itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_INTERPOLATE_MODE = {"nearest": "nearest", "nearest-exact": "nearest-exact", "mean": "area"}


def downsample_tokens(
    x: torch.Tensor, grid: tuple[int, int], factor: int | tuple[int, int] = 1, *, mode: str = "nearest"
) -> torch.Tensor:
    """Tokens of the coarser grid: ``x`` (B, gh*gw, C) -> (B, (gh // fh) * (gw // fw), C).

    The nearest modes look up which token ``interpolate`` picks (its scale is a float32 whatever the dtype of ``x``) by
    interpolating the float32 token numbers; "mean" is ``interpolate(mode="area")``. ToDo, section 3.2.
    """
    gh, gw = grid
    fh, fw = (factor, factor) if isinstance(factor, int) else factor
    size = (gh // fh, gw // fw)
    if mode == "mean":
        image = x.transpose(1, 2).unflatten(2, (gh, gw))
        return F.interpolate(image, size=size, mode="area").flatten(2).transpose(1, 2)
    # One axis at a time: row and column numbers stay far below 2^24, where float32 counts exactly.
    rows = torch.arange(gh, dtype=torch.float32).view(1, 1, gh, 1)
    columns = torch.arange(gw, dtype=torch.float32).view(1, 1, 1, gw)
    row = F.interpolate(rows, size=(size[0], 1), mode=_INTERPOLATE_MODE[mode]).long().view(-1, 1)
    column = F.interpolate(columns, size=(1, size[1]), mode=_INTERPOLATE_MODE[mode]).long().view(1, -1)
    return x[:, (row * gw + column).flatten().to(x.device)]


def downsampled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    factor: int | tuple[int, int] = 1,
    *,
    mode: str = "nearest",
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(Q K'^T * scale) V' with K', V' on the coarser grid, all N x M scores in memory.

    ``query`` (B, N, H, D), ``key`` and ``value`` (B, gh*gw, H, D) -> (B, N, H, D). ToDo, equation 2.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (
        downsample_tokens(t.flatten(2), grid, factor, mode=mode).unflatten(2, t.shape[2:]) for t in (key, value)
    )
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), value)
