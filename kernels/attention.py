"""Flash-style attention over the packed coarse keys and values (see ``pack.py``).

Numerics: Q is never scaled in its own dtype (a rounded scaled Q breaks the error bound from a logit spread of 2 nats).
Scale, log2(e) and the running maximum go into one fused multiply-add of the fp32 product, ``s * slope - shift``. It
rounds once, and ``shift`` is rounded before it is used, everywhere the same: it is a factor common to a row's output
and to its sum, whatever its error. Where V has spare columns, one of them holds ones and its product with P is the
softmax's sum; elsewhere P is summed in fp32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .exp2 import exp2_mixed
from .launch import Settings, Tiles, has_copy_engine, settings, tiles
from .pack import pack

LOG2_E = 1.4426950408889634


@triton.jit
def _weights(s, shift, log2_scale, log2_power, STEEP: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """A tile of products (M, N) -> P (M, N), the new shift (M,), the factor (M,) that takes older sums to it."""
    top = tl.max(s, 1)
    if STEEP:  # s * log2_scale may leave fp32: slower, and the shift is the maximum of the bare product
        higher = tl.maximum(shift, top)
        shrink = tl.exp2((shift - higher) * log2_scale)
        x = (s - higher[:, None]) * log2_scale
    else:
        # A shift is rounded by half a unit in the last place, and that is how far x may be above 0: up to 8 below 2^28.
        # From there on P would not fit fp16, but there the next lower s weighs at most 2^-16 of the top one, and a
        # steeper slope changes nothing: the next power of two, whose products are exact.
        slope = tl.where(tl.abs(top * log2_scale) < 268435456.0, log2_scale, log2_power)
        higher = tl.maximum(shift, top * slope)
        shrink = tl.exp2(shift - higher)
        x = tl.fma(s, tl.broadcast_to(slope[:, None], s.shape), tl.broadcast_to(-higher[:, None], s.shape))
    return exp2_mixed(x) if POLYNOMIAL else tl.exp2(x), higher, shrink


@triton.jit
def _attend(
    q_a,  # [BLOCK_M, K_A]
    q_b,  # [BLOCK_M, K_B], where TWO_K
    k_a,  # [K_A, BLOCK_N]
    k_b,
    v_a,  # [BLOCK_N, V_A]
    v_b,  # [BLOCK_N, V_B], where TWO_V
    live,  # how many of the tile's keys count, where MASK
    log2_scale,
    log2_power,
    shift,
    total,
    acc_a,
    acc_b,
    TWO_K: tl.constexpr,
    TWO_V: tl.constexpr,
    ONES: tl.constexpr,
    MASK: tl.constexpr,
    STEEP: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
):
    """Take in one tile of keys: the shift, sum and outputs after it."""
    s = tl.dot(q_a, k_a, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if TWO_K:
        s = tl.dot(q_b, k_b, s, input_precision="ieee")
    p, shift, shrink = _weights(s, shift, log2_scale, log2_power, STEEP, POLYNOMIAL)
    if not ONES:
        if MASK:
            p = tl.where(tl.arange(0, p.shape[1])[None, :] < live, p, 0.0)
        total = total * shrink + tl.sum(p, 1)
    p = p.to(v_a.dtype)
    acc_a = tl.dot(p, v_a, acc_a * shrink[:, None], input_precision="ieee")
    if TWO_V:
        acc_b = tl.dot(p, v_b, acc_b * shrink[:, None], input_precision="ieee")
    return shift, total, acc_a, acc_b


@triton.jit
def _load_columns(rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """WIDTH columns from FIRST on of rows with COLUMNS of them: pointers (N, 1) -> (N, WIDTH), zeros past the end."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH <= COLUMNS:
        return tl.load(rows + column)
    return tl.load(rows + column, mask=column < COLUMNS, other=0.0)


@triton.jit
def _load_rows(
    packed_key,
    packed_value,
    row,  # [BLOCK_N], int64
    K_A: tl.constexpr,
    K_B: tl.constexpr,
    V_A: tl.constexpr,
    V_B: tl.constexpr,
    V_COLUMNS: tl.constexpr,
):
    """A tile of keys, transposed, and of values, each in its two parts, through pointers."""
    key = packed_key + row[None, :] * (K_A + K_B)
    k_a = tl.load(key + tl.arange(0, K_A)[:, None])
    k_b = tl.load(key + K_A + tl.arange(0, K_B)[:, None]) if K_B > 0 else k_a
    value = packed_value + row[:, None] * V_COLUMNS
    v_a = _load_columns(value, 0, V_A, V_COLUMNS)
    v_b = _load_columns(value, V_A, V_B, V_COLUMNS) if V_B > 0 else v_a
    return k_a, k_b, v_a, v_b


