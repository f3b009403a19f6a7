"""``ops.match_tokens`` on every backend that runs here, against the float64 oracle."""

import os
import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from todo_attn.ops import backends, libraries, matching, reference
from todo_attn.ops.matching import match_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("bf16_in_the_interpreter")
GAP = 1e-6  # decisions closer than this in float64 are free
TRITON_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [("torch", d) for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
CASES += [("triton", d) for d in TRITON_DTYPES]
BACKENDS = ["torch", "triton"]
BUILT = shutil.which(os.environ.get("CXX") or "c++") and libraries._processor_unavailable_reason() is None
if DEVICE == "cpu" and BUILT:  # a build that failed is a failure
    CASES += [("compiled", d) for d in (torch.float32, torch.float16, torch.bfloat16)]
    BACKENDS.append("compiled")
# batch, N, C, Q, K: odd ones, one of each, more than a tile of both, the channels of Stable Diffusion
SIZES = [(2, 37, 5, 21, 13), (1, 1, 1, 1, 1), (2, 300, 70, 150, 140), (1, 90, 320, 33, 65), (3, 50, 16, 7, 1)]


def match(backend, x, query_index, key_index):
    similarity, position = torch.ops.todo_attn.match_tokens(x, query_index, key_index, backend)
    return position, similarity


def indices(batch, tokens, count, dtype=torch.int64):
    return torch.randint(0, tokens, (batch, count), dtype=dtype, device=DEVICE)


def rounding(backend, x):
    """How far off a similarity may be. Tensor cores cut off what a sum of 16 products and the sum so far has below
    fp32's last bits (and two more), where others round: equal tokens of 320 channels come out 1.3e-6 below 1."""
    cut = backend == "triton" and x.is_cuda and x.dtype != torch.float32
    return 5e-7 + (x.shape[2] / 16 * 2.0**-23 if cut else 0)


def check(backend, x, query_index, key_index):
    position, similarity = match(backend, x, query_index, key_index)
    assert position.dtype == torch.int64 and similarity.dtype == torch.float32
    assert position.shape == similarity.shape == query_index.shape
    batch = torch.arange(len(x), device=x.device)[:, None]
    wide = x.double()
    length = wide.norm(dim=-1, keepdim=True)
    unit = wide / torch.where(length > 0, length, 1)
    scores = unit[batch, query_index.long()] @ unit[batch, key_index.long()].transpose(1, 2)
    best, exact = reference.match_tokens(wide, query_index, key_index)
    allowed = rounding(backend, x)
    gap = max(GAP, 2 * allowed)
    torch.testing.assert_close(similarity, exact, rtol=0, atol=allowed)
    chosen = scores.gather(2, position[..., None])[..., 0]
    assert (chosen >= exact - gap).all()
    # Where nothing else comes near the best it is the one; keys that are the same token count once.
    same = key_index.long()[:, None] == key_index.long().gather(1, best)[..., None]
    runner_up = scores.masked_fill(same, -2).amax(-1)
    clear = exact - runner_up > gap
    assert torch.equal(position[clear], best[clear])


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_dtypes_and_index_types(backend, dtype, size):
    batch, tokens, channels, queries, keys = size
    x = torch.randn(batch, tokens, channels).to(dtype).to(DEVICE)
    check(backend, x, indices(batch, tokens, queries), indices(batch, tokens, keys, torch.int32))
    check(backend, x, indices(batch, tokens, queries, torch.int32), indices(batch, tokens, keys))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    x = torch.randn(9, 60, 2, device=DEVICE).permute(2, 1, 0)[:, ::2, 1:]
    query_index = indices(30, 30, 2).t()
    check(backend, x, query_index, indices(2, 30, 22)[:, 1::3])
    check(backend, x[:1].expand(2, -1, -1), query_index, indices(1, 30, 9).expand(2, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_position(backend):
    """Every key several times, inside a tile and in others; the same tokens also stand at several places of x."""
    distinct = torch.randn(1, 10, 24, device=DEVICE)
    x = distinct.repeat(1, 20, 1)
    query_index, key_index = indices(1, 200, 50), indices(1, 200, 150)
    position, similarity = match(backend, x, query_index, key_index)
    for q, p in zip((query_index[0] % 10).tolist(), position[0].tolist(), strict=True):
        assert p == (key_index[0] % 10).tolist().index(q)  # an equal token is there, and this is the first
    torch.testing.assert_close(similarity, torch.ones_like(similarity), rtol=0, atol=5e-7)
    kinds = {q: set() for q in range(10)}
    for q, s in zip((query_index[0] % 10).tolist(), similarity[0].tolist(), strict=True):
        kinds[q].add(s)
    assert all(len(values) <= 1 for values in kinds.values())


@pytest.mark.parametrize("channels", [1, 7, 320])
@pytest.mark.parametrize("keys", [3, 13, 50])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_tie_at_every_size(backend, keys, channels):
    """Small products are computed in other ways than large ones."""
    x = torch.cat([torch.randn(1, 5, channels), torch.randn(1, 1, channels).expand(1, keys, -1)], 1).to(DEVICE)
    key_index = torch.arange(5, 5 + keys, device=DEVICE)[None]
    position, similarity = match(backend, x, torch.arange(5, device=DEVICE)[None], key_index)
    assert (position == 0).all()
    torch.testing.assert_close(
        similarity, reference.match_tokens(x.double(), torch.arange(5, device=DEVICE)[None], key_index)[1]
    )


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.float64, 1e-13)], ids=str)
def test_equal_keys_tie_where_a_product_rounds_by_place(monkeypatch, dtype, rounding):
    """As OpenBLAS does on some processors, by more than what the torch path takes for a tie."""
    product = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda a, b, out: product(a, b, out=out).add_(rounding * torch.rand(out.shape, dtype=dtype))
    )
    x = torch.randn(2, 10, 24, dtype=dtype).repeat(1, 20, 1)
    query_index, key_index = torch.randint(0, 200, (2, 50)), torch.randint(0, 200, (2, 150))
    position, similarity = matching._match_in_blocks(x, query_index, key_index)
    same = (query_index % 10)[:, :, None] == (key_index % 10)[:, None]
    assert torch.equal(position, same.long().argmax(-1))  # the first
    torch.testing.assert_close(similarity, torch.ones_like(similarity))


