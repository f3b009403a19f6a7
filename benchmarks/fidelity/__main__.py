"""Quality of all methods on one pipeline: seconds, operations, and distances to dense, to true images, to the prompt.

python -m benchmarks.fidelity --cases 'todo:*' --cases 'tome:*' --size 256 --size 512 --out rows.jsonl
accelerate launch --num_processes 8 -m benchmarks.fidelity --model ./my-model --prompts coco.txt --reference ./coco
python -m benchmarks.fidelity layers --cases 'todo:*'
python -m benchmarks.fidelity insert README.md

Images are kept in a folder: the same command goes on after an interruption, and makes nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.fidelity import attention_error, table
from benchmarks.fidelity.cases import DENSE, Case, cases_for, chosen
from benchmarks.fidelity.defaults import Defaults, defaults
from benchmarks.fidelity.insert import inserted
from benchmarks.fidelity.metrics import METRICS
from benchmarks.fidelity.options import parse_sizes, split
from benchmarks.fidelity.page import page_of
from benchmarks.fidelity.reference import Reference
from benchmarks.fidelity.run import Plan, Run
from benchmarks.fidelity.store import Images, Size, Store, identity
from benchmarks.options import checked_out, naming_options
from todo_attn import machine
from todo_attn.bench import jsonl
from todo_attn.cli.app import hush_loading
from todo_attn.compare.features import Network
from todo_attn.compare.files import write_whole
from todo_attn.compare.page import build_page
from todo_attn.compare.workers import Workers, set_threads
from todo_attn.config.checks import ArgumentError
from todo_attn.diffusers.levels import transformers_by_level
from todo_attn.models.pipelines import load_pipeline, sized
from todo_attn.options.prompts import read_prompts
from todo_attn.options.settings import SCHEDULERS, CompareSettings

app = typer.Typer(pretty_exceptions_enable=False, help=__doc__)
_INTERRUPTED = 130

Model = Annotated[str | None, typer.Option(help="A folder, a file or a Hub id; the landscapes, or the shipped one.")]
Prompts = Annotated[Path | None, typer.Option(help="A UTF-8 file with a prompt a line.")]
Sizes = Annotated[list[str] | None, typer.Option(help="Pixels, as 512 or 768x512 (width x height); repeatable.")]
Cases = Annotated[list[str] | None, typer.Option(help="Names or globs, as 'todo:*'; repeatable; all. See --list.")]
Steps = Annotated[int | None, typer.Option(help="Of the scheduler; as todo-attn compare.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's own.")]
Scheduler = Annotated[str | None, typer.Option(help=f"One of {', '.join(SCHEDULERS)}; the pipeline's own.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of a process on a CPU; 1 if several run, else torch's own.")]
FirstSeed = Annotated[int, typer.Option(min=0, help="Of the first image; each one has the next.")]


def loaded(settings: CompareSettings, workers: Workers) -> Any:
    """The pipeline on this process's device."""
    hush_loading()
    return load_pipeline(settings).to(workers.device)


def settings_of(
    model: str | None, prompts: Path | None, steps: int | None, guidance: float | None, **given: Any
) -> tuple[CompareSettings, Defaults]:
    """The settings, and what else runs by default: nothing if a model is named."""
    default = Defaults() if model else defaults()
    settings = CompareSettings(
        model=model or default.model,
        prompts=default.prompts if prompts is None else read_prompts(prompts),
        steps=default.steps if steps is None else steps,
        guidance=default.guidance if guidance is None else guidance,
        **given,
    )
    return settings, default


