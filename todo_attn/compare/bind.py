"""The methods of ``compare``: what each puts on a pipeline and takes off."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config.checks import ArgumentError
from ..config.dato import DaToConfig
from ..config.todo import ToDoConfig
from ..diffusers.apply import apply_todo, remove_todo
from ..diffusers.dato.apply import ATTRIBUTE as DATO
from ..diffusers.dato.apply import apply_dato, remove_dato, reset_dato
from ..diffusers.patches import has_deepcache, has_todo
from ..options.methods import Method, SettingError
from ..options.settings import CompareSettings
from .peers import DeepCache, apply_tome, remove_tome, tome_options


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class BoundMethod:
    """A method bound to one pipeline.

    ``label`` names it, ``options`` says as plain data what it does, ``unavailable`` why it cannot run here (None if it
    can).
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    unavailable: str | None = None
    apply: Callable[[], object] = _nothing
    remove: Callable[[], object] = _nothing

    @contextmanager
    def applied(self) -> Iterator[None]:
        """On the pipeline inside the block, off it afterwards, whatever is raised."""
        try:
            self.apply()
            yield
        finally:
            self.remove()


def bind(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    """``method`` for ``pipe`` at the size and steps of ``settings``, which must be filled in; tried once.

    Raises:
        SettingError: the pipeline cannot take it: it lacks a level of a factor, or is not built as DaTo needs.
        ArgumentError: one of the methods is on the pipeline already, and would be taken off.
    """
    bound = _BINDERS[method.kind](method, pipe, settings)
    try:
        check_fits(bound, pipe)
    except ValueError as error:
        if isinstance(error, ArgumentError) and error.argument == "pipe":
            raise
        if isinstance(error, ArgumentError) and error.argument == "factor":
            raise settings.factor_refused(method, error.problem) from error
        raise SettingError("methods", f"has {method.label!r}, which the pipeline cannot take: {error}") from error
    return bound


def check_fits(bound: BoundMethod, pipe: Any) -> None:
    """Put ``bound`` on the pipeline once, and take it off.

    Raises:
        ArgumentError: of ``pipe``: one of the methods is on it already, and would be taken off.
        ValueError: the pipeline cannot take the method.
    """
    _check_untouched(pipe.unet)
    if bound.unavailable is None:
        with bound.applied():
            pass


def bind_dense(label: str = "dense") -> BoundMethod:
    """The pipeline as it is."""
    return BoundMethod(label)


def bind_todo(pipe: Any, config: ToDoConfig, label: str = "todo") -> BoundMethod:
    """ToDo with ``config``."""
    return BoundMethod(
        label, config.to_dict(), apply=lambda: apply_todo(pipe, config), remove=lambda: remove_todo(pipe)
    )


def bind_dato(pipe: Any, config: DaToConfig, label: str = "dato", schedule: str | None = None) -> BoundMethod:
    """DaTo with ``config``; ``schedule`` names its schedule in the options."""
    options = {"schedule": schedule, **config.to_dict()}

    def remove() -> None:
        reset_dato(pipe)  # frees its tensors now, before the next image's memory is measured
        remove_dato(pipe)

    return BoundMethod(label, options, apply=lambda: apply_dato(pipe, config), remove=remove)


def bind_tome(pipe: Any, ratio: float, label: str = "tome") -> BoundMethod:
    """Token Merging on the finest level with self-attention."""
    options = tome_options(pipe.unet, ratio)
    if importlib.util.find_spec("tomesd") is None:
        return BoundMethod(label, options, unavailable="tomesd is not installed: pip install tomesd")
    return BoundMethod(
        label, options, apply=lambda: apply_tome(pipe.unet, options), remove=lambda: remove_tome(pipe.unet)
    )


def bind_deepcache(pipe: Any, interval: int, label: str = "deepcache") -> BoundMethod:
    """DeepCache; cached calls compute only the outermost skip connection."""
    options = {"cache_interval": interval, "cache_branch_id": 0}
    if importlib.util.find_spec("DeepCache") is None:
        return BoundMethod(label, options, unavailable="DeepCache is not installed: pip install DeepCache")
    deepcache = DeepCache(pipe, options)
    return BoundMethod(label, options, apply=deepcache.apply, remove=deepcache.remove)


def _dense(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    return bind_dense(method.label)


def _todo(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    return bind_todo(pipe, settings.todo_config(method, *_size(settings)), method.label)


def _dato(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    """With its schedule resampled here to the calls of an image, so that it need not be at the call."""
    assert settings.steps is not None
    config = settings.dato_config(method, calls_of(pipe.scheduler, settings.steps), *_size(settings))
    return bind_dato(pipe, config, method.label, settings.schedule if method.variant is None else method.variant)


def _tome(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    return bind_tome(pipe, settings.tome_ratio_of(method), method.label)


def _deepcache(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    return bind_deepcache(pipe, settings.cache_interval_of(method), method.label)


_BINDERS: dict[str, Callable[[Method, Any, CompareSettings], BoundMethod]] = {
    "dense": _dense,
    "todo": _todo,
    "tome": _tome,
    "dato": _dato,
    "todo+dato": _dato,
    "deepcache": _deepcache,
}


def calls_of(scheduler: Any, steps: int) -> int:
    """Calls of the UNet for an image of ``steps`` steps of ``scheduler``; Heun, for one, calls it twice a step."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def _size(settings: CompareSettings) -> tuple[int, int]:
    assert settings.height is not None and settings.width is not None
    return settings.height, settings.width


def _check_untouched(unet: nn.Module) -> None:
    if DATO in unet.__dict__:
        raise ArgumentError("pipe", "must be as loaded, got one with DaTo on it: remove_dato(pipe) first")
    if has_todo(unet):
        raise ArgumentError("pipe", "must be as loaded, got one with ToDo on it: remove_todo(pipe) first")
    if any("_tome_info" in module.__dict__ for module in unet.modules()):
        raise ArgumentError("pipe", "must be as loaded, got one with ToMe on it: tomesd.remove_patch(pipe) first")
    if has_deepcache(unet):
        raise ArgumentError("pipe", "must be as loaded, got one with DeepCache on it: helper.disable() first")