def test_zeros_of_either_sign_are_equal():
    keys = torch.tensor([[[1.0, 0.0], [0.0, -0.0], [1.0, -0.0], [-0.0, 0.0]]])
    assert matching._first_of_equals(keys).tolist() == [[0, 1, 0, 1]]
    nan = torch.tensor([[[1.0], [float("nan")], [float("nan")]]])
    assert matching._first_of_equals(nan).tolist() == [[0, 1, 2]]


def test_keys_of_one_hash_that_differ_are_told_apart(monkeypatch):
    keys = torch.randn(1, 5, 3).repeat(2, 3, 1)
    monkeypatch.setattr(torch.Tensor, "mul_", lambda self, _: self.zero_())
    first = matching._first_of_equals(keys)
    assert torch.equal(keys.gather(1, first[..., None].expand_as(keys)), keys)


@pytest.mark.skipif("compiled" not in BACKENDS, reason="needs the CPU library")
def test_equal_keys_tie_in_the_library_whatever_hides_the_first_of_them():
    """21 and 36 are the same. 5, lower by less than a tie, hides 21, as it has its lane; 102 hides 5."""
    some = torch.stack((0.75 + torch.arange(2000) * 2.0**-25, torch.ones(2000)), -1)
    cosine = matching._normalise(some.clone())[0][:, 0]
    keys = torch.tensor([0.1, 1.0]).repeat(128, 1)
    for place, ulps in ((5, -3), (21, 0), (36, 0), (102, 2)):
        keys[place] = some[(cosine == cosine[1000] + ulps * 2.0**-24).nonzero()[0, 0]]
    x = torch.cat((torch.tensor([[1.0, 0.0]]), keys))[None]
    query_index, key_index = torch.tensor([[0]]), torch.arange(1, 129)[None]
    raw = torch.ops.todo_attn.match_rows(*(matching._normalise(x[:, i[0]])[0] for i in (query_index, key_index)))
    assert raw.item() == 36
    assert match("compiled", x, query_index, key_index)[0].item() == 21


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_tokens_of_zeros(backend, dtype):
    x = torch.randn(1, 8, 6).to(dtype).to(DEVICE)
    x[0, 3] = x[0, 5] = 0
    x[0, 6] = -x[0, 0]
    index = torch.tensor([[6, 3, 5]], device=DEVICE)
    position, similarity = match(backend, x, torch.tensor([[3, 0]], device=DEVICE), index)
    assert position.tolist() == [[0, 1]]  # a zero query ties with all; 0 is more than the similarity -1 of 0 and 6
    assert similarity.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("backend", "dtype"), [c for c in CASES if c[1] != torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-25, 1e-10, 1e15, 1e30])
