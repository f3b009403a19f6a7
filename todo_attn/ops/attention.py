"""Attention with keys and values on a coarser grid, as a torch.library op with a Triton and a torch backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..config.checks import ArgumentError
from ..config.modes import check_mode
from . import backends, checks, eager, fallback
from .downsample import coarse_tokens
from .precision import as_given
from .tracing import constant_in_graphs

# The backward recomputes at most this many scores at a time.
_BACKWARD_SCORES = 1 << 24


def _by_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Sequence[int],
    coarse: Sequence[int],
    mode: str,
    scale: float,
    backend: str,
    lse: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The attention, and its log-sum-exp in ``lse``; None if Triton cannot, unless ``backend`` is "triton"."""

    def launch() -> torch.Tensor:
        from ..kernels.launch import attention

        (gh, gw), (ch, cw) = grid, coarse
        return attention(query, key, value, (gh, gw), (ch, cw), mode, scale, lse=lse)

    return fallback.attempt(launch, query.device, query.dtype, query.shape[3], backend == "triton")


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Sequence[int],
    coarse: Sequence[int],
    mode: str,
    scale: float,
    backend: str,
) -> torch.Tensor:
    """``backend``: "triton", "torch", or "auto", which is Triton, and torch if Triton cannot run here."""
    (gh, gw), (ch, cw) = grid, coarse
    out = None if backend == "torch" else _by_triton(query, key, value, grid, coarse, mode, scale, backend)
    if out is not None:
        return out
    key, value = (coarse_tokens(t, (gh, gw), (ch, cw), mode).transpose(1, 2) for t in (key, value))
    with as_given(query):
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, scale=scale)
    return out.transpose(1, 2).contiguous()


_forward = torch.library.custom_op("todo_attn::downsampled_attention", _attention, mutates_args=())


@_forward.register_fake
def _(query, key, value, grid, coarse, mode, scale, backend):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)


