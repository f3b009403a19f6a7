"""``ops.downsampled_attention`` on every backend that runs here, against the float64 oracle.

The error bound is at most twice the error of torch's own attention in the same dtype.
"""

import pytest
import torch
import torch.nn.functional as F

from todo_attn import ops
from todo_attn.ops import reference

HALF = [torch.float16, torch.bfloat16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("bf16_in_the_interpreter")
HEAD_DIMS = [8, 24, 40, 64, 80, 96, 128, 160, 256]


def inputs(head_dim, dtype, grid, tokens=None, batch=2, heads=2, spread=1.0):
    shape = (batch, tokens or grid[0] * grid[1], heads, head_dim)
    query = (spread * torch.randn(shape)).to(dtype).to(DEVICE)
    key, value = (torch.randn(batch, grid[0] * grid[1], heads, head_dim).to(dtype).to(DEVICE) for _ in range(2))
    return query, key, value


def torch_attention(query, key, value, grid, factor, mode, scale=None):
    """torch's own op on the oracle's coarse tokens, in the dtype of the input."""
    key, value = (
        reference.downsample_tokens(t.flatten(2), grid, factor, mode=mode).unflatten(2, t.shape[2:]).transpose(1, 2)
        for t in (key, value)
    )
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, scale=scale).transpose(1, 2)


def check(query, key, value, grid, factor=1, mode="nearest", scale=None, backend="triton"):
    exact = reference.downsampled_attention(
        query.double(), key.double(), value.double(), grid, factor, mode=mode, scale=scale
    )
    peer = torch_attention(query, key, value, grid, factor, mode, scale).double()
    actual = ops.downsampled_attention(query, key, value, grid, factor, mode=mode, scale=scale, backend=backend)
    assert actual.dtype == query.dtype
    assert actual.shape == query.shape
    assert torch.isfinite(actual).all()
    # A rounding step of the largest output is the floor: torch may happen to be exact on a small case.
    floor = torch.finfo(query.dtype).eps * exact.abs().max()
    error, bound = (actual.double() - exact).abs().max(), (peer - exact).abs().max()
    assert error <= max(2 * bound, floor), f"max error {error:.3g}, torch's own {bound:.3g}"
    assert (actual.double() - exact).norm() <= max(2 * (peer - exact).norm(), floor)


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def use_tma(request, monkeypatch):
    """Tiles through pointers, as before Hopper, and by descriptor, as from Hopper on: the interpreter takes both."""
    monkeypatch.setattr("todo_attn.kernels.launch.has_tma", lambda *_: request.param)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, dtype, use_tma):
    """Keys end inside a tile (5 * 13 = 65) and queries inside a block."""
    check(*inputs(head_dim, dtype, (11, 27), tokens=70), (11, 27), 2)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 6, 7, 8, (1, 3), (4, 2), (9, 1), 1.5, (2.4, 1)], ids=str)
@pytest.mark.parametrize("grid", [(16, 16), (9, 23), (30, 10)], ids=str)
def test_factors_grids_and_modes(grid, factor, mode):
    fh, fw = factor if isinstance(factor, tuple) else (factor, factor)
    if fh > grid[0] or fw > grid[1]:
        pytest.fail("the grids above hold every factor")
    check(*inputs(40, torch.float32, grid, tokens=70, batch=1), grid, factor, mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
def test_torch_backend(dtype, mode):
    check(*inputs(40, dtype, (9, 14)), (9, 14), (2, 3), mode, backend="torch")
    check(*inputs(40, dtype, (9, 14)), (9, 14), (1.5, 2), mode, backend="torch")
    check(*inputs(7, dtype, (9, 14)), (9, 14), 2, mode, backend="torch")  # an odd head dim


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_logits_from_tiny_to_30x(head_dim, spread):
    for dtype in (torch.float32, *HALF):
        check(*inputs(head_dim, dtype, (12, 13), spread=spread), (12, 13), 1)


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, -0.3, 2], ids=str)
def test_scale_as_given(head_dim, scale):
    check(*inputs(head_dim, torch.float32, (8, 9)), (8, 9), 2, scale=scale)


@pytest.mark.parametrize("head_dim", [40, 64])
def test_extreme_rows_stay_finite(head_dim):
    """One key far above the rest, all scores far below zero, and products near the end of fp32."""
    query, key, value = inputs(head_dim, torch.float32, (10, 10))
    key[:, 37] = 50 * query[:, :1].mean(1)
    check(query, key, value, (10, 10))
    far = torch.full_like(query, 1e3), torch.full_like(key, -1e3), value
    check(*far, (10, 10))
    for size in (1e9, 1e17):  # scores up to 1e37: fp32 ends at 3.4e38
        out = ops.downsampled_attention(size * query, size * key, value, (10, 10), backend="triton")
        assert torch.isfinite(out).all()
        assert out.abs().max() <= value.abs().max() * (1 + 1e-5)


