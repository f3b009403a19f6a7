"""Moving tokens, against plain indexing: bit-equal whatever the dtype, strides, index type and size."""

import pytest
import torch

from todo_attn.ops import reference
from todo_attn.ops import tokens as T

compiled = torch.ops.todo_attn  # the compiled kernels where their library is loaded, else the fallback again
OPS = {
    "gather": {"fallback": T._gather, "op": compiled.gather_tokens, "public": T.gather_tokens},
    "scatter": {"fallback": T._scatter, "op": compiled.scatter_tokens, "public": T.scatter_tokens},
    "scatter_": {"fallback": T._scatter_, "op": compiled.scatter_tokens_, "public": T.scatter_tokens_},
    "recover": {"fallback": T._recover, "op": compiled.recover_tokens, "public": T.recover_tokens},
    "select": {
        "fallback": lambda s, grid, patch: T._select_base(s, *grid, *patch),
        "op": lambda s, grid, patch: compiled.select_base_tokens(s, *grid, *patch),
        "public": T.select_base_tokens,
    },
}
PATHS = ["fallback", "op", "public"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = [(2, 7, 3, 1), (1, 9, 9, 3), (3, 20, 11, 8), (2, 33, 1, 40), (2, 5, 4, 321), (2, 6, 0, 4), (0, 5, 3, 4)]
SIZES += [(2, 4, 3, 0), (1, 0, 0, 5)]
LAYOUTS = ["contiguous", "transposed", "stepped", "expanded", "offset"]

paths = pytest.mark.parametrize("path", PATHS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
index_dtypes = pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch fills new memory with NaN: what an op forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def laid_out(values, layout):
    """``values`` in memory of another layout; the memory between them is NaN (or out of range), never to be read."""
    beside = float("nan") if values.is_floating_point() else -1
    if layout == "transposed":
        order = tuple(reversed(range(values.dim())))
        return values.permute(order).contiguous().permute(order)
    if layout == "stepped":
        buffer = values.new_full([3 * n + 1 for n in values.shape], beside)
        return buffer[(slice(1, None, 3),) * values.dim()].copy_(values)
    if layout == "expanded":
        return values[:1].expand(values.shape) if len(values) else values
    if layout == "offset":  # not aligned to anything wider than an element
        return values.new_full((values.numel() + 1,), beside)[1:].view(values.shape).copy_(values)
    return values


def same_bits(actual, expected):
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    return torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


def unique(batch, tokens, count):
    return torch.rand(batch, tokens).argsort(-1)[:, :count]


def arguments(size, dtype, index_dtype, layout, device="cpu"):
    """x (B, N, C), index (B, K) unique in a row, source (B, K, C), back (B, N) into K, residual (B, N, C)."""
    B, N, K, C = size
    back = torch.randint(0, K, (B, N)) if K else torch.zeros((B, 0), dtype=torch.int64)
    index = [i.to(index_dtype) for i in (unique(B, N, K), back)]
    x, source, residual = (torch.randn(B, n, C).to(dtype) for n in (N, K, back.shape[1]))
    return [laid_out(t.to(device), layout) for t in (x, index[0], source, index[1], residual)]


@devices
@paths
@dtypes
@index_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_plain_indexing(path, dtype, index_dtype, layout, device):
    for size in SIZES:
        x, index, source, back, residual = arguments(size, dtype, index_dtype, layout, device)
        before = x.clone()
        expected = reference.scatter_tokens(x, index, source)
        results = [
            (OPS["gather"][path](x, index), reference.gather_tokens(x, index)),
            (OPS["scatter"][path](x, index, source), expected),
            (OPS["recover"][path](source, back, None), reference.recover_tokens(source, back)),
            (OPS["recover"][path](source, back, residual), reference.recover_tokens(source, back, residual)),
        ]
        for actual, wanted in results:
            assert actual.is_contiguous()
            assert same_bits(actual, wanted), size
        assert same_bits(x, before)
        if layout != "expanded":
            assert OPS["scatter_"][path](x, index, source) is None
            assert same_bits(x, expected), size


@paths
def test_in_place_writes_nothing_else(path):
    buffer = torch.full((2, 9, 12), float("nan"))
    x = buffer[:, 1:8, ::2].zero_()
    OPS["scatter_"][path](x, torch.tensor([[3, 0], [6, 1]]), torch.ones(2, 2, 6))
    assert x.sum() == 24
    assert buffer.isnan().sum() == buffer.numel() - x.numel()


@paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sum_is_rounded_once(path, dtype):
    y, residual = torch.randn(1, 50, 40).to(dtype), torch.randn(1, 50, 40).to(dtype)
    out = OPS["recover"][path](y, torch.arange(50)[None], residual)
    assert torch.equal(out, (y.double() + residual.double()).to(dtype))


@paths
def test_nan_and_infinity_move_like_numbers(path):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]).view(1, 4, 1)
    index = torch.tensor([[3, 2, 1, 0]])
    assert same_bits(OPS["gather"][path](x, index), x.flip(1))
    assert same_bits(OPS["scatter"][path](torch.zeros(1, 4, 1), index, x), x.flip(1))


