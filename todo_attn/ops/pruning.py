"""Which tokens DaTo prunes, and from which kept token each is recovered."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch

from ..config.checks import ArgumentError
from . import checks, eager, fallback
from .matching import backend_of, match_tokens, match_valid_tokens
from .tokens import base_tokens

# Similarities are ranked in multiples of this, so that most that differ by rounding alone tie. Equal tokens have equal
# similarities, so flat regions of an image are pruned in token order on every machine.
_STEP = 2.0**-21
_ROUNDING = 6.0  # the fp32 numbers from 4 to 8 are multiples of _STEP, so to add this rounds to one
# The kinds of tokens, in the order in which they are sorted; 0 is a token that is neither.
_BASE, _GONE = 1, 2


def check_ratio(ratio: object, tokens: int, bases: int) -> int:
    """Check ``ratio``; returns how many of ``tokens`` it prunes. ``bases`` of them are never pruned."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ArgumentError("ratio", f"must be a number from 0 up to but not including 1, got {ratio!r}")
    if ratio > max(1 - bases / tokens, (tokens - bases) / tokens):  # the same up to rounding
        raise ArgumentError(
            "ratio",
            f"must be at most {1 - bases / tokens:.6g}, which leaves the {bases} base tokens that the patch "
            f"gives among {tokens}, got {ratio!r}",
        )
    return math.floor(ratio * tokens)


