"""Attention over packed coarse keys for Hopper, in Gluon: one warp loads, two or three warpgroups multiply.

The arithmetic and the packed rows are those of ``kernels/attention.py``; what differs is who does what, and when. Each
consumer warpgroup has 64 query rows, and a ring of tiles in shared memory that all of them read. Its step for tile j is

    issue S[j+1] = Q K[j+1]^T                 asynchronous, in the tensor cores
    P[j] = exp2(S[j] * slope - row_max)         meanwhile; in two halves of the keys
    issue O += P[j] V[j]                      the first half's while the second's exp2 runs
    wait, give the tiles back

so that a warpgroup's products run under its own exp2, and not only under the other warpgroup's.

The ring's unit u holds K[u] and V[u-1], which is what one step needs: one barrier to wait for, one to arrive at. So n
tiles are n + 1 units; the first has no V and the last no K. Units are counted from the program's start to its end, over
all of its blocks of queries: unit u lies in slot u % stages, and is that slot's fill number u // stages, whose lowest
bit is the parity that both barriers are waited for with.

- ``full[slot]`` takes one arrival, the producer's, and the bytes it expects: whole boxes, zeros past an edge included.
  Consumers wait for the parity of the fill.
- ``empty[slot]`` takes one arrival of each consumer. The producer waits for the parity of the fill before, which a
  fresh barrier has passed. A consumer arrives once all its wgmmas that read the slot have ended, in all four warps.
- Q is stored by the warpgroup that reads it: stores, fence between the proxies, barrier, wgmma. The next block's stores
  come after a step that waited for every wgmma.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from benchmarks.experiments.hopper.step import ROWS, scores, step

# Its name up to Triton 3.6; 3.9 keeps that one only to raise.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _produce(
    descriptors,  # key_a, key_b, value_a, value_b
    ring,  # k_a, k_b, v_a, v_b, full, empty
    size,  # blocks of queries of one head, of all heads, rows and tiles of keys of one head
    PLAN: gl.constexpr,
):
    """One warp: fill the ring, for each of the program's blocks of queries."""
    key_a, key_b, value_a, value_b = descriptors
    k_a, k_b, v_a, v_b, full, empty = ring
    blocks, work, rows, tiles = size
    K_BYTES: gl.constexpr = PLAN.block_n * (PLAN.k_a + PLAN.k_b) * 2
    V_BYTES: gl.constexpr = PLAN.block_n * (PLAN.v_a + PLAN.v_b) * 2  # columns past the row's end are zeros, and count
    STAGES: gl.constexpr = PLAN.stages
    unit = 0
    for block in range(gl.program_id(0), work, gl.num_programs(0)):
        row = block // blocks * rows  # of K[u]
        for u in range(tiles + 1):
            slot = unit & (STAGES - 1)
            # Fill f waits for release f - 1, whose parity is that of f + 1: the first fill of all passes at once.
            mbarrier.wait(empty.index(slot), ((unit & STAGES) // STAGES) ^ 1)
            bar = full.index(slot)
            if u == 0:
                mbarrier.expect(bar, K_BYTES)
            elif u == tiles:
                mbarrier.expect(bar, V_BYTES)
            else:
                mbarrier.expect(bar, K_BYTES + V_BYTES)
            _copy(key_a, [row, 0], bar, k_a.index(slot), pred=u < tiles)
            if PLAN.k_b > 0:
                _copy(key_b, [row, PLAN.k_a], bar, k_b.index(slot), pred=u < tiles)
            _copy(value_a, [row - PLAN.block_n, 0], bar, v_a.index(slot), pred=u > 0)
            if PLAN.v_b > 0:
                _copy(value_b, [row - PLAN.block_n, PLAN.v_a], bar, v_b.index(slot), pred=u > 0)
            row += PLAN.block_n
            unit += 1


@gluon.jit
def _load_query(query, q, token, tokens, stride_n, stride_d, FIRST: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Columns from FIRST on of the consumer's rows of queries, into shared memory: q (ROWS, columns)."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    row = token + gl.arange(0, ROWS, gl.SliceLayout(1, LOAD))[:, None]
    column = FIRST + gl.arange(0, q.shape[1], gl.SliceLayout(0, LOAD))[None, :]
    at = row.to(gl.int64) * stride_n + column.to(gl.int64) * stride_d
    q.store(gl.load(query + at, mask=(row < tokens) & (column < HEAD_DIM), other=0.0))


@gluon.jit
def _store_out(out, acc, row_sum, token, tokens, stride_n, stride_d, FIRST: gl.constexpr, HEAD_DIM: gl.constexpr):
    """acc / row_sum to columns from FIRST on: acc (ROWS, columns), row_sum (ROWS,)."""
    L: gl.constexpr = acc.type.layout
    row = token + gl.arange(0, ROWS, gl.SliceLayout(1, L))[:, None]
    column = FIRST + gl.arange(0, acc.shape[1], gl.SliceLayout(0, L))[None, :]
    at = row.to(gl.int64) * stride_n + column.to(gl.int64) * stride_d
    row_sum = gl.convert_layout(row_sum, gl.SliceLayout(1, L), assert_trivial=True)
    gl.store(out + at, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=(row < tokens) & (column < HEAD_DIM))


@gluon.jit
def _column(acc, ROW: gl.constexpr, COLUMN: gl.constexpr):
    """One column of (ROWS, columns), in layout ROW."""
    column = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))[None, :]
    return gl.convert_layout(gl.sum(gl.where(column == COLUMN, acc, 0.0), 1), ROW, assert_trivial=True)


@gluon.jit
def _consume(
    tensors,  # query, out
    strides,  # of query, then of out: of batch, token, head and column
    size,  # blocks of queries of one head, of all heads, heads, tokens, tiles of keys, keys
    scale,  # log2_scale, log2_power
    queries,  # (consumers, ROWS, k_a) and (consumers, ROWS, k_b) in shared memory
    ring,
    which,  # of the consumers this is
    PLAN: gl.constexpr,
):
    """One warpgroup: its ROWS query rows of each of the program's blocks."""
    V_A: gl.constexpr = PLAN.v_a
    V_B: gl.constexpr = PLAN.v_b if PLAN.v_b > 0 else 16
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_A, 16])
    B: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_B, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PLAN.block_n, 16]))
    query, out = tensors
    stride_qb, stride_qn, stride_qh, stride_qd, stride_ob, stride_on, stride_oh, stride_od = strides
    blocks, work, heads, tokens, tiles, keys = size
    q = (queries[0].index(which), queries[1].index(which))
    full, empty = ring[4], ring[5]
    unit = 0
    for block in range(gl.program_id(0), work, gl.num_programs(0)):
        bh = block // blocks
        b = (bh // heads).to(gl.int64)
        h = (bh % heads).to(gl.int64)
        token = (block % blocks * PLAN.consumers + which) * ROWS
        rows_of_q = query + (b * stride_qb + h * stride_qh)
        # The last block's products have been waited for, so nothing reads these any more.
        _load_query(rows_of_q, q[0], token, tokens, stride_qn, stride_qd, 0, PLAN.head_dim)
        if PLAN.k_b > 0:
            _load_query(rows_of_q, q[1], token, tokens, stride_qn, stride_qd, PLAN.k_a, PLAN.head_dim)
        fence_async_shared()  # wgmma reads shared memory through another proxy than these stores wrote it

        row_max = gl.full([ROWS], -3.4028234663852886e38, gl.float32, ROW)
        row_sum = gl.zeros([ROWS], gl.float32, ROW)
        acc_a = gl.zeros([ROWS, V_A], gl.float32, A)
        acc_b = gl.zeros([ROWS, V_B], gl.float32, B)
        slot = unit & (PLAN.stages - 1)
        mbarrier.wait(full.index(slot), (unit & PLAN.stages) // PLAN.stages)
        s = warpgroup_mma_wait(0, deps=[scores(q, ring, slot, PLAN)])
        mbarrier.arrive(empty.index(slot))
        unit += 1

        # Two tiles a trip: this tile's products and the next one's change places without moving.
        state = (s, row_max, row_sum, acc_a, acc_b)
        for _pair in range(0, tiles - 2, 2):
            state = step(state, unit, 0, q, ring, scale, PLAN, False, False)
            state = step(state, unit + 1, 0, q, ring, scale, PLAN, False, False)
            unit += 2
        if tiles % 2 == 0:
            state = step(state, unit, 0, q, ring, scale, PLAN, False, False)
            unit += 1
        valid_keys = keys - (tiles - 1) * PLAN.block_n
        s, row_max, row_sum, acc_a, acc_b = step(state, unit, valid_keys, q, ring, scale, PLAN, True, not PLAN.ones)
        unit += 1

        if PLAN.ones:
            if PLAN.head_dim < V_A:
                row_sum = _column(acc_a, ROW, PLAN.head_dim)
            else:
                row_sum = _column(acc_b, ROW, PLAN.head_dim - V_A)
        rows_of_out = out + (b * stride_ob + h * stride_oh)
        _store_out(rows_of_out, acc_a, row_sum, token, tokens, stride_on, stride_od, 0, PLAN.head_dim)
        if PLAN.v_b > 0:
            _store_out(rows_of_out, acc_b, row_sum, token, tokens, stride_on, stride_od, V_A, PLAN.head_dim)


@gluon.jit(do_not_specialize=["batch_heads", "heads", "tokens", "keys", "rows"])
def attention_kernel(
    query,  # (B, N, H, D), any strides
    key_a,  # descriptor of (B*H*rows, k_columns), box [block_n, k_a]
    key_b,  # the same, box [block_n, k_b]
    value_a,  # descriptor of (B*H*rows, v_columns), box [block_n, v_a]
    value_b,  # the same, box [block_n, v_b]
    out,  # (B, N, H, D), any strides
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_ob,
    stride_on,
    stride_oh,
    stride_od,
    batch_heads,
    heads,
    tokens,
    keys,
    rows,
    log2_scale,  # |scale| * log2(e); a negative scale has turned the sign of the packed keys
    log2_power,  # the power of two at or above log2_scale
    PLAN: gl.constexpr,  # a Plan of launch.py
):
    dtype: gl.constexpr = key_a.dtype
    K_A: gl.constexpr = PLAN.k_a
    K_B: gl.constexpr = PLAN.k_b
    V_A: gl.constexpr = PLAN.v_a
    V_B: gl.constexpr = PLAN.v_b
    BLOCK_N: gl.constexpr = PLAN.block_n
    STAGES: gl.constexpr = PLAN.stages
    CONSUMERS: gl.constexpr = PLAN.consumers
    blocks = gl.cdiv(tokens, CONSUMERS * ROWS)
    work = blocks * batch_heads
    tiles = rows // BLOCK_N

    Q_A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, K_A], dtype)
    q_a = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, K_A], Q_A)
    k_a = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, K_A], key_a.layout)
    v_a = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, V_A], value_a.layout)
    q_b = q_a
    k_b = k_a
    v_b = v_a
    if K_B > 0:
        Q_B: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, K_B], dtype)
        q_b = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, K_B], Q_B)
        k_b = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, K_B], key_b.layout)
    if V_B > 0:
        v_b = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, V_B], value_b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)  # the producer's, with the bytes that it expects
        mbarrier.init(empty.index(i), count=CONSUMERS)  # one of each
    fence_async_shared()  # the copies see the barriers

    descriptors = (key_a, key_b, value_a, value_b)
    tensors = (query, out)
    strides = (stride_qb, stride_qn, stride_qh, stride_qd, stride_ob, stride_on, stride_oh, stride_od)
    size = (blocks, work, heads, tokens, tiles, keys)
    scale = (log2_scale, log2_power)
    q = (q_a, q_b)
    ring = (k_a, k_b, v_a, v_b, full, empty)
    # Registers: one thread of each of 3 warpgroups has 504 together (a lone warp counts as one), of 4 512. The first
    # consumer gets what the others leave, as much as each of them.
    if PLAN.consumers == 2:
        gl.warp_specialize([
            (_consume, (tensors, strides, size, scale, q, ring, 0, PLAN)),
            (_consume, (tensors, strides, size, scale, q, ring, 1, PLAN)),
            (_produce, (descriptors, ring, (blocks, work, rows, tiles), PLAN)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (tensors, strides, size, scale, q, ring, 0, PLAN)),
            (_consume, (tensors, strides, size, scale, q, ring, 1, PLAN)),
            (_consume, (tensors, strides, size, scale, q, ring, 2, PLAN)),
            (_produce, (descriptors, ring, (blocks, work, rows, tiles), PLAN)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
