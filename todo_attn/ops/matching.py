"""The most similar token: cosine similarity and arg-max in one pass, nothing of size Q x K in memory."""

from __future__ import annotations

import math

import torch

from . import backends, checks, libraries
from .precision import exact
from .tokens import gather_op

# The torch path holds this many scores at a time.
_SCORES = 1 << 21
# Of so many neighbouring keys only the best score is looked for at first.
_PIECE = 64
# Scores this close count as ties: mostly what a blocked product sets apart by rounding alone.
_TIE = {torch.float32: 2.0**-21, torch.float64: 2.0**-46}


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[b, index[b, k]] in fp32 or better: (B, N, C), (B, K) -> (B, K, C), a new tensor."""
    return gather_op(x, index).to(torch.promote_types(x.dtype, torch.float32))


def _normalise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of length 1 and their lengths before, which overwrite ``rows``; a row of zeros stays one, of length 0.

    The largest element is divided out first: squares of very large or small ones leave fp32.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    rows /= torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows /= torch.where(length > 0, length, 1)
    return rows, length * largest


def _first_of_equals(keys: torch.Tensor) -> torch.Tensor:
    """(B, K, C) -> (B, K) int64: for each row the lowest position of one with the same elements.

    By a hash of the bits, added up in integers, whose order of summation changes nothing.
    """
    number = torch.arange(1, keys.shape[2] + 1, device=keys.device) * 0x5851F42D4C957F2D
    weight = ((number ^ (number >> 31)) * 0x5851F42D4C957F2D) | 1
    bits = (keys + 0).view(torch.int32 if keys.dtype == torch.float32 else torch.int64)  # + 0: one zero, not two
    code = bits.to(torch.int64, copy=True).mul_(weight).sum(-1)
    ordered, order = code.sort(dim=1, stable=True)
    first = order.gather(1, torch.searchsorted(ordered, code))
    same = (gather_op(keys, first) - keys).abs().amax(-1) == 0  # rows of one hash that differ stay where they are
    return torch.where(same, first, torch.arange(keys.shape[1], device=keys.device))


def _match_in_blocks(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of queries against all keys, at most ``_SCORES`` scores (or one query's) at a time.

    A blocked product may round a score differently at another position: on some processors equal keys get scores more
    than 1e-6 apart. So the first of the keys that equal the chosen one is taken, and that pair is multiplied again on
    its own: equal keys have equal similarities wherever they stand, and the lowest wins.
    """
    batch, queries = query_index.shape
    position = query_index.new_empty((batch, queries), dtype=torch.int64)
    similarity = x.new_empty((batch, queries), dtype=torch.float32)
    pieces = -(-key_index.shape[1] // _PIECE)
    # The first key again fills the last piece: it ties with itself, and the later one loses.
    fill = key_index[:, :1].expand(-1, pieces * _PIECE - key_index.shape[1])
    keys, _ = _normalise(_rows(x, torch.cat((key_index, fill), 1)))
    first = _first_of_equals(keys)
    across = keys.transpose(1, 2).contiguous()
    tie = _TIE[keys.dtype]
    step = max(1, _SCORES // max(1, batch * pieces * _PIECE))
    buffer = keys.new_empty(batch * min(step, queries) * pieces * _PIECE)  # one: fresh memory costs page by page
    with exact(x):
        for start in range(0, queries, step):
            block = slice(start, start + step)
            query, _ = _normalise(_rows(x, query_index[:, block]))
            shape = (*query.shape[:2], pieces * _PIECE)
            scores = torch.bmm(query, across, out=buffer[: math.prod(shape)].view(shape))
            scores = scores.view(-1, _PIECE)
            highest = scores.amax(-1).view(*query.shape[:2], pieces)
            bound = highest.amax(-1, keepdim=True) - tie
            piece = (highest >= bound).max(-1).indices  # the first of the ties, here and in the piece
            row = torch.arange(piece.numel(), device=x.device) * pieces + piece.flatten()
            best = scores.index_select(0, row).view(*query.shape[:2], _PIECE)
            position[:, block] = first.gather(1, piece * _PIECE + (best >= bound).max(-1).indices)
            similarity[:, block] = (query * _rows(keys, position[:, block])).sum(-1)
    return position, similarity


def register_fake_of_library() -> None:
    """The fake kernel of the CPU library's own op, once that library is loaded."""
    if libraries.why_not("cpu") is None:
        torch.library.register_fake(
            "todo_attn::match_rows", lambda query, key: query.new_empty(query.shape[:2], dtype=torch.int64)
        )


def _match_compiled(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the CPU library, which stores no score at all (csrc/match.h)."""
    query, _ = _normalise(_rows(x, query_index))
    key, _ = _normalise(_rows(x, key_index))
    # A key that rounding alone puts below may hide the first of equal ones, and itself be hidden by a third.
    position = _first_of_equals(key).gather(1, torch.ops.todo_attn.match_rows(query, key))
    return position, (query * _rows(key, position)).sum(-1)


@torch.library.custom_op("todo_attn::match_tokens", mutates_args=())
def _forward(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    for name, index in (("query_index", query_index), ("key_index", key_index)):
        checks.in_range(name, index, x.shape[1])
        if backend == "triton" and x.is_cuda:  # gather_tokens asserts it itself
            torch._assert_async(((index >= 0) & (index < x.shape[1])).all(), f"{name} must be below {x.shape[1]}")
    if backend == "triton":
        from ..kernels.match import match

        position, similarity = match(x, query_index, key_index)
    elif backend == "compiled":
        position, similarity = _match_compiled(x, query_index, key_index)
    else:
        position, similarity = _match_in_blocks(x, query_index, key_index)
    return similarity, position  # the differentiable one first: opcheck adds outputs up in the type of the first


@_forward.register_fake
def _(x, query_index, key_index, backend):  # type: ignore[no-untyped-def]
    shape = query_index.shape
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("todo_attn::match_tokens_backward", mutates_args=())
def _backward(
    grad: torch.Tensor, x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """The gradient of each chosen pair's cosine, added up over the tokens of ``x``; none for tokens of zeros."""
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


def _backend(x: torch.Tensor) -> str:
    """ "triton", "compiled" or "torch": the fastest that takes ``x``."""
    chosen = backends.choose("auto", x.device, x.dtype)
    if chosen == "torch" and x.device.type == "cpu" and x.dtype != torch.float64 and libraries.why_not("cpu") is None:
        return "compiled"
    return chosen


def match_tokens(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token of ``x[query_index]`` the one of ``x[key_index]`` with the highest cosine similarity.

    The similarity of DaTo (section 3.2, "Token Pruning"), without the N x N matrix of the published code: memory grows
    linearly in Q and K. Norms and products are in fp32 (fp64 for fp64). A token of zeros has similarity 0 to all.

    Args:
        x: (B, N, C) tokens, C at least 1; fp32, fp16, bf16 or fp64; any strides.
        query_index: (B, Q) token numbers, int32 or int64, from 0 to N - 1; may repeat, may be empty.
        key_index: (B, K) token numbers likewise; K at least 1 unless Q is 0.

    Returns:
        position: (B, Q) int64, where in ``key_index`` the best one stands; of equal tokens always the lowest. Of tokens
            whose similarities differ by rounding alone (about 1e-6; 1e-14 for fp64) it may be any, mostly the lowest:
            another processor may decide otherwise.
        similarity: (B, Q) float32, from -1 to 1 up to rounding. Differentiable in ``x``, for the pairs as chosen; a
            token of zeros gets no gradient. Autocast changes nothing.

    Raises:
        ValueError: a shape, dtype or device that does not fit, naming the argument, or queries without any key.
        IndexError: a token number outside of ``x`` (on CUDA a device assert instead).
    """
    checks.tokens("x", x)
    if x.shape[2] < 1:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    checks.index("query_index", query_index, "B, Q", "x", x)
    checks.index("key_index", key_index, "B, K", "x", x)
    if key_index.shape[1] == 0 and query_index.shape[1] > 0:
        raise ValueError(f"key_index must name at least one key for the queries, got shape {tuple(key_index.shape)}")
    similarity, position = _forward(x, query_index, key_index, _backend(x))
    return position, similarity
