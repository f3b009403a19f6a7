"""The peers of downsampled attention: other implementations, all built and called in the same way.

A peer is built from the sets of inputs, the case and the device; that raises, with the reason, if it cannot run. It is
then called with one set of inputs and returns (B, N, H, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case
from .trial import needs_cuda

_SAGE_HEAD_DIMS = (64, 96, 128)


class Inputs(NamedTuple):
    """One set: queries, keys and values of the full grid, (B, N, H, D); keys and values of the coarse, (B, M, H, D)."""

    number: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    coarse_key: torch.Tensor
    coarse_value: torch.Tensor


Call = Callable[[Inputs], torch.Tensor]


def torch_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's own, by the backend that it chooses."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _sdpa(backend: SDPBackend, inputs: Sequence[Inputs], case: Case, device: torch.device) -> Call:
    if backend != SDPBackend.FLASH_ATTENTION:  # this one exists for the CPU as well
        needs_cuda(device)

    def call(x: Inputs) -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch_attention(x.query, x.coarse_key, x.coarse_value)

    return call


def _activated(name: str, inputs: Sequence[Inputs], case: Case, device: torch.device) -> Call:
    """FlashAttention-3 or -4 in place of torch's own -2, by torch's switch; its package has to be installed."""
    needs_cuda(device)
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    flash = _sdpa(SDPBackend.FLASH_ATTENTION, inputs, case, device)
    activate_flash_attention_impl(name)  # raises here if it is not there
    restore_flash_attention_impl()

    def call(x: Inputs) -> torch.Tensor:
        activate_flash_attention_impl(name)
        try:
            return flash(x)
        finally:
            restore_flash_attention_impl()

    return call


def _flex(inputs: Sequence[Inputs], case: Case, device: torch.device) -> Call:
    needs_cuda(device)
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # or it would run uncompiled after a few shapes
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def call(x: Inputs) -> torch.Tensor:
        return compiled(*(t.transpose(1, 2) for t in (x.query, x.coarse_key, x.coarse_value))).transpose(1, 2)

    return call


def _sage(inputs: Sequence[Inputs], case: Case, device: torch.device) -> Call:
    """SageAttention 1.0.6, the last on PyPI. Other head dims than its own are padded; it writes into its keys."""
    needs_cuda(device)
    from sageattention import sageattn

    wide = next((known for known in _SAGE_HEAD_DIMS if known >= case.head_dim), None)
    if wide is None:
        raise RuntimeError(f"knows head dims up to {_SAGE_HEAD_DIMS[-1]}, not {case.head_dim}")
    more = (0, wide - case.head_dim)
    # A layer could write padded keys and values itself, so only queries are padded in the timed call.
    keys, values = [F.pad(x.coarse_key, more) for x in inputs], [F.pad(x.coarse_value, more) for x in inputs]

    def call(x: Inputs) -> torch.Tensor:
        query = F.pad(x.query, more) if wide > case.head_dim else x.query
        out = sageattn(query, keys[x.number], values[x.number], tensor_layout="NHD", sm_scale=case.head_dim**-0.5)
        return out[..., : case.head_dim]

    return call


def _published(inputs: Sequence[Inputs], case: Case, device: torch.device) -> Call:
    """ToDo as published: keys and values as images, ``interpolate``, attention."""

    def shrink(t: torch.Tensor) -> torch.Tensor:
        image = t.flatten(2).transpose(1, 2).unflatten(2, case.grid)
        image = F.interpolate(image, size=case.coarse, mode="nearest")
        return image.flatten(2).transpose(1, 2).unflatten(2, (case.heads, case.head_dim))

    return lambda x: torch_attention(x.query, shrink(x.key), shrink(x.value))


def _dense(inputs: Sequence[Inputs], case: Case, device: torch.device) -> Call:
    return lambda x: torch_attention(x.query, x.key, x.value)


BUILD: dict[str, Callable[[Sequence[Inputs], Case, torch.device], Call]] = {
    "dense": _dense,
    "sdpa-flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "fa3": partial(_activated, "FA3"),
    "fa4": partial(_activated, "FA4"),
    "flex": _flex,
    "sage": _sage,
    "published": _published,
}
