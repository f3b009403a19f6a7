"""``todo-attn doctor``, ``bench`` and ``schedules``: arguments in, tables or JSON out; the work is done elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from ..config import schedule
from ..config.checks import ArgumentError
from ..config.schedule import FEWEST_CALLS
from ..example import example_pipeline
from ..options.methods import NO_SCHEDULE, SettingError
from ..options.settings import CompareSettings
from . import compare, recommend, search, tune  # noqa: F401  (register their own commands, which are listed first)
from .app import (
    DeviceName,
    DtypeName,
    MaxKeys,
    PruneRatio,
    Side,
    UserError,
    app,
    chosen_architecture,
    hush_loading,
    naming_options,
)
from .printing import (
    DIGITS_NOTE,
    print_examination,
    print_lines,
    schedule_lines,
    schedules_notes,
    schedules_table,
)

# The methods whose gain doctor predicts.
_ADVISED = "dense,todo,dato,todo+dato"
_PRESET = "coco"  # its default schedule
# Options that doctor and schedules share.
_Architecture = Annotated[
    str | None,
    typer.Option(
        help="sd15, sdxl, a folder saved by diffusers, a .safetensors or .ckpt file, or a Hub id.",
        show_default="the shipped pipeline",
    ),
]

_DOCTOR_HELP = """Say what is installed, run each op against its oracle, and exit with 1 if something is broken.

What is missing (a GPU, Triton, diffusers) is listed and is no error: the rest works without it.

With `--model`, a size or another of its options, say instead what ToDo and DaTo would gain there on this machine,
predicted from the operations that they save, and timed with `--measure`; or that they will not help, and why.

**Examples**