def sizes_of(pipe: Any, settings: CompareSettings, given: list[Size]) -> list[Size]:
    """The sizes as given, or the model's normal one and twice that."""
    if given:
        for height, width in given:
            sized(CompareSettings(model=settings.model, height=height, width=width), pipe)
        return given
    twice = sized(settings, pipe)
    assert twice.height is not None and twice.width is not None
    return [(twice.height // 2, twice.width // 2), (twice.height, twice.width)]


def all_cases(pipe: Any, steps: int, schedules: Sequence[str] = ()) -> list[Case]:
    return cases_for(sorted({level for level, _ in transformers_by_level(pipe.unet)}), steps, schedules)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    model: Model = None,
    prompts: Prompts = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many of the prompts, from the first.")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 1,
    first_seed: FirstSeed = 0,
    size: Sizes = None,
    cases: Cases = None,
    schedule: Annotated[
        list[str] | None, typer.Option(help="A case of DaTo more: a file that `todo-attn search` found; repeatable.")
    ] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the names of the cases.")] = False,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    warmup_steps: Annotated[int, typer.Option(help="Of each case's warm-up in each process.")] = 2,
    metrics: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(METRICS)}; repeatable; all.")] = None,
    features: Annotated[
        str | None, typer.Option(help="MODULE:FUNCTION that returns a feature network; see benchmarks/README.md.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="True images: a folder, or MODULE:FUNCTION(index, height, width).")
    ] = None,
    reference_images: Annotated[int, typer.Option(min=2, help="At most so many true images.")] = 2000,
    kid_subset: Annotated[int, typer.Option(min=2, help="Images in a subset of KID.")] = 50,
    versus: Annotated[str | None, typer.Option(help="A case; the others are compared with it, paired.")] = None,
    folder: Annotated[Path, typer.Option(help="The folder of images.")] = Path("fidelity"),
    out: Annotated[Path | None, typer.Option(help="The file of rows; rows.jsonl in the folder of images.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    report: Annotated[Path | None, typer.Option(help="An HTML page of the tables, curves and some images.")] = None,
    report_images: Annotated[int, typer.Option(min=0, help="Images of each size on the page.")] = 2,
) -> None:
    """Make the images of each case that the folder lacks, measure all, print the table and write its rows."""
    if context.invoked_subcommand is not None:
        return
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with naming_options():
        settings, default = settings_of(
            model, prompts, steps, guidance, scheduler=scheduler, device=device, dtype=dtype, warmup_steps=warmup_steps
        )
        sizes = parse_sizes(size or ())
        workers = Workers.joined(settings.device)
        set_threads(threads, workers)
        pipe = loaded(settings, workers)
        assert settings.steps is not None
        known = all_cases(pipe, settings.steps, schedule or ())
        if list_cases:
            if workers.is_main:
                typer.echo("\n".join(f"{case.name:32} {case.family}" for case in known))
            return
        path = checked_out(out or folder / "rows.jsonl")
        page_path = checked_out(report, "report") if report else None
        features, reference = features or default.features, reference or default.reference
        plan = Plan(
            settings,
            Images(settings.prompts[:limit], per_prompt, first_seed),
            sizes_of(pipe, settings, sizes),
            chosen(known, split(cases)) if cases else known,
            split(metrics),
            Network.load(features, workers.device) if features else None,
            Reference.load(reference, reference_images) if reference else None,
            kid_subset,
            versus,
        )
        run = Run(pipe, plan, workers, console.print)
        about = identity(pipe, plan.images, settings.steps, settings.guidance)
        if workers.is_main:
            store = Store(folder, about)
        workers.wait()
        if not workers.is_main:
            store = Store(folder, about, writes=False)
        for note in run.notes:
            run.tell(f"note: {note}")
        try:
            rows = run.rows(store)
        except KeyboardInterrupt:
            run.tell(f"interrupted: the images so far are in {folder}, and the same command goes on")
            raise typer.Exit(_INTERRUPTED) from None
        except OSError as error:  # such as a full disk
            problem = f"must have room, and writing failed: {error}: the same command goes on"
            raise ArgumentError("folder", problem) from error
    if not workers.is_main:
        return
    if markdown:
        typer.echo(table.markdown(rows))
    else:
        printed = Console(width=None if Console().is_terminal else 250)
        for one in table.rich_tables(rows):
            printed.print(one)
        for note in table.notes(rows):
            printed.print(note, soft_wrap=True, highlight=False, markup=False)
    table.write(path, rows)
    if page_path:
        page = page_of(rows, store, plan.images, min(report_images, len(plan.images)))
        write_whole(page_path, build_page(page).encode())
        console.print(f"page: {page_path}")
    console.print(f"rows: {path}, images: {folder}")


@app.command()
def layers(
    model: Model = None,
    prompts: Prompts = None,
    images: Annotated[int, typer.Option(min=1, help="At most so many images.")] = 4,
    first_seed: FirstSeed = 0,
    size: Sizes = None,
    cases: Cases = None,
    moments: Annotated[int, typer.Option(min=1, help="Timesteps of a run, evenly spaced.")] = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="A file that the rows are added to.")] = None,
) -> None:
    """The error of each self-attention and of one prediction by layer and timestep, from a dense run's latents.

    Cases that reuse earlier calls, or have other timesteps or another size, are left out.
    """
    with naming_options():
        settings, _ = settings_of(model, prompts, steps, guidance, scheduler=scheduler, device=device, dtype=dtype)
        sizes = parse_sizes(size or ())
        path = checked_out(out) if out else None
        workers = Workers(torch.device(settings.device))
        set_threads(threads, workers)
        pipe = loaded(settings, workers)
        assert settings.steps is not None
        known = all_cases(pipe, settings.steps)
        picked = chosen(known, split(cases)) if cases else known
        fitting = [case for case in picked if attention_error.fits(case) and case.name != DENSE]
        if not fitting:
            raise ArgumentError("cases", f"must have one that reuses no earlier call, got {', '.join(split(cases))}")
        some = Images(settings.prompts[:images], 1, first_seed)
        rows = []
        for at in sizes_of(pipe, settings, sizes):
            errors = attention_error.LayerErrors(pipe, settings, some, at, moments)
            new = [row | {"machine": machine.describe(pipe.unet.device)} for row in errors.rows(fitting)]
            if path:
                jsonl.append(path, new)
            rows += new
    printed = Console(width=None if Console().is_terminal else 200)
    for at in dict.fromkeys((row["height"], row["width"]) for row in rows):
        for one in attention_error.tables([row for row in rows if (row["height"], row["width"]) == at]):
            printed.print(one)


@app.command()
def insert(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Markdown files.")],
    root: Annotated[Path, typer.Option(exists=True, help="Where the files of rows are looked for.")] = Path(),
) -> None:
    """Fill the tables between <!-- fidelity FILE --case NAME --metric NAME --> and <!-- /fidelity --> from rows."""
    with naming_options():
        texts = {file: inserted(file.read_text(encoding="utf-8"), root) for file in files}
        for file, text in texts.items():
            write_whole(file, text.encode())


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    app()
