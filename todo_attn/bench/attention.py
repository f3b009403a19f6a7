"""``downsampled_attention`` against what else computes it.

The oracle is :func:`todo_attn.reference.downsampled_attention` in float64 for 64 queries, spread from the first to the
last, of every head, in the first and last of the batch; all other outputs must be finite. Ours may err twice as much as
torch's own attention on the same queries in the same dtype. The peers' bounds are wider: they are there to find a wrong
function, and one that is only less exact must not leave the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from todo_attn import ops, reference
from todo_attn.ops import backends

from .cases import DTYPES, SDPA, Case
from .harness import Side
from .trial import Trial, ends, needs_cuda, once, rotation, spread, work, wrong

_QUERIES = 64
_OURS, _PEERS, _QUANTISED = 2, 8, 256  # bounds, in errors of torch's own attention
_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
_SAGE_HEAD_DIMS = (64, 96, 128)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Inputs(NamedTuple):
    """One set: (B, N, H, D) queries, keys and values of the whole grid, and (B, M, H, D) of the coarse one."""

    number: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    coarse_key: torch.Tensor
    coarse_value: torch.Tensor


Call = Callable[[Inputs], torch.Tensor]


def trial(case: Case, device: torch.device, variants: Mapping[str, Call] | None = None) -> Trial:
    """The sides that ``case.peers`` names; given ``variants`` of ours, each of those against ours as it is."""

    def make(number: int, generator: torch.Generator) -> Inputs:
        shape = (case.batch, case.tokens, case.heads, case.head_dim)
        query, key, value = (
            torch.randn(shape, generator=generator, device=device, dtype=DTYPES[case.dtype]) for _ in range(3)
        )
        coarse = (_coarse(t, case) for t in (key, value))
        return Inputs(number, query, key, value, *(t.contiguous() for t in coarse))

    inputs = rotation(make, device)
    peers, forms = case.sides
    oracles = {dense: once(partial(_oracle, inputs[-1], case, dense)) for dense in (False, True)}
    build: dict[str, Callable[[], Call]] = {
        "dense": lambda: lambda x: _torch_attention(x.query, x.key, x.value),
        "flex": partial(_flex, device),
        "sage": partial(_sage, inputs, case, device),
        "published": lambda: partial(_published, case=case),
        "todo": lambda: lambda x: ops.downsampled_attention(x.query, x.key, x.value, case.grid, case.factor),
        "todo-coarse": lambda: lambda x: ops.downsampled_attention(x.query, x.coarse_key, x.coarse_value, case.coarse),
        "todo-packed": partial(_packed, case, device),
    }
    build |= {name: partial(_sdpa, backend, device) for name, backend in _BACKENDS.items()}
    ours = {"todo", *forms, *(variants or {})}

    def side(name: str, make: Callable[[], Call] | None = None) -> Side:
        keys = case.tokens if name == "dense" else case.keys
        info = _work(case, keys)
        bound = _OURS if name in ours else _QUANTISED if name == "sage" else _PEERS
        return Side(name, make or build[name], info, partial(_check, oracles[name == "dense"], bound, info))

    if variants is not None:
        return Trial(inputs, [side(n, partial(_as_it_is, v)) for n, v in variants.items()], [side("todo")], ("todo",))
    return Trial(inputs, [side(name) for name in ("todo", *forms)], [side(name) for name in peers], SDPA)


def _as_it_is(call: Call) -> Call:
    return call


def _coarse(x: torch.Tensor, case: Case) -> torch.Tensor:
    return reference.downsample_tokens(x.flatten(2), case.grid, case.factor).unflatten(2, x.shape[2:])


def _work(case: Case, keys: int) -> dict[str, Any]:
    """Q K and P V; queries and outputs, keys and values."""
    rows = case.batch * case.heads
    size = DTYPES[case.dtype].itemsize
    moved = 2 * rows * (case.tokens + keys) * case.head_dim * size
    return work(moved, 4 * rows * case.tokens * keys * case.head_dim)


# The check.


class _Oracle(NamedTuple):
    """The right outputs of the sampled queries, (b, queries, H, D), and how far off torch's own are."""

    rows: torch.Tensor
    out: torch.Tensor
    error: float


