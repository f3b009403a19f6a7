"""The most similar key of each query by cosine similarity, in one pass over the keys: no scores in memory.

``rows_kernel`` gathers the rows of both indices into contiguous memory. ``match_kernel`` is a matrix product whose
scores are reduced at once. One program serves BLOCK_M queries::

    best, best_at = -inf, 0
    for k in tiles of BLOCK_N keys:
        score = q @ k                                      # in steps of BLOCK_C channels, fp32; one loop with that of k
        score = score * (1 / |k|)
        high, at = max(score), its position                # of equal scores the lowest position
        best, best_at = (high, at) if high > best else (best, best_at)
    similarity, position = best * (1 / |q|), best_at

Lengths are divided out of the fp32 scores, so the products are those of the raw fp16 or bf16 values, which are exact in
fp32; only their sum rounds. Every score is computed by the same instructions in the same order, wherever it lies in a
tile. So equal keys have equal scores, and ties go to the lowest position, within a tile and across tiles. Rows beyond
the last key repeat it: they tie with it and lose, so the loop needs no mask.

=======  ====================  ===============================================================================
flag     set if                why
=======  ====================  ===============================================================================
RESCALE  bf16 or fp32          each row is multiplied by a power of two that takes its largest element near 1,
                               exactly, so that squares fit fp32; fp16 needs none
=======  ====================  ===============================================================================
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import COMPILER, KernelConfig
from .plan import Launch, layout, planned
from .tuned import match_config

OPTIONS: dict[str, object] = {"num_warps": 4, **COMPILER}


@triton.jit
def rows_kernel(
    x,  # (B, N, C), any strides
    query_index,  # (B, Q) int32 or int64, any strides
    key_index,  # (B, K) likewise
    packed,  # (B*rows, COLUMNS); of each sample first the queries, then the keys: rows = query_rows + key_rows
    reciprocal,  # (B*rows,) fp32: 1 / length of the packed row, 0 for a row of zeros
    stride_xb,
    stride_xn,
    stride_xc,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_kn,
    tokens,
    queries,
    keys,
    query_rows,  # queries, rounded up to the match kernel's BLOCK_M
    key_rows,  # keys, rounded up to its BLOCK_N
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = query_rows + key_rows
    blocks = tl.cdiv(rows, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_COLUMNS)[None, :].to(tl.int64)
    is_query = row < query_rows
    entry = tl.minimum(tl.where(is_query, row, row - query_rows), tl.where(is_query, queries, keys) - 1).to(tl.int64)
    token = tl.load(query_index + b * stride_qb + entry * stride_qn, mask=is_query, other=0).to(tl.int64)
    token += tl.load(key_index + b * stride_kb + entry * stride_kn, mask=~is_query, other=0).to(tl.int64)
    token = token[:, None]
    inside = (token >= 0) & (token < tokens) & (channel < CHANNELS)
    value = tl.load(x + b * stride_xb + token * stride_xn + channel * stride_xc, mask=inside, other=0.0).to(tl.float32)
    if RESCALE:
        # 254 minus the exponent of the largest element is the exponent of the power of two that takes it to 1.
        largest = tl.max(tl.abs(value), 1).to(tl.int32, bitcast=True) & 0x7F800000
        largest = tl.minimum(tl.maximum(largest, 1 << 23), 253 << 23)
        value = value * ((254 << 23) - largest).to(tl.float32, bitcast=True)[:, None]
    square = tl.sum(value * value, 1)
    one = tl.full([BLOCK], 1.0, tl.float32)
    length = tl.where(square > 0, tl.sqrt_rn(square), one)
    live = row < rows
    out_row = b * rows + row
    tl.store(reciprocal + out_row, tl.where(square > 0, tl.div_rn(one, length), square), mask=live)
    tl.store(
        packed + out_row[:, None] * COLUMNS + channel,
        value.to(packed.dtype.element_ty),
        mask=live[:, None] & (channel < COLUMNS),
    )


@triton.jit
def match_kernel(
    packed,  # (B*rows, COLUMNS), from rows_kernel
    reciprocal,  # (B*rows,) fp32
    position,  # (B, Q) int64, contiguous
    similarity,  # (B, Q) fp32, contiguous
    queries,
    keys,
    query_rows,
    key_rows,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = query_rows // BLOCK_M
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    query_row = b * (query_rows + key_rows) + row
    key_row = b * (query_rows + key_rows) + query_rows + offs_n
    query = packed + query_row[:, None] * COLUMNS + offs_c[None, :]
    key = packed + key_row[None, :] * COLUMNS + offs_c[:, None]
    key_reciprocal = reciprocal + key_row
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK_M], tl.int32)
    score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # One loop over tiles of keys and steps of channels: two loops would empty their pipeline of loads at every tile.
    STEPS: tl.constexpr = COLUMNS // BLOCK_C
    for step in range(0, key_rows // BLOCK_N * STEPS):
        start = step // STEPS * BLOCK_N
        c = step % STEPS * BLOCK_C
        k = tl.load(key + start.to(tl.int64) * COLUMNS + c)
        score = tl.dot(tl.load(query + c), k, score, input_precision="ieee")
        if c == COLUMNS - BLOCK_C:
            score = score * tl.load(key_reciprocal + start)[None, :]
            high, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
            higher = high > best
            best = tl.where(higher, high, best)
            best_at = tl.where(higher, start + at, best_at)
            score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    best = best * tl.load(reciprocal + query_row)
    out = b * queries + row
    # If a NaN won, best_at may be that of a repeated key.
    tl.store(position + out, tl.minimum(best_at, keys - 1).to(tl.int64), mask=row < queries)
    tl.store(similarity + out, best, mask=row < queries)


def columns(channels: int, half: bool) -> tuple[int, int]:
    """The length of a packed row and BLOCK_C, both in elements. BLOCK_C is 128 bytes, or less for fewer channels.

    Rows are padded with zeros to a multiple of BLOCK_C, so the main loop needs no mask.
    """
    block_c = min(64 if half else 32, max(16, triton.next_power_of_2(channels)))
    return triton.cdiv(channels, block_c) * block_c, block_c


def rows_constants(channels: int, half: bool, rescale: bool) -> dict[str, int | bool]:
    """The compile-time arguments of :func:`rows_kernel`."""
    length, _ = columns(channels, half)
    width = triton.next_power_of_2(length)
    return {
        "CHANNELS": channels,
        "COLUMNS": length,
        "RESCALE": rescale,
        "BLOCK": max(1, 2048 // width),  # 16 elements per thread
        "BLOCK_COLUMNS": width,
    }


def match_constants(channels: int, half: bool, config: KernelConfig) -> dict[str, int]:
    """The compile-time arguments of :func:`match_kernel`."""
    length, block_c = columns(channels, half)
    return {"COLUMNS": length, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_C": block_c}


class _Plan:
    """Both launches of :func:`match`, for tensors of one layout."""

    def __init__(
        self, x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor, config: KernelConfig
    ) -> None:
        (batch, tokens, channels), queries, keys = x.shape, query_index.shape[1], key_index.shape[1]
        half = x.dtype != torch.float32
        query_rows = triton.cdiv(queries, config.block_m) * config.block_m
        key_rows = triton.cdiv(keys, config.block_n) * config.block_n
        counts = [queries, keys, query_rows, key_rows]
        constants = rows_constants(channels, half, rescale=x.dtype != torch.float16)
        self.packed_shape = (batch * (query_rows + key_rows), constants["COLUMNS"])
        self.pack = Launch(
            rows_kernel,
            triton.cdiv(query_rows + key_rows, constants["BLOCK"]) * batch,
            [*x.stride(), *query_index.stride(), *key_index.stride(), tokens, *counts],
            constants,
            OPTIONS,
        )
        self.match = Launch(
            match_kernel,
            query_rows // config.block_m * batch,
            counts,
            match_constants(channels, half, config),
            config.options,
        )


def match(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor, config: KernelConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch both kernels: (B, N, C), (B, Q), (B, K) -> position (B, Q) int64, similarity (B, Q) fp32.

    ``todo_attn.ops`` has checked the arguments; dtype fp16, bf16 or fp32. ``config`` overrides the choice of
    ``tuned.py`` and ``configs.py``.
    """
    position = torch.empty_like(query_index, dtype=torch.int64, memory_format=torch.contiguous_format)
    similarity = torch.empty_like(position, dtype=torch.float32)
    if position.numel() == 0:
        return position, similarity
    config = config or match_config(x)
    layouts = layout(x), layout(query_index), layout(key_index)
    with torch.cuda.device_of(x):
        plan = planned((layouts, config), lambda: _Plan(x, query_index, key_index, config))
        packed = x.new_empty(plan.packed_shape)
        reciprocal = x.new_empty(plan.packed_shape[:1], dtype=torch.float32)
        plan.pack(x, query_index, key_index, packed, reciprocal)
        plan.match(packed, reciprocal, position, similarity)
    return position, similarity
