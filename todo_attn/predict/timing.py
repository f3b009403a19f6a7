"""Times calls of a UNet, dense and under ToDo and DaTo, in turns, to check the predictions of :mod:`.gains`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel

from .. import logs
from ..bench.harness import Candidate, Meter, Rounds, elapsed, measure
from ..config.dato import DaToConfig
from ..config.schedule import FULL, REUSE, SHALLOW
from ..config.todo import ToDoConfig
from ..diffusers.apply import apply_todo
from ..diffusers.dato import apply_dato, reset_dato
from ..models.architectures import CONFIGS, Architecture
from ..models.loading import is_single_file, load_weights
from ..models.unets import random_inputs, twin, with_random_weights
from ..options.methods import SettingError
from ..peak_memory import is_out_of_memory
from .count import in_one_run
from .rates import now

_LONG = 5.0  # seconds; a longer dense call is timed only once


def time_calls(
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    latents: tuple[int, int],
    batch: int,
    configs: dict[str, ToDoConfig | DaToConfig],
    expected: float,
) -> dict[str, dict[str, float]]:
    """Median seconds of a call of each kind, by the names of ``configs`` and "dense", which has full calls only.

    Args:
        architecture: of a pipeline, with its weights; a name alone gets random ones, on which time does not depend.
        latents: height and width of the UNet's input.
        batch: of a call.
        configs: each on a UNet of its own, over the same weights.
        expected: seconds of a dense call, roughly. A call of more than 5 s is timed once, after a tiny call; others
            are timed 5 times on a CPU, 10 times on a GPU.

    Raises:
        SettingError: the model cannot be loaded, or a call of it failed.
        MemoryError: a call ran out of memory.
    """
    unet = _load(architecture, device, dtype)
    calls = [
        _Calls(name, unet, config, random_inputs(unet, batch, *latents))
        for name, config in {"dense": None, **configs}.items()
    ]
    if expected > _LONG:  # minutes otherwise
        rounds = Rounds(warmup=0, rounds=1)
        for each in calls:
            each.warm_up()
    else:
        rounds = Rounds(warmup=1, rounds=5, seconds=30) if device.type == "cpu" else Rounds(warmup=3, rounds=10)
    with logs.silent():
        results = measure([Candidate(each.name, each.ready) for each in calls], Meter(device), rounds)
    for result in results:
        if result.error is not None:
            if is_out_of_memory(RuntimeError(result.error)):
                raise MemoryError(result.error)
            raise SettingError("measure", f"was not possible: {result.candidate.name} ended with {result.error}")
    return {each.name: each.medians(rounds.warmup) for each in calls}


class _Calls:
    """Times one call of each kind that a method has, on a twin of ``unet``."""

    def __init__(
        self, name: str, unet: UNet2DConditionModel, config: ToDoConfig | DaToConfig | None, inputs: dict[str, Any]
    ) -> None:
        self.name, self.config, self.inputs = name, config, inputs
        self.model = twin(unet)
        self.kinds = (FULL, SHALLOW, REUSE) if isinstance(config, DaToConfig) else (FULL,)
        self.seconds: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        if isinstance(config, DaToConfig):
            apply_dato(self.model, in_one_run(config))  # type: ignore[arg-type]
        elif config is not None:
            apply_todo(self.model, config)

    def ready(self) -> Callable[[], None]:
        """What is timed."""
        return self

    def warm_up(self) -> None:
        """One call on a tiny image, to bring the weights into memory."""
        small = self.inputs | {"sample": self.inputs["sample"][..., :16, :16]}
        with torch.inference_mode(), logs.silent():
            self.model(timestep=1, **small)

    @torch.inference_mode()
    def __call__(self) -> None:
        if isinstance(self.config, DaToConfig):
            reset_dato(self.model)
        device = self.model.device
        spans = []
        for timestep, kind in zip(torch.arange(999, 999 - len(self.kinds), -1), self.kinds, strict=True):
            start = now(device)
            self.model(timestep=timestep, **self.inputs)
            spans.append((kind, start, now(device)))
        for kind, start, end in spans:
            self.seconds[kind].append(elapsed(start, end))

    def medians(self, warmup: int) -> dict[str, float]:
        """Of each kind, without the first ``warmup`` calls."""
        return {kind: statistics.median(seconds[warmup:]) for kind, seconds in self.seconds.items()}


def _load(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """With its weights; random ones for a name or a single file, of which only shapes are known."""
    if architecture.name in CONFIGS or is_single_file(architecture.name):
        return with_random_weights(architecture.config, device, dtype)
    return load_weights(UNet2DConditionModel, architecture.name, dtype).to(device).eval()