def plan_from_bases(x: torch.Tensor, bases: torch.Tensor, pruned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`plan_pruning` for given base tokens, which both halves of a guided batch share.

    ``x`` (B, N, C); ``bases`` (B, Nb) token indices on the device of ``x``, unique within a row; ``pruned``: how many
    tokens to prune, from :func:`check_ratio` (a count, which a graph can use as a size).
    """
    return _plan(x, bases, pruned, eager.plain(x, bases))


def _plan(x: torch.Tensor, bases: torch.Tensor, pruned: int, plain: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`plan_from_bases`; ``plain``: whether :func:`eager.plain` says so of the tensors."""
    (batch, tokens, _), count = x.shape, bases.shape[1]
    if pruned == 0:
        number = torch.arange(tokens, device=x.device).expand(batch, -1)
        return number.contiguous(), number.contiguous()
    match = partial(match_valid_tokens, x) if plain else partial(match_tokens, x.detach())
    # Sorts instead of masks: sizes are known throughout, so nothing waits for the device and everything traces. A sort
    # by kind puts the tokens of each kind side by side, ascending.
    kind = torch.zeros((batch, tokens), dtype=torch.int8, device=x.device)
    by_kind = kind.scatter_(1, bases.long(), _BASE).sort(dim=1, stable=True).indices
    others, bases = by_kind.split_with_sizes((tokens - count, count), 1)
    base, similarity = match(others, bases)
    first = (similarity + _ROUNDING).sort(dim=1, descending=True, stable=True).indices[:, :pruned]
    gone = others.gather(1, first)
    by_kind = kind.scatter_(1, gone, _GONE).sort(dim=1, stable=True).indices
    stays, kept = by_kind[:, : tokens - count - pruned], by_kind[:, : tokens - pruned].sort(dim=1).values
    # The best match among all kept tokens. The best base is known, so only the other kept tokens are searched.
    rival, rival_similarity = match(gone, stays) if stays.shape[1] else (None, None)
    chosen = _Chosen(kept.contiguous(), gone, first, base, similarity, bases, rival, rival_similarity, stays)
    source = _launch(chosen, x) if plain and backend_of(x) == "triton" else None
    return chosen.kept, _sources(chosen) if source is None else source


class _Chosen(NamedTuple):
    """What is kept, and from where each pruned token may be recovered; all int64 except for the similarities (fp32)."""

    kept: torch.Tensor  # (B, K) tokens, ascending
    gone: torch.Tensor  # (B, G) tokens: those that are pruned
    first: torch.Tensor  # (B, G) the number of each among the M tokens that are no bases
    base: torch.Tensor  # (B, M) the position in ``bases`` of the best one
    similarity: torch.Tensor  # (B, M) to it
    bases: torch.Tensor  # (B, Nb) tokens
    rival: torch.Tensor | None  # (B, G) the position in ``stays`` of the best one; None if there is none
    rival_similarity: torch.Tensor | None  # (B, G) to it
    stays: torch.Tensor  # (B, S) tokens: those that are kept and no bases


def _sources(chosen: _Chosen) -> torch.Tensor:
    """The position in ``kept`` of the token that each token is recovered from: (B, N)."""
    kept, gone, first, base, similarity, bases, place, rival_similarity, stays = chosen
    source = bases.gather(1, base.gather(1, first))
    if place is not None and rival_similarity is not None:
        rival, ahead = stays.gather(1, place), rival_similarity - similarity.gather(1, first)
        better = torch.where(ahead > _STEP, rival, source.minimum(rival))  # of a tie the lowest token
        source = torch.where(ahead >= -_STEP, better, source)
    number = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    position = kept.new_empty((len(kept), kept.shape[1] + gone.shape[1])).scatter_(1, kept, number)
    return position.scatter_(1, gone, position.gather(1, source))


def _launch(chosen: _Chosen, x: torch.Tensor) -> torch.Tensor | None:
    """:func:`_sources` in one launch in place of fifteen; None if Triton cannot run on such tokens ``x``."""

    def launch() -> torch.Tensor:
        from ..kernels.sources import sources

        return sources(*chosen, _STEP)

    return fallback.attempt(launch, x.device, x.dtype, None, required=False)


def plan_pruning(
    x: torch.Tensor,
    score: torch.Tensor,
    grid: tuple[int, int],
    ratio: float,
    patch: tuple[int, int] = (2, 2),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the tokens to keep, and for each pruned token the most similar kept one (DaTo, section 3.2).

    The token with the highest ``score`` in each patch is a base token and is kept. Of the others, the int(ratio * N)
    most similar to their best base token are pruned. Ties (similarities that round to the same multiple of 2^-21) go to
    the lowest token index. Each pruned token is recovered from its best match among all kept tokens. Memory is linear
    in N.

    Args:
        x: (B, N, C) tokens, row-major over the grid; fp32, fp16, bf16 or fp64; any strides.
        score: (B, N), as in :func:`todo_attn.ops.select_base_tokens`.
        grid: (h, w), height and width in tokens; N = h * w.
        ratio: share of the tokens to prune, from 0 to 1 - Nb / N for Nb patches.
        patch: (height, width) of a patch in tokens; rows and columns beyond the last whole patch have no base token.

    Returns:
        kept: (B, K) int64 token indices, ascending; K = N - int(ratio * N).
        source: (B, N) int64 positions in ``kept``; a kept token has its own. ``recover_tokens(y, source)`` undoes
            ``gather_tokens(x, kept)``. Neither is differentiable.

    Raises:
        ArgumentError: a shape, dtype, device, grid, patch or ratio that does not fit, naming the argument; a ratio
            above what the patch allows, naming that.
    """
    checks.channels("x", checks.tokens("x", x))
    grid = checks.grid(grid, x.shape[1], "x")
    checks.tensor("score", score, "B, N", checks.FLOATS)
    if score.shape != x.shape[:2]:
        raise ArgumentError(
            "score", f"must have the batch and tokens of x, {tuple(x.shape[:2])}, got {tuple(score.shape)}"
        )
    checks.same_device("score", score, "x", x)
    plain = eager.plain(x, score)
    bases = base_tokens(score, grid, checks.patch(patch), plain)
    pruned = check_ratio(ratio, x.shape[1], bases.shape[1])
    if pruned and not bases.shape[1]:
        raise ArgumentError(
            "ratio", f"must be 0 on a grid without a whole patch, which has no base token, got {ratio!r}"
        )
    return _plan(x, bases, pruned, plain)
