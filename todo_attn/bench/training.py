"""``downsampled_attention`` with its backward, as in a training step, against torch's own attention with its own.

Keys and values are those of the coarse grid, as the attention processor gives them. A call is a forward and the
gradients of query, key and value. These are checked for the first head of the first sample, against float64; the error
of ours may be three times that of torch's own in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from .. import ops
from .attention import coarse_tokens
from .cases import SDPA, Case
from .harness import Candidate
from .peers import BUILD, torch_attention
from .trial import Trial, rotation, work, wrong

_OURS, _PEERS = 3, 8  # bounds, in errors of torch's own
_PIECE = 2**24  # scores that the check has in memory at a time
Gradients = tuple[torch.Tensor, ...]  # of query, key and value


class Inputs(NamedTuple):
    """One set, as :class:`todo_attn.bench.peers.Inputs`, all but the gradient with ``requires_grad``."""

    number: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    coarse_key: torch.Tensor
    coarse_value: torch.Tensor
    grad: torch.Tensor  # of the output

    def leaves(self, dense: bool) -> Gradients:
        return (self.query, self.key, self.value) if dense else (self.query, self.coarse_key, self.coarse_value)


def trial(case: Case, device: torch.device) -> Trial:
    """Ours, torch's own attention by each of its backends, and dense attention unless the factor is 1."""

    def make(number: int, generator: torch.Generator) -> Inputs:
        shape = (case.batch, case.tokens, case.heads, case.head_dim)
        query, key, value, grad = (
            torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype) for _ in range(4)
        )
        coarse = (coarse_tokens(t, case).contiguous() for t in (key, value))
        return Inputs._make((number, *(t.requires_grad_() for t in (query, key, value, *coarse)), grad))

    inputs = rotation(make, device)
    oracles = {dense: cache(partial(_oracle, inputs[-1], dense)) for dense in (False, True)}

    def candidate(name: str, build: Callable[[], Callable[[Any], torch.Tensor]], bound: int) -> Candidate:
        dense = name == "dense"
        info = _work(case, case.tokens if dense else case.keys)
        return Candidate(name, lambda: _both(build(), dense), info, partial(_check, oracles[dense], bound, info))

    def todo(x: Inputs) -> torch.Tensor:
        return ops.downsampled_attention(x.query, x.coarse_key, x.coarse_value, case.coarse)

    names = [*SDPA, *(["dense"] if case.factor != (1, 1) else [])]
    # The peers read only what both kinds of inputs have.
    peers = [candidate(name, partial(BUILD[name], inputs, case, device), _PEERS) for name in names]  # type: ignore[arg-type]
    return Trial(inputs, [candidate("todo", lambda: todo, _OURS)], peers, SDPA)


def _both(forward: Callable[[Any], torch.Tensor], dense: bool) -> Callable[[Inputs], Gradients]:
    def call(x: Inputs) -> Gradients:
        with torch.enable_grad():
            return torch.autograd.grad(forward(x), x.leaves(dense), x.grad)

    return call


def _work(case: Case, keys: int) -> dict[str, Any]:
    """Seven products, of which the backward has five; bytes of queries, keys, values, outputs and their gradients."""
    rows = case.batch * case.heads
    moved = 4 * rows * (case.tokens + keys) * case.head_dim * case.torch_dtype.itemsize
    return work(moved, 14 * rows * case.tokens * keys * case.head_dim)


# The check.


def _oracle(x: Inputs, dense: bool) -> tuple[Gradients, list[float]]:
    """The right gradients of the first head of the first sample, and the relative error of torch's own."""
    leaves = [t.detach()[:1, :, :1].clone() for t in x.leaves(dense)]
    right = _right(*(t[0, :, 0].double() for t in (*leaves, x.grad)))
    with torch.enable_grad():
        leaves = [t.requires_grad_() for t in leaves]
        own = torch.autograd.grad(torch_attention(*leaves), leaves, x.grad[:1, :, :1])
    smallest = torch.finfo(x.query.dtype).eps / 2
    return right, [max(_distance(a[0, :, 0], b), smallest) for a, b in zip(own, right, strict=True)]


def _right(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor) -> Gradients:
    """By the formulas, a few queries at a time; (N, D) and (M, D) each."""
    scale = query.shape[1] ** -0.5
    grad_query, grad_key, grad_value = [], torch.zeros_like(key), torch.zeros_like(value)
    for q, g in zip(*(t.split(max(1, _PIECE // key.shape[0])) for t in (query, grad)), strict=True):
        p = (q @ key.T * scale).softmax(-1)
        grad_value += p.T @ g
        grad_p = g @ value.T
        grad_scores = scale * p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
        grad_query.append(grad_scores @ key)
        grad_key += grad_scores.T @ q
    return torch.cat(grad_query), grad_key, grad_value


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


def _check(oracle: Callable[[], tuple[Gradients, list[float]]], bound: float, info: dict[str, Any], out: Any) -> None:
    right, own = oracle()
    if not all(t.isfinite().all() for t in out):
        raise wrong("not finite")
    errors = [_distance(t[0, :, 0], r) for t, r in zip(out, right, strict=True)]
    info["relative_error"] = max(errors)
    for name, error, torchs in zip(("query", "key", "value"), errors, own, strict=True):
        if not error <= bound * torchs:
            raise wrong(f"the gradient of the {name} is off by {error:.2g} of its norm, torch's own by {torchs:.2g}")
