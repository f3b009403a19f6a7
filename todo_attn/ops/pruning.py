"""Which tokens DaTo prunes, and from which kept token each is recovered."""

from __future__ import annotations

import math

import torch

from ..config.checks import ArgumentError
from . import checks
from .matching import match_tokens
from .tokens import select_base_tokens

# Similarities are ranked in multiples of this, so that most that differ by rounding alone tie. Equal tokens have equal
# similarities, so flat regions of an image are pruned in token order on every machine.
_STEP = 2.0**-21


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
    batch, tokens, _ = x.shape
    number = torch.arange(tokens, device=x.device).expand(batch, -1)
    if pruned == 0:
        return number.contiguous(), number.contiguous()
    x = x.detach()
    bases = bases.long().sort(dim=1).values
    # Sorts instead of masks: sizes are known throughout, so nothing waits for the device and everything traces.
    others = without(tokens, bases)
    base, similarity = match_tokens(x, others, bases)
    order = (similarity / _STEP).round().sort(dim=1, descending=True, stable=True).indices
    gone, stays = others.gather(1, order[:, :pruned]), others.gather(1, order[:, pruned:]).sort(dim=1).values
    kept = without(tokens, gone)
    # The best match among all kept tokens. The best base is known, so only the other kept tokens are searched.
    source, base_similarity = (t.gather(1, order[:, :pruned]) for t in (bases.gather(1, base), similarity))
    if stays.shape[1]:
        place, stays_similarity = match_tokens(x, gone, stays)
        rival, ahead = stays.gather(1, place), stays_similarity - base_similarity
        tied = ahead.abs() <= _STEP
        source = torch.where(tied, source.minimum(rival), torch.where(ahead > 0, rival, source))
    position = torch.empty_like(number, memory_format=torch.contiguous_format)
    position = position.scatter(1, kept, torch.arange(tokens - pruned, device=x.device).expand(batch, -1))
    return kept.contiguous(), position.scatter(1, gone, position.gather(1, source))


def without(tokens: int, index: torch.Tensor) -> torch.Tensor:
    """The token indices below ``tokens`` that are not in ``index`` (B, K), ascending: (B, tokens - K)."""
    present = torch.zeros((index.shape[0], tokens), dtype=torch.int8, device=index.device).scatter_(1, index, 1)
    return present.sort(dim=1, stable=True).indices[:, : tokens - index.shape[1]]


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
    checks.tokens("x", x)
    grid = checks.grid(grid, x.shape[1], "x")
    checks.tensor("score", score, "B, N", checks.FLOATS)
    if score.shape != x.shape[:2]:
        raise ArgumentError(
            "score", f"must have the batch and tokens of x, {tuple(x.shape[:2])}, got {tuple(score.shape)}"
        )
    checks.same_device("score", score, "x", x)
    bases = select_base_tokens(score, grid, patch)
    pruned = check_ratio(ratio, x.shape[1], bases.shape[1])
    if pruned and not bases.shape[1]:
        raise ArgumentError(
            "ratio", f"must be 0 on a grid without a whole patch, which has no base token, got {ratio!r}"
        )
    return plan_from_bases(x, bases, pruned)
