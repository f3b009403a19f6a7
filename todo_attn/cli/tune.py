"""``todo-attn tune``: the fastest launch configurations for the GPU of this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from ..config.checks import ArgumentError
from ..kernels import tuned
from ..options.settings import check_area, resolved_device
from .app import UserError, app, chosen_architecture, naming_options
from .printing import print_lines, tuning_table

if TYPE_CHECKING:
    from ..bench.tuning import Contest

_SIDE = 2048  # pixels
_LEGEND = (
    "a configuration is queries x keys of a tile x warps x stages; poly: one exp2 in eight by polynomial; ws: warp "
    "specialization. ratio: the median of before's time over kept's"
)


@app.command("tune")
def tune_command(
    model: Annotated[
        str, typer.Option(help="sd15, sdxl, a folder saved by diffusers, or a Hub id: whose head dims.")
    ] = "sd15",
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default=str(_SIDE))] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default="the height")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cuda:N.")] = "auto",
    reset: Annotated[bool, typer.Option("--reset", help="Forget what was kept for this GPU; time nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was timed and kept as JSON.")] = False,
) -> None:
    """Find the fastest launch configurations of the kernels for this GPU, and keep them; about a minute.

    For each head dim of the model, and for DaTo's matching, a handful of configurations are checked against torch's
    attention and timed. The best ones go into a file of your cache folder. Every later process uses them, until the
    driver, Triton or todo_attn changes. Head dims that were tuned for another model are kept.

    **Examples**

    - for SDXL, at the size you use: `todo-attn tune --model sdxl --height 1536 --width 1536`
    - back to the shipped ones: `todo-attn tune --reset`
    """
    with naming_options(ArgumentError):
        resolved = torch.device(resolved_device(device, mps=False))
    if tuned.gpu_of(resolved) is None:
        given = "torch sees none here" if device == "auto" else f"--device {device} is none"
        raise UserError(f"tune needs an NVIDIA GPU, and {given}; `todo-attn doctor` says what is here", 1)
    try:
        result = _reset(resolved) if reset else _tune(resolved, model, height, width)
    except OSError as error:
        raise UserError(f"the cache folder cannot be written: {error}", 1) from error
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    elif reset:
        was = "forgotten: " if result["forgotten"] else "this GPU was not tuned: there is no "
        print_lines([f"{was}{result['file']}"])
    else:
        Console().print(tuning_table(result))
        print_lines([_LEGEND, *(f"note: {note}" for note in result["notes"]), f"kept in {result['file']}"])
    if not reset and result["wrong"]:
        raise UserError("; ".join(result["wrong"]), 1)


def _reset(device: torch.device) -> dict[str, Any]:
    forgotten = tuned.reset(device)
    return {"forgotten": forgotten, "file": str(tuned.path_of(device))}


def _tune(device: torch.device, model: str, height: int | None, width: int | None) -> dict[str, Any]:
    from ..bench import tuning

    _check_triton(device)
    with naming_options(ArgumentError):
        chosen = _contests(device, model, height, width)
    tuned.check_writable(device)
    aside = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn()
    with Progress(*columns, console=aside, transient=True, disable=not aside.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def watch(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        result = tuning.tune(device, chosen, watch)
    found = tuning.kept(chosen, result["rows"])
    if not found.attention and found.match is None:
        raise UserError(f"no configuration could be timed: {result['notes'][0]}", 1)
    return {**result, "file": str(tuned.save(device, found))}


def _check_triton(device: torch.device) -> None:
    from ..ops import backends

    try:
        backends.choose("triton", device, torch.float16)
    except ArgumentError as error:
        reason = error.problem.rpartition("got 'triton': ")[2]
        raise UserError(f"tune needs Triton: {reason}", 1) from error


def _contests(device: torch.device, model: str, height: int | None, width: int | None) -> Sequence[Contest]:
    """What is timed.

    Raises:
        ArgumentError: an argument does not fit.
    """
    from ..bench import cases, tuning
    from .bench import heads

    if height is None:
        height = _SIDE if width is None else width
    if width is None:
        width = height
    check_area(height, width)
    levels, pixels_per_latent = None, cases.PIXELS_PER_LATENT
    if model not in cases.MODELS:  # whose shapes are known
        architecture = chosen_architecture(model)
        levels, pixels_per_latent = heads(architecture), architecture.pixels_per_latent
    attentions = cases.attentions(model, height, width, 2, "fp16", levels, pixels_per_latent)
    gpu = tuned.gpu_of(device)
    assert gpu is not None
    chosen = tuning.contests(device, gpu, attentions)
    if not chosen:
        dims = ", ".join(str(each) for each in sorted({case.head_dim for case in attentions}))
        raise ArgumentError(
            "model", f"must have a head dim that the kernels serve, a multiple of 8 up to 256, and {model!r} has {dims}"
        )
    return chosen