@devices
@paths
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_base_tokens(path, dtype, layout, device):
    for grid in [(4, 6), (5, 7), (1, 1), (9, 2), (7, 13)]:
        for patch in [(2, 2), (3, 2), (1, 1), (1, 4), (10, 1)]:
            for batch in (0, 3):
                # Few distinct values: most patches are decided by ties.
                score = laid_out(torch.randint(0, 3, (batch, grid[0] * grid[1])).to(dtype).to(device), layout)
                actual = OPS["select"][path](score, grid, patch)
                assert actual.dtype == torch.int64
                assert torch.equal(actual, reference.select_base_tokens(score, grid, patch)), (grid, patch)


@paths
def test_base_of_nan_and_infinity(path):
    nan, inf = float("nan"), float("inf")
    score = torch.tensor([[1, nan, -inf, -inf], [inf, nan, -inf, -inf]]).view(1, 8)
    assert OPS["select"][path](score, (2, 4), (2, 2)).tolist() == [[1, 2]]


def test_gradients():
    x, index, source, back, residual = arguments((2, 6, 4, 3), torch.float64, torch.int64, "contiguous")
    for t in (x, source, residual):
        t.requires_grad_()
    twice = torch.tensor([[0, 5, 0], [2, 2, 2]])
    torch.autograd.gradcheck(lambda x: T.gather_tokens(x, twice), x)
    torch.autograd.gradcheck(lambda x, s: T.scatter_tokens(x, index, s), (x, source))
    torch.autograd.gradcheck(lambda y, r: T.recover_tokens(y, back, r), (source, residual))
    torch.autograd.gradcheck(lambda y: T.recover_tokens(y, back), source)
    for op, plain, inputs, others in [
        (T.gather_tokens, reference.gather_tokens, (x,), (twice,)),
        (T.scatter_tokens, reference.scatter_tokens, (x, source), (index,)),
        (T.recover_tokens, reference.recover_tokens, (source, residual), (back,)),
    ]:
        order = (inputs[0], *others, *inputs[1:])
        out = op(*order)
        grad = torch.randn_like(out)
        actual = torch.autograd.grad(out, inputs, grad)
        expected = torch.autograd.grad(plain(*order), inputs, grad)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_half_are_summed_in_fp32(dtype):
    y = torch.ones(1, 1, 1, dtype=dtype, requires_grad=True)
    T.recover_tokens(y, torch.zeros(1, 4096, dtype=torch.int64)).sum().backward()
    assert y.grad.item() == 4096  # bf16 alone stops at 256, fp16 at 2048


@index_dtypes
def test_opcheck(index_dtype):
    for layout in LAYOUTS:
        x, index, source, back, residual = arguments((2, 6, 4, 3), torch.float32, index_dtype, layout)
        x, source, residual = (
            t.clone().requires_grad_() if layout == "contiguous" else t for t in (x, source, residual)
        )
        torch.library.opcheck(compiled.gather_tokens, (x, index))
        torch.library.opcheck(compiled.scatter_tokens, (x, index, source))
        torch.library.opcheck(compiled.recover_tokens, (source, back, residual))
        torch.library.opcheck(compiled.recover_tokens, (source, back, None))
        if layout != "expanded":
            torch.library.opcheck(compiled.scatter_tokens_, (x.detach(), index, source.detach()))
        torch.library.opcheck(compiled.select_base_tokens, (torch.randn(2, 35), 5, 7, 2, 3))


