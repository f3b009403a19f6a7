"""``match_tokens`` and ``plan_pruning`` against the published arithmetic, which computes all N x N similarities.

The oracle computes in float64. It judges a choice by its similarity, because rounding decides near ties: a match may
be worse than the best by a rounding of the candidate's own arithmetic (fp32 for ours, the tensors' dtype for peers).

- ``match_tokens``: 512 evenly spaced queries in the first and last of the batch. For all other queries: the position is
  valid, and the similarity is that of the token at this position.
- ``plan_pruning``: every pruned token in the first and last of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import ops
from ..ops import reference
from .cases import PATCH, PRUNE_RATIO, Case
from .harness import Candidate
from .trial import Trial, ends, rotation, spread, work, wrong

_QUERIES = 512
_ROWS = 1024  # queries whose similarities an oracle computes at a time
_COSINE = 1.01  # the largest possible, rounding included
_OURS = 1e-5
Choice = tuple[torch.Tensor, torch.Tensor]
Call = Callable[["Inputs"], Choice]


class Inputs(NamedTuple):
    """One set: tokens (B, N, C), scores (B, N), base tokens by score (B, Nb), and all other tokens (B, N - Nb)."""

    number: int
    x: torch.Tensor
    score: torch.Tensor
    others: torch.Tensor
    bases: torch.Tensor


def trial(case: Case, device: torch.device, variants: Mapping[str, Call] | None = None) -> Trial:
    """Ours, the published arithmetic, and torch ops on only the pairs that decide something.

    With ``variants`` of ours, those against the first of them.
    """

    def make(number: int, generator: torch.Generator) -> Inputs:
        shape = (case.batch, case.tokens, case.channels)
        x = torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)
        score = torch.randn(shape[:2], generator=generator, device=device)
        bases = ops.select_base_tokens(score, case.grid, PATCH)
        return Inputs(number, x, score, _without(case.tokens, bases), bases)

    inputs = rotation(make, device)
    match = case.benchmark == "match_tokens"
    oracle: Callable[[], Any] = cache(partial(_match_oracle if match else _plan_oracle, inputs[-1], case))
    calls = _calls(case) if variants is None else variants
    check: Callable[..., None] = _check_match if match else _check_plan

    def candidate(name: str) -> Candidate:
        exact = variants is not None or name == "todo"
        allowed = _OURS if exact else max(_OURS, 4 * torch.finfo(case.torch_dtype).eps)
        return Candidate(name, lambda: calls[name], _work(case), lambda out: check(oracle(), out, allowed))

    if variants is not None:
        first, *others = map(candidate, variants)
        return Trial(inputs, others, [first], (first.name,))
    peers = [name for name in calls if name != "todo"]
    return Trial(inputs, [candidate("todo")], [candidate(name) for name in peers], peers)


def _work(case: Case) -> dict[str, Any]:
    """Operations of the pairs that decide something; bytes of the tokens read and the choices written."""
    pairs = (case.tokens - case.bases) * case.bases
    if case.benchmark == "plan_pruning":
        pairs += case.pruned * (case.kept - case.bases)  # the best base of each is known by then
    size = case.channels * case.torch_dtype.itemsize
    return work(case.batch * case.tokens * (size + 8), 2 * case.batch * pairs * case.channels)


# The candidates.


def _calls(case: Case) -> dict[str, Call]:
    if case.benchmark == "plan_pruning":
        return {
            "todo": lambda x: ops.plan_pruning(x.x, x.score, case.grid, PRUNE_RATIO, PATCH),
            "published": partial(_published_plan, case=case),
            "torch-pairs": partial(_pairs_plan, case=case),
        }
    return {
        "todo": lambda x: ops.match_tokens(x.x, x.others, x.bases),
        "published": lambda x: _best(_take(_all_similarities(x.x), x.others, x.bases)),
        "torch-pairs": lambda x: _best_pairs(_unit(x.x), x.others, x.bases),
    }


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return reference.gather_tokens(x, index)


def _without(tokens: int, index: torch.Tensor) -> torch.Tensor:
    """The token indices below ``tokens`` that are not in ``index`` (B, K), ascending: (B, tokens - K)."""
    present = torch.zeros((index.shape[0], tokens), dtype=torch.int8, device=index.device).scatter_(1, index, 1)
    return present.sort(dim=1, stable=True).indices[:, : tokens - index.shape[1]]


def _unit(x: torch.Tensor) -> torch.Tensor:
    """As published: norms in the dtype of the tokens."""
    return x / x.norm(dim=-1, keepdim=True)


def _all_similarities(x: torch.Tensor) -> torch.Tensor:
    unit = _unit(x)
    return unit @ unit.mT


def _take(similarity: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The chosen rows and columns of each matrix."""
    similarity = similarity.gather(1, rows.unsqueeze(-1).expand(-1, -1, similarity.shape[2]))
    return similarity.gather(2, columns.unsqueeze(1).expand(-1, rows.shape[1], -1))