- what works here: `todo-attn doctor`
- is it worth it: `todo-attn doctor --model sd15 --height 1024 --width 1024`
- timed on your own model: `todo-attn doctor --model ./my-model --height 1536 --width 1536 --measure`
- with a few-step model, such as LCM: `todo-attn doctor --model ./my-lcm --steps 4`
"""


@app.command("doctor", help=_DOCTOR_HELP)
def doctor_command(
    context: typer.Context,
    model: _Architecture = None,
    height: Side = None,
    width: Side = None,
    max_kv_tokens: MaxKeys = 4096,
    schedule: Annotated[
        str | None,
        typer.Option(
            help=f"DaTo: a schedule's name (todo-attn schedules), a JSON file, or {NO_SCHEDULE} to prune alone.",
            show_default=f"{_PRESET}, or {NO_SCHEDULE} below {FEWEST_CALLS} calls of the UNet",
        ),
    ] = None,
    prune_ratio: PruneRatio = None,
    steps: Annotated[
        int,
        typer.Option(
            help="DaTo: steps of the scheduler, one fewer than calls of the UNet, as with PNDM; schedules are "
            "resampled to them."
        ),
    ] = 50,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    measure: Annotated[bool, typer.Option("--measure", help="Time the UNet as well: seconds to minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    sources = {name: context.get_parameter_source(name) for name in context.params}
    if not any(source and source.name == "COMMANDLINE" for name, source in sources.items() if name != "as_json"):
        _examine(as_json)
        return
    if schedule is None:
        schedule = NO_SCHEDULE if steps + 1 < FEWEST_CALLS else _PRESET
    with naming_options():
        settings = CompareSettings(
            methods=_ADVISED,
            height=height,
            width=width,
            max_kv_tokens=max_kv_tokens,
            schedule=schedule,
            prune_ratio=prune_ratio,
            steps=steps,
            device=device,
            dtype=dtype,
        )
        _advise(str(example_pipeline()) if model is None else model, settings, measure, as_json)


def _examine(as_json: bool) -> None:
    from ..doctor import examine

    with Console(stderr=True).status("examining"):
        examination = examine()
    if as_json:
        print(json.dumps(examination, indent=2, allow_nan=False))
    else:
        print_examination(examination, Console())
    if not examination["ok"]:
        raise typer.Exit(1)


def _advise(model: str, settings: CompareSettings, measure: bool, as_json: bool) -> None:
    from ..predict.gains import advice_lines, build_advice

    with Console(stderr=True).status("reading the model") as status:
        hush_loading()
        architecture = chosen_architecture(model)
        advice = build_advice(architecture, settings, measured=measure, watch=status.update)
    if as_json:
        print(json.dumps(advice, indent=2, allow_nan=False))
        return
    print_lines(advice_lines(advice))


@app.command("bench")
def bench_command(
    model: Annotated[
        str, typer.Option(help="sd15, sdxl, a folder saved by diffusers, or a Hub id: whose self-attentions.")
    ] = "sd15",
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default="2048 on a GPU, 768 on a CPU")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default="the height")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: DtypeName = "auto",
    out: Annotated[Path | None, typer.Option(help="A file that the rows are added to, one JSON object a line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows and notes as JSON.")] = False,
) -> None:
    """Time the kernels on this machine, at the shapes of one image, against what they replace; about a minute.

    Each result is checked against an oracle before it is timed; exits with 1 if one of ours was wrong. Says if ToDo is
    not the faster one.

    **Example:** `todo-attn bench --height 1024 --width 1536`
    """
    timed = _bench(model, height, width, device, dtype, out)
    from ..bench import report

    print(json.dumps(timed, indent=2, allow_nan=False) if as_json else report.table(timed["rows"]))
    notes = [f"note: {note}" for note in timed["notes"]]
    print_lines(notes if as_json else [report.LEGEND, *notes], stderr=as_json)
    if refused := report.refused(timed["rows"]):
        raise UserError("; ".join(refused), 1)
    if report.found_no_memory(timed["rows"]):
        raise MemoryError


def _bench(
    model: str, height: int | None, width: int | None, device: str, dtype: str, out: Path | None
) -> dict[str, Any]:
    """Time and write."""
    from ..bench import cases, jsonl
    from .bench import bench

    try:
        with naming_options(ArgumentError):
            if out is not None:
                jsonl.check_appendable(out)
            architecture = None if model in cases.MODELS else chosen_architecture(model)  # whose shapes are known

            def show(rows: list[dict[str, Any]]) -> None:
                if out is not None:
                    jsonl.append(out, rows)

            return bench(device, dtype, model, height, width, show, architecture)
    except OSError as error:
        raise UserError(f"--out cannot be written: {error}", 1) from error


@app.command("schedules")
def schedules_command(
    model: _Architecture = None,
    height: Side = None,
    width: Side = None,
    steps: Annotated[int, typer.Option(help="Of the scheduler; schedules are resampled to them.")] = 50,
    name: Annotated[
        str | None,
        typer.Option(
            help="The name of a schedule, or a JSON file: this one alone, with its digits and source.",
            autocompletion=schedule.names,
            show_default="those without a number",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All schedules.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all of them, or the one, as JSON, digits and sources included.")
    ] = False,
) -> None:
    """List the cache schedules for DaTo, published or found here, and the operations that each saves on a model.

    Only the configuration of the model is read: no weights, no GPU.

    **Examples**

    - on Stable Diffusion 1.5: `todo-attn schedules --model sd15 --height 768 --width 512 --steps 25`
    - the digits of one: `todo-attn schedules --name coco`
    """
    from .schedules import build_listing

    aside = Console(stderr=True)
    if every and name is not None:
        raise UserError(f"--name and --all cannot both be given, got --name {name}")
    with naming_options():
        chosen = _chosen_schedules(name, every or as_json)
        architecture = chosen_architecture(str(example_pipeline()) if model is None else model)
        columns = SpinnerColumn(), TextColumn("counting the operations of a call of each kind"), BarColumn()
        with Progress(*columns, console=aside, transient=True, disable=not aside.is_terminal) as bar:
            task = bar.add_task("", total=None)

            def watch(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            listing = build_listing(architecture, height, width, steps, chosen, watch)
    if as_json:
        print(json.dumps(listing, indent=2, allow_nan=False))
        return
    console = Console()
    if name is None:
        console.print(schedules_table(listing))
        notes = schedules_notes(listing)
        if not every:
            hidden = len(schedule.names()) - len(chosen)
            notes.append(f"{hidden} more, which have only a number: --all. Digits and source of one: --name NAME")
    else:
        for line in schedule_lines(listing):
            whole = line.startswith("digits:")  # so that it can be copied
            console.print(line, highlight=False, soft_wrap=whole, markup=False)
        notes = ["", DIGITS_NOTE, *schedules_notes(listing)[1:]]
    for note in notes:
        console.print(note, highlight=False, markup=False)


def _chosen_schedules(name: str | None, every: bool) -> list[schedule.Schedule]:
    if name is None:
        return list(map(schedule.load, schedule.names() if every else schedule.named()))
    try:
        return [schedule.load(name)]
    except ArgumentError as error:
        raise SettingError("name", error.problem) from error
    except ValueError as error:
        raise SettingError("name", str(error)) from error