@triton.jit
def attention_kernel(
    query,  # (B, N, H, D), any strides
    key_a,  # descriptor of (B*H*rows, k_columns), box [BLOCK_N, K_A]
    key_b,  # the same, box [BLOCK_N, K_B]
    value_a,  # descriptor of (B*H*rows, v_columns), box [BLOCK_N, V_A]
    value_b,  # the same, box [BLOCK_N, V_B]
    packed_key,  # what the descriptors are of
    packed_value,
    out,  # (B, N, H, D), any strides
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_ob,
    stride_on,
    stride_oh,
    stride_od,
    heads,
    tokens,
    keys,
    rows,
    log2_scale,  # |scale| * log2(e); a negative scale has turned the sign of the packed keys
    log2_power,  # the power of two at or above log2_scale
    HEAD_DIM: tl.constexpr,
    K_A: tl.constexpr,
    K_B: tl.constexpr,
    V_A: tl.constexpr,
    V_B: tl.constexpr,
    V_COLUMNS: tl.constexpr,  # the length of a packed row of values
    ONES: tl.constexpr,
    TAIL: tl.constexpr,  # the last tile repeats a key, and no ones column leaves the copies out of the sum
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEEP: tl.constexpr,  # log2_scale is above 1
    POLYNOMIAL: tl.constexpr,  # one exp2 in eight by polynomial: fp16 and bf16 only
    COPY_ENGINE: tl.constexpr,  # the GPU reads tiles by descriptor
):
    blocks = tl.cdiv(tokens, BLOCK_M)
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token[:, None] < tokens
    token = token.to(tl.int64)[:, None]

    query += b * stride_qb + h * stride_qh + token * stride_qn
    offs_a = tl.arange(0, K_A)[None, :].to(tl.int64)
    q_a = tl.load(query + offs_a * stride_qd, mask=live & (offs_a < HEAD_DIM), other=0.0)  # [BLOCK_M, K_A]
    q_b = q_a
    if K_B > 0:
        offs_b = K_A + tl.arange(0, K_B)[None, :].to(tl.int64)
        q_b = tl.load(query + offs_b * stride_qd, mask=live & (offs_b < HEAD_DIM), other=0.0)  # [BLOCK_M, K_B]
    shift = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)  # finite: with a scale of 0, -inf would make NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, V_A], tl.float32)
    acc_b = tl.zeros([BLOCK_M, V_B if V_B > 0 else 1], tl.float32)

    whole = rows - BLOCK_N if TAIL else rows
    if TAIL:
        # First, so that the loop below needs no mask; a loop of one trip, so that the two share their shared memory;
        # through pointers, so that it waits for no barrier.
        tl.assume(whole < rows)
        for start in tl.range(whole, rows, BLOCK_N, num_stages=1):
            row = bh.to(tl.int64) * rows + start + tl.arange(0, BLOCK_N)
            k_a, k_b, v_a, v_b = _load_rows(packed_key, packed_value, row, K_A, K_B, V_A, V_B, V_COLUMNS)
            shift, total, acc_a, acc_b = _attend(
                q_a, q_b, k_a, k_b, v_a, v_b, keys - start, log2_scale, log2_power, shift, total,
                acc_a, acc_b, K_B > 0, V_B > 0, ONES, True, STEEP, POLYNOMIAL,
            )  # fmt: skip

    for start in range(0, whole, BLOCK_N):
        if COPY_ENGINE:
            row = bh * rows + start
            k_a = key_a.load([row, 0]).T
            k_b = key_b.load([row, K_A]).T if K_B > 0 else k_a
            v_a = value_a.load([row, 0])
            v_b = value_b.load([row, V_A]) if V_B > 0 else v_a
        else:
            # A descriptor would be read element by element; pointers are copied 16 bytes at a time.
            row = bh.to(tl.int64) * rows + start + tl.arange(0, BLOCK_N)
            k_a, k_b, v_a, v_b = _load_rows(packed_key, packed_value, row, K_A, K_B, V_A, V_B, V_COLUMNS)
        shift, total, acc_a, acc_b = _attend(
            q_a, q_b, k_a, k_b, v_a, v_b, BLOCK_N, log2_scale, log2_power, shift, total,
            acc_a, acc_b, K_B > 0, V_B > 0, ONES, False, STEEP, POLYNOMIAL,
        )  # fmt: skip

    offs_a = tl.arange(0, V_A)[None, :].to(tl.int64)
    offs_b = V_A + tl.arange(0, V_B)[None, :].to(tl.int64) if V_B > 0 else offs_a
    if ONES:
        total = tl.sum(tl.where(offs_a == HEAD_DIM, acc_a, 0.0), 1)
        if V_B > 0:
            total += tl.sum(tl.where(offs_b == HEAD_DIM, acc_b, 0.0), 1)
    out += b * stride_ob + h * stride_oh + token * stride_on
    dtype = out.dtype.element_ty
    tl.store(out + offs_a * stride_od, (acc_a / total[:, None]).to(dtype), mask=live & (offs_a < HEAD_DIM))
    if V_B > 0:
        tl.store(out + offs_b * stride_od, (acc_b / total[:, None]).to(dtype), mask=live & (offs_b < HEAD_DIM))