@pytest.fixture
def hopper(monkeypatch):
    """Hopper's configuration in the interpreter: larger tiles, and the polynomial exp2."""
    if DEVICE == "cpu":
        monkeypatch.setattr("todo_attn.kernels.launch.capability", lambda _: (9, 0))


def sink(query, key):
    key[:, 0] *= 20


def flat(query, key):
    query.zero_()


def smooth(query, key):
    """Neighbours are alike: waves along the tokens, longer from channel to channel."""
    for t in (query, key):
        token = torch.arange(t.shape[1], device=t.device)[:, None, None]
        channel = torch.arange(1, t.shape[3] + 1, device=t.device)
        t.copy_(2 * torch.sin(token / (3 * channel)) + 0.1 * t)


def one_key_above(query, key):
    """One key 13 to 19 bits above the mean of the others, which together still count."""
    head_dim = query.shape[-1]
    query[..., 0], key[..., 0] = 8.0, 0.0
    bits = torch.linspace(13, 19, query.shape[0] * query.shape[2], device=query.device).view(query.shape[0], -1)
    key[:, key.shape[1] // 3, :, 0] = bits * 0.6931 * head_dim**0.5 / 8.0


@pytest.mark.parametrize("head_dim", [40, 160])
@pytest.mark.parametrize("shape", [sink, flat, smooth, one_key_above], ids=lambda f: f.__name__)
def test_rows_of_every_shape(shape, head_dim, hopper):
    """The last tile ends early: 17 * 19 = 323 keys."""
    for dtype in HALF:
        query, key, value = inputs(head_dim, dtype, (17, 19), tokens=40, batch=1)
        shape(query, key)
        check(query, key, value, (17, 19))


@pytest.mark.parametrize(
    ("head_dim", "spread"),
    [(40, 1e-3), (40, 30.0), (64, 1e-3), (64, 30.0), (8, 1.0), (56, 1.0), (80, 30.0), (128, 1.0), (160, 1e-3)],
)
def test_settings_of_hopper(head_dim, spread, hopper):
    for dtype in HALF:
        check(*inputs(head_dim, dtype, (17, 19), tokens=40, batch=1, spread=spread), (17, 19))


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [20, 25, 27, 28, 29, 33])
def test_logits_whose_rounding_is_many_bits(bits, sign, falling, hopper):
    """Logits near 2^bits, whose neighbours in fp32 lie apart by 2^(bits-23), and which fp32 products give exactly.

    From 2^28 on the kernel takes another slope, and from a scale of 0.69 on (33 bits) another formula. The result is
    right to fp16's own rounding."""
    grid, head_dim = (17, 19), 40
    step = torch.arange(323).flip(0) if falling else torch.arange(323)
    query, key = torch.zeros(1, 16, 1, head_dim), torch.zeros(1, 323, 1, head_dim)
    query[..., 0] = 2.0**15 + 2048.0 * torch.arange(16)[:, None]  # shifts that round otherwise from row to row
    key[..., 0] = sign * 2.0**15  # 2^30 and more, plus 128 for each step
    query[..., 1], key[..., 1] = 128.0, (step // 9)[:, None]
    query[:, 12:, :, 0] = 0.0  # and rows with small logits
    value = torch.randn(1, 323, 1, head_dim)
    arguments = [t.to(torch.float16).to(DEVICE) for t in (query, key, value)]
    scale = 2.0 ** (bits - 30) * 0.6932
    actual = ops.downsampled_attention(*arguments, grid, scale=scale, backend="triton")
    exact = reference.downsampled_attention(*(t.double() for t in arguments), grid, scale=scale)
    torch.testing.assert_close(actual.double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("falling", [False, True])
def test_logits_that_cross_to_another_slope(sign, falling, hopper):
    """Tiles whose maxima lie on both sides of 2^28, either way round: the largest key alone counts."""
    size = torch.linspace(1, 120, 323) * sign
    size = size.flip(0) if falling else size
    query, key = torch.zeros(1, 8, 1, 40), torch.zeros(1, 323, 1, 40)
    query[..., 0], key[..., 0] = 2.0**15, (size * 512)[:, None]  # up to 2^31, times 0.23
    value = torch.randn(1, 323, 1, 40).to(torch.float16).to(DEVICE)
    query, key = (t.to(torch.float16).to(DEVICE) for t in (query, key))
    smallest, largest = (key[..., 0].double() * 2.0**15 * 0.228).abs().aminmax()
    assert smallest < 2.0**28 < largest
    out = ops.downsampled_attention(query, key, value, (17, 19), backend="triton")
    assert torch.equal(out, value[:, key[0, :, 0, 0].argmax()][:, None].expand_as(out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [None, -3.0])
def test_largest_inputs(dtype, scale, hopper):
    """As large as fp16 goes, or as fp32 products go; times a scale of 3 those end above fp32."""
    query, key, value = inputs(40, torch.float32, (9, 9), tokens=20, batch=1)
    largest = 6e4 if dtype == torch.float16 else (3e38 / torch.einsum("bnhd,bmhd->bhnm", query, key).abs().max()) ** 0.5
    if dtype == torch.float16:
        query, key = query / query.abs().max(), key / key.abs().max()
    query, key, value = (query * largest).to(dtype), (key * largest).to(dtype), value.to(dtype)
    best = torch.einsum("bnhd,bmhd->bhnm", query.double(), key.double() * (1 if scale is None else -1)).argmax(-1)
    expected = value.transpose(1, 2).gather(2, best[..., None].expand(-1, -1, -1, 40)).transpose(1, 2)
    out = ops.downsampled_attention(query, key, value, (9, 9), scale=scale, backend="triton")
    torch.testing.assert_close(out, expected)


def test_nan_in_one_key_shows(hopper):
    """As in torch's own attention, wherever in the tile the key lies."""
    for place in range(9):
        query, key, value = inputs(40, torch.float16, (3, 3), tokens=3, batch=1, heads=1)
        key[:, place, :, 3] = float("nan")
        assert not torch.isfinite(ops.downsampled_attention(query, key, value, (3, 3), backend="triton")).any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_any_strides(backend):
    """(B, H, D, N) storage, an expanded batch, and a slice that starts in the middle of a row."""
    grid = (6, 9)
    query = torch.randn(2, 3, 40, 50, device=DEVICE).permute(0, 3, 1, 2)
    key = torch.randn(1, 54, 3, 40, device=DEVICE).expand(2, -1, -1, -1)
    value = torch.randn(2, 54, 3, 83, device=DEVICE)[..., 3:].as_strided(
        (2, 54, 3, 40), (54 * 3 * 83, 3 * 83, 83, 2), 3
    )
    check(query, key, value, grid, 2, backend=backend)


def fused(head_dim):
    """One projection for all three: (B, N, 3 * H * D)."""
    return torch.randn(2, 54, 9 * head_dim).unflatten(2, (9, head_dim)).split(3, 2)


def odd(head_dim):
    """Rows of an odd length."""
    return (torch.randn(2, 54, 3 * head_dim + 1)[..., :-1].unflatten(2, (3, head_dim)) for _ in range(3))


def odd_values(head_dim):
    """Only those of the values."""
    return *list(fused(head_dim))[:2], list(odd(head_dim))[2]


def unaligned(head_dim):
    """Rows of a length that is a multiple of 8, from the second element on."""
    return (torch.randn(2, 54, 3 * head_dim + 8)[..., 1:-7].unflatten(2, (3, head_dim)) for _ in range(3))


def one_head(head_dim):
    """The stride along an axis of length 1 says nothing, and here it is odd."""
    return (torch.randn(2 * 54 * head_dim).as_strided((2, 54, 1, head_dim), (54 * head_dim, head_dim, 3, 1))
            for _ in range(3))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("views", "unit"), [(fused, 8), (odd, 1), (odd_values, 1), (unaligned, 8), (one_head, 8)], ids=lambda v: str(v)[:20]
)
def test_views_that_a_processor_gives(views, unit, dtype):
    """16 bytes at a time if all strides allow it, right with all others."""
    from todo_attn.kernels.pack import strides

    def moved(x):  # to the device and dtype, with its strides
        whole = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0).to(dtype).to(DEVICE)
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    query, key, value = map(moved, views(40))
    for mode in ("nearest", "mean"):
        check(query, key, value, (6, 9), 2, mode)
    assert strides(key, value)[0] == unit


def test_every_output_is_written(monkeypatch):
    """Outputs and packed keys start as NaN; a place the kernels leave out shows."""
    plain = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for head_dim in (8, 40, 72, 80):
        check(*inputs(head_dim, torch.float32, (7, 11), tokens=45), (7, 11), 2)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty(backend):
    query, key, value = inputs(40, torch.float32, (4, 4))
    assert ops.downsampled_attention(query[:0], key[:0], value[:0], (4, 4), 2, backend=backend).shape == (0, 16, 2, 40)
    assert ops.downsampled_attention(query[:, :0], key, value, (4, 4), 2, backend=backend).shape == (2, 0, 2, 40)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
def test_gradients_of_no_heads(backend, mode):
    leaves = [t[:, :, :0].requires_grad_() for t in inputs(40, torch.float32, (4, 4))]
    ops.downsampled_attention(*leaves, (4, 4), 2, mode=mode, backend=backend).sum().backward()
    assert all(t.grad.shape == (2, 16, 0, 40) for t in leaves)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
@pytest.mark.parametrize(("grid", "factor"), [((6, 8), 2), ((7, 9), (2, 3)), ((4, 5), 1), ((7, 10), 1.5)], ids=str)
def test_gradients(backend, mode, grid, factor, monkeypatch):
    """Against autograd through the oracle, with the queries taken in several blocks."""
    monkeypatch.setattr("todo_attn.ops.attention._BACKWARD_SCORES", 2 * 2 * 50 * 7)
    tensors = inputs(40, torch.float32, grid, tokens=50)
    grad = torch.randn_like(tensors[0])

    def gradients(function, dtype, **options):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        function(*leaves, grid, factor, mode=mode, scale=0.3, **options).backward(grad.to(dtype))
        return [t.grad for t in leaves]

    exact = gradients(reference.downsampled_attention, torch.float64)
    actual = gradients(ops.downsampled_attention, torch.float32, backend=backend)
    for name, a, e in zip(("query", "key", "value"), actual, exact, strict=True):
        assert (a.double() - e).norm() <= 1e-5 * max(e.norm(), 1e-3), name


def test_gradcheck():
    tensors = [t.double().requires_grad_() for t in inputs(8, torch.float32, (4, 5), tokens=6, batch=1, heads=1)]
    torch.autograd.gradcheck(lambda q, k, v: ops.downsampled_attention(q, k, v, (4, 5), 2, scale=0.7), tensors)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("mode", ["nearest", "mean"])
def test_opcheck(backend, mode):
    tensors = [t.requires_grad_() for t in inputs(40, torch.float32, (6, 7), tokens=20)]
    arguments = (*tensors, [6, 7], [2, 3], mode, 0.2, backend)
    torch.library.opcheck(torch.ops.todo_attn.downsampled_attention.default, arguments)
    query, key, value = (t.detach() for t in tensors)
    out = torch.randn_like(query)
    torch.library.opcheck(
        torch.ops.todo_attn.downsampled_attention_backward.default,
        (torch.randn_like(query), query, key, value, out, [6, 7], [2, 3], mode, 0.2),
    )


def test_backward_never_holds_all_scores(watch_tensors):
    """The largest tensor of the backward stays far below N x M."""
    query, key, value = (t.requires_grad_() for t in inputs(8, torch.float32, (64, 64), tokens=8192, heads=1, batch=1))
    out = ops.downsampled_attention(query, key, value, (64, 64))
    from todo_attn.ops import attention

    arguments = (torch.ones_like(out), query, key, value, out)
    with watch_tensors() as watch, torch.no_grad():
        attention._backward._init_fn(*(t.detach() for t in arguments), [64, 64], [64, 64], "nearest", 0.3)
    assert watch.largest <= attention._BACKWARD_SCORES < 8192 * 4096


BAD = [
    ({"query": torch.zeros(1, 6, 8)}, "query must have shape"),
    ({"query": torch.zeros(1, 6, 1, 8, dtype=torch.int32)}, "query must be of dtype"),
    (
        {"query": torch.zeros(1, 6, 1, 0), "key": torch.zeros(1, 12, 1, 0), "value": torch.zeros(1, 12, 1, 0)},
        "head_dim",
    ),
    ({"key": torch.zeros(2, 12, 1, 8)}, "key must have the batch, heads and head_dim"),
    ({"key": torch.zeros(1, 12, 2, 8)}, "key must have the batch, heads and head_dim"),
    ({"value": torch.zeros(1, 12, 1, 16)}, "value must have the batch, heads and head_dim"),
    ({"value": torch.zeros(1, 11, 1, 8)}, "value must have the shape of key"),
    ({"key": torch.zeros(1, 12, 1, 8, dtype=torch.float64)}, "key must have the dtype of query"),
    ({"value": torch.zeros(1, 12, 1, 8, device="meta")}, "value must be on the device of query"),
    ({"grid": (4, 4)}, "grid must match the tokens of key"),
    ({"factor": 0}, "factor must be at least 1"),
    ({"factor": float("nan")}, "factor must be a finite number"),
    ({"factor": 5}, "factor must not exceed the grid"),
    ({"mode": "max"}, "mode must be one of"),
    ({"scale": float("nan")}, "scale must be None or a finite number"),
    ({"scale": "1"}, "scale must be None or a finite number"),
    ({"backend": "flash"}, "backend must be one of"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(change, message):
    arguments = {
        "query": torch.zeros(1, 6, 1, 8),
        "key": torch.zeros(1, 12, 1, 8),
        "value": torch.zeros(1, 12, 1, 8),
        "grid": (3, 4),
    } | change
    with pytest.raises(ValueError, match=message):
        ops.downsampled_attention(**arguments)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [(12, torch.float32, "head_dim 12"), (264, torch.float32, "head_dim 264"), (40, torch.float64, "float64")],
)
def test_triton_that_cannot_run_says_why(head_dim, dtype, reason):
    query, key, value = inputs(head_dim, dtype, (3, 4))
    with pytest.raises(ValueError, match=f"backend must be 'auto' or 'torch' here, got 'triton': .*{reason}"):
        ops.downsampled_attention(query, key, value, (3, 4), backend="triton")
    check(query, key, value, (3, 4), backend="auto")


def test_triton_without_interpreter_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    query, key, value = (t.cpu() for t in inputs(40, torch.float32, (3, 4)))
    with pytest.raises(ValueError, match="device 'cpu' is not an NVIDIA GPU"):
        ops.downsampled_attention(query, key, value, (3, 4), backend="triton")


def test_compiles_in_one_graph():
    function = torch.compile(
        lambda q, k, v: ops.downsampled_attention(q, k, v, (6, 7), 2, mode="mean"), backend="aot_eager", fullgraph=True
    )
    tensors = [t.requires_grad_() for t in inputs(40, torch.float32, (6, 7))]
    out = function(*tensors)
    torch.testing.assert_close(out, ops.downsampled_attention(*tensors, (6, 7), 2, mode="mean"))
    out.sum().backward()
    assert all(t.grad is not None for t in tensors)


def test_what_torch_compile_cannot_follow_is_not_in_the_graph(monkeypatch):
    """Up to torch 2.11: is Triton there, on what GPU (half dtypes on one ask), and has the device an autocast."""
    untraceable = torch.compiler.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    function = torch.compile(
        lambda q, k, v: ops.downsampled_attention(q, k, v, (6, 7), 2, backend="triton"),
        backend="aot_eager",
        fullgraph=True,
    )
    tensors = inputs(40, torch.float16, (6, 7))
    assert torch.equal(function(*tensors), ops.downsampled_attention(*tensors, (6, 7), 2, backend="triton"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_in_torchs_own_attention(dtype, compiled):
    """Mixed inputs become autocast's dtype, whatever the backend and compiled or not; fp32 gradients come back."""
    query, key, value = (t.requires_grad_() for t in inputs(40, torch.float32, (6, 7)))
    function = ops.downsampled_attention
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.autocast(DEVICE, dtype):
        expected = F.scaled_dot_product_attention(query, key.to(dtype), value).dtype
        out = function(query, key.to(dtype), value, (6, 7), 2)
    assert out.dtype == expected == dtype
    plain = ops.downsampled_attention(*(t.to(dtype) for t in (query, key, value)), (6, 7), 2)
    torch.testing.assert_close(out, plain, rtol=0.02, atol=0.02)
    with torch.autocast(DEVICE, dtype):
        out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (query, key, value))


def test_backward_stays_wide_under_autocast():
    tensors = [t.double().requires_grad_() for t in inputs(8, torch.float32, (4, 5))]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ops.downsampled_attention(*tensors, (4, 5), 2)
        assert out.dtype == torch.float64
        grads = torch.autograd.grad(out.sum(), tensors)
    exact = torch.autograd.grad(reference.downsampled_attention(*tensors, (4, 5), 2).sum(), tensors)
    for actual, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("scale", [5e-324, 1e-40, 1e38, -3e38, 1e300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_scales_at_the_ends_of_fp32_and_beyond(dtype, scale, hopper):
    """Small ones make the mean of the values, large ones take the best key's."""
    query, key, value = inputs(40, dtype, (3, 3), tokens=5, batch=1)
    out = ops.downsampled_attention(query, key, value, (3, 3), scale=scale, backend="triton")
    exact = reference.downsampled_attention(*(t.double() for t in (query, key, value)), (3, 3), scale=scale)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
