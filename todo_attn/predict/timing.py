"""The UNet itself timed, dense and under ToDo and DaTo, to compare with what :mod:`.gains` predicts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel

from .. import logs
from ..bench.harness import Candidate, Meter, Rounds, measure
from ..bench.unet import CallTimes, Run
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

_LONG = 5.0  # seconds; a dense call that takes longer is timed once


def time_calls(
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    latents: tuple[int, int],
    batch: int,
    configs: Mapping[str, ToDoConfig | DaToConfig],
    expected: float,
) -> dict[str, dict[str, float]]:
    """Median seconds of each kind of call, by the names of ``configs`` and "dense". All but DaTo have full calls only.

    Args:
        architecture: a pipeline is loaded with its weights; a name alone gets random ones, on which time does not
            depend.
        latents: height and width of the UNet's input.
        batch: of a call.
        configs: each on a UNet of its own, over the same weights.
        expected: seconds of a dense call, predicted. A long call is timed once, after a small call that brings the
            weights into memory; others 5 times on a CPU and 10 times on a GPU.

    Raises:
        SettingError: the model cannot be loaded, or a call of it failed.
        MemoryError: a call ran out of memory.
    """
    unet = _load(architecture, device, dtype)
    inputs = random_inputs(unet, batch, *latents)
    methods: dict[str, ToDoConfig | DaToConfig | None] = {"dense": None, **configs}
    runs = {name: _run(unet, config, inputs) for name, config in methods.items()}
    if expected > _LONG:
        rounds = Rounds(warmup=0, rounds=1)
        small = inputs | {"sample": inputs["sample"][..., :16, :16]}
        for run in runs.values():
            with torch.no_grad(), logs.silent():
                run.model(timestep=1, **small)
            run.after()
    else:
        rounds = Rounds(warmup=1, rounds=5, seconds=30) if device.type == "cpu" else Rounds(warmup=3, rounds=10)
    with logs.silent():
        results = measure([Candidate(name, partial(runs.__getitem__, name)) for name in runs], Meter(device), rounds)
    for result in results:
        if result.error is not None:
            if is_out_of_memory(RuntimeError(result.error)):
                raise MemoryError(result.error)
            raise SettingError("measure", f"was not possible: {result.candidate.name} ended with {result.error}")
    return {name: run.times.medians(skip=rounds.warmup) for name, run in runs.items()}


def _run(unet: UNet2DConditionModel, config: ToDoConfig | DaToConfig | None, inputs: dict[str, Any]) -> Run:
    """One call of each kind that ``config`` has (None: dense), on a UNet of its own over the weights of ``unet``."""
    model = twin(unet)
    if config is None or isinstance(config, ToDoConfig):
        if config is not None:
            apply_todo(model, config)
        return Run(model, inputs, torch.tensor([999]), CallTimes(FULL))
    apply_dato(model, in_one_run(config))  # type: ignore[arg-type]
    kinds = FULL + SHALLOW + REUSE
    timesteps = torch.arange(999, 999 - len(kinds), -1)
    return Run(model, inputs, timesteps, CallTimes(kinds), after=lambda: reset_dato(model))


def _load(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet with its weights, or random ones for a name or a single file, of which only the shapes are read."""
    if architecture.name in CONFIGS or is_single_file(architecture.name):
        return with_random_weights(architecture.config, device, dtype)
    return load_weights(UNet2DConditionModel, architecture.name, dtype).to(device).eval()
