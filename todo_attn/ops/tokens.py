"""Token movement as torch.library ops: gather, scatter, recover, and the base token of each patch.

Here each op has a kernel of plain torch ops, for every device and dtype. The compiled libraries register their own for
CPU and CUDA, which take precedence.
"""

from __future__ import annotations

import torch

from ..config.checks import ArgumentError
from . import checks, eager


def _rows(index: torch.Tensor, channels: int) -> torch.Tensor:
    """Expand (B, K) to (B, K, C) without copying, for torch's gather and scatter."""
    return index.long().unsqueeze(-1).expand(-1, -1, channels)


def _put(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
    """``x[b, index[b, k]] = source[b, k]``."""
    if x.device.type == "cpu":
        # On the CPU scatter_ reads all of x. Elsewhere index_put_ would accept negative indices.
        x.index_put_((torch.arange(x.shape[0], device=x.device).unsqueeze(1), index.long()), source)
    else:
        x.scatter_(1, _rows(index, x.shape[2]), source)


# The kernels in torch ops.


def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    checks.in_range("index", index, x.shape[1])
    return x.gather(1, _rows(index, x.shape[2]))


def _scatter_(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
    checks.in_range("index", index, x.shape[1])
    _put(x, index, source)


def _scatter(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    checks.in_range("index", index, x.shape[1])
    out = x.clone(memory_format=torch.contiguous_format)
    _put(out, index, source)
    return out


def _recover(y: torch.Tensor, source: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    checks.in_range("source", source, y.shape[1])
    out = y.gather(1, _rows(source, y.shape[2]))
    return out if residual is None else out.add_(residual)


def _select_base(score: torch.Tensor, height: int, width: int, patch_height: int, patch_width: int) -> torch.Tensor:
    down, across = height // patch_height, width // patch_width
    image = score.unflatten(1, (height, width))[:, : down * patch_height, : across * patch_width]
    patches = image.unflatten(2, (across, patch_width)).unflatten(1, (down, patch_height)).transpose(2, 3)
    offset = patches.flatten(3).argmax(-1)  # the first of equal scores
    top = torch.arange(down, device=score.device)[:, None] * patch_height
    left = torch.arange(across, device=score.device) * patch_width
    # (top + dy) * width + (left + dx)
    token = (top + offset // patch_width) * width + left + offset % patch_width
    return token.flatten(1)


gather_op = torch.library.custom_op("todo_attn::gather_tokens", _gather, mutates_args=())
scatter_op = torch.library.custom_op("todo_attn::scatter_tokens", _scatter, mutates_args=())
scatter_inplace_op = torch.library.custom_op("todo_attn::scatter_tokens_", _scatter_, mutates_args={"x"})
recover_op = torch.library.custom_op("todo_attn::recover_tokens", _recover, mutates_args=())
select_base_op = torch.library.custom_op("todo_attn::select_base_tokens", _select_base, mutates_args=())


# Fake kernels. Outputs are contiguous, whatever the strides of the arguments.


@gather_op.register_fake
def _(x, index):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


@scatter_op.register_fake
def _(x, index, source):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@scatter_inplace_op.register_fake
def _(x, index, source):  # type: ignore[no-untyped-def]
    return None


@recover_op.register_fake
def _(y, source, residual):  # type: ignore[no-untyped-def]
    return y.new_empty((y.shape[0], source.shape[1], y.shape[2]))


@select_base_op.register_fake
def _(score, height, width, patch_height, patch_width):  # type: ignore[no-untyped-def]
    patches = (height // patch_height) * (width // patch_width)
    return score.new_empty((score.shape[0], patches), dtype=torch.int64)


# Autograd.


def _sum_rows(grad: torch.Tensor, index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Add each row of ``grad`` (B, K, C) at ``index`` (B, K): (B, tokens, C), summed in fp32 for the half dtypes."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    total = torch.zeros((grad.shape[0], tokens, grad.shape[2]), dtype=dtype, device=grad.device)
    return total.scatter_add(1, _rows(index, grad.shape[2]), grad.to(dtype)).to(grad.dtype)


def _gather_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.tokens = x.shape[1]


def _gather_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (index,) = ctx.saved_tensors
    return _sum_rows(grad, index, ctx.tokens), None


def _scatter_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (index,) = ctx.saved_tensors
    to_x, _, to_source = ctx.needs_input_grad
    grad_x = grad.scatter(1, _rows(index, grad.shape[2]), 0.0) if to_x else None
    return grad_x, None, gather_op(grad, index) if to_source else None


def _recover_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    y, source, _ = inputs
    ctx.save_for_backward(source)
    ctx.tokens = y.shape[1]


def _recover_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (source,) = ctx.saved_tensors
    to_y, _, to_residual = ctx.needs_input_grad
    return _sum_rows(grad, source, ctx.tokens) if to_y else None, None, grad if to_residual else None


gather_op.register_autograd(_gather_backward, setup_context=_gather_setup)
scatter_op.register_autograd(_scatter_backward, setup_context=_scatter_setup)
recover_op.register_autograd(_recover_backward, setup_context=_recover_setup)


# The public functions.


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather the kept tokens: ``out[b, k] = x[b, index[b, k]]`` (DaTo, arXiv 2501.00375, section 3.2).

    Args:
        x: (B, N, C) tokens; fp32, fp16, bf16 or fp64; any strides and device.
        index: (B, K) int32 or int64, each in [0, N); may repeat.

    Returns:
        (B, K, C), contiguous, in the dtype of ``x``. Differentiable in ``x``, summed in fp32 for the half dtypes.

    Raises:
        ArgumentError: a shape, dtype or device that does not fit, naming the argument.
        IndexError: an index out of range, negative ones included, on the CPU; on CUDA a device assert.
    """
    checks.tokens("x", x)
    checks.index("index", index, "B, K", "x", x)
    return gather_op(x, index)


def _check_scatter(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
    checks.tokens("x", x)
    checks.index("index", index, "B, K", "x", x)
    checks.tokens("source", source)
    checks.same("source", source, "x", x)
    checks.shape("source", source, (*index.shape, x.shape[2]), "that of index and the channels of x")


def scatter_tokens(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copy ``x``, then set ``out[b, index[b, k]] = source[b, k]`` (DaTo, arXiv 2501.00375, section 3.2).

    Args:
        x: (B, N, C) tokens; fp32, fp16, bf16 or fp64; any strides and device.
        index: (B, K) int32 or int64, each in [0, N), unique within a row. With duplicates it is undefined which token
            is written and which gets the gradient.
        source: (B, K, C), dtype and device of ``x``; any strides.

    Returns:
        (B, N, C), contiguous, in the dtype of ``x``. Differentiable in ``x`` (overwritten tokens get no gradient)
        and in ``source``.

    Raises:
        ArgumentError: a shape, dtype or device that does not fit, naming the argument.
        IndexError: an index out of range, negative ones included, on the CPU; on CUDA a device assert.
    """
    _check_scatter(x, index, source)
    return scatter_op(x, index, source)


def scatter_tokens_(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
    """:func:`scatter_tokens` into ``x`` itself (DaTo, arXiv 2501.00375, section 3.2).

    Args:
        x: (B, N, C) tokens; fp32, fp16, bf16 or fp64; any strides, but not expanded.
        index: (B, K) int32 or int64, each in [0, N), unique within a row. With duplicates it is undefined which token
            is written.
        source: (B, K, C), dtype and device of ``x``; any strides. It must not share memory with ``x``.

    Raises:
        ArgumentError: a shape, dtype or device that does not fit, naming the argument; ``x`` is expanded; ``x`` or
            ``source`` requires grad in grad mode (:func:`scatter_tokens` is differentiable).
        IndexError: an index out of range, negative ones included, on the CPU, before anything is written; on CUDA a
            device assert.
    """
    _check_scatter(x, index, source)
    checks.writable("x", x)
    for name, t in (("x", x), ("source", source)):
        if torch.is_grad_enabled() and t.requires_grad:
            raise ArgumentError(name, "must not require grad in place (scatter_tokens may), got requires_grad=True")
    scatter_inplace_op(x, index, source)


def recover_tokens(y: torch.Tensor, source: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Fill every token from a kept one: ``out[b, n] = y[b, source[b, n]] (+ residual[b, n])``, in one pass.

    DaTo, arXiv 2501.00375, section 3.2. The sum is rounded once, to the dtype of ``y``.

    Args:
        y: (B, K, C) tokens; fp32, fp16, bf16 or fp64; any strides and device.
        source: (B, N) int32 or int64, each in [0, K).
        residual: None or (B, N, C), dtype and device of ``y``; any strides.

    Returns:
        (B, N, C), contiguous, in the dtype of ``y``. Differentiable in ``y``, summed in fp32 for the half dtypes, and
        in ``residual``.

    Raises:
        ArgumentError: a shape, dtype or device that does not fit, naming the argument.
        IndexError: a source out of range, negative ones included, on the CPU; on CUDA a device assert.
    """
    checks.tokens("y", y)
    checks.index("source", source, "B, N", "y", y)
    if residual is not None:
        checks.tokens("residual", residual)
        checks.same("residual", residual, "y", y)
        checks.shape("residual", residual, (*source.shape, y.shape[2]), "that of source and the channels of y")
    return recover_op(y, source, residual)


def select_base_tokens(score: torch.Tensor, grid: tuple[int, int], patch: tuple[int, int] = (2, 2)) -> torch.Tensor:
    """The highest-scoring token of each patch (DaTo, arXiv 2501.00375, section 3.2).

    Args:
        score: (B, N) with N = height * width; fp32, fp16, bf16 or fp64; any strides and device. NaN counts as
            highest.
        grid: (height, width) in tokens.
        patch: (ph, pw) in tokens. Rows and columns beyond the last whole patch have no base token, nor does a grid
            smaller than a patch.

    Returns:
        (B, Nb) int64 token indices, Nb = (height // ph) * (width // pw), patches in row-major order. Of equal scores
        the first in the patch, in row-major order. Not differentiable.

    Raises:
        ArgumentError: a shape, dtype, grid or patch that does not fit, naming the argument.
    """
    score = checks.tensor("score", score, "B, N", checks.FLOATS)
    grid = checks.grid(grid, score.shape[1], "score")
    return base_tokens(score, grid, checks.patch(patch), eager.plain(score))


def base_tokens(score: torch.Tensor, grid: tuple[int, int], patch: tuple[int, int], plain: bool) -> torch.Tensor:
    """:func:`select_base_tokens` for checked arguments; ``plain``: whether :func:`eager.plain` says so of ``score``."""
    if not plain:
        return select_base_op(score.detach(), *grid, *patch)
    with eager.below_autograd():  # where torch would look for gradients, in Python
        return select_base_op(score, *grid, *patch)
