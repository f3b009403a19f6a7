"""todo_attn: Stable Diffusion in diffusers, fast at high resolution.

Importing registers the ops and nothing more: no compilation, no diffusers. The names that need diffusers are looked up
on first use.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .interrupt import leave_on_interrupt

leave_on_interrupt()  # first: torch takes seconds to import

from . import ops  # noqa: E402
from .config import ArgumentError, DaToConfig, ToDoConfig  # noqa: E402
from .example import example_pipeline  # noqa: E402

if TYPE_CHECKING:
    from .diffusers import ToDoProcessor, apply_dato, apply_todo, remove_dato, remove_todo, reset_dato
    from .diffusers.status import status

try:
    __version__ = version("todo_attn")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"

_NEEDS_DIFFUSERS = {"ToDoProcessor", "apply_dato", "apply_todo", "remove_dato", "remove_todo", "reset_dato", "status"}

__all__ = [
    "ArgumentError",
    "DaToConfig",
    "ToDoConfig",
    "ToDoProcessor",
    "apply_dato",
    "apply_todo",
    "example_pipeline",
    "ops",
    "remove_dato",
    "remove_todo",
    "reset_dato",
    "status",
]


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(".diffusers", __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ModuleNotFoundError(
            f"todo_attn.{name} needs diffusers: pip install 'todo_attn[diffusers]'", name="diffusers"
        ) from error


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
