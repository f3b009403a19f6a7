"""``todo-attn recommend``: a wish in, settings out; the work is done in :mod:`todo_attn.search` and compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax

from ..compare.folder import choose_folder
from ..config.checks import ArgumentError, is_number
from ..options.settings import RECOMMEND_MINUTES, CompareSettings
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
from .compare import compare_and_show
from .search import PromptsFile, Threads, load_and_search, needing_pymoo

SEARCH = "search"  # its folder; each wish has another

_RECOMMEND_HELP = """Pick settings of ToDo and DaTo for a wish, on your model, prompts and machine.

A short search, then a comparison of dense and the best that was found, with seeds that the search has not seen. Prints
the lines of Python to paste, and writes a page with the images under a slider.

**Examples**

- twice as fast, on the shipped pipeline: `todo-attn recommend --speedup 2`
- as fast as it gets at 35 dB, on your own prompts:
  `todo-attn recommend ./my-model --psnr 35 --prompts prompts.txt --height 1024 --width 1024`
"""


@app.command("recommend", help=_RECOMMEND_HELP)
def recommend_command(
    model: ModelSource = None,
    speedup: Annotated[float | None, typer.Option(help="At least so many times as fast as dense.")] = None,
    psnr: Annotated[float | None, typer.Option(help="At least so many dB to the dense image.")] = None,
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
    cost: Annotated[str, typer.Option(help="What --speedup counts: seconds (measured) or operations.")] = "seconds",
    minutes: Annotated[
        float, typer.Option(help="Of the search; the same command goes on for as many.")
    ] = RECOMMEND_MINUTES,
    variant: Variant = None,
    config: ConfigSource = None,
    folder: Annotated[
        Path, typer.Option(help="For everything; new, empty, or of the same command, with another wish too.")
    ] = Path("recommend"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout, the rest on stderr.")
    ] = False,
) -> None:
    for name, value in {"speedup": speedup, "psnr": psnr}.items():
        if value is not None and not (is_number(value) and value > 0):
            raise UserError(f"--{name} must be a number above 0, got {value:g}")
    if (speedup is None) == (psnr is None):
        raise UserError(f"--speedup or --psnr must be given, and {'only one' if psnr else 'none is'}")
    wish = f"psnr-{psnr:g}" if speedup is None else f"speedup-{speedup:g}"
    folder = _checked(folder.expanduser())
    with naming_options(ArgumentError, model="MODEL", seeds="--seed", out="--folder"):
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
        out = choose_folder(str(folder / wish), overwrite=True)
        hush_loading()  # before anything imports transformers
        with needing_pymoo():
            from .. import search as searching

            plan = searching.short_plan(cost, minutes)
            pipe, found, is_main = load_and_search(settings, plan, folder / SEARCH, threads)
    if not is_main:
        return
    try:
        point = searching.recommended(found, speedup=speedup, psnr=psnr)
    except ArgumentError as error:
        raise UserError(f"--{error.argument} {error.problem}; more --minutes, or another wish, may do", 1) from error
    console = Console(stderr=as_json)
    chosen = searching.comparison_of(found, point, folder / f"{wish}.json")
    report = compare_and_show(pipe, chosen, out, True, console)
    missed = _missed(report, speedup if cost == "seconds" else None, psnr)
    if missed:
        console.print(f"note: {missed}", highlight=False, soft_wrap=True, markup=False)
    code = searching.code_of(found, point)
    if console.is_terminal:
        console.print(Syntax(code, "python", background_color="default", word_wrap=True))
    else:
        console.print(code, highlight=False, soft_wrap=True, markup=False)
    if as_json:
        result = {
            "method": "todo" if point.config.computes_everything else "dato",
            "config": point.config.to_dict(),
            "python": code,
            "search": {"speedup": found.speedup(point), "psnr": point.fidelity},
            "fulfilled": missed is None,
            "comparison": report,
        }
        print(json.dumps(result, indent=2, allow_nan=False), flush=True)


def _checked(folder: Path) -> Path:
    """``folder`` if it is new, empty or of this command.

    Raises:
        UserError: it is another one.
    """
    try:
        there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    except OSError as error:  # a file, for one
        raise UserError(f"--folder must be a folder, got {str(folder)!r}: {error.strerror}") from error
    if there and SEARCH not in there:
        raise UserError(f"--folder must be new, empty or of an earlier recommend, got {str(folder)!r} with other files")
    return folder


def _missed(report: dict[str, Any], speedup: float | None, psnr: float | None) -> str | None:
    """What the comparison, on seeds that the search has not seen, says against the wish; None if nothing."""
    _, method = report["methods"]
    if speedup is not None and method["speedup"] < speedup:
        return f"on new seeds it is {method['speedup']:.2f}x as fast, below --speedup {speedup:g}"
    if psnr is not None and method["psnr"] is not None and method["psnr"] < psnr:  # None: the images are equal
        return f"on new seeds it has {method['psnr']:.2f} dB, below --psnr {psnr:g}"
    return None
