"""The commands of ``todo-attn``: arguments in, tables or JSON out; the work is done elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import __version__
from ..compare.folder import IMAGES, NOTHING_MADE, REPORT, SHEET, choose_folder
from ..config import schedule
from ..config.modes import MODES
from ..config.schedule import FEWEST_CALLS
from ..example import example_pipeline
from ..options.methods import METHODS_TEXT, NO_SCHEDULE, SettingError
from ..options.settings import DTYPES, OTHER_STEPS, SCHEDULERS, SHIPPED_STEPS, CompareSettings
from ..peak_memory import MAY_FIT, OUT_OF_MEMORY
from .printing import DIGITS_NOTE, compare_table, print_examination, schedule_lines, schedules_notes, schedules_table

if TYPE_CHECKING:
    from ..compare import run as comparing
    from ..models.architectures import Architecture

app = typer.Typer(
    name="todo-attn",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Stable Diffusion at high resolution, faster: ToDo token downsampling for diffusers.",
)

# The methods whose gain doctor tells.
_ADVISED = "dense,todo,dato,todo+dato"
_PRESET = "coco"  # the schedule that it takes by itself
# Options that doctor and schedules share.
_Architecture = Annotated[
    str | None,
    typer.Option(
        help="sd15, sdxl, a folder saved by diffusers, a .safetensors or .ckpt file, or a Hub id.",
        show_default="the shipped pipeline",
    ),
]
_Side = Annotated[int | None, typer.Option(help="In pixels.", show_default="the model's normal")]
# Options that are not called like the setting they give.
_OPTIONS = {"model": "MODEL", "prompts": "--prompt", "seeds": "--seed"}


class UserError(Exception):
    """What the user should read instead of a traceback, and the exit code."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def format_message(self) -> str:
        """As the parser's own complaints have it."""
        return str(self)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"todo-attn {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


_COMPARE_HELP = """Make the same pictures by each method, taking turns; write them, a contact sheet and report.json.

**Examples**

- the pipeline that comes with the package, at twice its normal size:
  `todo-attn compare`
- your model, three seeds, at 2048 x 1536:
  `todo-attn compare ./my-model --prompt "a lighthouse at dusk" --seed 0 --seed 1 --seed 2 --width 2048 --height 1536`
- two strengths of ToDo beside ToMe, to read quality at equal speed:
  `todo-attn compare --methods dense,todo:2,todo:4,tome:0.5,tome:0.75`
- DaTo with two of its schedules, with and without ToDo, beside DeepCache:
  `todo-attn compare --methods dense,dato,dato:search,todo+dato,deepcache:3,deepcache:5 --steps 50`
- the numbers for a script: `todo-attn compare --json > report.json`
"""