def test_squares_outside_of_fp32(backend, dtype, size):
    x = (size * torch.randn(1, 40, 12)).to(dtype).to(DEVICE)
    check(backend, x, indices(1, 40, 12), indices(1, 40, 20))


@pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if b != "triton" or DEVICE == "cuda"]
)  # it stops the interpreter
def test_nan_stays_in_range(backend):
    x = torch.randn(1, 10, 6, device=DEVICE)
    x[0, 4] = float("nan")
    position, _ = match(backend, x, indices(1, 10, 30), torch.arange(5, device=DEVICE)[None])
    assert ((position >= 0) & (position < 5)).all()


@pytest.mark.skipif("compiled" not in BACKENDS, reason="needs the CPU library")
def test_many_more_keys_than_a_block_of_the_cache_holds():
    """And more queries than a task has; threads share them out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        x = torch.randn(2, 3000, 320)
        check("compiled", x, indices(2, 3000, 131), indices(2, 3000, 2500))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif("compiled" not in BACKENDS, reason="needs the CPU library")
def test_keys_that_rounding_alone_sets_apart_tie_in_the_library():
    x = torch.randn(1, 1, 320) * (1 + torch.arange(200)[None, :, None] / 3)
    position, _ = match("compiled", x, torch.arange(200)[None], torch.arange(200)[None])
    assert (position == 0).all()


@pytest.mark.skipif("compiled" not in BACKENDS, reason="needs the CPU library")
@pytest.mark.parametrize(
    ("query", "key", "name"),
    [
        (torch.ones(1, 2, 3).double(), torch.ones(1, 2, 3), "query"),
        (torch.ones(1, 3, 2).mT, torch.ones(1, 2, 3), "query"),
        (torch.ones(1, 2, 3), torch.ones(2, 3), "key"),
        (torch.ones(1, 2, 3), torch.ones(1, 2, 4), "key"),
        (torch.ones(1, 2, 3), torch.ones(1, 0, 3), "key"),
    ],
)
def test_the_library_refuses_what_it_cannot_take(query, key, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        torch.ops.todo_attn.match_rows(query, key)


def test_blocks_of_queries_and_memory(monkeypatch, watch_tensors):
    """Equal to one block, and no tensor has more elements than the limit or the rows themselves."""
    x = torch.randn(2, 400, 8)
    query_index, key_index = torch.randint(0, 400, (2, 301)), torch.randint(0, 400, (2, 350))
    whole = matching._match_in_blocks(x, query_index, key_index)
    monkeypatch.setattr(matching, "_SCORES", 2 * 350 * 7)
    with watch_tensors() as watch:
        blocks = matching._match_in_blocks(x, query_index, key_index)
    assert watch.largest <= max(x.numel(), 2 * 350 * 8) < 2 * 301 * 350
    for a, b in zip(whole, blocks, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    x = torch.randn(2, 6, 4, device=DEVICE)
    for b, keys in ((2, 3), (2, 0), (0, 3)):
        position, similarity = match(backend, x[:b], indices(b, 6, 0), indices(b, 6, keys))
        assert position.shape == similarity.shape == (b, 0)
    assert match(backend, x[:0], indices(0, 6, 5), indices(0, 6, 3))[0].shape == (0, 5)


def test_gradient_is_that_of_the_oracle():
    x = torch.randn(2, 30, 7, dtype=torch.float64)
    x[0, 4] = 0
    query_index, key_index = torch.randint(0, 30, (2, 40)), torch.randint(0, 30, (2, 11), dtype=torch.int32)
    weight = torch.randn(2, 40)

    def gradient(function, dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        (function(leaf, query_index, key_index)[1] * weight).sum().backward()
        return leaf.grad

    exact = gradient(reference.match_tokens, torch.float64)
    assert exact.abs().max() > 0.1
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        grad = gradient(match_tokens, dtype)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x = torch.randn(2, 12, 5, device=DEVICE, requires_grad=True)
    arguments = (x, indices(2, 12, 6), indices(2, 12, 4, torch.int32))
    torch.library.opcheck(torch.ops.todo_attn.match_tokens.default, (*arguments, backend))
    position = indices(2, 4, 6)
    backward = (torch.randn(2, 6, device=DEVICE), x.detach(), *arguments[1:], position)
    torch.library.opcheck(torch.ops.todo_attn.match_tokens_backward.default, backward)


@pytest.mark.skipif("compiled" not in BACKENDS, reason="needs the CPU library")
def test_opcheck_of_the_library():
    torch.library.opcheck(torch.ops.todo_attn.match_rows.default, (torch.randn(2, 12, 5), torch.randn(2, 7, 5)))


def test_traces_in_one_graph():
    x = torch.randn(2, 12, 5, device=DEVICE, requires_grad=True)
    query_index, key_index = indices(2, 12, 6), indices(2, 12, 4)
    compiled = torch.compile(match_tokens, backend="aot_eager", fullgraph=True)
    position, similarity = compiled(x, query_index, key_index)
    expected = match_tokens(x, query_index, key_index)
    assert torch.equal(position, expected[0])
    torch.testing.assert_close(similarity, expected[1])
    similarity.sum().backward()
    assert x.grad.abs().sum() > 0


def test_autocast_and_matmul_precision_change_nothing():
    x = torch.randn(1, 64, 32, device=DEVICE)
    arguments = (x, indices(1, 64, 20), indices(1, 64, 30))
    expected = match_tokens(*arguments)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(DEVICE, torch.bfloat16):
            actual = match_tokens(*arguments)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_flops_are_counted():
    from todo_attn.ops import flops  # noqa: F401  (registers the formula)

    x = torch.randn(2, 12, 5, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        match_tokens(x, indices(2, 12, 6), indices(2, 12, 4))
    assert counter.get_total_flops() == 2 * 2 * 6 * 4 * 5


def test_flops_of_attention_are_counted():
    from todo_attn import ops
    from todo_attn.ops import flops  # noqa: F401  (registers the formula)

    query, key = torch.randn(2, 10, 3, 8, device=DEVICE), torch.randn(2, 35, 3, 8, device=DEVICE)
    with FlopCounterMode(display=False) as counter:
        ops.downsampled_attention(query, key, key, (5, 7), (2, 3))
    assert counter.get_total_flops() == 4 * 2 * 3 * 10 * (2 * 2) * 8


def test_choice_of_backend(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.choose("auto", cpu, torch.float16) == "torch"
    assert backends.choose("triton", cpu, torch.float16) == "triton"
    with pytest.raises(ValueError, match="float64 is not one of"):
        backends.choose("triton", cpu, torch.float64)


ZERO = torch.zeros(2, 6, 4)
INDEX = torch.zeros(2, 3, dtype=torch.int64)
BAD = [
    ({"x": ZERO[0]}, ValueError, "x must have shape"),
    ({"x": ZERO.int()}, ValueError, "x must be of dtype"),
    ({"x": ZERO[..., :0]}, ValueError, "x must have at least one channel"),
    ({"query_index": INDEX[0]}, ValueError, "query_index must have shape"),
    ({"key_index": INDEX.float()}, ValueError, "key_index must be of dtype"),
    ({"key_index": INDEX[:1]}, ValueError, "key_index must have the batch of x"),
    ({"query_index": INDEX.to("meta")}, ValueError, "query_index must be on the device of x"),
    ({"key_index": INDEX[:, :0]}, ValueError, "key_index must name at least one key"),
    ({"query_index": INDEX + 6}, IndexError, "query_index must lie in .0, 6., got 6"),
    ({"key_index": INDEX - 1}, IndexError, "key_index must lie in .0, 6., got -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(change, error, message):
    arguments = {"x": ZERO, "query_index": INDEX, "key_index": INDEX} | change
    with pytest.raises(error, match=message):
        match_tokens(**arguments)


def test_it_works_beside_the_newer_precision_settings():
    x = torch.randn(1, 12, 8)
    index = torch.arange(12).unsqueeze(0)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        position, similarity = match_tokens(x, index[:, :4], index[:, 4:])
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    right = reference.match_tokens(x.double(), index[:, :4], index[:, 4:])
    assert torch.equal(position, right[0])
    torch.testing.assert_close(similarity, right[1], rtol=0, atol=1e-6)
