"""The Triton backward of ``ops.downsampled_attention``, in the interpreter (on a GPU where there is one).

The error bound is three times the error of torch's own backward in the same dtype, both against float64.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from todo_attn import ops
from todo_attn.kernels import backward, launch
from todo_attn.ops import fallback, reference

HALF = [torch.float16, torch.bfloat16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("bf16_in_the_interpreter", "poisoned")
triton_attention = partial(ops.downsampled_attention, backend="triton")


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever the kernels are to write starts as NaN, so a place that they leave out shows."""
    plain = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture
def hopper(monkeypatch):
    """Hopper's configurations: larger tiles, and head dim 40 in one tile of columns."""
    if DEVICE == "cpu":
        for module in (launch, backward):
            monkeypatch.setattr(module, "capability", lambda _: (9, 0))


def inputs(head_dim, dtype, grid, tokens, batch=1, heads=2, spread=1.0):
    query = (spread * torch.randn(batch, tokens, heads, head_dim)).to(dtype).to(DEVICE)
    key, value = (torch.randn(batch, grid[0] * grid[1], heads, head_dim).to(dtype).to(DEVICE) for _ in range(2))
    return query, key, value


def torch_attention(query, key, value, grid, factor, mode="nearest", scale=None):
    """torch's own op on the oracle's coarse tokens, in the dtype of the input."""
    key, value = (
        reference.downsample_tokens(t.flatten(2), grid, factor, mode=mode).unflatten(2, t.shape[2:]).transpose(1, 2)
        for t in (key, value)
    )
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, scale=scale).transpose(1, 2)


def gradients(attend, tensors, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    attend(*leaves).backward(grad)
    return [t.grad for t in leaves]


def check(tensors, grid, factor=1, mode="nearest", scale=None, grad=None):
    grad = torch.randn(tensors[0].shape).to(tensors[0]) if grad is None else grad
    how = {"grid": grid, "factor": factor, "mode": mode, "scale": scale}
    exact = gradients(partial(reference.downsampled_attention, **how), [t.double() for t in tensors], grad.double())
    peers = gradients(partial(torch_attention, **how), tensors, grad)
    actual = gradients(partial(triton_attention, **how), tensors, grad)
    for name, t, ours, peer, right in zip(("query", "key", "value"), tensors, actual, peers, exact, strict=True):
        assert ours.dtype == t.dtype and ours.shape == t.shape and ours.isfinite().all(), name
        for size in (torch.linalg.vector_norm, lambda x: x.abs().max()):
            floor = torch.finfo(t.dtype).eps * size(right)  # torch may happen to be exact on a small case
            error, bound = size(ours.double() - right), size(peer.double() - right)
            assert error <= max(3 * bound, floor), f"{name}: {error:.3g}, torch's own {bound:.3g}"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 128, 160, 256])
def test_head_dims(head_dim, dtype):
    """Keys end inside a tile (5 * 7 = 35) and queries inside a block; there are fewer of both than a tile has."""
    check(inputs(head_dim, dtype, (11, 15), tokens=37, heads=1), (11, 15), 2)


@pytest.mark.parametrize(("head_dim", "tokens"), [(40, 256), (80, 131)])
def test_several_tiles(head_dim, tokens, hopper):
    check(inputs(head_dim, torch.float16, (13, 20), tokens, heads=1), (13, 20))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
@pytest.mark.parametrize(("grid", "factor"), [((5, 7), (2, 3)), ((3, 5), 1), ((5, 7), 1.5)], ids=str)
def test_modes_and_factors(mode, grid, factor):
    check(inputs(40, torch.float16, grid, tokens=20, batch=2, heads=1), grid, factor, mode)


