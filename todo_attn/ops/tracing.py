"""What torch.compile is to run while it traces, because it cannot follow it or need not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable[..., object])


def constant_in_graphs(function: _Function) -> _Function:
    """A decorator: traced, ``function`` runs at once on plain arguments, and its result is a constant of the graph.

    ``torch.compiler.assume_constant_result``, but without its import of all of torch.compile, and of Triton with it,
    which would then come with ``import todo_attn``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
