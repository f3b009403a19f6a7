"""Flash-style attention over the packed coarse keys and values (``pack.py``).

One program computes BLOCK_M queries of one head::

    q = load(Q)
    row_max, row_sum, acc = lowest, 0, 0
    for k, v in tiles of BLOCK_N packed keys and values:
        qk = q @ k                                         # fp32
        new_max = max(row_max, max(qk) * slope)            # slope: log2_scale = |scale| * log2(e)
        alpha = exp2(row_max - new_max)
        p = exp2(qk * slope - new_max)
        row_sum = row_sum * alpha + sum(p)                 # unless ONES
        acc = acc * alpha + p @ v
        row_max = new_max
    store(acc / row_sum)

Q is never scaled in its own dtype: the rounding would break the error bound once logits spread over 2 nats. Slope and
running maximum go into one fused multiply-add of the fp32 product. It rounds once. ``row_max`` is rounded before use
and used rounded everywhere, so its error scales a row's output and its sum alike, and cancels.

=================  ======================================  ==========================================================
flag               set if                                  why
=================  ======================================  ==========================================================
K_B > 0, V_B > 0   head_dim fits two tiles better          a tile is a power of two: 40 is read as 32 + 16, not as 64
                                                           (TWO_K and TWO_V in ``_attend``)
ONES               V has a spare column                    it holds ones, so P @ V also computes the row sum
TAIL               the last tile is partial, without ONES  that tile is masked (MASK), ahead of a loop without masks
LARGE_SCALE        log2_scale > 1                          the scaled product could overflow fp32
POLYNOMIAL         exp2 limits the loop, fp16 or bf16      one exp2 in eight runs on the multiply-add units
USE_TMA            from Hopper on, fp16 or bf16            tiles are copied by descriptor
WARP_SPECIALIZE    on request                              see ``configs.py``
UNIT = 8, not 1    strides are multiples of 8 elements     the compiler sees that, and loads 16 bytes at a time
=================  ======================================  ==========================================================
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exp2 import exp2_mixed


@triton.jit
def _softmax_tile(qk, row_max, log2_scale, log2_power, LARGE_SCALE: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """QK^T (M, N) -> P (M, N), the new row maximum (M,), and alpha (M,), which rescales older sums to it."""
    tile_max = tl.max(qk, 1)
    if LARGE_SCALE:  # qk * log2_scale could overflow fp32, so row_max is of the unscaled product
        new_max = tl.maximum(row_max, tile_max)
        alpha = tl.exp2((row_max - new_max) * log2_scale)
        x = (qk - new_max[:, None]) * log2_scale
    else:
        # Rounding row_max can leave x above 0 by half a unit in its last place: by up to 8 while row_max is below 2^28.
        # Beyond, P would overflow fp16. But there the second largest qk weighs at most 2^-16 of the largest, so a
        # steeper slope gives the same P: the next power of two, whose products are exact.
        slope = tl.where(tl.abs(tile_max * log2_scale) < 268435456.0, log2_scale, log2_power)
        new_max = tl.maximum(row_max, tile_max * slope)
        alpha = tl.exp2(row_max - new_max)
        x = tl.fma(qk, tl.broadcast_to(slope[:, None], qk.shape), tl.broadcast_to(-new_max[:, None], qk.shape))
    return exp2_mixed(x) if POLYNOMIAL else tl.exp2(x), new_max, alpha


@triton.jit
def _attend(
    q_a,  # [BLOCK_M, K_A]
    q_b,  # [BLOCK_M, K_B], if TWO_K
    k_a,  # [K_A, BLOCK_N]
    k_b,
    v_a,  # [BLOCK_N, V_A]
    v_b,  # [BLOCK_N, V_B], if TWO_V
    valid_keys,  # of this tile, if MASK
    log2_scale,
    log2_power,
    row_max,
    row_sum,
    acc_a,
    acc_b,
    TWO_K: tl.constexpr,
    TWO_V: tl.constexpr,
    ONES: tl.constexpr,
    MASK: tl.constexpr,
    LARGE_SCALE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
):
    """Accumulate one tile of keys; returns the updated row maximum, row sum and accumulators."""
    qk = tl.dot(q_a, k_a, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if TWO_K:
        qk = tl.dot(q_b, k_b, qk, input_precision="ieee")
    p, row_max, alpha = _softmax_tile(qk, row_max, log2_scale, log2_power, LARGE_SCALE, POLYNOMIAL)
    if not ONES:
        if MASK:
            p = tl.where(tl.arange(0, p.shape[1])[None, :] < valid_keys, p, 0.0)
        row_sum = row_sum * alpha + tl.sum(p, 1)
    p = p.to(v_a.dtype)
    acc_a = tl.dot(p, v_a, acc_a * alpha[:, None], input_precision="ieee")
    if TWO_V:
        acc_b = tl.dot(p, v_b, acc_b * alpha[:, None], input_precision="ieee")
    return row_max, row_sum, acc_a, acc_b


@triton.jit
def _load_columns(rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of rows COLUMNS long: pointers (N, 1) -> (N, WIDTH), zero beyond the row."""
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
    """Load a tile of keys, transposed, and of values through pointers, each as its two column tiles."""
    key = packed_key + row[None, :] * (K_A + K_B)
    k_a = tl.load(key + tl.arange(0, K_A)[:, None])
    k_b = tl.load(key + K_A + tl.arange(0, K_B)[:, None]) if K_B > 0 else k_a
    value = packed_value + row[:, None] * V_COLUMNS
    v_a = _load_columns(value, 0, V_A, V_COLUMNS)
    v_b = _load_columns(value, V_A, V_B, V_COLUMNS) if V_B > 0 else v_a
    return k_a, k_b, v_a, v_b