def constants(
    head_dim: int, tile: Tiles, run: Settings, copy_engine: bool, tail: bool, steep: bool = False
) -> dict[str, object]:
    """The compile-time arguments of :func:`attention_kernel`."""
    return {
        "HEAD_DIM": head_dim,
        "K_A": tile.k[0],
        "K_B": tile.k[1],
        "V_A": tile.v[0],
        "V_B": tile.v[1],
        "V_COLUMNS": tile.v_columns,
        "ONES": tile.ones,
        "TAIL": tail and not tile.ones,
        "BLOCK_M": run.block_m,
        "BLOCK_N": run.block_n,
        "STEEP": steep,
        "POLYNOMIAL": run.polynomial,
        "COPY_ENGINE": copy_engine,
    }


def log2_scales(scale: float) -> tuple[float, float]:
    """What the kernel multiplies scores by: |scale| * log2(e), and the power of two at or above it, or 0 and 0."""
    # As fp32 can hold it: infinity times a difference of 0 would be NaN, and what is below its normal numbers is 0.
    fp32 = torch.finfo(torch.float32)
    log2_scale = min(abs(scale) * LOG2_E, fp32.max)
    if log2_scale < fp32.tiny:
        return 0.0, 0.0
    return log2_scale, 2.0 ** min(127, math.ceil(math.log2(log2_scale)))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    mode: str,
    scale: float,
    run: Settings | None = None,
    tile: Tiles | None = None,
) -> torch.Tensor:
    """Launch both kernels: (B, N, H, D), (B, gh*gw, H, D), (B, gh*gw, H, D) -> (B, N, H, D), contiguous.

    The arguments were checked by ``todo_attn.ops``; head_dim is a multiple of 8 up to 256, dtype fp16, bf16 or fp32.
    ``run`` and ``tile`` are for trying others than ``launch.py`` chooses.
    """
    batch, tokens, heads, head_dim = query.shape
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    # The interpreter runs on CPU tensors; it takes any settings.
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (8, 0)
    run = run or settings(capability, head_dim, half=query.dtype != torch.float32)
    copy_engine = has_copy_engine(capability)
    tile = tile or tiles(head_dim)
    coarse = (grid[0] // factor[0], grid[1] // factor[1])
    keys = math.prod(coarse)
    rows = triton.cdiv(keys, run.block_n) * run.block_n
    log2_scale, log2_power = log2_scales(scale)

    with torch.cuda.device_of(query):
        packed_key, packed_value = pack(key, value, grid, coarse, mode, scale < 0, rows, tile)

        def box(x: torch.Tensor, columns: int) -> TensorDescriptor:
            return TensorDescriptor.from_tensor(x, [run.block_n, columns])

        attention_kernel[(triton.cdiv(tokens, run.block_m) * batch * heads,)](
            query,
            box(packed_key, tile.k[0]),
            box(packed_key, tile.k[1] or tile.k[0]),
            box(packed_value, tile.v[0]),
            box(packed_value, tile.v[1] or tile.v[0]),
            packed_key,
            packed_value,
            out,
            *query.stride(),
            *out.stride(),
            heads,
            tokens,
            keys,
            rows,
            log2_scale,
            log2_power,
            **constants(head_dim, tile, run, copy_engine, tail=rows > keys, steep=log2_scale > 1),
            **run.options,
        )
    return out