@app.command("compare", help=_COMPARE_HELP)
def compare_command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder saved by diffusers, a .safetensors or .ckpt file, or a Hub id.",
            show_default="the shipped pipeline",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; give it again for more.", show_default="two")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="A picture per prompt and seed.", show_default="0")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default="twice the model's normal")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default="twice the model's normal")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Of the scheduler.", show_default=f"{SHIPPED_STEPS} for the shipped pipeline, else {OTHER_STEPS}"
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is without.", show_default="the pipeline's own")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(SCHEDULERS)}.", show_default="the pipeline's own")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"auto (float16 on CUDA, else float32), {', '.join(DTYPES)}, or fp32, fp16, bf16.")
    ] = "auto",
    methods: Annotated[str, typer.Option(help=f"With commas between: {METHODS_TEXT}.")] = "dense,todo",
    factor: Annotated[
        str,
        typer.Option(help="ToDo: auto, paper, an integer, or LEVEL=FACTOR pairs with + between, such as 1=4+2=2."),
    ] = "auto",
    max_kv_tokens: Annotated[int, typer.Option(help="ToDo: the most keys that factor auto leaves.")] = 4096,
    mode: Annotated[str, typer.Option(help=f"ToDo: how keys are taken, {', '.join(MODES)}.")] = "nearest",
    tome_ratio: Annotated[float, typer.Option(help="ToMe: the share of tokens merged, at most 0.75.")] = 0.5,
    schedule: Annotated[
        str, typer.Option(help="DaTo: the name of a published schedule, a JSON file, or none.")
    ] = "coco",
    prune_ratio: Annotated[float, typer.Option(help="DaTo: the share of tokens pruned, at most 0.75.")] = 0.4,
    cache_interval: Annotated[int, typer.Option(help="DeepCache: each so many-th call of the UNet is full.")] = 3,
    warmup_steps: Annotated[int, typer.Option(help="Steps of each method's one uncounted pass.")] = 2,
    variant: Annotated[str | None, typer.Option(help="Of the weights' files, such as fp16.")] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="For a single file: the folder or Hub id of a like model, which has the configuration.",
            show_default="the published model's, from the Hub",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for what is written, new or empty.",
            show_default="compare, or compare-2 and so on if that is taken",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the files of an older comparison that is in the folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report on stdout, all else on stderr.")] = False,
) -> None:
    try:
        settings = CompareSettings(
            model=model,
            prompts=tuple(map(_as_typed, prompt or ())),
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
        _compare(settings, choose_folder(out, overwrite), as_json)
    except SettingError as error:
        option = _OPTIONS.get(error.name, f"--{error.name.replace('_', '-')}")
        raise UserError(f"{option} {error.problem}", error.exit_code) from error
    except KeyboardInterrupt:  # while the pipeline is loaded
        raise UserError(f"interrupted: {NOTHING_MADE}", 130) from None


def _as_typed(argument: str) -> str:
    """Python reads the bytes of an argument by the locale: what is beyond ASCII is lost on the C locale's."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode(errors="replace")
    return argument


def _compare(settings: CompareSettings, folder: Path, as_json: bool) -> None:
    """Load, compare, show and write."""
    notes = Console(stderr=True)
    # A download draws bars of its own.
    with notes.status("loading the pipeline") if Path(settings.source).exists() else nullcontext():
        _hush_loading()
        from ..compare.output import Output
        from ..compare.report import build_report
        from ..compare.run import compare
        from ..models.pipelines import load_pipeline

        pipe = load_pipeline(settings)
    output = Output(folder)
    try:
        with _bar(notes) as watch:
            comparison = compare(pipe, settings, watch, output.add)
        with notes.status("measuring how like the pictures are"):
            report = build_report(comparison)
        console = notes if as_json else Console()
        console.print(compare_table(report))  # before anything can fail to be written
        for note in report["notes"]:
            console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
        if as_json:
            print(json.dumps(report, indent=2, allow_nan=False), flush=True)
        output.finish(comparison, report)
    except KeyboardInterrupt:
        raise UserError(f"interrupted: {output.stop()}", 130) from None
    except Exception:  # a fault of ours or of a library: what was made is kept
        output.stop()
        raise
    if problem := output.problem():
        raise UserError(problem, 1)
    for line in (
        f"side by side  {folder / SHEET}",
        f"one by one    {folder / IMAGES}",
        f"the numbers   {folder / REPORT}",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if failed := [m.label for m in comparison.methods if m.unavailable == OUT_OF_MEMORY]:
        raise UserError(f"out of memory by {', '.join(failed)}: {MAY_FIT}", 1)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[comparing.Progress], None]]:
    """A progress bar on ``console``, and what moves it; where that is no terminal, a line at each beginning."""
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


def _hush_loading() -> None:
    """Without the libraries' own bars and advice on loading, unless asked for by their environment variables."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    if "HF_HUB_VERBOSITY" not in os.environ:
        hub_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


_DOCTOR_HELP = """Say what is installed, run each op against its oracle, and exit with 1 if something is broken.

What is not installed (a GPU, Triton, diffusers) is said and is no error: the rest works without it.

With `--model`, a size or another of its options, say instead what ToDo and DaTo would gain there on this machine:
predicted from the operations that they leave out, and with `--measure` timed; or that they will not help, and why.

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
    height: _Side = None,
    width: _Side = None,
    max_kv_tokens: Annotated[int, typer.Option(help="ToDo: the most keys that factor auto leaves.")] = 4096,
    schedule: Annotated[
        str | None,
        typer.Option(
            help=f"DaTo: the name of a published schedule, a JSON file, or {NO_SCHEDULE} to prune alone.",
            show_default=f"{_PRESET}, or {NO_SCHEDULE} below {FEWEST_CALLS} calls of the UNet",
        ),
    ] = None,
    prune_ratio: Annotated[float, typer.Option(help="DaTo: the share of tokens pruned, at most 0.75.")] = 0.4,
    steps: Annotated[
        int, typer.Option(help="DaTo: of the scheduler, one fewer than calls of the UNet; schedules are resampled.")
    ] = 50,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"auto (float16 on CUDA, else float32), {', '.join(DTYPES)}, or fp32, fp16, bf16.")
    ] = "auto",
    measure: Annotated[bool, typer.Option("--measure", help="Time the UNet as well: seconds to minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    sources = {name: context.get_parameter_source(name) for name in context.params}
    if not any(source and source.name == "COMMANDLINE" for name, source in sources.items() if name != "as_json"):
        _examine(as_json)
        return
    if schedule is None:
        schedule = NO_SCHEDULE if steps + 1 < FEWEST_CALLS else _PRESET
    try:
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
    except SettingError as error:
        raise UserError(f"--{error.name.replace('_', '-')} {error.problem}") from error


def _tell(lines: list[str], *, stderr: bool = False) -> None:
    """A line each, which a terminal gets broken between words and all else whole."""
    console = Console(stderr=stderr)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)


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


def _read_architecture(model: str) -> Architecture:
    """The UNet that ``--model`` names; a path where nothing is does not make it to the Hub."""
    from ..models.architectures import CONFIGS, read_architecture

    if model not in CONFIGS and not Path(model).expanduser().exists():
        try:
            CompareSettings(model=model)  # knows what may be a Hub id
        except SettingError as error:
            known = ", ".join(CONFIGS)
            raise UserError(
                f"--model must be {known}, or a folder or Hub id of a pipeline with a UNet, got {model!r}: there is no "
                "such folder, and a Hub id is owner/name"
            ) from error
    try:
        return read_architecture(model)
    except SettingError as error:
        raise UserError(f"--{error}", error.exit_code) from error


def _advise(model: str, settings: CompareSettings, measure: bool, as_json: bool) -> None:
    from ..predict.gains import advice_lines, build_advice

    with Console(stderr=True).status("reading the model") as status:
        _hush_loading()
        architecture = _read_architecture(model)
        advice = build_advice(architecture, settings, measured=measure, watch=status.update)
    if as_json:
        print(json.dumps(advice, indent=2, allow_nan=False))
        return
    _tell(advice_lines(advice))


@app.command("bench")
def bench_command(
    model: Annotated[
        str, typer.Option(help="sd15, sdxl, a folder saved by diffusers, or a Hub id: whose self-attentions.")
    ] = "sd15",
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default="2048 on a GPU, 768 on a CPU")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default="the height")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (fp16 on CUDA, else fp32), fp32, fp16 or bf16.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="A file that the rows are added to, one JSON object a line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows and notes as JSON.")] = False,
) -> None:
    """Time the kernels on this machine, at the shapes of one picture, against what they replace; about a minute.

    Each result is checked against an oracle before it is timed; exits with 1 where one of ours was wrong. Says where
    ToDo is not the faster one.

    **Example:** `todo-attn bench --height 1024 --width 1536`
    """
    timed = _bench(model, height, width, device, dtype, out)
    from ..bench import report

    print(json.dumps(timed, indent=2, allow_nan=False) if as_json else report.table(timed["rows"]))
    notes = [f"note: {note}" for note in timed["notes"]]
    _tell(notes if as_json else [report.LEGEND, *notes], stderr=as_json)
    if refused := report.refused(timed["rows"]):
        raise UserError("; ".join(refused), 1)
    if report.found_no_memory(timed["rows"]):
        raise MemoryError


def _bench(
    model: str, height: int | None, width: int | None, device: str, dtype: str, out: Path | None
) -> dict[str, Any]:
    """Time and write."""
    from ..bench import cases, harness
    from .bench import bench

    try:
        if out is not None:
            harness.check_appendable(out)
        architecture = None if model in cases.MODELS else _read_architecture(model)  # their shapes are known

        def show(rows: list[dict[str, Any]]) -> None:
            if out is not None:
                harness.append(out, rows)

        return bench(device, dtype, model, height, width, show, architecture)
    except ValueError as error:  # its first word is the option
        raise UserError(f"--{error}") from error
    except OSError as error:
        raise UserError(f"--out cannot be written: {error}", 1) from error


@app.command("schedules")
def schedules_command(
    model: _Architecture = None,
    height: _Side = None,
    width: _Side = None,
    steps: Annotated[int, typer.Option(help="Of the scheduler; schedules are resampled to them.")] = 50,
    name: Annotated[
        str | None,
        typer.Option(
            help="A published schedule, or a JSON file: this one alone, with its digits and source.",
            autocompletion=schedule.names,
            show_default="those with a name of their own",
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All published schedules.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all of them, or the one, as JSON, digits and sources included.")
    ] = False,
) -> None:
    """List DaTo's published cache schedules, and the operations that each saves of a model.

    Only the configuration of the model is read: no weights, no GPU.

    **Examples**

    - on Stable Diffusion 1.5: `todo-attn schedules --model sd15 --height 768 --width 512 --steps 25`
    - the digits of one: `todo-attn schedules --name coco`
    """
    from .schedules import build_listing

    aside = Console(stderr=True)
    if every and name is not None:
        raise UserError(f"--name and --all cannot both be given, got --name {name}")
    try:
        chosen = _chosen_schedules(name, every or as_json)
        architecture = _read_architecture(str(example_pipeline()) if model is None else model)
        columns = SpinnerColumn(), TextColumn("counting the operations of a call of each kind"), BarColumn()
        with Progress(*columns, console=aside, transient=True, disable=not aside.is_terminal) as bar:
            task = bar.add_task("", total=None)

            def watch(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            listing = build_listing(architecture, height, width, steps, chosen, watch)
    except ValueError as error:  # its first word is the option
        raise UserError(f"--{error}") from error
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
            whole = line.startswith("digits:")  # to be copied
            console.print(line, highlight=False, soft_wrap=whole, markup=False)
        notes = ["", DIGITS_NOTE, *schedules_notes(listing)[1:]]
    for note in notes:
        console.print(note, highlight=False, markup=False)


def _chosen_schedules(name: str | None, every: bool) -> list[schedule.Schedule]:
    if name is None:
        return list(map(schedule.load, schedule.names() if every else schedule.named()))
    try:
        return [schedule.load(name)]
    except ValueError as error:
        raise SettingError("name", str(error).removeprefix("schedule ")) from error
