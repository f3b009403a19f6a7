"""Every op against what it replaces, at the shapes of Stable Diffusion 1.5 and SDXL; checked first, then timed.

python -m benchmarks.kernels                                at most 60 rows, those with a target first
python -m benchmarks.kernels --only attention --full        every size, shape of picture, batch and dtype
python -m benchmarks.kernels --device cpu                   a few small shapes, about a minute
python -m benchmarks.kernels --minutes 4 --out rows.jsonl   starts no case after four minutes

Sides and oracles: todo_attn/bench/attention.py, tokens.py and matching.py. Times are those of the device alone. Each
case's rows are added to the file as soon as they are measured. Exits with 1 where a result of ours was wrong.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import RESULTS
from todo_attn import machine
from todo_attn.bench import cases, harness, kernels, report
from todo_attn.bench.cases import Case
from todo_attn.bench.harness import Rounds
from todo_attn.bench.kernels import Row


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    full: Annotated[bool, typer.Option("--full", help="Every shape against every peer, not the telling ones.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(cases.BENCHMARKS)}; repeatable.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed rounds at most; 3 on a CPU, 20 on a GPU.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Start no case after that.")] = float("inf"),
    out: Annotated[Path | None, typer.Option(help="Rows go there; benchmarks/results/kernels-DEVICE.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, no table.")] = False,
) -> None:
    """Time ours and its peers, alternating in one run."""
    where = chosen_device(device)
    check_among("only", only or (), cases.BENCHMARKS)
    path = checked_out(out or RESULTS / f"kernels-{machine.slug(where)}.jsonl")
    if where.type == "cpu":
        machine.keep_freed_memory()
    chosen = [c for c in (cases.full(where) if full else cases.plan(where)) if not only or c.benchmark in only]
    often = kernels.rounds_for(where)
    often = Rounds(often.warmup, rounds or often.rounds, often.seconds)
    rows = collect(chosen, path, minutes, lambda some: kernels.run(some, where, often))
    typer.echo(json.dumps(rows, indent=1) if as_json else report.table(rows))
    for sentence in report.slower(rows):
        typer.echo(sentence, err=True)
    fail_if_refused(rows)


def check_among(option: str, given: Iterable[object], known: Collection[object]) -> None:
    """Refuse values that an option does not know.

    Raises:
        typer.BadParameter: naming the option.
    """
    if unknown := [value for value in given if value not in known]:
        names, wrong = (", ".join(map(str, values)) for values in (known, unknown))
        raise typer.BadParameter(f"--{option} must be among {names}, got {wrong}")


def chosen_device(name: str) -> torch.device:
    """--device, if it can be used here."""
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda needs a GPU that torch sees")
    return torch.device(name)


def checked_out(path: Path) -> Path:
    """--out, if rows can be added to it."""
    try:
        harness.check_appendable(path)
    except ValueError as error:  # its first word is the option
        raise typer.BadParameter(f"--{error}") from error
    return path


def collect(
    chosen: Sequence[Case], path: Path, minutes: float, run: Callable[[Iterable[Case]], Iterable[list[Row]]]
) -> list[Row]:
    """Run the cases, none started after ``minutes``; each case's rows are shown and added to ``path`` at once."""
    start = time.monotonic()
    rows = []
    in_time = (case for case in chosen if time.monotonic() - start < 60 * minutes)
    for done, new in enumerate(run(in_time), start=1):
        harness.append(path, new)
        rows += new
        typer.echo(f"{done} of {len(chosen)}\n{report.table(new)}\n", err=True)
    said = f"rows added to {path}" if rows else f"no case was started in {minutes:g} minutes, nothing was written"
    typer.echo(said, err=True)
    return rows


def fail_if_refused(rows: Iterable[Row]) -> None:
    """Say which of ours were wrong, last of all, and exit with 1 if any was."""
    sentences = report.refused(rows)
    for sentence in sentences:
        typer.echo(sentence, err=True)
    if sentences:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
