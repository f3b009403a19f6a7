"""The most similar token: cosine similarity and arg-max in one pass, nothing of size Q x K in memory."""

from __future__ import annotations

import math

import torch

from ..config.checks import ArgumentError
from . import backends, checks, eager, fallback, libraries
from .precision import exact
from .tokens import gather_op

# The torch path holds at most this many scores at a time.
_SCORES = 1 << 21
# Two-level argmax: the best score of each group of 64 keys, then its position in the group.
_GROUP = 64
# Scores this close are ties. A blocked product may round equal scores this far apart.
_TIE = {torch.float32: 2.0**-21, torch.float64: 2.0**-46}


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A copy of ``x[b, index[b, k]]`` in fp32 or better: (B, N, C), (B, K) -> (B, K, C)."""
    return gather_op(x, index).to(torch.promote_types(x.dtype, torch.float32))


def _normalise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise ``rows`` in place; returns them and their lengths. A row of zeros stays zero, with length 0.

    Each row is first divided by its largest element, because squares of very large or small ones leave fp32's range.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    rows /= torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows /= torch.where(length > 0, length, 1)
    return rows, length * largest


def _first_of_equals(keys: torch.Tensor) -> torch.Tensor:
    """The lowest position of a row equal to each row: (B, K, C) -> (B, K) int64.

    Rows are compared by a hash of their bits. Its sum is of integers, so the order of summation does not matter.
    """
    number = torch.arange(1, keys.shape[2] + 1, device=keys.device) * 0x5851F42D4C957F2D
    weight = ((number ^ (number >> 31)) * 0x5851F42D4C957F2D) | 1
    bits = (keys + 0).view(torch.int32 if keys.dtype == torch.float32 else torch.int64)  # -0.0 + 0 is 0.0
    code = bits.to(torch.int64, copy=True).mul_(weight).sum(-1)
    ordered, order = code.sort(dim=1, stable=True)
    first = order.gather(1, torch.searchsorted(ordered, code))
    same = (gather_op(keys, first) - keys).abs().amax(-1) == 0  # false if the hashes collide
    return torch.where(same, first, torch.arange(keys.shape[1], device=keys.device))


def _match_in_blocks(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of queries against all keys, at most ``_SCORES`` scores (or those of one query) at a time.

    A blocked product may round a score differently by its position: on some processors equal keys get scores more than
    1e-6 apart. So the chosen key is replaced by the first key equal to it, and the similarity of that pair is computed
    on its own. Equal keys then have equal similarities wherever they are, and the lowest wins.
    """
    batch, queries = query_index.shape
    position = query_index.new_empty((batch, queries), dtype=torch.int64)
    similarity = x.new_empty((batch, queries), dtype=torch.float32)
    groups = -(-key_index.shape[1] // _GROUP)
    # Copies of the first key fill the last group. They tie with it, come later, and so lose.
    fill = key_index[:, :1].expand(-1, groups * _GROUP - key_index.shape[1])
    keys, _ = _normalise(_rows(x, torch.cat((key_index, fill), 1)))
    first = _first_of_equals(keys)
    across = keys.transpose(1, 2).contiguous()
    tie = _TIE[keys.dtype]
    step = max(1, _SCORES // max(1, batch * groups * _GROUP))
    buffer = keys.new_empty(batch * min(step, queries) * groups * _GROUP)  # allocated once: fresh memory is slow
    with exact(x):
        for start in range(0, queries, step):
            block = slice(start, start + step)
            query, _ = _normalise(_rows(x, query_index[:, block]))
            shape = (*query.shape[:2], groups * _GROUP)
            scores = torch.bmm(query, across, out=buffer[: math.prod(shape)].view(shape))
            scores = scores.view(-1, _GROUP)
            highest = scores.amax(-1).view(*query.shape[:2], groups)
            bound = highest.amax(-1, keepdim=True) - tie
            group = (highest >= bound).max(-1).indices  # the first of the ties; likewise within the group
            row = torch.arange(group.numel(), device=x.device) * groups + group.flatten()
            best = scores.index_select(0, row).view(*query.shape[:2], _GROUP)
            position[:, block] = first.gather(1, group * _GROUP + (best >= bound).max(-1).indices)
            similarity[:, block] = (query * _rows(keys, position[:, block])).sum(-1)
    return position, similarity


def register_fake_of_library() -> None:
    """Register the fake kernel of the CPU library's own op, if that library is loaded."""
    if libraries.unavailable_reason("cpu") is None:
        torch.library.register_fake(
            "todo_attn::match_rows", lambda query, key: query.new_empty(query.shape[:2], dtype=torch.int64)
        )


def _match_compiled(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Match with the CPU library, which stores no scores (csrc/match.h)."""
    query, _ = _normalise(_rows(x, query_index))
    key, _ = _normalise(_rows(x, key_index))
    # Of keys whose scores differ by rounding alone any may win. The first key that equals the winner replaces it.
    position = _first_of_equals(key).gather(1, torch.ops.todo_attn.match_rows(query, key))
    return position, (query * _rows(key, position)).sum(-1)


def _match(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """``backend``: "compiled", "torch", or "triton", which is torch if Triton cannot run here."""
    for name, index in (("query_index", query_index), ("key_index", key_index)):
        checks.in_range(name, index, x.shape[1])
        if backend == "triton" and x.is_cuda:  # gather_tokens asserts it itself
            torch._assert_async(((index >= 0) & (index < x.shape[1])).all(), f"{name} must be below {x.shape[1]}")
    return _match_valid(x, query_index, key_index, backend)


def _match_valid(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`_match` for indices that are in range."""
    found = None
    if backend == "triton":

        def launch() -> tuple[torch.Tensor, torch.Tensor]:
            from ..kernels.match import match

            return match(x, query_index, key_index)

        found = fallback.attempt(launch, x.device, x.dtype, None, required=False)
    elif backend == "compiled":
        found = _match_compiled(x, query_index, key_index)
    position, similarity = found or _match_in_blocks(x, query_index, key_index)
    return similarity, position  # the differentiable one first: opcheck sums outputs in the type of the first


_forward = torch.library.custom_op("todo_attn::match_tokens", _match, mutates_args=())


@_forward.register_fake
def _(x, query_index, key_index, backend):  # type: ignore[no-untyped-def]
    shape = query_index.shape
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("todo_attn::match_tokens_backward", mutates_args=())
def _backward(
    grad: torch.Tensor, x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """The gradient of the chosen pairs' cosine similarities in ``x``; 0 for a token of zeros."""
    batch, tokens, channels = x.shape
    pair = (query_index.long(), key_index.long().gather(1, position))
    (query, query_length), (key, key_length) = (_normalise(_rows(x, index)) for index in pair)
    similarity = (query * key).sum(-1, keepdim=True)
    out = query.new_zeros((batch * tokens, channels))
    offset = tokens * torch.arange(batch, device=x.device).unsqueeze(1)
    for index, own, other, length in ((pair[0], query, key, query_length), (pair[1], key, query, key_length)):
        slope = torch.where(length > 0, grad.unsqueeze(-1) / length, 0).to(out.dtype)
        out.index_add_(0, (index + offset).flatten(), ((other - similarity * own) * slope).flatten(0, 1))
    return out.view(x.shape).to(x.dtype)


@_backward.register_fake
def _(grad, x, query_index, key_index, position):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, position = output
    ctx.mark_non_differentiable(position)
    ctx.save_for_backward(*inputs[:3], position)


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    return _backward(grad, *ctx.saved_tensors), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def backend_of(x: torch.Tensor) -> str:
    """What searches among such tokens: "triton", "compiled" or "torch"."""
    chosen = backends.choose("auto", x.device, x.dtype)
    compilable = chosen == "torch" and x.device.type == "cpu" and x.dtype != torch.float64
    return "compiled" if compilable and libraries.unavailable_reason("cpu") is None else chosen


def match_valid_tokens(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`match_tokens` for arguments that are known to be valid, in a plain call (:func:`eager.plain`)."""
    similarity, position = _match_valid(x, query_index, key_index, backend_of(x))
    return position, similarity


def match_tokens(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Match each token of ``x[query_index]`` with its most similar token of ``x[key_index]``, by cosine similarity.

    DaTo, section 3.2, "Token Pruning", without the N x N matrix of the published code: memory is linear in Q and K.
    Norms and products are in fp32 (fp64 for fp64). A token of zeros has similarity 0 to every other.

    Args:
        x: (B, N, C) tokens, C at least 1; fp32, fp16, bf16 or fp64; any strides.
        query_index: (B, Q) token indices, int32 or int64, each in [0, N); may repeat, may be empty.
        key_index: (B, K) token indices likewise; K at least 1 unless Q is 0.

    Returns:
        position: (B, Q) int64, the best token's position in ``key_index``; of equal tokens always the lowest. Of tokens
            whose similarities differ by rounding alone (about 1e-6; 1e-14 for fp64) any may be chosen, usually the
            lowest; another processor may choose differently.
        similarity: (B, Q) float32, from -1 to 1 up to rounding. Differentiable in ``x`` for the chosen pairs; a token
            of zeros gets no gradient. Autocast has no effect.

    Raises:
        ArgumentError: a shape, dtype or device that does not fit, naming the argument, or queries without any key.
        IndexError: a token index out of range (on CUDA a device assert instead).
    """
    checks.channels("x", checks.tokens("x", x))
    checks.index("query_index", query_index, "B, Q", "x", x)
    checks.index("key_index", key_index, "B, K", "x", x)
    if key_index.shape[1] == 0 and query_index.shape[1] > 0:
        raise ArgumentError(
            "key_index", f"must name at least one key for the queries, got shape {tuple(key_index.shape)}"
        )
    call = _match if eager.plain(x, query_index, key_index) else _forward
    similarity, position = call(x, query_index, key_index, backend_of(x))
    return position, similarity
