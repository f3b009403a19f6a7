"""What ToDo and DaTo would gain on this machine, for a UNet and an image size: predicted, and on request measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from .. import logs
from ..config.checks import ArgumentError
from ..config.dato import DaToConfig
from ..config.schedule import FEWEST_CALLS, FULL
from ..config.todo import ToDoConfig
from ..diffusers.levels import check_levels, heads_by_level
from ..machine import device_name
from ..models.architectures import Architecture, chosen_size
from ..models.unets import on_meta
from ..options.methods import SettingError
from ..options.settings import CompareSettings
from .count import count_self_attention, count_work
from .model import Work
from .rates import measure_rates
from .timing import time_calls
from .verdict import Verdict, compare_runs, kinds_of

# From benchmarks/results/fidelity-256-cpu-amd-epyc.jsonl.
_IMAGES = (
    "DaTo's schedules change the image visibly, fast ones most. On the shipped pipeline (256 x 256, 25 steps) coco's "
    "images have a PSNR of 18.3 dB to the dense ones and an SSIM of 0.742, those of ToDo with factor 2 at the finest "
    "level 42.7 dB and 0.995. See it on your model: todo-attn compare MODEL --methods dense,todo,dato,todo+dato"
)
_FEW_STEPS = (
    f"A published schedule pays from about {FEWEST_CALLS} calls of the UNet on, one searched for few steps from 8 on. "
    "Published gains of caching in few-step models (LCM, Turbo, Lightning: 1 to 8 steps) are 1.0 to 1.3x"
)


def build_advice(
    architecture: Architecture,
    settings: CompareSettings,
    *,
    measured: bool = False,
    watch: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Every method of ``settings`` on ``architecture``, at its size, on its device; ``json.dumps`` takes it.

    Predicted: the operations counted while the UNet runs on shapes, over the machine's measured rates. Measured: calls
    of the UNet, which take turns with dense ones. DaTo's gain is that of a whole run.

    Args:
        architecture: the UNet.
        settings: its methods "todo", "dato", "todo+dato", their options, the size (None: the model's normal one),
            device and dtype, and steps: of the scheduler, one fewer than the calls of the UNet, as with PNDM.
        measured: whether to time the UNet too; a name alone gets random weights, on which time does not depend.
        watch: called with the current step, in words.

    Raises:
        SettingError: a size that does not fit, or a UNet that cannot be counted, loaded or called.
    """
    height, width = chosen_size(architecture, settings.height, settings.width)
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    batch = 1 if device.type == "cpu" else 2
    assert settings.steps is not None
    calls = settings.steps + 1
    configs: dict[str, ToDoConfig | DaToConfig] = {}
    for method in settings.parsed_methods():
        if method.kind == "todo":
            configs[method.label] = settings.todo_config(method, height, width)
        elif method.kind in ("dato", "todo+dato"):
            dato = settings.dato_config(method, calls, height, width)
            if isinstance(dato.prune_ratio, tuple):
                problem = "must have one prune ratio for all calls here, got one for each: --prune-ratio replaces them"
                raise SettingError("schedule", problem)
            configs[method.label] = dato
    _check_levels(settings, architecture, configs)

    # If a method combines both, the advice also says what each adds to the other.
    both = [(c, c.todo) for c in configs.values() if isinstance(c, DaToConfig) and c.todo is not None]
    alone = [part for config, todo in both for part in (replace(config, todo=None), todo)]
    different = list(dict.fromkeys((*configs.values(), *alone)))
    watch("counting the operations of a call of each kind")
    try:
        with logs.silent():
            counted = count_work(architecture.config, height, width, different, batch, architecture.pixels_per_latent)
    except ValueError as error:
        raise SettingError("model", f"cannot be counted: {error}") from error
    dense, works = counted[0].full, dict(zip(different, counted[1:], strict=True))
    finest = next(iter(heads_by_level(on_meta(architecture.config)).values()))
    latents = height // architecture.pixels_per_latent, width // architecture.pixels_per_latent
    attention = count_self_attention(architecture.config, height, width, batch, architecture.pixels_per_latent)
    watch("finding out how fast this machine is")
    rates = measure_rates(device, dtype, *finest, batch)
    found: dict[str, dict[str, float]] = {}
    if measured:
        watch("timing the UNet")
        found = time_calls(architecture, device, dtype, latents, batch, configs, rates.seconds(dense))

    share = rates.computing(attention) / rates.seconds(dense)
    labels = {config: label for label, config in configs.items()}

    def calls_of(config: ToDoConfig | DaToConfig, times: int = 1) -> tuple[list[Work], list[float] | None]:
        """The work of each call of ``times`` runs under ``config``, and its seconds if they were measured."""
        kinds, timed = kinds_of(config) * times, found.get(labels.get(config, ""))
        return [works[config].of(kind) for kind in kinds], None if timed is None else [timed[kind] for kind in kinds]

    rows = []
    for label, config in configs.items():
        run, clock = calls_of(config)
        dense_run = [dense] * len(run), [found["dense"][FULL]] * len(run) if found else None
        todo = config if isinstance(config, ToDoConfig) else config.todo
        beside_dato = beside_todo = None
        if isinstance(config, DaToConfig) and todo is not None:
            beside_dato = compare_runs(calls_of(replace(config, todo=None)), (run, clock), rates)
            beside_todo = compare_runs(calls_of(todo, len(run)), (run, clock), rates)
        verdict = Verdict(
            config,
            compare_runs(dense_run, (run, clock), rates),
            downsamples=todo is not None and works[todo].full.operations < dense.operations,
            share=share,
            beside_dato=beside_dato,
            beside_todo=beside_todo,
            starts_slowly=rates.overlaps and rates.starting(dense) > rates.computing(dense),
        )
        rows.append(_row(label, verdict, sum(map(rates.seconds, run)) / len(run), clock))
    return {
        "model": architecture.name,
        "height": height,
        "width": width,
        "batch": batch,
        "calls": calls,
        "device": device_name(device),
        "dtype": settings.dtype,
        "rates": asdict(rates),
        "dense": {
            "operations": dense.operations,
            "launches": dense.launches,
            "predicted_seconds": rates.seconds(dense),
            "measured_seconds": found["dense"][FULL] if found else None,
            "self_attention_share": share,
        },
        "methods": rows,
        "notes": _notes(calls, list(configs.values())),
    }


