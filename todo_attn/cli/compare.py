"""``todo-attn compare``: arguments in, the table out; the work is done in :mod:`todo_attn.compare`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..compare.folder import IMAGES, NOTHING_MADE, PAGE, REPORT, SHEET, choose_folder
from ..config.modes import MODES
from ..options.methods import METHODS_TEXT
from ..options.settings import CompareSettings
from ..peak_memory import MAY_FIT, OUT_OF_MEMORY
from .app import (
    ConfigSource,
    DeviceName,
    DtypeName,
    Guidance,
    MaxKeys,
    ModelSource,
    Prompts,
    PruneRatio,
    SchedulerName,
    Seeds,
    Steps,
    UserError,
    Variant,
    app,
    as_typed,
    hush_loading,
    naming_options,
)
from .printing import compare_table

if TYPE_CHECKING:
    from ..compare import run as comparing

_COMPARE_HELP = """Make the same images by each method, in turns; write them, a contact sheet and report.json.

**Examples**

- the pipeline that comes with the package, at twice its normal size:
  `todo-attn compare`
- your model, three seeds, at 2048 x 1536:
  `todo-attn compare ./my-model --prompt "a lighthouse at dusk" --seed 0 --seed 1 --seed 2 --width 2048 --height 1536`
- two strengths of ToDo beside ToMe, to read quality at equal speed:
  `todo-attn compare --methods dense,todo:2,todo:4,tome:0.5,tome:0.75`
- DaTo with two of its schedules, with and without ToDo, beside DeepCache:
  `todo-attn compare --methods dense,dato,dato:search,todo+dato,deepcache:3,deepcache:5 --steps 50`
- a page to look at, to keep or to send:
  `todo-attn compare --methods dense,todo:2,dato --report`
- the numbers for a script: `todo-attn compare --json > report.json`
"""


@app.command("compare", help=_COMPARE_HELP)
def compare_command(
    model: ModelSource = None,
    prompt: Prompts = None,
    seed: Seeds = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default="twice the model's normal")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default="twice the model's normal")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: SchedulerName = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    methods: Annotated[str, typer.Option(help=f"Comma-separated: {METHODS_TEXT}.")] = "dense,todo",
    factor: Annotated[
        str,
        typer.Option(help="ToDo: auto, paper, a number, or LEVEL=FACTOR pairs joined by +, such as 1=4+2=2."),
    ] = "auto",
    max_kv_tokens: MaxKeys = 4096,
    mode: Annotated[str, typer.Option(help=f"ToDo: how keys are taken, {', '.join(MODES)}.")] = "nearest",
    tome_ratio: Annotated[float, typer.Option(help="ToMe: the share of tokens merged, at most 0.75.")] = 0.5,
    schedule: Annotated[
        str, typer.Option(help="DaTo: a schedule's name (todo-attn schedules), a JSON file, or none.")
    ] = "coco",
    prune_ratio: PruneRatio = None,
    cache_interval: Annotated[int, typer.Option(help="DeepCache: every n-th call of the UNet is full.")] = 3,
    warmup_steps: Annotated[int, typer.Option(help="Steps of each method's warm-up, which is not counted.")] = 2,
    variant: Variant = None,
    config: ConfigSource = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="The output folder, new or empty.",
            show_default="compare, or compare-2 and so on if that is taken",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the files of an older comparison that is in the folder.")
    ] = False,
    page: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Write report.html too: images under a slider, differences, curve."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report on stdout, everything else on stderr.")
    ] = False,
) -> None:
    with naming_options(model="MODEL", prompts="--prompt", seeds="--seed"):
        settings = CompareSettings(
            model=model,
            prompts=tuple(map(as_typed, prompt or ())),
            seeds=tuple(seed or (0,)),
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            device=device,
            dtype=dtype,
            methods=methods,
            factor=factor,
            max_kv_tokens=max_kv_tokens,
            mode=mode,
            tome_ratio=tome_ratio,
            schedule=schedule,
            prune_ratio=prune_ratio,
            cache_interval=cache_interval,
            warmup_steps=warmup_steps,
            variant=variant,
            config=config,
        )
        try:
            _compare(settings, choose_folder(out, overwrite), page, as_json)
        except KeyboardInterrupt:  # while the pipeline is loaded
            raise UserError(f"interrupted: {NOTHING_MADE}", 130) from None


def _compare(settings: CompareSettings, folder: Path, page: bool, as_json: bool) -> None:
    """Load, compare, show and write."""
    # A download has a progress bar of its own.
    with Console(stderr=True).status("loading the pipeline") if Path(settings.source).exists() else nullcontext():
        hush_loading()
        from ..models.pipelines import load_pipeline

        pipe = load_pipeline(settings)
    compare_and_show(pipe, settings, folder, page, Console(stderr=as_json), as_json)


def compare_and_show(
    pipe: Any, settings: CompareSettings, folder: Path, page: bool, console: Console, as_json: bool = False
) -> dict[str, Any]:
    """Compare, show on ``console``, as JSON too if asked, and write; returns the report."""
    from ..compare.output import Output
    from ..compare.report import build_report
    from ..compare.run import compare

    notes = Console(stderr=True)
    output = Output(folder, page)
    try:
        with _bar(notes) as watch:
            comparison = compare(pipe, settings, watch, output.add)
        with notes.status("measuring how similar the images are"):
            report = build_report(comparison)
        console.print(compare_table(report))  # first, in case writing fails
        for note in report["notes"]:
            console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
        if as_json:
            print(json.dumps(report, indent=2, allow_nan=False), flush=True)
        output.finish(comparison, report)
    except KeyboardInterrupt:
        raise UserError(f"interrupted: {output.stop()}", 130) from None
    except Exception:  # of any kind: keep what was made
        output.stop()
        raise
    if problem := output.problem():
        raise UserError(problem, 1)
    written = {"side by side": SHEET, "one by one": IMAGES, "the numbers": REPORT}
    for what, name in (written | ({"a page of all": PAGE} if page else {})).items():
        console.print(f"{what:<13}  {folder / name}", highlight=False, soft_wrap=True, markup=False)
    if failed := [m.label for m in comparison.methods if m.unavailable == OUT_OF_MEMORY]:
        raise UserError(f"out of memory by {', '.join(failed)}: {MAY_FIT}", 1)
    return report


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[comparing.Progress], None]]:
    """A progress bar on ``console``, and the function that moves it; without a terminal, a line per image."""
    said = ""
    if not console.is_terminal:

        def say(progress: comparing.Progress) -> None:
            nonlocal said
            if progress.what != said:
                said = progress.what
                console.print(said, highlight=False)

        yield say
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def watch(progress: comparing.Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total, description=progress.what)

        yield watch
