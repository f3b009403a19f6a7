"""The backward of ``attention.py``: two kernels over packed coarse keys and values (``pack.py``).

Neither has P in memory. Both recompute it from the log-sum-exp that the forward wrote, in units of log2::

    p = exp2(q @ k * log2_scale - lse)
    ds = p * (g @ v - delta)                               # g: gradient of the output; delta = sum(g * out) of a row
    grad_q = scale * ds @ k;  grad_k = scale * ds.T @ q;  grad_v = p.T @ g

``query_grad_kernel`` has a program for BLOCK_M queries of a head, which loops over all keys. It also computes ``delta``
and writes it. ``key_grad_kernel`` runs after it, with a program for BLOCK_N keys of a head, which loops over all
queries. No two programs write to the same place, so there are no atomics and a run repeats bit for bit.

The head dim is split into tiles of D_A and D_B columns, as in ``attention.py``; D_B may be 0. Queries beyond the last
are read as zeros, with a log-sum-exp, delta and gradient of zero, so they add nothing to the gradient of a key. Packed
rows beyond the last key repeat it; TAIL masks them for the gradient of a query, and nothing is stored for them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .configs import BackwardConfig, Tiles, backward_config, backward_tiles, capability
from .launch import log2_scales
from .pack import Pack, strides

_STRIDES = ("stride_qb", "stride_qn", "stride_qh", "stride_gb", "stride_gn", "stride_gh")


@triton.jit
def _load(x, stride_d, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of rows at pointers (N, 1) -> (N, WIDTH), zero beyond HEAD_DIM or if not valid."""
    column = FIRST + tl.arange(0, WIDTH)[None, :].to(tl.int64)
    return tl.load(x + column * stride_d, mask=valid & (column < HEAD_DIM), other=0.0)


@triton.jit
def _store(x, tile, valid, FIRST: tl.constexpr, HEAD_DIM: tl.constexpr):
    column = FIRST + tl.arange(0, tile.shape[1])[None, :]
    tl.store(x + column, tile.to(x.dtype.element_ty), mask=valid & (column < HEAD_DIM))


@triton.jit
def _row_sum(a, b):
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def _dot_t(a, b, TWO: tl.constexpr, a_second, b_second):
    """a @ b.T, with the second column tiles of both added if TWO."""
    product = tl.dot(a, b.T, input_precision="ieee")
    if TWO:
        product = tl.dot(a_second, b_second.T, product, input_precision="ieee")
    return product


