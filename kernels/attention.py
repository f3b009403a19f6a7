"""Flash-style attention over the packed coarse keys and values (see ``pack.py``).

Numerics: Q is never scaled in its own dtype (a rounded scaled Q breaks the error bound from a logit spread of 2 nats);
the running maximum is subtracted from the raw fp32 product and the difference scaled, so no exponent is ever above 0
and rows with extreme logits stay finite. Where V has spare columns, one of them holds ones and its product with P is
the softmax's sum; elsewhere P is summed in fp32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Settings, Tiles, settings, tiles
from .pack import pack

LOG2_E = 1.4426950408889634


@triton.jit
def attention_kernel(
    query,  # (B, N, H, D), any strides
    key_a,  # descriptor of (B*H*rows, k_columns), box [BLOCK_N, K_A]
    key_b,  # the same, box [BLOCK_N, K_B]
    value_a,  # descriptor of (B*H*rows, v_columns), box [BLOCK_N, V_A]
    value_b,  # the same, box [BLOCK_N, V_B]
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
    HEAD_DIM: tl.constexpr,
    K_A: tl.constexpr,
    K_B: tl.constexpr,
    V_A: tl.constexpr,
    V_B: tl.constexpr,
    ONES: tl.constexpr,
    TAIL: tl.constexpr,  # the last tile repeats a key, and there is no ones column to leave it out of the sum
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    if K_B > 0:
        offs_b = K_A + tl.arange(0, K_B)[None, :].to(tl.int64)
        q_b = tl.load(query + offs_b * stride_qd, mask=live & (offs_b < HEAD_DIM), other=0.0)  # [BLOCK_M, K_B]
    maximum = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)  # finite: with a scale of 0, -inf would make NaN
    total = tl.zeros([BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, V_A], tl.float32)
    if V_B > 0:
        acc_b = tl.zeros([BLOCK_M, V_B], tl.float32)

    for start in range(0, rows, BLOCK_N):
        row = bh * rows + start
        s = tl.dot(q_a, key_a.load([row, 0]).T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if K_B > 0:
            s = tl.dot(q_b, key_b.load([row, K_A]).T, s, input_precision="ieee")
        higher = tl.maximum(maximum, tl.max(s, 1))
        shrink = tl.exp2((maximum - higher) * log2_scale)
        maximum = higher
        p = tl.exp2((s - maximum[:, None]) * log2_scale)
        if not ONES:
            if TAIL:
                p = tl.where(start + tl.arange(0, BLOCK_N)[None, :] < keys, p, 0.0)
            total = total * shrink + tl.sum(p, 1)
        p = p.to(value_a.dtype)
        acc_a = tl.dot(p, value_a.load([row, 0]), acc_a * shrink[:, None], input_precision="ieee")
        if V_B > 0:
            acc_b = tl.dot(p, value_b.load([row, V_A]), acc_b * shrink[:, None], input_precision="ieee")

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


def constants(head_dim: int, tile: Tiles, run: Settings, tail: bool) -> dict[str, object]:
    """The compile-time arguments of :func:`attention_kernel`."""
    return {
        "HEAD_DIM": head_dim,
        "K_A": tile.k[0],
        "K_B": tile.k[1],
        "V_A": tile.v[0],
        "V_B": tile.v[1],
        "ONES": tile.ones,
        "TAIL": tail and not tile.ones,
        "BLOCK_M": run.block_m,
        "BLOCK_N": run.block_n,
    }


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    factor: tuple[int, int],
    mode: str,
    scale: float,
) -> torch.Tensor:
    """Launch both kernels: (B, N, H, D), (B, gh*gw, H, D), (B, gh*gw, H, D) -> (B, N, H, D), contiguous.

    The arguments were checked by ``todo_attn.ops``; head_dim is a multiple of 8 up to 256, dtype fp16, bf16 or fp32.
    """
    batch, tokens, heads, head_dim = query.shape
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    # The interpreter runs on CPU tensors; it takes any settings.
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else (8, 0)
    run = settings(capability, head_dim, half=query.dtype != torch.float32)
    tile = tiles(head_dim)
    coarse = (grid[0] // factor[0], grid[1] // factor[1])
    keys = math.prod(coarse)
    rows = triton.cdiv(keys, run.block_n) * run.block_n

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
            out,
            *query.stride(),
            *out.stride(),
            heads,
            tokens,
            keys,
            rows,
            abs(scale) * LOG2_E,
            **constants(head_dim, tile, run, tail=rows > keys),
            **run.options,
        )
    return out