def _best(similarity: torch.Tensor) -> Choice:
    best, position = similarity.max(-1)
    return position, best


def _best_pairs(unit: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Choice:
    return _best(_rows(unit, rows) @ _rows(unit, columns).mT)


def _published_plan(x: Inputs, case: Case) -> Choice:
    """DaTo as published: bases by score, all other choices from the N x N similarities."""
    bases = _bases(x, case)
    similarity = _all_similarities(x.x)
    others = _without(case.tokens, bases)
    _, best = _best(_take(similarity, others, bases))
    gone = others.gather(1, best.argsort(dim=1, descending=True)[:, : case.pruned])
    kept = _without(case.tokens, gone)
    position, _ = _best(_take(similarity, gone, kept))
    return kept, _filled_in(x, kept).scatter_(1, gone, position)


def _pairs_plan(x: Inputs, case: Case) -> Choice:
    """The same choices from the similarities that decide them; the best base of a pruned token is reused."""
    bases, unit = _bases(x, case), _unit(x.x)
    others = _without(case.tokens, bases)
    base, best = _best_pairs(unit, others, bases)
    order = best.argsort(dim=1, descending=True)
    first = order[:, : case.pruned]
    gone, stays = others.gather(1, first), others.gather(1, order[:, case.pruned :])
    rival, ahead = _best_pairs(unit, gone, stays)
    token = torch.where(ahead > best.gather(1, first), stays.gather(1, rival), bases.gather(1, base.gather(1, first)))
    kept = _without(case.tokens, gone)
    source = _filled_in(x, kept)
    return kept, source.scatter_(1, gone, source.gather(1, token))


def _bases(x: Inputs, case: Case) -> torch.Tensor:
    (height, width), (ph, pw) = case.grid, PATCH
    down, across = height // ph, width // pw
    image = x.score.unflatten(1, case.grid)[:, : down * ph, : across * pw]
    offset = image.unflatten(2, (across, pw)).unflatten(1, (down, ph)).transpose(2, 3).flatten(3).argmax(-1)
    row = torch.arange(down, device=offset.device)[:, None] * ph + offset // pw
    column = torch.arange(across, device=offset.device) * pw + offset % pw
    return (row * width + column).flatten(1)


def _filled_in(x: Inputs, kept: torch.Tensor) -> torch.Tensor:
    """(B, N): a kept token's own position among the kept; pruned tokens are not written yet."""
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return torch.empty_like(x.score, dtype=torch.int64).scatter_(1, kept, own)


# The checks.


class _Match(NamedTuple):
    """Positions and best similarities of the sampled queries; the inputs, for all other queries."""

    sample: torch.Tensor
    best: torch.Tensor  # (b, S) float64
    x: Inputs


def _match_oracle(x: Inputs, case: Case) -> _Match:
    sample = spread(x.others.shape[1], _QUERIES, x.x.device)
    unit = F.normalize(ends(x.x).double(), dim=-1)
    best = _best_similarity(_rows(unit, ends(x.others)[:, sample]), _rows(unit, ends(x.bases)))
    return _Match(sample, best, x)


def _check_match(right: _Match, out: Choice, allowed: float) -> None:
    position, similarity = out
    x, shape = right.x, right.x.others.shape
    if position.shape != shape or similarity.shape != shape:
        raise wrong(f"of shapes {tuple(position.shape)} and {tuple(similarity.shape)}, not {tuple(shape)}")
    if position.min() < 0 or position.max() >= x.bases.shape[1]:
        raise wrong("positions out of range")
    if not (similarity.abs() <= _COSINE).all():
        raise wrong("similarities out of range")
    chosen = _cosines(x, position)
    judged = (("a match", ends(chosen)[:, right.sample], right.best), ("a similarity", similarity, chosen))
    for what, value, expected in judged:
        error = (value - expected).abs().max().item()
        if not error <= allowed:
            raise wrong(f"{what} is off by {error:.2g}")


def _cosines(x: Inputs, position: torch.Tensor) -> torch.Tensor:
    """The similarity of each query to the base at its ``position``, (B, Q) float64."""

    def cosine(query: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(_rows(x.x, query).double(), _rows(x.x, base).double(), dim=-1)

    bases = x.bases.gather(1, position)
    return torch.cat([cosine(q, b) for q, b in zip(x.others.split(_ROWS, 1), bases.split(_ROWS, 1), strict=True)], 1)


class _Plan(NamedTuple):
    """Normalized tokens (b, N, C) in float64, the bases, and each token's best similarity to one (-inf for a base)."""

    unit: torch.Tensor
    bases: torch.Tensor
    to_base: torch.Tensor
    kept: int


def _plan_oracle(x: Inputs, case: Case) -> _Plan:
    unit = F.normalize(ends(x.x).double(), dim=-1)
    bases = reference.select_base_tokens(ends(x.score), case.grid, PATCH)
    to_base = _best_similarity(unit, _rows(unit, bases)).scatter_(1, bases, -torch.inf)
    return _Plan(unit, bases, to_base, case.kept)


def _best_similarity(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.cat([(rows @ key.mT).amax(-1) for rows in query.split(_ROWS, dim=1)], dim=1)


def _check_plan(right: _Plan, out: Choice, allowed: float) -> None:
    kept, source = (ends(t) for t in out)
    tokens = right.unit.shape[1]
    if kept.shape[1] != right.kept or source.shape[1] != tokens or (kept.diff(dim=1) <= 0).any():
        raise wrong(f"must keep {right.kept} tokens in ascending order")
    if any(t.min() < 0 or t.max() >= count for t, count in zip(out, (tokens, right.kept), strict=True)):
        raise wrong("tokens or positions out of range")
    is_kept = torch.zeros_like(source, dtype=torch.bool).scatter_(1, kept, True)
    if not is_kept.gather(1, right.bases).all():
        raise wrong("a base is pruned")
    if not torch.equal(source.gather(1, kept), torch.arange(right.kept, device=kept.device).expand_as(kept)):
        raise wrong("a kept token is not filled in from itself")
    pruned = right.to_base.masked_fill(is_kept, torch.inf)
    stays = right.to_base.masked_fill(~is_kept, -torch.inf)
    if not (late := (stays.amax(1) - pruned.amin(1)).max().item()) <= allowed:
        raise wrong(f"a token is pruned before one whose similarity is higher by {late:.2g}")
    keys = _rows(right.unit, kept)
    chosen = (right.unit * _rows(keys, source)).sum(-1)
    if not (error := (_best_similarity(right.unit, keys) - chosen).max().item()) <= allowed:
        raise wrong(f"a source is off by {error:.2g}")
