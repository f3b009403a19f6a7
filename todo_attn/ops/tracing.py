"""What tracers need: for torch.compile what it cannot follow or need not, for torch.jit.trace sizes as numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_in_graphs(function: _Function) -> _Function:
    """A decorator: traced, ``function`` runs at once on plain arguments, and its result is a constant of the graph.

    ``torch.compiler.assume_constant_result``, but without its import of all of torch.compile, and of Triton with it,
    which would then come with ``import todo_attn``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def as_numbers(sizes: Any) -> tuple[Any, ...]:
    """``sizes`` of a tensor as numbers, which torch.jit.trace hands out as tensors; torch.compile's stay symbols."""
    return tuple(int(size) if isinstance(size, torch.Tensor) else size for size in sizes)