def test_in_place_is_seen_by_autograd():
    """A tensor that a backward needs must not change unnoticed."""
    x = torch.randn(1, 3, 2)
    out = (x * torch.ones_like(x, requires_grad=True)).sum()
    T.scatter_tokens_(x, torch.tensor([[1]]), torch.ones(1, 1, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_compiles_in_one_graph_at_changing_sizes():
    def step(x, score, grid):
        base = T.select_base_tokens(score, grid)
        y = T.scatter_tokens(x, base, T.gather_tokens(x, base) * 2)
        T.scatter_tokens_(y, base, T.gather_tokens(x, base) * 3)
        return T.recover_tokens(y, base, T.gather_tokens(x, base))

    fast = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for grid in [(4, 6), (5, 7), (8, 9)]:
        x, score = torch.randn(2, grid[0] * grid[1], 3), torch.randn(2, grid[0] * grid[1])
        assert torch.equal(fast(x, score, grid), step(x, score, grid))


def test_autocast_leaves_dtypes_alone():
    x, index, source, back, residual = arguments((2, 6, 4, 3), torch.float32, torch.int64, "contiguous")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = [T.gather_tokens(x, index), T.scatter_tokens(x, index, source), T.recover_tokens(source, back, residual)]
    assert all(out.dtype == torch.float32 for out in outs)


@paths
@index_dtypes
@pytest.mark.parametrize("wrong", [-1, 5, 2**31 - 1, -(2**31)])
def test_index_out_of_range(path, index_dtype, wrong):
    x, source = torch.randn(2, 5, 3), torch.randn(2, 3, 3)
    index = torch.tensor([[0, 1, 2], [4, 0, wrong]], dtype=index_dtype)
    before = x.clone()
    for op, args in [("gather", (x, index)), ("scatter", (x, index, source)), ("scatter_", (x, index, source))]:
        with pytest.raises(IndexError, match="index must"):
            OPS[op][path](*args)
    assert torch.equal(x, before)
    with pytest.raises(IndexError, match="source must"):
        OPS["recover"][path](x, index, None)
    with pytest.raises(IndexError, match="source must"):
        OPS["recover"][path](x[:, :0], index, source)


X, I, S = torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: T.gather_tokens([1.0], I), "x must be a torch.Tensor"),
        (lambda: T.gather_tokens(X[0], I), "x must have shape"),
        (lambda: T.gather_tokens(X.long(), I), "x must be of dtype"),
        (lambda: T.gather_tokens(X, I.float()), "index must be of dtype int32, int64, got float32"),
        (lambda: T.gather_tokens(X, I.bool()), "index must be of dtype"),
        (lambda: T.gather_tokens(X, I[0]), "index must have shape"),
        (lambda: T.gather_tokens(X, I[:1]), "index must have the batch of x, 2"),
        (lambda: T.gather_tokens(X, I.to("meta")), "index must be on the device of x"),
        (lambda: T.scatter_tokens(X, I, S.double()), "source must have the dtype of x"),
        (lambda: T.scatter_tokens(X, I, S[:, :3]), r"source must have shape \(2, 4, 3\)"),
        (lambda: T.scatter_tokens(X, I, S[..., :1]), r"source must have shape \(2, 4, 3\)"),
        (lambda: T.scatter_tokens_(X, I, S[..., :1]), r"source must have shape \(2, 4, 3\)"),
        (lambda: T.scatter_tokens_(X[:1].expand(2, 5, 3), I, S), "x must not be expanded"),
        (lambda: T.scatter_tokens_(X.clone().requires_grad_(), I, S), "x must not require grad"),
        (lambda: T.scatter_tokens_(X, I, S.clone().requires_grad_()), "source must not require grad"),
        (lambda: T.recover_tokens(X, I, S.half()), "residual must have the dtype of y"),
        (lambda: T.recover_tokens(X, I, X), r"residual must have shape \(2, 4, 3\)"),
        (lambda: T.recover_tokens(X, I[:1]), "source must have the batch of y"),
        (lambda: T.select_base_tokens(X, (3, 5)), "score must have shape"),
        (lambda: T.select_base_tokens(I, (2, 2)), "score must be of dtype"),
        (lambda: T.select_base_tokens(X[..., 0], (2, 3)), "grid must match the tokens of score"),
        (lambda: T.select_base_tokens(X[..., 0], (1, 5), 2), "patch must be a pair"),
        (lambda: T.select_base_tokens(X[..., 0], (1, 5), (0, 1)), "patch must be at least"),
        (lambda: T.select_base_tokens(X[..., 0], (1, 5), (1.0, 1)), "patch must be a pair"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_in_place_without_gradients_on():
    x = torch.zeros(1, 2, 1, requires_grad=True)
    with torch.no_grad():
        T.scatter_tokens_(x, torch.tensor([[1]]), torch.ones(1, 1, 1))
    assert x.flatten().tolist() == [0, 1]


@pytest.mark.parametrize("path", ["fallback", "op"])
def test_above_two_to_the_31_elements(path, needs_memory):
    needs_memory(6)
    torch.use_deterministic_algorithms(False)  # memory that nobody touches stays unmapped
    tokens, channels = 2**20 + 1, 2048
    x = torch.empty(1, tokens, channels, dtype=torch.float16)
    ends = torch.tensor([[tokens - 1, 0, tokens // 2]])
    source = torch.randn(1, 3, channels).half()
    OPS["scatter_"][path](x, ends, source)
    assert torch.equal(x[0, ends[0]], source[0])
    assert torch.equal(OPS["gather"][path](x, ends), source)
    residual = torch.randn(1, 3, channels).half()
    assert torch.equal(OPS["recover"][path](x, ends, residual), source + residual)


@paths
def test_whatever_torchs_default_device_is(path):
    """An op makes what it needs where its arguments are."""
    x, source, index = torch.randn(2, 5, 3), torch.randn(2, 2, 3), torch.tensor([[0, 4], [3, 1]])
    back = torch.tensor([[0, 1, 1, 0, 1]] * 2)
    with torch.device("meta"):
        scattered, recovered = OPS["scatter"][path](x, index, source), OPS["recover"][path](source, back, None)
        bases = OPS["select"][path](x[..., 0], (5, 1), (2, 1))
    same_bits(scattered, reference.scatter_tokens(x, index, source))
    same_bits(recovered, reference.recover_tokens(source, back))
    assert torch.equal(bases, reference.select_base_tokens(x[..., 0], (5, 1), (2, 1)))
