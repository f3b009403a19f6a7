"""``gather``, ``scatter`` and ``recover`` against the torch ops that they replace, and a copy of as many bytes.

The oracle is :mod:`todo_attn.ops.reference` on the same tensors; every candidate must equal it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from .. import ops
from ..ops import reference
from .cases import DTYPES, Case
from .harness import Candidate
from .trial import Trial, rotation, work, wrong


class Inputs(NamedTuple):
    """One set of DaTo's tokens: all N of each image, and the K kept ones after a layer."""

    number: int
    tokens: torch.Tensor  # (B, N, C)
    stay: torch.Tensor  # (B, K, C): new values of the kept tokens
    kept: torch.Tensor  # (B, K): positions of the kept tokens, ascending
    pruned: torch.Tensor  # (B, N - K): positions of the pruned tokens
    match: torch.Tensor  # (B, N - K): for each pruned token, the kept one that fills it in
    source: torch.Tensor  # (B, N): the same for every token; a kept one fills itself in
    image: torch.Tensor  # (B, 1): number in the batch, for indices into all rows of the batch


def trial(case: Case, device: torch.device) -> Trial:
    """Ours; each way to do it by torch ops, for ``recover`` the published one as well; and the copy."""
    inputs = rotation(partial(_make, case, device), device)
    ours, peers = _CANDIDATES[case.benchmark]
    moved = _bytes(case)
    right = cache(lambda: _run_oracle(case, inputs[-1]))
    originals = [_random_bytes(moved // 2, device) for _ in inputs]

    def candidate(name: str, call: Callable[[Inputs, bool], torch.Tensor]) -> Candidate:
        return Candidate(name, lambda: lambda x: call(x, case.residual), work(moved), lambda out: _check(out, right()))

    copy = Candidate(
        "copy",
        lambda: lambda x: originals[x.number].clone(),
        work(moved),
        lambda out: _check(out, originals[-1]),
    )
    named = [candidate(name, call) for name, call in peers.items()]
    return Trial(inputs, [candidate("todo", ours)], [*named, copy], tuple(peers))


def _make(case: Case, device: torch.device, number: int, generator: torch.Generator) -> Inputs:
    batch, count = case.batch, case.tokens
    tokens = torch.randn((batch, count, case.channels), generator=generator, device=device, dtype=DTYPES[case.dtype])
    order = torch.rand((batch, count), generator=generator, device=device).argsort(1)
    kept, pruned = order[:, : case.kept].sort(1).values, order[:, case.kept :].sort(1).values
    match = torch.randint(case.kept, pruned.shape, generator=generator, device=device)
    own = torch.arange(case.kept, device=device).expand(batch, -1)
    source = torch.empty_like(order).scatter_(1, kept, own).scatter_(1, pruned, match)
    # Not the values of the kept tokens: scattering those would change nothing.
    stay = torch.randn((batch, case.kept, case.channels), generator=generator, device=device, dtype=tokens.dtype)
    image = torch.arange(batch, device=device)[:, None]
    return Inputs(number, tokens, stay, kept, pruned, match, source, image)


def _random_bytes(count: int, device: torch.device) -> torch.Tensor:
    return torch.randint(256, (count,), dtype=torch.uint8, device=device)


def _bytes(case: Case) -> int:
    """Bytes read and written, each token once; indices are int64."""
    size = case.channels * DTYPES[case.dtype].itemsize
    tokens, indices = {
        "gather": (2 * case.kept, case.kept),
        "scatter": (2 * case.tokens, case.kept),
        "recover": (case.kept + case.tokens + case.residual * case.tokens, case.tokens),
    }[case.benchmark]
    return case.batch * (tokens * size + indices * 8)


def _run_oracle(case: Case, x: Inputs) -> torch.Tensor:
    if case.benchmark == "gather":
        return reference.gather_tokens(x.tokens, x.kept)
    if case.benchmark == "scatter":
        return reference.scatter_tokens(x.tokens, x.kept, x.stay)
    return reference.recover_tokens(x.stay, x.source, x.tokens if case.residual else None)


def _check(out: torch.Tensor, right: torch.Tensor) -> None:
    if out.shape != right.shape or not torch.equal(out, right):
        raise wrong("not the same to the last bit")


# The candidates: each takes one set of inputs, and whether a residual of all tokens is added.


def _wide(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index.unsqueeze(-1).expand(-1, -1, x.shape[2])


def _flat(x: Inputs, index: torch.Tensor, count: int) -> torch.Tensor:
    """Indices into the rows of all images, of which each has ``count``."""
    return torch.add(index, x.image, alpha=count).flatten()


def _select(x: Inputs, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return t.flatten(0, 1).index_select(0, _flat(x, index, t.shape[1])).unflatten(0, index.shape)


def _gather(x: Inputs, residual: bool) -> torch.Tensor:
    return ops.gather_tokens(x.tokens, x.kept)


def _torch_gather(x: Inputs, residual: bool) -> torch.Tensor:
    return x.tokens.gather(1, _wide(x.kept, x.tokens))


def _index_select(x: Inputs, residual: bool) -> torch.Tensor:
    return _select(x, x.tokens, x.kept)


def _scatter(x: Inputs, residual: bool) -> torch.Tensor:
    return ops.scatter_tokens(x.tokens, x.kept, x.stay)


def _torch_scatter(x: Inputs, residual: bool) -> torch.Tensor:
    return x.tokens.scatter(1, _wide(x.kept, x.tokens), x.stay)


def _index_copy(x: Inputs, residual: bool) -> torch.Tensor:
    rows = _flat(x, x.kept, x.tokens.shape[1])
    return x.tokens.flatten(0, 1).index_copy(0, rows, x.stay.flatten(0, 1)).view_as(x.tokens)


def _recover(x: Inputs, residual: bool) -> torch.Tensor:
    return ops.recover_tokens(x.stay, x.source, x.tokens if residual else None)


def _torch_recover(x: Inputs, residual: bool) -> torch.Tensor:
    out = x.stay.gather(1, _wide(x.source, x.stay))
    return out.add_(x.tokens) if residual else out


def _index_select_recover(x: Inputs, residual: bool) -> torch.Tensor:
    out = _select(x, x.stay, x.source)
    return out.add_(x.tokens) if residual else out


def _published_recover(x: Inputs, residual: bool) -> torch.Tensor:
    """DaTo as published: scatter the kept tokens, then gather what fills in the pruned ones and scatter that."""
    out = torch.empty_like(x.tokens)
    out.scatter_(1, _wide(x.kept, out), x.stay)
    out.scatter_(1, _wide(x.pruned, out), x.stay.gather(1, _wide(x.match, out)))
    return out + x.tokens if residual else out


_Call = Callable[[Inputs, bool], torch.Tensor]
_CANDIDATES: dict[str, tuple[_Call, dict[str, _Call]]] = {
    "gather": (_gather, {"torch": _torch_gather, "index_select": _index_select}),
    "scatter": (_scatter, {"torch": _torch_scatter, "index_copy": _index_copy}),
    "recover": (
        _recover,
        {"torch": _torch_recover, "index_select": _index_select_recover, "published": _published_recover},
    ),
}