@triton.jit(do_not_specialize=[*_STRIDES, "heads", "tokens", "keys"])
def query_grad_kernel(
    query,  # (B, N, H, D), any strides, those of b, n and h in units of UNIT elements
    grad,  # of the output, likewise
    out,  # (B, N, H, D), contiguous
    lse,  # (B, H, N) fp32, in units of log2
    delta,  # (B, H, N) fp32; written here
    packed_key,  # (B*H*rows, D_A + D_B)
    packed_value,  # the same
    grad_query,  # (B, N, H, D), contiguous
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_gd,
    heads,
    tokens,
    keys,
    rows,  # keys, rounded up to BLOCK_N
    log2_scale,  # |scale| * log2(e); for a negative scale the packed keys are negated
    scale,  # |scale|
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_A: tl.constexpr,
    D_B: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_M)
    bh = tl.program_id(0) // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    offs_m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = offs_m.to(tl.int64)[:, None]
    valid = offs_m[:, None] < tokens

    query += (b * stride_qb + h * stride_qh + token * stride_qn) * UNIT
    grad += (b * stride_gb + h * stride_gh + token * stride_gn) * UNIT
    contiguous = (b * tokens * heads + h) * HEAD_DIM + token * (heads * HEAD_DIM)
    out += contiguous
    q_a = _load(query, stride_qd, valid, 0, D_A, HEAD_DIM)
    g_a = _load(grad, stride_gd, valid, 0, D_A, HEAD_DIM)
    row_delta = _row_sum(g_a, _load(out, 1, valid, 0, D_A, HEAD_DIM))
    q_b, g_b = q_a, g_a
    if D_B > 0:
        q_b = _load(query, stride_qd, valid, D_A, D_B, HEAD_DIM)
        g_b = _load(grad, stride_gd, valid, D_A, D_B, HEAD_DIM)
        row_delta += _row_sum(g_b, _load(out, 1, valid, D_A, D_B, HEAD_DIM))
    statistics = bh.to(tl.int64) * tokens + offs_m
    tl.store(delta + statistics, row_delta, mask=offs_m < tokens)
    row_lse = tl.load(lse + statistics, mask=offs_m < tokens, other=0.0)

    acc_a = tl.zeros([BLOCK_M, D_A], tl.float32)
    acc_b = tl.zeros([BLOCK_M, D_B if D_B > 0 else 1], tl.float32)
    offs_n = tl.arange(0, BLOCK_N)
    for start in tl.range(0, rows, BLOCK_N):
        row = (bh.to(tl.int64) * rows + start + offs_n)[:, None] * (D_A + D_B)
        k_a = tl.load(packed_key + row + tl.arange(0, D_A)[None, :])
        v_a = tl.load(packed_value + row + tl.arange(0, D_A)[None, :])
        k_b, v_b = k_a, v_a
        if D_B > 0:
            k_b = tl.load(packed_key + row + D_A + tl.arange(0, D_B)[None, :])
            v_b = tl.load(packed_value + row + D_A + tl.arange(0, D_B)[None, :])
        s = _dot_t(q_a, k_a, D_B > 0, q_b, k_b)  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * log2_scale - row_lse[:, None])
        ds = p * (_dot_t(g_a, v_a, D_B > 0, g_b, v_b) - row_delta[:, None])
        if TAIL:
            ds = tl.where((start + offs_n < keys)[None, :], ds, 0.0)
        ds = ds.to(k_a.dtype)
        acc_a = tl.dot(ds, k_a, acc_a, input_precision="ieee")
        if D_B > 0:
            acc_b = tl.dot(ds, k_b, acc_b, input_precision="ieee")

    grad_query += contiguous
    _store(grad_query, acc_a * scale, valid, 0, HEAD_DIM)
    if D_B > 0:
        _store(grad_query, acc_b * scale, valid, D_A, HEAD_DIM)


