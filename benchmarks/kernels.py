"""Every op against what it replaces, at the shapes of Stable Diffusion 1.5 and SDXL; checked first, then timed.

python -m benchmarks.kernels                                at most 68 rows, those with a target first
python -m benchmarks.kernels --only attention --full        every size, aspect ratio, batch and dtype
python -m benchmarks.kernels --device cpu                   a few small shapes, about a minute
python -m benchmarks.kernels --minutes 4 --out rows.jsonl   starts no case after four minutes

The candidates and oracles are in todo_attn/bench/attention.py, tokens.py and matching.py. Times are of the device
alone. The rows of each case are added to the file as soon as they are measured. Exits with 1 if a result of ours was
wrong.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import RESULTS
from benchmarks.options import DEFAULT_DEVICE, check_among, checked_out, chosen_device
from todo_attn import machine
from todo_attn.bench import cases, jsonl, kernels, report
from todo_attn.bench.cases import Case
from todo_attn.bench.harness import Rounds


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = DEFAULT_DEVICE,
    full: Annotated[bool, typer.Option("--full", help="Every shape against every peer, not the telling ones.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(cases.BENCHMARKS)}; repeatable.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Timed rounds at most; 3 on a CPU, 20 on a GPU.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Start no case after that.")] = float("inf"),
    out: Annotated[Path | None, typer.Option(help="Rows go there; benchmarks/results/kernels-DEVICE.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, no table.")] = False,
) -> None:
    """Time ours and its peers, alternating in one run."""
    resolved = chosen_device(device)
    check_among("only", only or (), cases.BENCHMARKS)
    path = checked_out(out or RESULTS / f"kernels-{machine.slug(resolved)}.jsonl")
    if resolved.type == "cpu":
        machine.keep_freed_memory()
    chosen = [c for c in (cases.full(resolved) if full else cases.plan(resolved)) if not only or c.benchmark in only]
    run(chosen, resolved, path, minutes, as_json, rounds)


def run(
    chosen: Sequence[Case],
    device: torch.device,
    path: Path,
    minutes: float,
    as_json: bool,
    rounds: int | None = None,
    make: kernels.MakeTrial | None = None,
) -> None:
    """Measure the cases, add the rows of each to ``path`` as soon as they are there, and print all of them.

    Args:
        minutes: no case is started after that.
        rounds: timed rounds at most; None is :func:`todo_attn.bench.kernels.rounds_for`.
        make: the candidates of a case; None: ours and the peers.

    Raises:
        typer.Exit: a result of ours was wrong; said last of all.
    """
    start, rows = time.monotonic(), []
    often = kernels.rounds_for(device)
    often = Rounds(often.warmup, rounds or often.rounds, often.seconds)
    in_time = (case for case in chosen if time.monotonic() - start < 60 * minutes)
    for done, new in enumerate(kernels.run(in_time, device, often, make), start=1):
        jsonl.append(path, new)
        rows += new
        typer.echo(f"{done} of {len(chosen)}\n{report.table(new)}\n", err=True)
    said = f"rows added to {path}" if rows else f"no case was started in {minutes:g} minutes, nothing was written"
    typer.echo(said, err=True)
    typer.echo(json.dumps(rows, indent=1) if as_json else report.table(rows))
    refused = report.refused(rows)
    for sentence in (report.slower(rows) if make is None else []) + refused:
        typer.echo(sentence, err=True)
    if refused:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