@triton.jit(do_not_specialize=["stride_qb", "stride_qn", "stride_qh", "heads", "tokens", "keys"])
def attention_kernel(
    query,  # (B, N, H, D), any strides, those of b, n and h in units of UNIT elements
    key_a,  # descriptor of packed_key, block [BLOCK_N, K_A]; None without USE_TMA
    key_b,  # the same, block [BLOCK_N, K_B]; None if K_B is 0 as well
    value_a,  # descriptor of packed_value, block [BLOCK_N, V_A]; None likewise
    value_b,  # the same, block [BLOCK_N, V_B]; None likewise
    packed_key,  # (B*H*rows, K_A + K_B)
    packed_value,  # (B*H*rows, V_COLUMNS)
    out,  # (B, N, H, D), contiguous
    lse,  # (B, H, N) fp32: the log-sum-exp of each row, in units of log2; None if no backward will need it
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    heads,
    tokens,
    keys,
    rows,  # keys, rounded up to BLOCK_N
    log2_scale,  # |scale| * log2(e); for a negative scale the packed keys are negated
    log2_power,  # the smallest power of two that is at least log2_scale
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_A: tl.constexpr,
    K_B: tl.constexpr,
    V_A: tl.constexpr,
    V_B: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    ONES: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LARGE_SCALE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    USE_TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_M)
    bh = tl.program_id(0) // blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    valid = token < tokens

    query += (b * stride_qb + h * stride_qh + token.to(tl.int64) * stride_qn) * UNIT
    offs_a = tl.arange(0, K_A)[None, :].to(tl.int64)
    q_a = tl.load(query + offs_a * stride_qd, mask=valid & (offs_a < HEAD_DIM), other=0.0)  # [BLOCK_M, K_A]
    q_b = q_a
    if K_B > 0:
        offs_b = K_A + tl.arange(0, K_B)[None, :].to(tl.int64)
        q_b = tl.load(query + offs_b * stride_qd, mask=valid & (offs_b < HEAD_DIM), other=0.0)  # [BLOCK_M, K_B]
    row_max = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)  # finite: with a scale of 0, -inf would give NaN
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, V_A], tl.float32)
    acc_b = tl.zeros([BLOCK_M, V_B if V_B > 0 else 1], tl.float32)

    full_rows = rows - BLOCK_N if TAIL else rows  # of tiles without a repeated key
    if TAIL:
        # A loop of one iteration, so that the compiler gives both loops the same shared memory. It comes first, so that
        # the main loop has no mask, and reads through pointers, so that it waits at no barrier.
        tl.assume(full_rows < rows)
        for start in tl.range(full_rows, rows, BLOCK_N, num_stages=1):
            row = bh.to(tl.int64) * rows + start + tl.arange(0, BLOCK_N)
            k_a, k_b, v_a, v_b = _load_rows(packed_key, packed_value, row, K_A, K_B, V_A, V_B, V_COLUMNS)
            row_max, row_sum, acc_a, acc_b = _attend(
                q_a, q_b, k_a, k_b, v_a, v_b, keys - start, log2_scale, log2_power, row_max, row_sum,
                acc_a, acc_b, K_B > 0, V_B > 0, ONES, True, LARGE_SCALE, POLYNOMIAL,
            )  # fmt: skip

    for start in tl.range(0, full_rows, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        if USE_TMA:
            row = bh * rows + start
            k_a = key_a.load([row, 0]).T
            k_b = key_b.load([row, K_A]).T if K_B > 0 else k_a
            v_a = value_a.load([row, 0])
            v_b = value_b.load([row, V_A]) if V_B > 0 else v_a
        else:
            # Without TMA a descriptor is read element by element, pointers 16 bytes at a time.
            row = bh.to(tl.int64) * rows + start + tl.arange(0, BLOCK_N)
            k_a, k_b, v_a, v_b = _load_rows(packed_key, packed_value, row, K_A, K_B, V_A, V_B, V_COLUMNS)
        row_max, row_sum, acc_a, acc_b = _attend(
            q_a, q_b, k_a, k_b, v_a, v_b, BLOCK_N, log2_scale, log2_power, row_max, row_sum,
            acc_a, acc_b, K_B > 0, V_B > 0, ONES, False, LARGE_SCALE, POLYNOMIAL,
        )  # fmt: skip

    offs_a = tl.arange(0, V_A)[None, :].to(tl.int64)
    offs_b = V_A + tl.arange(0, V_B)[None, :].to(tl.int64) if V_B > 0 else offs_a
    if ONES:
        row_sum = tl.sum(tl.where(offs_a == HEAD_DIM, acc_a, 0.0), 1)
        if V_B > 0:
            row_sum += tl.sum(tl.where(offs_b == HEAD_DIM, acc_b, 0.0), 1)
    out += (b * tokens * heads + h) * HEAD_DIM + token.to(tl.int64) * (heads * HEAD_DIM)
    dtype = out.dtype.element_ty
    tl.store(out + offs_a, (acc_a / row_sum[:, None]).to(dtype), mask=valid & (offs_a < HEAD_DIM))
    if V_B > 0:
        tl.store(out + offs_b, (acc_b / row_sum[:, None]).to(dtype), mask=valid & (offs_b < HEAD_DIM))
    if lse is not None:
        row_max = row_max * log2_scale if LARGE_SCALE else row_max
        offs_m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(lse + bh.to(tl.int64) * tokens + offs_m, row_max + tl.log2(row_sum), mask=offs_m < tokens)