@triton.jit(do_not_specialize=[*_STRIDES, "heads", "tokens", "keys"])
def key_grad_kernel(
    query,  # these as above
    grad,
    lse,
    delta,
    packed_key,
    packed_value,
    grad_key,  # (B, keys, H, D), contiguous
    grad_value,  # the same
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_gd,
    heads,
    tokens,
    keys,
    rows,
    log2_scale,
    scale,  # with its sign, because the gradient is that of the keys before they were negated
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_A: tl.constexpr,
    D_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(keys, BLOCK_N)
    bh = tl.program_id(0) // blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    key = ((tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    row = (bh.to(tl.int64) * rows + key) * (D_A + D_B)
    k_a = tl.load(packed_key + row + tl.arange(0, D_A)[None, :])  # [BLOCK_N, D_A]
    v_a = tl.load(packed_value + row + tl.arange(0, D_A)[None, :])
    k_b, v_b = k_a, v_a
    if D_B > 0:
        k_b = tl.load(packed_key + row + D_A + tl.arange(0, D_B)[None, :])
        v_b = tl.load(packed_value + row + D_A + tl.arange(0, D_B)[None, :])

    query += (b * stride_qb + h * stride_qh) * UNIT
    grad += (b * stride_gb + h * stride_gh) * UNIT
    lse += bh.to(tl.int64) * tokens
    delta += bh.to(tl.int64) * tokens
    key_acc_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    value_acc_a = tl.zeros([BLOCK_N, D_A], tl.float32)
    key_acc_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 1], tl.float32)
    value_acc_b = tl.zeros([BLOCK_N, D_B if D_B > 0 else 1], tl.float32)
    for start in tl.range(0, tokens, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        token = offs_m.to(tl.int64)[:, None]
        valid = offs_m[:, None] < tokens
        q_row = query + token * stride_qn * UNIT
        g_row = grad + token * stride_gn * UNIT
        q_a = _load(q_row, stride_qd, valid, 0, D_A, HEAD_DIM)  # [BLOCK_M, D_A]
        g_a = _load(g_row, stride_gd, valid, 0, D_A, HEAD_DIM)
        q_b, g_b = q_a, g_a
        if D_B > 0:
            q_b = _load(q_row, stride_qd, valid, D_A, D_B, HEAD_DIM)
            g_b = _load(g_row, stride_gd, valid, D_A, D_B, HEAD_DIM)
        column_lse = tl.load(lse + offs_m, mask=offs_m < tokens, other=0.0)
        column_delta = tl.load(delta + offs_m, mask=offs_m < tokens, other=0.0)
        s = _dot_t(k_a, q_a, D_B > 0, k_b, q_b)  # [BLOCK_N, BLOCK_M]
        p = tl.exp2(s * log2_scale - column_lse[None, :])
        ds = p * (_dot_t(v_a, g_a, D_B > 0, v_b, g_b) - column_delta[None, :])
        p, ds = p.to(q_a.dtype), ds.to(q_a.dtype)
        value_acc_a = tl.dot(p, g_a, value_acc_a, input_precision="ieee")
        key_acc_a = tl.dot(ds, q_a, key_acc_a, input_precision="ieee")
        if D_B > 0:
            value_acc_b = tl.dot(p, g_b, value_acc_b, input_precision="ieee")
            key_acc_b = tl.dot(ds, q_b, key_acc_b, input_precision="ieee")

    valid = key < keys
    place = (b * keys * heads + h) * HEAD_DIM + key * (heads * HEAD_DIM)
    _store(grad_key + place, key_acc_a * scale, valid, 0, HEAD_DIM)
    _store(grad_value + place, value_acc_a, valid, 0, HEAD_DIM)
    if D_B > 0:
        _store(grad_key + place, key_acc_b * scale, valid, D_A, HEAD_DIM)
        _store(grad_value + place, value_acc_b, valid, D_A, HEAD_DIM)


def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grid: tuple[int, int],
    coarse: tuple[int, int],
    mode: str,
    scale: float,
    config: BackwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the query (B, N, H, D) and of the coarse keys and values (B, M, H, D), contiguous.

    ``grad``, ``out`` (B, N, H, D): of :func:`todo_attn.kernels.launch.attention`; ``lse`` (B, H, N) as it wrote it.
    The other arguments are those of that call, in fp16 or bf16. ``config`` overrides the choice of ``configs.py``.
    """
    batch, tokens, heads, head_dim = query.shape
    keys = math.prod(coarse)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (t.new_empty((batch, keys, heads, head_dim)) for t in (key, value))
    if query.numel() == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_()
    gpu = capability(query)
    tile = backward_tiles(gpu, head_dim)
    config = config or backward_config(gpu, head_dim)
    # Both blocks are powers of two, so the longer is a multiple of the other.
    block = max(config.query.block_n, config.key.block_n)
    rows = triton.cdiv(keys, block) * block
    delta = lse.new_empty(lse.shape)
    unit, stride = strides(query, grad)
    log2_scale, _ = log2_scales(scale)
    numbers = (heads, tokens, keys, rows, log2_scale)
    with torch.cuda.device_of(query):
        packed = Pack(key, value, grid, coarse, mode, scale < 0, rows, tile)(key, value)
        query_grad_kernel[(triton.cdiv(tokens, config.query.block_m) * batch * heads,)](
            query, grad, out, lse, delta, *packed, grad_query, *stride, *numbers, abs(scale),
            UNIT=unit, TAIL=rows > keys, **_constants(head_dim, tile),
            BLOCK_M=config.query.block_m, BLOCK_N=config.query.block_n, **config.query.options,
        )  # fmt: skip
        key_grad_kernel[(triton.cdiv(keys, config.key.block_n) * batch * heads,)](
            query, grad, lse, delta, *packed, grad_key, grad_value, *stride, *numbers, scale,
            UNIT=unit, **_constants(head_dim, tile),
            BLOCK_M=config.key.block_m, BLOCK_N=config.key.block_n, **config.key.options,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _constants(head_dim: int, tile: Tiles) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "D_A": tile.k[0], "D_B": tile.k[1]}
