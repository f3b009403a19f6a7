"""Help for tracers: constants for torch.compile, sizes as plain numbers for torch.jit.trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_in_graphs(function: _Function) -> _Function:
    """Decorator: while tracing, call ``function`` and make its result a constant of the graph.

    The same as ``torch.compiler.assume_constant_result``, without importing torch.compile, and with it Triton, on
    ``import todo_attn``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def as_numbers(sizes: Any) -> tuple[Any, ...]:
    """``sizes`` of a tensor as numbers. torch.jit.trace gives tensors, which become int; symbols stay."""
    return tuple(int(size) if isinstance(size, torch.Tensor) else size for size in sizes)
