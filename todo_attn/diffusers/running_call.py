"""Whether ToDo acts in the running call of a model: by its timestep, and by its place in its run.

A timestep is read, which waits for the device. A place is known without that: see :mod:`.streams`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config.checks import ArgumentError
from ..config.todo import ToDoConfig, in_steps
from ..logs import logger
from .caller import calling_pipeline
from .streams import Streams

_Range: TypeAlias = tuple[float, float]

_SAID = {
    "unplaced": "steps: which call of its run a call of the model is cannot be known, because the timestep is not an "
    "element of a longer tensor. ToDo is off in such calls. Pass the elements of scheduler.timesteps.",
    "timesteps": "steps: the timesteps are another tensor in every call, so each is taken for the first of a run. If a "
    "loop converts or copies them in every step, do it once, before it.",
}


class RunningCall:
    """The running call of a model, as far as configurations depend on it; ``place`` is (call, calls), from 0."""

    def __init__(self) -> None:
        self.place: tuple[int, int] | None = None
        self._in_range: dict[_Range, bool] = {}
        self._in_steps: dict[_Range, bool] = {}
        # A run is a tensor of timesteps. Two calls at a step, of guidance or of views of an image, have the same place.
        self._streams = Streams(self._say)
        self._said: set[str] = set()
        self._handle: RemovableHandle | None = None

    def watch(self, model: nn.Module, config: ToDoConfig, timestep: Any) -> None:
        """Decide for ``config`` in every call of ``model`` from now on; in the running call it is at ``timestep``."""
        known = len(self._in_range) + len(self._in_steps)
        if not config.every_timestep:
            self._in_range.setdefault(config.timestep_range, True)
        if not config.every_step:
            self._in_steps.setdefault(config.steps, True)
        if len(self._in_range) + len(self._in_steps) == known:
            return
        if self._handle is None:  # before DaTo's hook, which may copy the timestep to another device
            self._handle = model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        self._decide(model, timestep)

    def acts(self, config: ToDoConfig) -> bool:
        """Whether ToDo under ``config`` acts in the running call."""
        in_range = config.every_timestep or self._in_range[config.timestep_range]
        return in_range and (config.every_step or self._in_steps[config.steps])

    def why_not(self, config: ToDoConfig) -> str:
        """Why ToDo under ``config`` does not act in the running call; "" if it does."""
        if self.acts(config):
            return ""
        if not config.every_timestep and not self._in_range[config.timestep_range]:
            low, high = config.timestep_range
            return f"the timestep is outside of timestep_range, {low:g} to {high:g}"
        if self.place is None:
            return "steps needs the place of the call in its run, which is not known"
        (call, calls), (low, high) = self.place, config.steps
        return f"call {call + 1} of {calls} is outside of steps, {low:g} to {high:g}"

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    # torch.compile runs the hooks of the module that it compiles outside of the graph. This hook, disabled for the
    # compiler, may read the timestep; the model then has one graph with ToDo and one without.
    @torch.compiler.disable(reason="ToDo looks at the timestep: compile the model itself, not a function that calls it")
    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._decide(model, args[1] if len(args) > 1 else kwargs.get("timestep"))

    def _decide(self, model: nn.Module, timestep: Any) -> None:
        if isinstance(timestep, torch.Tensor) and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            name, whole = ("timestep_range", "0 to 1000") if self._in_range else ("steps", "0 to 1")
            low, high = next(iter(self._in_range or self._in_steps))
            raise ArgumentError(
                name,
                f"must hold all of {whole} while torch.jit.trace or torch.export records the model, "
                f"whose graph is one for every timestep, got {(low, high)}",
            )
        if timestep is None:
            return
        for low, high in self._in_range:
            inside = (timestep >= low) & (timestep <= high)
            self._in_range[low, high] = bool(inside.all() if isinstance(inside, torch.Tensor) else inside)
        if self._in_steps:
            self.place = self._place(model, timestep)
            for steps in self._in_steps:
                self._in_steps[steps] = self.place is not None and in_steps(steps, *self.place)

    def _place(self, model: nn.Module, timestep: Any) -> tuple[int, int] | None:
        stream = self._streams.of(timestep, None, ())
        if stream.calls is None:
            caller = calling_pipeline(model)
            stream.expect(None if caller is None else caller.calls)
        if stream.calls is None or (stream.position is None and stream.calls != 1):
            self._say("unplaced")
            return None
        return min(stream.index, stream.calls - 1), stream.calls

    def _say(self, key: str, what: str = "") -> None:
        """Log, once for each ``key``, what concerns ToDo; ``what`` says it for DaTo."""
        if key in _SAID and key not in self._said:
            self._said.add(key)
            logger.warning("ToDo: %s", _SAID[key])
