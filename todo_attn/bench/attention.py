"""``downsampled_attention`` against its peers, and the checks of their results.

Every result is checked twice, and no check ever holds N x M scores.

- Against :func:`todo_attn.ops.reference.downsampled_attention` in float64: 512 queries, evenly spaced (one in each 128
  up to 2048 x 2048 pixels), of every head, in the first and last of the batch. The error of ours may be twice that of
  torch's own attention on the same queries in the same dtype. The bounds of peers are wider, so that they reject a
  wrong result but not one of lower precision.
- Against torch's own attention, all outputs: for each head and each tile of 128 queries, the distance may be four times
  that bound. ("dense" is torch's own attention and skips this.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import ops
from ..ops import backends, reference
from .cases import FLASH, SDPA, Case
from .harness import Candidate
from .peers import BUILD, Call, Inputs, torch_attention
from .trial import Trial, ends, rotation, spread, work, wrong

_QUERIES = 512
_TILE = 128  # queries compared together
_PIECE = 2**24  # elements of each tensor that a check has in memory at a time
_SLACK = 4  # a tile is a small sample, and its distance includes torch's own error
_OURS, _PEERS, _QUANTISED = 2, 8, 256  # bounds, in errors of torch's own attention


def trial(case: Case, device: torch.device, variants: Mapping[str, Call] | None = None) -> Trial:
    """The candidates that ``case.peers`` names, or the ``variants`` of ours against the first of them."""

    def make_inputs(number: int, generator: torch.Generator) -> Inputs:
        shape = (case.batch, case.tokens, case.heads, case.head_dim)
        query, key, value = (
            torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype) for _ in range(3)
        )
        coarse = (coarse_tokens(t, case) for t in (key, value))
        return Inputs(number, query, key, value, *(t.contiguous() for t in coarse))

    inputs = rotation(make_inputs, device)
    peers, forms = case.candidates
    oracles = {dense: cache(partial(_oracle, inputs[-1], case, dense)) for dense in (False, True)}
    build: dict[str, Callable[[], Call]] = {name: partial(make, inputs, case, device) for name, make in BUILD.items()}
    build |= {
        "todo": lambda: lambda x: ops.downsampled_attention(x.query, x.key, x.value, case.grid, case.factor),
        "todo-coarse": lambda: lambda x: ops.downsampled_attention(x.query, x.coarse_key, x.coarse_value, case.coarse),
        "todo-packed": partial(_packed, case, device),
    }
    exact = {"todo", *forms, *(variants or {})}

    def candidate(name: str, make: Callable[[], Call] | None = None) -> Candidate:
        keys = case.tokens if name == "dense" else case.keys
        info = _work(case, keys)
        bound = _OURS if name in exact else _QUANTISED if name == "sage" else _PEERS
        return Candidate(name, make or build[name], info, partial(_check, oracles[name == "dense"], bound, info))

    if variants is not None:
        first, *others = (candidate(name, partial(variants.__getitem__, name)) for name in variants)
        return Trial(inputs, others, [first], (first.name,))
    return Trial(
        inputs, [candidate(name) for name in ("todo", *forms)], [candidate(name) for name in peers], (*SDPA, *FLASH)
    )


def coarse_tokens(x: torch.Tensor, case: Case) -> torch.Tensor:
    """Keys or values of the full grid, (B, N, H, D) -> those of the coarse grid, (B, M, H, D)."""
    return reference.downsample_tokens(x.flatten(2), case.grid, case.factor).unflatten(2, x.shape[2:])


def _work(case: Case, keys: int) -> dict[str, Any]:
    """Operations of Q K^T and P V; bytes of queries, keys, values and outputs."""
    rows = case.batch * case.heads
    size = case.torch_dtype.itemsize
    moved = 2 * rows * (case.tokens + keys) * case.head_dim * size
    return work(moved, 4 * rows * case.tokens * keys * case.head_dim)


# The check.


class _Oracle(NamedTuple):
    """The right outputs of the sampled queries, (b, queries, H, D), and the error of torch's own attention on them."""

    rows: torch.Tensor
    out: torch.Tensor
    error: float
    plain: torch.Tensor | None  # torch's own outputs, (B, N, H, D); None for "dense"
    shape: tuple[int, ...]


