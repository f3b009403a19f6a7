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
from ..diffusers.apply import apply_todo, remove_todo
from ..diffusers.dato.apply import ATTRIBUTE as DATO
from ..diffusers.dato.apply import apply_dato, remove_dato, reset_dato
from ..diffusers.levels import transformers_by_level
from ..diffusers.patches import has_deepcache, has_todo
from ..options.methods import Method, SettingError, refusal
from ..options.settings import CompareSettings


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
        SettingError: the pipeline cannot take it: it lacks a level of the factor, or is not built as DaTo needs.
        ArgumentError: one of the methods is on the pipeline already, and would be taken off.
    """
    _check_untouched(pipe.unet)
    bound = _BINDERS[method.kind](method, pipe, settings)
    if bound.unavailable is not None:
        return bound
    try:
        with bound.applied():
            pass
    except ValueError as error:
        if isinstance(error, ArgumentError) and error.argument == "factor":
            option = Method("todo") if method.kind == "todo+dato" else method  # the variant of todo+dato is no factor
            raise refusal(option, "factor", error.problem) from error
        raise SettingError("methods", f"has {method.label!r}, which the pipeline cannot take: {error}") from error
    return bound


def _bind_dense(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    return BoundMethod(method.label)


def _bind_todo(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    config = settings.todo_config(method, *_size(settings))
    return BoundMethod(
        method.label, config.to_dict(), apply=lambda: apply_todo(pipe, config), remove=lambda: remove_todo(pipe)
    )


def _bind_dato(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    """DaTo with its schedule resampled here to the calls of an image, so that it need not be at the call."""
    assert settings.steps is not None
    calls = calls_of(pipe.scheduler, settings.steps)
    config = settings.dato_config(method, calls, *_size(settings))
    options = {"schedule": settings.schedule if method.variant is None else method.variant, **config.to_dict()}

    def remove() -> None:
        reset_dato(pipe)  # frees its tensors now, before the next image's memory is measured
        remove_dato(pipe)

    return BoundMethod(method.label, options, apply=lambda: apply_dato(pipe, config), remove=remove)


def _bind_tome(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    """Token Merging (arXiv 2303.17604) by its authors' package, on the finest level with self-attention."""
    unet = pipe.unet
    # tomesd's own default is level 1, where SDXL has no attention.
    finest = min(level for level, _ in transformers_by_level(unet))
    options = {"ratio": settings.tome_ratio_of(method), "max_downsample": finest}
    if importlib.util.find_spec("tomesd") is None:
        return BoundMethod(method.label, options, unavailable="tomesd is not installed: pip install tomesd")
    import tomesd

    def remove() -> None:
        tomesd.remove_patch(unet)
        for module in unet.modules():  # remove_patch leaves a mark on each
            module.__dict__.pop("_tome_info", None)

    return BoundMethod(method.label, options, apply=lambda: tomesd.apply_patch(unet, **options), remove=remove)


def _bind_deepcache(method: Method, pipe: Any, settings: CompareSettings) -> BoundMethod:
    """DeepCache (arXiv 2312.00858) by its authors' package: cached calls compute only the outermost skip connection."""
    options = {"cache_interval": settings.cache_interval_of(method), "cache_branch_id": 0}
    if importlib.util.find_spec("DeepCache") is None:
        return BoundMethod(method.label, options, unavailable="DeepCache is not installed: pip install DeepCache")
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe)
    helper.set_params(**options)
    forwards: dict[nn.Module, Any] = {}  # set on the module itself, as offloading does

    def apply() -> None:
        forwards.update((m, m.__dict__["forward"]) for m in pipe.unet.modules() if "forward" in m.__dict__)
        helper.enable()

    def remove() -> None:
        # Not disable(), which leaves a forward on every module and fails after an enable() that did not complete.
        for module in pipe.unet.modules():
            module.__dict__.pop("forward", None)
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        forwards.clear()
        helper.reset_states()

    return BoundMethod(method.label, options, apply=apply, remove=remove)


_BINDERS: dict[str, Callable[[Method, Any, CompareSettings], BoundMethod]] = {
    "dense": _bind_dense,
    "todo": _bind_todo,
    "tome": _bind_tome,
    "dato": _bind_dato,
    "todo+dato": _bind_dato,
    "deepcache": _bind_deepcache,
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
