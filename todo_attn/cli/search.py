"""``todo-attn search``: arguments in, the front out; the work is done in :mod:`todo_attn.search`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..config import schedule as schedules
from ..config.checks import ArgumentError
from ..config.schedule import KINDS
from ..options.methods import SettingError
from ..options.settings import CompareSettings
from .app import (
    ConfigSource,
    DeviceName,
    DtypeName,
    Guidance,
    ModelSource,
    Prompts,
    SchedulerName,
    Seeds,
    Side,
    Steps,
    UserError,
    Variant,
    app,
    given_prompts,
    hush_loading,
    naming_options,
)

if TYPE_CHECKING:
    from .. import search as searching

_Number = TypeVar("_Number", int, float)
_SHOWN = 8  # points of the front under the progress bar

PromptsFile = Annotated[Path | None, typer.Option(help="A UTF-8 file with a prompt a line.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Of a process on a CPU.", show_default="1 if several run, else torch's own")
]

_SEARCH_HELP = """Search schedules of DaTo for a model: quality against cost, by NSGA-II.

Writes a schedule file for each point of the front, which `--schedule` and `DaToConfig.from_file` take, the table, and a
page with the plot. The same command goes on if it was interrupted, and ends at the same front.

**Examples**

- the caching alone, on your own prompts:
  `todo-attn search ./my-model --prompts prompts.txt --steps 20 --prune-ratios 0`
- pruning and ToDo too, by SSIM:
  `todo-attn search ./my-model --prompts prompts.txt --prune-ratios 0,0.2,0.4 --todo-factors 1,2 --metric ssim`