@pytest.mark.parametrize("scale", [0.0, 1.5, -0.3], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_scale_as_given(scale, dtype):
    check(inputs(40, dtype, (4, 9), tokens=20), (4, 9), 2, scale=scale)


@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_logits_from_tiny_to_30x(spread, hopper):
    for dtype in HALF:
        check(inputs(40, dtype, (7, 9), tokens=20, spread=spread), (7, 9))


def test_all_scores_far_below_zero():
    """The padded keys repeat the last one, so none of them has a score of 0, far above the rest."""
    query, key, value = inputs(40, torch.float16, (5, 7), tokens=20)
    query[..., 0], key[..., 0] = 60.0, -60.0
    check((query, key, value), (5, 7))


def test_views_that_a_processor_gives():
    """A fused projection; one gradient for all; rows of an odd length; tokens innermost."""
    query, key, value = torch.randn(2, 35, 6 * 40).half().to(DEVICE).unflatten(2, (6, 40)).split(2, 2)
    check((query, key, value), (5, 7), 2)
    check((query, key, value), (5, 7), grad=torch.ones((), dtype=query.dtype, device=DEVICE).expand(query.shape))
    query, key, value = (
        torch.randn(2, 35, 2 * 40 + 1).half().to(DEVICE)[..., 1:].unflatten(2, (2, 40)) for _ in range(3)
    )
    check((query, key, value), (5, 7), 2)
    query = torch.randn(2, 2, 40, 35).half().to(DEVICE).permute(0, 3, 1, 2)
    check((query, key, value), (5, 7), 2, grad=torch.randn_like(query))


@pytest.mark.parametrize("scale", [0.2, -0.2, 1.5])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_log_sum_exp(head_dim, scale):
    query, key, value = inputs(head_dim, torch.float16, (5, 7), tokens=20)
    lse = query.new_empty((1, 2, 20), dtype=torch.float32)
    launch.attention(query, key, value, (5, 7), (5, 7), "nearest", scale, lse=lse)
    scores = torch.einsum("bnhd,bmhd->bhnm", query.double(), key.double()) * scale
    torch.testing.assert_close(lse.double() * math.log(2), scores.logsumexp(-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (1, 0)])
def test_empty(batch, tokens):
    grads = gradients(
        partial(triton_attention, grid=(3, 4), factor=2),
        inputs(40, torch.float16, (3, 4), tokens, batch),
        torch.zeros(batch, tokens, 2, 40).half().to(DEVICE),
    )
    assert [g.shape for g in grads] == [(batch, tokens, 2, 40), (batch, 12, 2, 40), (batch, 12, 2, 40)]
    assert all((g == 0).all() for g in grads)


def op_of(*tensors, **how):
    return ops.downsampled_attention(*tensors, (3, 4), **how).grad_fn.name()


def test_only_what_it_serves_and_only_with_gradients(monkeypatch):
    """fp32, and whatever Triton does not run, have torch's backward; without gradients nothing is written for one."""
    half = inputs(40, torch.float16, (3, 4), tokens=5)
    calls = []
    plain = launch.Attend.__call__
    monkeypatch.setattr(launch.Attend, "__call__", lambda *args: calls.append(args[-1]) or plain(*args))
    with torch.no_grad():
        triton_attention(*(t.detach().requires_grad_() for t in half), (3, 4))
    triton_attention(*half, (3, 4))
    assert calls == [None, None]
    half[1].requires_grad_()
    assert "lse" in op_of(*half, backend="triton") and calls[2] is not None
    assert "lse" not in op_of(*half, backend="torch")
    assert "lse" not in op_of(*(t.float() for t in half), backend="triton")


def test_ops_pass_torchs_own_check():
    tensors = [t.requires_grad_() for t in inputs(8, torch.float16, (3, 4), tokens=5, heads=1)]
    how = ([3, 4], [2, 2], "nearest", 0.2, "triton")
    torch.library.opcheck(torch.ops.todo_attn.downsampled_attention_lse.default, (*tensors, *how))
    query, key, value = (t.detach() for t in tensors)
    out, lse = torch.ops.todo_attn.downsampled_attention_lse(query, key, value, *how)
    torch.library.opcheck(
        torch.ops.todo_attn.downsampled_attention_lse_backward.default,
        (torch.randn_like(query), query, key, value, out, lse, *how),
    )


def through_checkpoint(attend, reentrant):
    return lambda *tensors: checkpoint(attend, *tensors, use_reentrant=reentrant)


@pytest.mark.parametrize(
    "wrapped",
    [
        partial(through_checkpoint, reentrant=False),
        partial(through_checkpoint, reentrant=True),
        partial(torch.compile, backend="aot_eager", fullgraph=True),
    ],
    ids=["checkpoint", "reentrant checkpoint", "compiled"],
)
def test_the_same_gradients_however_it_is_called(wrapped):
    tensors = inputs(40, torch.float16, (4, 5), tokens=6)
    grad = torch.randn_like(tensors[0])
    attend = partial(triton_attention, grid=(4, 5), factor=2)
    for a, b in zip(gradients(attend, tensors, grad), gradients(wrapped(attend), tensors, grad), strict=True):
        assert torch.equal(a, b)


def test_autocast_gives_gradients_in_the_dtype_of_the_leaves():
    tensors = [t.requires_grad_() for t in inputs(40, torch.float32, (3, 4), tokens=5)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = triton_attention(*tensors, (3, 4), 2)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), tensors)
    exact = gradients(partial(reference.downsampled_attention, grid=(3, 4), factor=2), tensors, torch.ones_like(out))
    for a, b in zip(grads, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_twice_differentiated_is_refused():
    query, key, value = (t.requires_grad_() for t in inputs(40, torch.float16, (3, 4), tokens=5))
    (grad,) = torch.autograd.grad(triton_attention(query, key, value, (3, 4)).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


def test_operations_are_counted_as_torch_counts_its_own():
    from torch.utils.flop_counter import FlopCounterMode

    from todo_attn.ops import flops  # noqa: F401  (registers the formulas)

    for backend in ("triton", "torch"):
        tensors = [t.requires_grad_() for t in inputs(40, torch.float16, (4, 6), tokens=5)]
        with FlopCounterMode(display=False) as counter:
            ops.downsampled_attention(*tensors, (4, 6), 2, backend=backend).sum().backward()
        assert counter.get_total_flops() == 14 * 2 * 5 * 6 * 40


def test_a_backward_that_fails_leaves_the_forward(monkeypatch, caplog):
    """With "auto" torch serves the backward from then on, and that is said once; by name it is an error."""
    monkeypatch.setattr(fallback, "_failures", {})
    monkeypatch.setattr("todo_attn.ops.backends.choose", lambda backend, *_: "triton")
    calls = {"forward": 0, "backward": 0}
    plain = launch.attention

    def forward(*args, **kwargs):
        calls["forward"] += 1
        return plain(*args, **kwargs)

    def fails(*_):
        calls["backward"] += 1
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(launch, "attention", forward)
    monkeypatch.setattr(backward, "attention_backward", fails)
    tensors, grad = inputs(40, torch.float16, (3, 4), tokens=5), torch.randn(1, 5, 2, 40).half().to(DEVICE)
    exact = gradients(
        partial(reference.downsampled_attention, grid=(3, 4)), [t.double() for t in tensors], grad.double()
    )
    for _ in range(2):
        grads = gradients(partial(ops.downsampled_attention, grid=(3, 4)), tensors, grad)
        for a, b in zip(grads, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0.01, atol=0.01)
    assert calls == {"forward": 2, "backward": 1}
    (record,) = (record for record in caplog.records if record.name == "todo_attn")
    assert "for the backward of head_dim 40 in float16" in record.message
    with pytest.raises(ValueError, match=r"got 'triton': .*PassManager"):
        gradients(partial(triton_attention, grid=(3, 4)), tensors, grad)


def test_a_forward_that_fails_takes_its_backward_along(monkeypatch):
    monkeypatch.setattr(fallback, "_failures", {})
    monkeypatch.setattr("todo_attn.ops.backends.choose", lambda backend, *_: "triton")

    def fails(*_, **__):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(launch, "attention", fails)
    monkeypatch.setattr(backward, "attention_backward", lambda *_: pytest.fail("there is no log-sum-exp to read"))
    tensors, grad = inputs(40, torch.float16, (3, 4), tokens=5), torch.randn(1, 5, 2, 40).half().to(DEVICE)
    ours = gradients(partial(ops.downsampled_attention, grid=(3, 4)), tensors, grad)
    monkeypatch.undo()
    plain = gradients(partial(ops.downsampled_attention, grid=(3, 4), backend="torch"), tensors, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
