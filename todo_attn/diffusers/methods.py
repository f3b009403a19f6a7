"""The ways to make a picture that ``compare`` holds against each other: what each puts on a pipeline and takes off."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..compare_settings import CompareSettings, Method, SettingError
from .apply import apply_todo, remove_todo
from .levels import transformers_by_level
from .processor import ToDoProcessor


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class BoundMethod:
    """A method bound to one pipeline.

    ``label`` names it, ``options`` says as plain data what it does, ``unavailable`` why it cannot run here (None where
    it can).
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    unavailable: str | None = None
    apply: Callable[[], object] = _nothing
    remove: Callable[[], object] = _nothing

    @contextmanager
    def applied(self) -> Iterator[None]:
        """On the pipeline within, off it after, whatever is raised."""
        try:
            self.apply()
            yield
        finally:
            self.remove()


def bind(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    """``method`` for ``pipe`` at the size of ``settings``, which must be filled in; tried on once.

    Raises:
        SettingError: the pipeline cannot take it: it lacks a level that a factor names.
        ValueError: ToDo or ToMe is on the pipeline already, which would be taken off.
    """
    assert settings.height is not None and settings.width is not None
    _check_untouched(pipe.unet)
    if method.kind == "dense":
        return BoundMethod("dense")
    if method.kind == "tome":
        return _bind_tome(method, pipe.unet, settings)
    config = settings.todo_config(method.variant, settings.height, settings.width)
    bound = BoundMethod(
        method.label, config.to_dict(), apply=lambda: apply_todo(pipe, config), remove=lambda: remove_todo(pipe)
    )
    try:
        with bound.applied():
            pass
    except ValueError as error:
        problem = str(error).removeprefix("factor ")
        if method.variant is None:
            raise SettingError("factor", problem) from error
        raise SettingError("methods", f"has a factor in {method.label!r} that {problem}") from error
    return bound


def _bind_tome(method: Method, unet: nn.Module, settings: CompareSettings) -> BoundMethod:
    """Token Merging (arXiv 2303.17604) by its authors' package, on the finest level with self-attention."""
    # tomesd's own default is level 1, where SDXL has no attention.
    finest = min(level for level, _ in transformers_by_level(unet))
    options = {"ratio": settings.tome_ratio_of(method), "max_downsample": finest}
    if importlib.util.find_spec("tomesd") is None:
        return BoundMethod(method.label, options, unavailable="tomesd is not installed: pip install tomesd")
    import tomesd

    def remove() -> None:
        tomesd.remove_patch(unet)
        for module in unet.modules():  # what remove_patch forgets
            module.__dict__.pop("_tome_info", None)

    return BoundMethod(method.label, options, apply=lambda: tomesd.apply_patch(unet, **options), remove=remove)


def _check_untouched(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(getattr(module, "processor", None), ToDoProcessor):
            raise ValueError("pipe must be as loaded, got one with ToDo on it: remove_todo(pipe) first")
        if "_tome_info" in module.__dict__:
            raise ValueError("pipe must be as loaded, got one with ToMe on it: tomesd.remove_patch(pipe) first")