def _oracle(x: Inputs, case: Case, dense: bool) -> _Oracle:
    rows = spread(case.tokens, _QUERIES, x.query.device)
    query, key, value = (ends(t) for t in (x.query[:, rows], x.key, x.value))
    factor = (1, 1) if dense else case.factor
    right = reference.downsampled_attention(query.double(), key.double(), value.double(), case.grid, factor)
    keys = (key, value) if dense else (ends(x.coarse_key), ends(x.coarse_value))
    plain = _torch_attention(query, *keys)
    return _Oracle(rows, right, max(_distance(plain, right), torch.finfo(query.dtype).eps / 2))


def _distance(out: torch.Tensor, right: torch.Tensor) -> float:
    return ((out.double() - right).norm() / right.norm()).item()


def _check(oracle: Callable[[], _Oracle], bound: float, info: dict[str, Any], out: torch.Tensor) -> None:
    right = oracle()
    if not out.isfinite().all():
        raise wrong("not finite")
    info["relative_error"] = error = _distance(ends(out[:, right.rows]), right.out)
    if not error <= bound * right.error:
        raise wrong(f"off by {error:.2g} of its norm, torch's own attention by {right.error:.2g}")


# The sides: each takes one set of inputs and returns (B, N, H, D).


def _torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """By the backend that torch chooses."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _sdpa(backend: SDPBackend, device: torch.device) -> Call:
    if backend != SDPBackend.FLASH_ATTENTION:  # of which torch has one for the CPU too
        needs_cuda(device)

    def call(x: Inputs) -> torch.Tensor:
        with sdpa_kernel(backend):
            return _torch_attention(x.query, x.coarse_key, x.coarse_value)

    return call


def _flex(device: torch.device) -> Call:
    needs_cuda(device)
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # compiled for a few shapes, it would stay uncompiled for the next
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def call(x: Inputs) -> torch.Tensor:
        return compiled(*(t.transpose(1, 2) for t in (x.query, x.coarse_key, x.coarse_value))).transpose(1, 2)

    return call


def _sage(inputs: list[Inputs], case: Case, device: torch.device) -> Call:
    """SageAttention 1.0.6, the last on PyPI. It knows few head dims (others are padded) and writes into its keys."""
    needs_cuda(device)
    from sageattention import sageattn

    wide = next((known for known in _SAGE_HEAD_DIMS if known >= case.head_dim), None)
    if wide is None:
        raise RuntimeError(f"knows head dims up to {_SAGE_HEAD_DIMS[-1]}, not {case.head_dim}")
    keys = [x.coarse_key.clone() for x in inputs]

    def call(x: Inputs) -> torch.Tensor:
        tensors = [x.query, keys[x.number], x.coarse_value]
        if wide != case.head_dim:
            tensors = [F.pad(t, (0, wide - case.head_dim)) for t in tensors]
        out = sageattn(*tensors, tensor_layout="NHD", sm_scale=case.head_dim**-0.5)
        return out[..., : case.head_dim]

    return call


def _published(x: Inputs, case: Case) -> torch.Tensor:
    """ToDo as published: keys and values as images, ``interpolate``, attention."""

    def shrink(t: torch.Tensor) -> torch.Tensor:
        image = t.flatten(2).transpose(1, 2).unflatten(2, case.grid)
        image = F.interpolate(image, size=case.coarse, mode="nearest")
        return image.flatten(2).transpose(1, 2).unflatten(2, (case.heads, case.head_dim))

    return _torch_attention(x.query, shrink(x.key), shrink(x.value))


def _packed(case: Case, device: torch.device) -> Call:
    """Ours without the copy of keys and values: what they are packed to is kept from the first call on each set."""
    backends.choose("triton", device, DTYPES[case.dtype], case.head_dim)  # says why where it cannot run
    from todo_attn.kernels import attention

    pack, kept = attention.pack, dict[int, Any]()

    def call(x: Inputs) -> torch.Tensor:
        def packed(*arguments: Any) -> Any:
            if x.number not in kept:
                kept[x.number] = pack(*arguments)
            return kept[x.number]

        attention.pack = packed  # type: ignore[assignment]
        try:
            return ops.downsampled_attention(x.query, x.key, x.value, case.grid, case.factor, backend="triton")
        finally:
            attention.pack = pack

    return call
