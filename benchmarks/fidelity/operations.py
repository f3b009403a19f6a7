"""The operations of an image by each case: the UNet runs on shapes alone under the method, one call of each kind.

All cases are counted in one way. Matrix products, convolutions, attention and the search for similar tokens count, a
multiplication with its addition as two; elementwise operations do not, nor do text encoder and VAE.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from benchmarks.fidelity.cases import Case
from benchmarks.fidelity.store import Size
from todo_attn import logs
from todo_attn.compare.run import quiet, take_shot
from todo_attn.config.schedule import FULL
from todo_attn.config.todo import in_steps
from todo_attn.models.unets import on_meta
from todo_attn.options.settings import CompareSettings
from todo_attn.predict.count import tallied


def kinds_of(case: Case, timesteps: torch.Tensor) -> list[Hashable]:
    """The kind of each call of a run: calls of one kind do the same work, so that one of each is counted.

    Args:
        timesteps: of the scheduler, (calls,), one for each call of the UNet.
    """
    times = timesteps.tolist()
    todo = case.todo if case.dato is None else case.dato.todo
    acts = [False] * len(times)
    if todo is not None:
        low, high = todo.timestep_range
        acts = [low <= time <= high and in_steps(todo.steps, i, len(times)) for i, time in enumerate(times)]
    if case.cache_interval is not None:
        # DeepCache finds the call by its timestep, of which PNDM has two equal ones.
        return [(times.index(time) - times.index(times[0])) % case.cache_interval == 0 for time in times]
    if case.dato is None:
        return list(acts)
    return list(zip(FULL + case.dato.schedule_for(len(times)), acts, strict=True))


class _StopError(Exception):
    """Ends a call of a pipeline at its first call of the UNet."""


class Operations:
    """Counts for one pipeline, at the guidance and with the scheduler of its runs."""

    def __init__(self, pipe: Any, settings: CompareSettings, prompt: str) -> None:
        assert settings.steps is not None
        self.pipe, self.settings, self.steps, self.prompt = pipe, settings, settings.steps, prompt
        with torch.device("meta"):
            # diffusers' own to() would warn of layers to keep in float32.
            self.unet = torch.nn.Module.to(on_meta(pipe.unet.config), pipe.unet.dtype)
        self._inputs: dict[Size, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def of(self, case: Case, size: Size) -> int:
        """Of one image by ``case`` at ``size``."""
        args, kwargs = self._inputs_at(case.size_of(*size))
        steps = case.steps_of(self.steps)
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(steps)
        bound = case.bind(SimpleNamespace(unet=self.unet, scheduler=scheduler), steps)
        kinds = kinds_of(case, scheduler.timesteps)
        found: dict[Hashable, int] = {}
        with logs.silent(), bound.applied(), torch.no_grad(), torch.device("meta"):
            for timestep, kind in zip(scheduler.timesteps, kinds, strict=True):
                if len(found) == len(set(kinds)):
                    break
                with tallied() as work:
                    self.unet(args[0], timestep, *args[2:], **kwargs)
                found[kind] = work().operations
        return sum(found[kind] for kind in kinds)

    def _inputs_at(self, size: Size) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the pipeline calls its UNet with at ``size``, as shapes: with guidance, and as much text as it gives."""
        if size not in self._inputs:
            seen: list[Any] = []

            def look(module: Any, args: Any, kwargs: Any) -> None:
                seen.append((args, kwargs))
                raise _StopError

            height, width = size
            settings = replace(self.settings, height=height, width=width)
            handle = self.pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
            try:
                with quiet(self.pipe):
                    take_shot(self.pipe, settings, self.prompt, 0, self.steps, label="", number=0)
            except _StopError:
                pass
            finally:
                handle.remove()
            self._inputs[size] = tree_map_only(
                torch.Tensor, lambda x: torch.empty_like(x, device="meta"), tuple(seen[0])
            )
        return self._inputs[size]