def _by_torch(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    grid: Sequence[int],
    coarse: Sequence[int],
    mode: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. Scores are recomputed for a block of queries at a time, in fp32 or better."""
    (gh, gw), (ch, cw) = grid, coarse
    wide = torch.promote_types(query.dtype, torch.float32)

    def heads_first(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).to(wide)

    coarse_key, coarse_value = (heads_first(coarse_tokens(t, (gh, gw), (ch, cw), mode)) for t in (key, value))
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_key = torch.zeros_like(coarse_key, memory_format=torch.contiguous_format)
    grad_value = torch.zeros_like(coarse_value, memory_format=torch.contiguous_format)
    batch, tokens, heads, _ = query.shape
    block = max(1, _BACKWARD_SCORES // max(1, batch * heads * coarse_key.shape[2]))
    with as_given(query):
        for start in range(0, tokens, block):
            rows = slice(start, start + block)
            q, g, o = (heads_first(t[:, rows]) for t in (query, grad, out))  # (B, H, block, D)
            p = (q @ coarse_key.transpose(-1, -2)).mul_(scale).softmax(dim=-1)  # (B, H, block, M)
            grad_value += p.transpose(-1, -2) @ g
            grad_scores = (g @ coarse_value.transpose(-1, -2)).sub_((g * o).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            grad_query[:, rows] = (grad_scores @ coarse_key).transpose(1, 2).to(query.dtype)
            grad_key += grad_scores.transpose(-1, -2) @ q
    grads = [_refine(g.transpose(1, 2), (gh, gw), (ch, cw), mode) for g in (grad_key, grad_value)]
    return grad_query, *(g.to(key.dtype).contiguous() for g in grads)  # type: ignore[return-value]


def _refine(grad: torch.Tensor, grid: tuple[int, int], coarse: tuple[int, int], mode: str) -> torch.Tensor:
    """The adjoint of ``coarse_tokens``: (B, M, H, D) -> (B, gh*gw, H, D)."""
    batch, _, heads, head_dim = grad.shape
    if coarse == grid:
        return grad
    if not heads:  # which torch's pooling refuses
        return grad.new_empty((batch, grid[0] * grid[1], heads, head_dim))
    if mode == "mean":
        image = grad.flatten(2).transpose(1, 2).unflatten(2, coarse)
        full = image.new_empty((batch, heads * head_dim, *grid))
        full = torch.ops.aten._adaptive_avg_pool2d_backward(image.contiguous(), full)
        return full.flatten(2).transpose(1, 2).unflatten(2, (heads, head_dim))
    number = torch.arange(grid[0] * grid[1], device=grad.device).view(1, -1)
    index = coarse_tokens(number, grid, coarse, mode)[0]
    return grad.new_zeros((batch, grid[0] * grid[1], heads, head_dim)).index_copy_(1, index, grad)


_backward = torch.library.custom_op("todo_attn::downsampled_attention_backward", _by_torch, mutates_args=())


@_backward.register_fake
def _(grad, query, key, value, out, grid, coarse, mode, scale):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, *ctx.arguments = inputs
    ctx.save_for_backward(query, key, value, output)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    grid, coarse, mode, scale, _ = ctx.arguments
    query, key, value, out = ctx.saved_tensors
    grads = _backward(grad, query, key, value, out, grid, coarse, mode, scale)
    return (*grads, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("todo_attn::downsampled_attention_lse", mutates_args=())
def _forward_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: list[int],
    coarse: list[int],
    mode: str,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op above by Triton, in fp16 or bf16, if it will be differentiated.

    Also returns the log-sum-exp of each row for the Triton backward, (B, H, N) fp32; NaN if torch serves.
    """
    batch, tokens, heads, _ = query.shape
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    out = _by_triton(query, key, value, grid, coarse, mode, scale, backend, lse)
    if out is not None:
        return out, lse
    return _attention(query, key, value, grid, coarse, mode, scale, "torch"), lse.fill_(float("nan"))


@_forward_lse.register_fake
def _(query, key, value, grid, coarse, mode, scale, backend):  # type: ignore[no-untyped-def]
    batch, tokens, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("todo_attn::downsampled_attention_lse_backward", mutates_args=())
def _backward_lse(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grid: list[int],
    coarse: list[int],
    mode: str,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value by Triton; by torch if Triton failed, in the forward or here."""
    (gh, gw), (ch, cw) = grid, coarse

    def launch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from ..kernels.backward import attention_backward

        return attention_backward(grad, query, key, value, out, lse, (gh, gw), (ch, cw), mode, scale)

    grads = fallback.attempt(launch, query.device, query.dtype, query.shape[3], backend == "triton", backward=True)
    if grads is not None:
        return grads[0], *(_refine(g, (gh, gw), (ch, cw), mode).contiguous() for g in grads[1:])  # type: ignore[return-value]
    return _by_torch(grad, query, key, value, out, grid, coarse, mode, scale)


@_backward_lse.register_fake
def _(grad, query, key, value, out, lse, grid, coarse, mode, scale, backend):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _setup_context_lse(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, *ctx.arguments = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)


def _differentiate_lse(ctx, grad, _):  # type: ignore[no-untyped-def]
    return (*_backward_lse(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None, None)


_forward_lse.register_autograd(_differentiate_lse, setup_context=_setup_context_lse)


# torch.compile cannot trace this (up to torch 2.11), so it is called while tracing.
@constant_in_graphs
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """Cast ``x`` as autocast does for torch's own attention; fp64 stays."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def downsampled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    factor: float | tuple[float, float] = 1,
    *,
    mode: str = "nearest",
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of every query to keys and values on a coarser spatial grid (ToDo, arXiv 2402.13573, eq. 2).

    Args:
        query: (B, N, H, D); fp32, fp16, bf16 or fp64; any strides. N need not be gh*gw.
        key, value: (B, gh*gw, H, D), row-major over the grid; dtype and device of ``query``; any strides.
        grid: (gh, gw), height and width of the keys in tokens.
        factor: tokens per coarse token along each axis, a number of at least 1 or (fh, fw). The coarse grid is
            (gh / fh, gw / fw), rounded down.
        mode: "nearest", "nearest-exact" or "mean", as in :func:`todo_attn.ops.downsample_tokens`.
        scale: multiplies the scores. None is D ** -0.5; 0.0 is allowed.
        backend: "triton" (fp16, bf16, fp32; D a multiple of 8 up to 256; CUDA, or the CPU with TRITON_INTERPRET=1),
            "torch" (no such limits), or "auto": Triton for fp16 and bf16 on a GPU that can run it, else torch. If
            Triton cannot compile or launch, "auto" logs why, and torch serves from then on.

    Returns:
        (B, N, H, D), contiguous, in the dtype of ``query`` (under autocast in autocast's, like torch's own attention).
        Differentiable once in query, key and value, by ``backward`` and ``torch.autograd.grad``, not by ``torch.func``.
        The backward recomputes the scores, so memory stays linear: by Triton if that ran the forward in fp16 or bf16,
        else by torch in fp32 or better.

    Raises:
        ArgumentError: a shape, dtype, device or value that does not fit, naming the argument, what it must be and what
            it was; a backend that cannot run here, with the reason. Raised before anything is computed.
    """
    checks.tensor("query", query, "B, N, H, D", checks.FLOATS)
    plain = eager.plain(query, key, value)
    if not plain:
        query, key, value = (_autocast(t) for t in (query, key, value))
    for name, t in (("key", key), ("value", value)):
        checks.tensor(name, t, "B, gh*gw, H, D", checks.FLOATS)
        checks.same(name, t, "query", query)
        if t.shape[0] != query.shape[0] or t.shape[2:] != query.shape[2:]:
            raise ArgumentError(
                name, f"must have the batch, heads and head_dim of query, {tuple(query.shape)}, got {tuple(t.shape)}"
            )
    if key.shape != value.shape:
        raise ArgumentError("value", f"must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")
    if query.shape[3] < 1:
        raise ArgumentError("query", f"must have a head_dim of at least 1, got shape {tuple(query.shape)}")
    grid = checks.grid(grid, key.shape[1], "key")
    coarse = checks.coarse_grid(factor, grid)
    mode, scale = check_mode(mode), checks.scale(scale, query.shape[3])
    chosen = backends.choose(backend, query.device, query.dtype, query.shape[3])
    if chosen == "triton":
        chosen = backend
        differentiates = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if differentiates and query.dtype != torch.float32:
            return _forward_lse(query, key, value, grid, coarse, mode, scale, chosen)[0]
    return (_attention if plain else _forward)(query, key, value, grid, coarse, mode, scale, chosen)
