"""What a consumer of ``kernel.py`` does with one tile of keys and values.

wgmmas are asynchronous: what a function here "starts" may be read only after a wait, and its operands in shared memory
must stay as they are until then.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from todo_attn.kernels.exp2 import exp2_mixed

ROWS: gl.constexpr = gl.constexpr(64)  # queries of a consumer: what one wgmma takes


@gluon.jit
def scores(q, ring, slot, PLAN: gl.constexpr):
    """Start Q K^T: (ROWS, block_n), not yet there."""
    BLOCK_N: gl.constexpr = PLAN.block_n
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
    s = warpgroup_mma(q[0], ring[0].index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
    if PLAN.k_b > 0:
        s = warpgroup_mma(q[1], ring[1].index(slot).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _halves(s, WIDTH: gl.constexpr):
    """(ROWS, 2 * WIDTH) -> its left and its right half: other registers of the same threads, nothing moves."""
    H: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    left, right = gl.split(gl.permute(gl.reshape(s, [ROWS, 2, WIDTH]), (0, 2, 1)))
    return gl.convert_layout(left, H, assert_trivial=True), gl.convert_layout(right, H, assert_trivial=True)


@gluon.jit
def _softmax(s, slope, new_max, valid_keys, FIRST: gl.constexpr, MASK: gl.constexpr, POLYNOMIAL: gl.constexpr):
    """P = exp2(s * slope - new_max), (ROWS, columns); zero from column ``valid_keys`` - FIRST on."""
    ROW: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    slope = gl.convert_layout(slope, ROW, assert_trivial=True)
    new_max = gl.convert_layout(new_max, ROW, assert_trivial=True)
    zero = gl.zeros_like(s)
    x = gl.fma(s, zero + slope[:, None], zero - new_max[:, None])
    p = exp2_mixed(x) if POLYNOMIAL else gl.exp2(x)
    if MASK:
        column = FIRST + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        p = gl.where(column < valid_keys, p, 0.0)
    return p


@gluon.jit
def _product(p, v_a, v_b, acc_a, acc_b, A: gl.constexpr, B: gl.constexpr, TWO: gl.constexpr):
    """Start acc + P V: P (ROWS, keys), V (keys, v_a) and (keys, v_b), layouts A and B of the sums."""
    P_A: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    P_B: gl.constexpr = gl.DotOperandLayout(0, B, 2)
    p = p.to(v_a.dtype)
    acc_a = warpgroup_mma(gl.convert_layout(p, P_A, assert_trivial=True), v_a, acc_a, is_async=True)
    if TWO:
        acc_b = warpgroup_mma(gl.convert_layout(p, P_B, assert_trivial=True), v_b, acc_b, is_async=True)
    return acc_a, acc_b


@gluon.jit
def _rescale(acc, alpha):
    """(ROWS, columns) times (ROWS,)."""
    ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    return acc * gl.convert_layout(alpha, ROW, assert_trivial=True)[:, None]


@gluon.jit
def step(
    state,  # products of this tile (ROWS, block_n); row_max, row_sum (ROWS,), acc (ROWS, v_a), (ROWS, v_b) before it
    unit,  # that of this tile's values and the next one's keys
    valid_keys,  # of the tile, if MASK
    q,  # two tiles
    ring,
    scale,  # log2_scale, log2_power
    PLAN: gl.constexpr,
    LAST: gl.constexpr,
    MASK: gl.constexpr,
):
    """Accumulate one tile and start the products of the next: returns these, row_max, row_sum and accumulators."""
    s, row_max, row_sum, acc_a, acc_b = state
    full, empty = ring[4], ring[5]
    TWO: gl.constexpr = PLAN.v_b > 0
    slot = unit & (PLAN.stages - 1)
    mbarrier.wait(full.index(slot), (unit & PLAN.stages) // PLAN.stages)
    if PLAN.ahead and not LAST:
        coming = scores(q, ring, slot, PLAN)

    A: gl.constexpr = acc_a.type.layout
    B: gl.constexpr = acc_b.type.layout
    # As in kernels/attention.py, _softmax_tile.
    tile_max = gl.max(s, 1)
    slope = gl.where(gl.abs(tile_max * scale[0]) < 268435456.0, scale[0], scale[1])
    new_max = gl.maximum(row_max, tile_max * slope)
    alpha = gl.exp2(row_max - new_max)
    acc_a = _rescale(acc_a, alpha)
    if TWO:
        acc_b = _rescale(acc_b, alpha)

    v_a = ring[2].index(slot)
    v_b = ring[3].index(slot)
    if PLAN.halves:
        H: gl.constexpr = PLAN.block_n // 2
        left, right = _halves(s, H)
        p = _softmax(left, slope, new_max, valid_keys, 0, MASK, PLAN.polynomial)
        acc_a, acc_b = _product(p, v_a.slice(0, H), v_b.slice(0, H), acc_a, acc_b, A, B, TWO)
        p_right = _softmax(right, slope, new_max, valid_keys, H, MASK, PLAN.polynomial)
        acc_a, acc_b = _product(p_right, v_a.slice(H, H), v_b.slice(H, H), acc_a, acc_b, A, B, TWO)
        if not PLAN.ones:
            more = gl.sum(p + p_right, 1)
            row_sum = row_sum * alpha + gl.convert_layout(more, alpha.type.layout, assert_trivial=True)
    else:
        p = _softmax(s, slope, new_max, valid_keys, 0, MASK, PLAN.polynomial)
        if not PLAN.ones:
            row_sum = row_sum * alpha + gl.sum(p, 1)
        acc_a, acc_b = _product(p, v_a, v_b, acc_a, acc_b, A, B, TWO)

    # wgmmas end in the order in which they were issued; each call above is one group to wait for.
    if PLAN.ahead and not LAST:
        s = warpgroup_mma_wait((2 if PLAN.halves else 1) * (2 if TWO else 1), deps=[coming])
    if TWO:
        acc_a, acc_b = warpgroup_mma_wait(0, deps=[acc_a, acc_b])
    else:
        acc_a = warpgroup_mma_wait(0, deps=[acc_a])
    if not PLAN.ahead and not LAST:
        s = warpgroup_mma_wait(0, deps=[scores(q, ring, slot, PLAN)])
    mbarrier.arrive(empty.index(slot))  # by one thread, after a barrier of the warpgroup: all four warps have waited
    return s, new_max, row_sum, acc_a, acc_b