- on 8 GPUs: `accelerate launch --num_processes 8 -m todo_attn search ./my-model --prompts prompts.txt`
"""


@app.command("search", help=_SEARCH_HELP)
def search_command(
    model: ModelSource = None,
    prompts: PromptsFile = None,
    prompt: Prompts = None,
    seed: Seeds = None,
    height: Side = None,
    width: Side = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: SchedulerName = None,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    threads: Threads = None,
    metric: Annotated[
        str,
        typer.Option(
            help="Fidelity to dense: latents, psnr, ssim, perceptual, or MODULE:FUNCTION(image, dense, prompt), where "
            "higher is better."
        ),
    ] = "psnr",
    features: Annotated[
        str | None, typer.Option(help="For perceptual: MODULE:FUNCTION that returns a feature network.")
    ] = None,
    cost: Annotated[str, typer.Option(help="operations (counted) or seconds (measured).")] = "operations",
    prune_ratios: Annotated[
        str, typer.Option(help="DaTo: the shares of tokens to choose from, at most 0.75, separated by commas.")
    ] = "0.4",
    prune_per_call: Annotated[bool, typer.Option("--prune-per-call", help="A ratio for each call.")] = False,
    todo_factors: Annotated[
        str, typer.Option(help="ToDo: the factors to choose from at each level, separated by commas; 1 is dense.")
    ] = "1",
    population: Annotated[int, typer.Option(help="Candidates of a generation.")] = 24,
    generations: Annotated[int, typer.Option(help="Of the search.")] = 20,
    minutes: Annotated[
        float | None, typer.Option(help="End after so many; the same command goes on.", show_default="no end")
    ] = None,
    search_seed: Annotated[int, typer.Option(help="Of the search itself.")] = 0,
    start: Annotated[
        list[Path] | None,
        # Not --start, which torchrun takes for its own --start-method.
        typer.Option("--start-from", help="A schedule file to begin with, for as many calls; repeatable."),
    ] = None,
    variant: Variant = None,
    config: ConfigSource = None,
    folder: Annotated[Path, typer.Option(help="For everything; new, empty, or of the same search.")] = Path("search"),
    as_json: Annotated[bool, typer.Option("--json", help="Print front.json on stdout, the rest on stderr.")] = False,
) -> None:
    sys.path.insert(0, os.getcwd())  # for MODULE:FUNCTION, as with python -m
    with naming_options(ArgumentError, model="MODEL", seeds="--seed", start="--start-from"):
        settings = CompareSettings(
            model=model,
            prompts=given_prompts(prompts, prompt),
            seeds=tuple(seed or (0,)),
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            device=device,
            dtype=dtype,
            variant=variant,
            config=config,
        )
        hush_loading()  # before anything imports transformers
        with needing_pymoo():
            from ..search import Plan

            plan = Plan(
                metric=metric,
                features=features,
                cost=cost,
                prune_ratios=_numbers("prune_ratios", prune_ratios, float),
                prune_per_call=prune_per_call,
                todo_factors=_numbers("todo_factors", todo_factors, int),
                population=population,
                generations=generations,
                minutes=minutes,
                search_seed=search_seed,
                start=tuple(map(_schedule, start or ())),
            )
            _search(settings, plan, folder, threads, as_json)


def _numbers(name: str, text: str, kind: Callable[[str], _Number]) -> tuple[_Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise SettingError(name, f"must be {what} separated by commas, got {text!r}") from None


def _schedule(path: Path) -> schedules.Schedule:
    try:
        return schedules.load(path)
    except ValueError as error:
        raise SettingError("start", f"must be a file with a schedule: {error}") from error


@contextmanager
def needing_pymoo() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pymoo":
            raise
        raise UserError("pymoo is not installed: pip install 'todo_attn[search]'", 1) from error


def _search(settings: CompareSettings, plan: searching.Plan, folder: Path, threads: int | None, as_json: bool) -> None:
    """Load, search and show."""
    from ..search.output import FRONT, PAGE, SCHEDULES

    _, found, is_main = load_and_search(settings, plan, folder, threads)
    if not is_main:
        return
    console = Console(stderr=as_json)
    console.print(_table(found, found.front))
    if as_json:
        print((folder / FRONT).read_text(encoding="utf-8"), end="", flush=True)
    if found.failures:
        why = next(iter(found.failures.values()))
        console.print(f"note: {len(found.failures)} candidates have no figures: {why}", soft_wrap=True, markup=False)
    for what, name in {"schedules": SCHEDULES, "the plot": PAGE, "the numbers": FRONT}.items():
        console.print(f"{what:<13}  {folder / name}", highlight=False, soft_wrap=True, markup=False)


def load_and_search(
    settings: CompareSettings, plan: searching.Plan, folder: Path, threads: int | None
) -> tuple[Any, searching.Found, bool]:
    """The pipeline, what a search found on it, and whether this process is to print it."""
    from dataclasses import replace

    from ..compare.workers import Workers, set_threads
    from ..models.pipelines import load_pipeline
    from ..search import search

    workers = Workers.joined(settings.device)
    set_threads(threads, workers)
    settings = replace(settings, device=str(workers.device))
    notes = Console(stderr=True, quiet=not workers.is_main)
    # A download has a progress bar of its own.
    with notes.status("loading the pipeline") if Path(settings.source).exists() else nullcontext():
        pipe = load_pipeline(settings)
    done = 0
    try:
        with _showing(notes, plan) as show:

            def watch(progress: searching.Progress) -> None:
                nonlocal done
                done = 0 if progress.found is None else progress.found.generations
                show(progress)

            return pipe, search(pipe, settings, plan, folder, workers, watch), workers.is_main
    except KeyboardInterrupt:
        kept = f"{_generations(done, plan)} are in {folder}, and the same command goes on"
        raise UserError(f"interrupted: {kept}", 130) from None
    except OSError as error:  # such as a full disk
        if error.filename is None:
            raise
        problem = f"{error.filename} cannot be written: {error.strerror}: what is there stays, and the same command"
        raise UserError(f"{problem} goes on", 1) from error


@contextmanager
def _showing(console: Console, plan: searching.Plan) -> Iterator[Callable[[searching.Progress], None]]:
    """A bar of this generation and the front so far; without a terminal, a line for each generation."""
    said = -1
    if not console.is_terminal:

        def say(progress: searching.Progress) -> None:
            nonlocal said
            if progress.found is not None and progress.found.generations != said:
                said = progress.found.generations
                console.print(_line(progress.found), highlight=False, markup=False, soft_wrap=True)

        yield say
        return
    from ..search.output import spread

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=console)
    task = bar.add_task("dense images", total=None)
    with Live(bar, console=console, transient=True) as live:

        def watch(progress: searching.Progress) -> None:
            what = f"generation {progress.generation}{_of_all(plan)}" if progress.generation else "dense images"
            bar.update(task, description=what, completed=progress.done, total=progress.total)
            if progress.found is not None:
                live.update(Group(bar, _table(progress.found, spread(progress.found.front, _SHOWN))))

        yield watch


def _of_all(plan: searching.Plan) -> str:
    """ " of 20", or nothing if the clock decides how many generations there are."""
    return f" of {plan.generations}" if plan.minutes is None else ""


def _generations(done: int, plan: searching.Plan) -> str:
    return f"{done}{_of_all(plan)} generations" if plan.minutes is None else f"{done} whole generations and a part"


def _line(found: searching.Found) -> str:
    """The front in a line."""
    from ..search.output import fidelity_text, spread

    some = ", ".join(f"{found.speedup(p):.2f}x {fidelity_text(found, p)}" for p in spread(found.front, 4))
    return f"generation {found.generations}{_of_all(found.plan)}: {len(found.front)} on the front: {some or '-'}"


def _table(found: searching.Found, points: list[searching.Point]) -> Table:
    """A row per point, the cheapest first."""
    from ..search.output import factors_text, fidelity_text, names_of, pruning_text

    names, title = names_of(found), found.metric.title
    table = Table(
        title=f"{len(found.front)} on the front of {len(found.points)} candidates, after "
        f"{_generations(found.generations, found.plan)}; speed-up by {found.plan.cost}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    columns: dict[str, Callable[[searching.Point], str]] = {
        "schedule": lambda point: names[point.key],
        "speed-up": lambda point: f"{found.speedup(point):.2f}x",
        title: lambda point: fidelity_text(found, point),
    }
    for kind in KINDS.values():
        columns[kind] = partial(_count_text, kind)
    if len(found.plan.prune_ratios) > 1:
        columns["pruned"] = pruning_text
    if len(found.plan.todo_factors) > 1:
        columns["factors"] = factors_text
    columns["known as"] = lambda point: escape(point.origin)
    for heading in columns:
        left = heading in ("schedule", "known as")
        table.add_column(escape(heading), justify="left" if left else "right", no_wrap=heading == "schedule")
    for point in points:
        table.add_row(*(text(point) for text in columns.values()))
    return table


def _count_text(kind: str, point: searching.Point) -> str:
    from ..search.output import kinds_of

    return str(kinds_of(point)[kind])