def _oracle(x: Inputs, case: Case, dense: bool) -> _Oracle:
    rows = spread(case.tokens, _QUERIES, x.query.device)
    right = _right(ends(x.query[:, rows]), ends(x.key), ends(x.value), case, (1, 1) if dense else case.factor)
    if dense:
        plain = torch_attention(ends(x.query[:, rows]), ends(x.key), ends(x.value))
        error = _distance(plain, right)
    else:
        plain = torch_attention(x.query, x.coarse_key, x.coarse_value)
        error = _distance(ends(plain[:, rows]), right)
    smallest = torch.finfo(x.query.dtype).eps / 2
    return _Oracle(rows, right, max(error, smallest), None if dense else plain, tuple(x.query.shape))


def _right(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, case: Case, factor: tuple[float, float]
) -> torch.Tensor:
    """The reference in float64, a few queries at a time."""
    key, value = (reference.downsample_tokens(t.flatten(2), case.grid, factor).double() for t in (key, value))
    key, value = (t.unflatten(2, query.shape[2:]) for t in (key, value))
    keys = (key.shape[1], 1)
    few = max(1, _PIECE // (query.shape[0] * query.shape[2] * key.shape[1]))
    return torch.cat([reference.downsampled_attention(q.double(), key, value, keys) for q in query.split(few, 1)], 1)


def _distance(out: torch.Tensor, right: torch.Tensor) -> float:
    return ((out.double() - right).norm() / right.norm()).item()


def _worst_tile(out: torch.Tensor, plain: torch.Tensor) -> tuple[float, int]:
    """The largest distance of any head and tile, and the first query of that tile; NaN counts as the largest."""
    batch, _, heads, head_dim = out.shape
    tiles = max(1, _PIECE // (batch * heads * head_dim * _TILE))
    distances = []
    for both in zip(out.split(tiles * _TILE, 1), plain.split(tiles * _TILE, 1), strict=True):
        # (B, tiles, 128, H, D), the last tile padded with zeros
        a, b = (F.pad(t, (0, 0, 0, 0, 0, -t.shape[1] % _TILE)).unflatten(1, (-1, _TILE)) for t in both)
        off, length = ((t.float().square().sum((2, 4))).sqrt() for t in (a.float() - b, b))
        distances.append((off / length.clamp_min(torch.finfo(torch.float32).tiny)).amax((0, 2)))
    worst, tile = torch.cat(distances).max(0)
    return worst.item(), int(tile) * _TILE


def _check(oracle: Callable[[], _Oracle], bound: float, info: dict[str, Any], out: torch.Tensor) -> None:
    right = oracle()
    if out.shape != right.shape:
        raise wrong(f"of shape {tuple(out.shape)}, not {right.shape}")
    if not out.isfinite().all():
        raise wrong("not finite")
    info["relative_error"] = error = _distance(ends(out[:, right.rows]), right.out)
    if not error <= bound * right.error:
        raise wrong(f"off by {error:.2g} of its norm, torch's own attention by {right.error:.2g}")
    if right.plain is not None:
        worst, first = _worst_tile(out, right.plain)
        if not worst <= _SLACK * bound * right.error:
            raise wrong(f"off by {worst:.2g} of their norm in the {_TILE} queries from {first} on")


# Ours without packing.


def _packed(case: Case, device: torch.device) -> Call:
    """The attention kernel alone: keys and values are packed in the first call on each set of inputs."""
    backends.choose("triton", device, case.torch_dtype, case.head_dim)  # raises, with the reason, if it cannot run
    from ..kernels import launch

    packed: dict[int, tuple[launch.Plan, tuple[torch.Tensor, torch.Tensor]]] = {}

    def call(x: Inputs) -> torch.Tensor:
        with torch.cuda.device_of(x.query):
            if x.number not in packed:
                how = case.grid, case.coarse, "nearest", case.head_dim**-0.5
                plan = launch.Plan(x.query, x.key, x.value, *how, *launch.settings_for(x.query))
                packed[x.number] = plan, plan.pack(x.key, x.value)
            plan, rows = packed[x.number]
            return plan.attend(x.query, *rows)

    return call