def _check_levels(
    settings: CompareSettings, architecture: Architecture, configs: dict[str, ToDoConfig | DaToConfig]
) -> None:
    """Refuse a factor for a level that the UNet lacks, of an option or of a schedule."""
    for method in settings.parsed_methods():
        config = configs.get(method.label)
        todo = config.todo if isinstance(config, DaToConfig) else config
        if todo is None or not isinstance(todo.factor, dict):
            continue
        try:
            check_levels(todo, on_meta(architecture.config))
        except ArgumentError as error:
            if error.argument == "factor":  # of any other, counting says what is wrong
                raise settings.factor_refused(method, error.problem) from error


def advice_lines(found: dict[str, Any]) -> list[str]:
    """What :func:`build_advice` found, for a person."""
    dense, rates = found["dense"], found["rates"]
    seconds = f"{dense['predicted_seconds']:.3g} s predicted"
    if dense["measured_seconds"] is not None:
        seconds += f", {dense['measured_seconds']:.3g} s measured"
    lines = [
        f"{found['model']} at {found['width']} x {found['height']}, batch {found['batch']}, {found['dtype']}, on "
        f"{found['device']}",
        f"dense: {dense['operations'] / 1e9:,.1f}e9 operations a call, {seconds}; self-attention takes "
        f"{dense['self_attention_share']:.0%} of the time",
        *(f"{_name(row)}: {row['verdict']}" for row in found["methods"]),
        *(f"note: {note}" for note in found["notes"]),
        f"predicted: operations counted on this UNet, over the rates of this machine, just measured: "
        f"{rates['attention'] / 1e9:,.1f}e9 a second of attention, {rates['other'] / 1e9:,.1f}e9 of all else, and "
        f"{rates['launch'] * 1e6:.3g} microseconds to start an operation",
    ]
    if dense["measured_seconds"] is None:
        lines.append("--measure times the UNet itself")
    return lines


def _name(row: dict[str, Any]) -> str:
    """The method's name, and whether DaTo has no schedule."""
    without = "cache_schedule" in row["config"] and row["config"]["cache_schedule"] is None
    return f"{row['method']} without a schedule" if without else row["method"]


def _notes(calls: int, configs: list[ToDoConfig | DaToConfig]) -> list[str]:
    """What seconds do not show of DaTo: how the image changes, and how many calls a schedule needs."""
    datos = [config for config in configs if isinstance(config, DaToConfig)]
    cached = any(config.cache_schedule is not None for config in datos)
    notes = [_IMAGES] if cached else []
    few = calls < FEWEST_CALLS
    if cached or (datos and few):
        if not few:
            advice = "For them use ToDo, or DaTo with --schedule none, which only prunes"
        elif cached:
            advice = f"With {calls} calls try --schedule none too, which only prunes"
        else:
            advice = f"With {calls} calls DaTo is without one here and only prunes"
        notes.append(f"{_FEW_STEPS}. {advice}")
    return notes


def _row(label: str, verdict: Verdict, predicted: float, clock: list[float] | None) -> dict[str, Any]:
    """One method as plain data; seconds are per call, averaged over a run."""
    return {
        "method": label,
        "config": verdict.config.to_dict(),
        "operations_gain": verdict.gains.counted,
        "predicted_seconds": predicted,
        "predicted_gain": verdict.gains.predicted,
        "measured_seconds": None if clock is None else sum(clock) / len(clock),
        "measured_gain": verdict.gains.measured,
        "helps": verdict.gains.helps,
        "todo_helps": verdict.todo_helps,
        "dato_helps": verdict.dato_helps,
        "verdict": str(verdict),
    }
