"""Copy the keys and values of the coarse grid into contiguous rows, once, for the attention kernel.

One program packs BLOCK coarse positions of one head::

    for i in BLOCK rows:
        y, x = position min(i, keys - 1) on the coarse grid
        k, v = K[source(y, x)], V[source(y, x)]            # MODE "mean": the average over the window
        packed_key[i] = k * sign                           # zeros from HEAD_DIM on
        packed_value[i] = (v, 1, zeros) if i < keys else zeros    # the 1 only with ONES

There are fewer coarse tokens than queries, by the square of the factor, so this copy is well under 1 % of the work. It
takes everything but the products out of the attention's main loop: the choice of tokens, pooling, padding of the head
dim, masks, and, with the column of ones, the row sum.

Rows beyond the last key repeat its key, so they leave the running maximum alone. Their values are zero, the ones column
included, so they add nothing to output or row sum. So the attention loop needs no mask.

==================  ===================  ============================================================
flag                set if               why
==================  ===================  ============================================================
ONES                V has a spare        see ``attention.py``
                    column
MODE                as the op's mode     "nearest", "nearest-exact" or "mean"
UNIT                see ``attention.py``
WINDOW_H, WINDOW_W  MODE is "mean"       longest pooling window: the bounds of the loop over a window
==================  ===================  ============================================================
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .configs import COMPILER, Tiles
from .plan import Launch

OPTIONS: dict[str, object] = {"num_warps": 4, **COMPILER}
STRIDES = ("stride_kb", "stride_kn", "stride_kh", "stride_vb", "stride_vn", "stride_vh")


@triton.jit
def _source_nearest(i, size, scale, EXACT: tl.constexpr):
    """The index that ``torch.nn.functional.interpolate`` reads for coarse position ``i``, in its float32 arithmetic."""
    position = i.to(tl.float32)
    if EXACT:
        position = position + 0.5
    return tl.minimum((position * scale).to(tl.int32), size - 1)


@triton.jit
def _load_token(x, y, column, width, stride_n, offs_d, stride_d, mask, UNIT: tl.constexpr):
    token = (y * width + column).to(tl.int64)[:, None]
    return tl.load(x + token * stride_n * UNIT + offs_d[None, :].to(tl.int64) * stride_d, mask=mask, other=0.0)


@triton.jit(do_not_specialize=[*STRIDES, "heads", "height", "width", "coarse_height", "coarse_width"])
def pack_kernel(
    key,  # (B, gh*gw, H, D), any strides, those of b, n and h in units of UNIT elements
    value,  # the same
    packed_key,  # (B*H*rows, K_COLUMNS)
    packed_value,  # (B*H*rows, V_COLUMNS)
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_vd,
    heads,
    rows,
    height,
    width,
    coarse_height,
    coarse_width,
    scale_y,  # height / coarse_height, as a float32
    scale_x,
    sign,  # -1.0 if the attention's scale is negative, because its row maximum is of the unscaled product
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    ONES: tl.constexpr,
    MODE: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(rows, BLOCK)
    bh = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_COLUMNS)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    key += (b * stride_kb + h * stride_kh) * UNIT
    value += (b * stride_vb + h * stride_vh) * UNIT

    keys = coarse_height * coarse_width
    position = tl.minimum(row, keys - 1)
    cy = position // coarse_width
    cx = position % coarse_width
    mask = (offs_d[None, :] < HEAD_DIM) & (row[:, None] < rows)

    if MODE == "mean":
        # Adaptive pooling windows: [floor(i * size / coarse), ceil((i + 1) * size / coarse)).
        y0 = cy * height // coarse_height
        x0 = cx * width // coarse_width
        y1 = ((cy + 1) * height + coarse_height - 1) // coarse_height
        x1 = ((cx + 1) * width + coarse_width - 1) // coarse_width
        k = tl.zeros([BLOCK, BLOCK_COLUMNS], tl.float32)
        v = tl.zeros([BLOCK, BLOCK_COLUMNS], tl.float32)
        for dy in range(WINDOW_H):
            for dx in range(WINDOW_W):
                inside = mask & (y0 + dy < y1)[:, None] & (x0 + dx < x1)[:, None]
                k += _load_token(key, y0 + dy, x0 + dx, width, stride_kn, offs_d, stride_kd, inside, UNIT).to(
                    tl.float32
                )
                v += _load_token(value, y0 + dy, x0 + dx, width, stride_vn, offs_d, stride_vd, inside, UNIT).to(
                    tl.float32
                )
        area = ((y1 - y0) * (x1 - x0)).to(tl.float32)[:, None]
        k = tl.div_rn(k, tl.broadcast_to(area, k.shape))
        v = tl.div_rn(v, tl.broadcast_to(area, v.shape))
    else:
        y = _source_nearest(cy, height, scale_y, MODE == "nearest-exact")
        x = _source_nearest(cx, width, scale_x, MODE == "nearest-exact")
        k = _load_token(key, y, x, width, stride_kn, offs_d, stride_kd, mask, UNIT)
        v = _load_token(value, y, x, width, stride_vn, offs_d, stride_vd, mask, UNIT)

    v = v.to(packed_value.dtype.element_ty)
    if ONES:
        v = tl.where(offs_d[None, :] == HEAD_DIM, 1.0, v).to(packed_value.dtype.element_ty)
    v = tl.where(row[:, None] < keys, v, 0.0).to(packed_value.dtype.element_ty)
    out_row = bh.to(tl.int64) * rows + row
    inside = row[:, None] < rows
    tl.store(
        packed_key + out_row[:, None] * K_COLUMNS + offs_d[None, :],
        (k * sign).to(packed_key.dtype.element_ty),
        mask=inside & (offs_d[None, :] < K_COLUMNS),
    )
    tl.store(
        packed_value + out_row[:, None] * V_COLUMNS + offs_d[None, :],
        v,
        mask=inside & (offs_d[None, :] < V_COLUMNS),
    )


def window(size: int, coarse: int) -> int:
    """The length of the longest adaptive pooling window along an axis."""
    return max(-(-(i + 1) * size // coarse) - i * size // coarse for i in range(coarse))


def strides(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """UNIT, and the strides of (B, N, H, D) tensors one after the other, those of b, n and h in units of it.

    Triton learns of an integer argument only whether it is a multiple of 16, and 40, the stride of a head of 40
    elements, is not. The product of the argument and UNIT is a multiple of 8 for certain, which makes 16 bytes. The
    stride along an axis of length 1 is never used and may be anything.
    """
    found = [
        (*(s if n > 1 else 0 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)), t.stride(3)) for t in tensors
    ]
    unit = 1 if any(s % 8 for *outer, _ in found for s in outer) else 8
    return unit, [s for *outer, inner in found for s in (*(s // unit for s in outer), inner)]


def constants(head_dim: int, tile: Tiles, mode: str, window_h: int = 1, window_w: int = 1) -> dict[str, Any]:
    """The compile-time arguments of :func:`pack_kernel`, but UNIT."""
    columns = triton.next_power_of_2(max(tile.k_columns, tile.v_columns))
    return {
        "HEAD_DIM": head_dim,
        "K_COLUMNS": tile.k_columns,
        "V_COLUMNS": tile.v_columns,
        "ONES": tile.ones,
        "MODE": mode,
        "WINDOW_H": window_h,
        "WINDOW_W": window_w,
        "BLOCK": 1024 // columns,  # 8 elements of K and of V per thread: 16 bytes
        "BLOCK_COLUMNS": columns,
    }


class Pack:
    """The launch of the packing kernel for keys and values of one layout.

    ``rows``: coarse tokens, rounded up to the attention kernel's BLOCK_N.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: tuple[int, int],
        coarse: tuple[int, int],
        mode: str,
        negative: bool,
        rows: int,
        tile: Tiles,
    ) -> None:
        batch, _, heads, head_dim = key.shape
        self._key_shape = (batch * heads * rows, tile.k_columns)
        self._value_shape = (batch * heads * rows, tile.v_columns)
        windows = [window(size, small) for size, small in zip(grid, coarse, strict=True)] if mode == "mean" else []
        constant = constants(head_dim, tile, mode, *windows)
        unit, stride = strides(key, value)
        scales = (grid[0] / coarse[0], grid[1] / coarse[1], -1.0 if negative else 1.0)
        self._launch = Launch(
            pack_kernel,
            triton.cdiv(rows, constant["BLOCK"]) * batch * heads,
            [*stride, heads, rows, *grid, *coarse, *scales],
            {"UNIT": unit, **constant},
            OPTIONS,
        )

    def __call__(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, gh*gw, H, D) keys and values -> (B*H*rows, k_columns) and (B*H*rows, v_columns), contiguous."""
        packed_key, packed_value = key.new_empty(self._key_shape), value.new_empty(self._value_shape)
        self._launch(key, value, packed_key, packed_value)
        return packed_key, packed_value
