"""``gather``, ``scatter`` and ``recover`` against the torch ops that they replace, and a copy of as many bytes.

The oracle is :mod:`todo_attn.ops.reference` on the same tensors; every candidate must equal it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from .. import ops
from ..ops import reference
from .cases import Case
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
    adds_residual: bool

    @property
    def residual(self) -> torch.Tensor | None:
        """(B, N, C), which "recover" adds."""
        return self.tokens if self.adds_residual else None


def trial(case: Case, device: torch.device) -> Trial:
    """Ours; each way to do it by torch ops, for ``recover`` the published one as well; and the copy."""
    inputs = rotation(partial(_make, case, device), device)
    peers, moved = _PEERS[case.benchmark], _bytes(case)
    right = cache(lambda: _op(case.benchmark, reference)(inputs[-1]))
    originals = [torch.randint(256, (moved // 2,), dtype=torch.uint8, device=device) for _ in inputs]

    def candidate(name: str, call: Call, expected: Callable[[], torch.Tensor] = right) -> Candidate:
        return Candidate(name, lambda: call, work(moved), lambda out: _check(out, expected()))

    copy = candidate("copy", lambda x: originals[x.number].clone(), lambda: originals[-1])
    named = [candidate(name, call) for name, call in peers.items()]
    return Trial(inputs, [candidate("todo", _op(case.benchmark, ops))], [*named, copy], tuple(peers))


def _make(case: Case, device: torch.device, number: int, generator: torch.Generator) -> Inputs:
    batch, count = case.batch, case.tokens
    tokens = torch.randn((batch, count, case.channels), generator=generator, device=device, dtype=case.torch_dtype)
    order = torch.rand((batch, count), generator=generator, device=device).argsort(1)
    kept, pruned = order[:, : case.kept].sort(1).values, order[:, case.kept :].sort(1).values
    match = torch.randint(case.kept, pruned.shape, generator=generator, device=device)
    own = torch.arange(case.kept, device=device).expand(batch, -1)
    source = torch.empty_like(order).scatter_(1, kept, own).scatter_(1, pruned, match)
    # Not the values of the kept tokens: scattering those would change nothing.
    stay = torch.randn((batch, case.kept, case.channels), generator=generator, device=device, dtype=tokens.dtype)
    image = torch.arange(batch, device=device)[:, None]
    return Inputs(number, tokens, stay, kept, pruned, match, source, image, case.residual)


def _bytes(case: Case) -> int:
    """Bytes read and written, each token once; indices are int64."""
    size = case.channels * case.torch_dtype.itemsize
    tokens, indices = {
        "gather": (2 * case.kept, case.kept),
        "scatter": (2 * case.tokens, case.kept),
        "recover": (case.kept + case.tokens + case.residual * case.tokens, case.tokens),
    }[case.benchmark]
    return case.batch * (tokens * size + indices * 8)


def _check(out: torch.Tensor, right: torch.Tensor) -> None:
    if out.shape != right.shape or not torch.equal(out, right):
        raise wrong("not the same to the last bit")


# The candidates.


def _wide(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index.unsqueeze(-1).expand(-1, -1, x.shape[2])


def _flat(x: Inputs, index: torch.Tensor, count: int) -> torch.Tensor:
    """Indices into the rows of all images, of which each has ``count``."""
    return torch.add(index, x.image, alpha=count).flatten()


def _select(x: Inputs, t: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return t.flatten(0, 1).index_select(0, _flat(x, index, t.shape[1])).unflatten(0, index.shape)


def _index_copy(x: Inputs) -> torch.Tensor:
    rows = _flat(x, x.kept, x.tokens.shape[1])
    return x.tokens.flatten(0, 1).index_copy(0, rows, x.stay.flatten(0, 1)).view_as(x.tokens)


def _published_recover(x: Inputs) -> torch.Tensor:
    """DaTo as published: scatter the kept tokens, then gather what fills in the pruned ones and scatter that."""
    out = torch.empty_like(x.tokens)
    out.scatter_(1, _wide(x.kept, out), x.stay)
    out.scatter_(1, _wide(x.pruned, out), x.stay.gather(1, _wide(x.match, out)))
    return out if x.residual is None else out + x.residual


def _added(out: torch.Tensor, x: Inputs) -> torch.Tensor:
    return out if x.residual is None else out.add_(x.residual)


Call = Callable[[Inputs], torch.Tensor]


def _op(benchmark: str, module: Any) -> Call:
    """The op of a benchmark, from ``todo_attn.ops`` or its reference."""
    return {
        "gather": lambda x: module.gather_tokens(x.tokens, x.kept),
        "scatter": lambda x: module.scatter_tokens(x.tokens, x.kept, x.stay),
        "recover": lambda x: module.recover_tokens(x.stay, x.source, x.residual),
    }[benchmark]


_PEERS: dict[str, dict[str, Call]] = {
    "gather": {
        "torch": lambda x: x.tokens.gather(1, _wide(x.kept, x.tokens)),
        "index_select": lambda x: _select(x, x.tokens, x.kept),
    },
    "scatter": {
        "torch": lambda x: x.tokens.scatter(1, _wide(x.kept, x.tokens), x.stay),
        "index_copy": _index_copy,
    },
    "recover": {
        "torch": lambda x: _added(x.stay.gather(1, _wide(x.source, x.stay)), x),
        "index_select": lambda x: _added(_select(x, x.stay, x.source), x),
        "published": _published_recover,
    },
}
