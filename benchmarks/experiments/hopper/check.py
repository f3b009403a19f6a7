"""The Hopper candidate against the oracle on a GPU: the first thing to run there, before anything times it.

python -m benchmarks.experiments.hopper.check                             all that are worth a measurement
python -m benchmarks.experiments.hopper.check --head-dim 40 --seconds 30  some, with less patience

Each configuration is tried in a process of its own with a time limit: a wrong barrier is a hang, and must not take the
rest along. As many run at a time as there are processors, because most of their time goes into compiling. "worst" is
the largest error, over that of torch's own attention in the same dtype; it must be below 2. A hang is a barrier, NaN a
slot of the ring, a factor everywhere a scale.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from tabulate import tabulate

from benchmarks.experiments.hopper.launch import RUNS, Run, attention
from benchmarks.options import check_among
from todo_attn.config.modes import coarse_grid
from todo_attn.ops import reference

BOUND = 2.0  # of "worst"
SECONDS = 120.0  # most of which goes into compiling: a program for each dtype, and two that pack
REPEATS = 3  # a race shows now and then
# Grid, factor, tokens: one key, odd numbers, keys that end a tile, several blocks for each SM.
_SHAPES = [
    ((1, 1), (1, 1), 1),
    ((13, 27), (1, 1), 300),
    ((16, 16), (2, 2), 256),
    ((33, 40), (2, 2), 1320),
    ((96, 96), (2, 2), 9216),
]


def worst(head_dim: int, run: Run) -> float:
    """The largest error over that of torch's own attention, in this process; infinite if one is not finite."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = 0.0
    for dtype, (grid, factor, tokens) in itertools.product((torch.float16, torch.bfloat16), _SHAPES):
        query = torch.randn(2, tokens, 3, head_dim, device=device).mul(3).to(dtype)
        key, value = (torch.randn(2, grid[0] * grid[1], 3, head_dim, device=device).to(dtype) for _ in "kv")
        coarse_key, coarse_value = (
            reference.downsample_tokens(t.flatten(2), grid, factor).unflatten(2, t.shape[2:]) for t in (key, value)
        )
        q, k, v = (t.transpose(1, 2) for t in (query, coarse_key, coarse_value))
        for scale in (head_dim**-0.5, -0.1, 0.0):
            results = [
                attention(query, key, value, grid, coarse_grid(grid, factor), "nearest", scale, run)
                for _ in range(REPEATS)
            ]
            exact = reference.downsampled_attention(
                query.double(), key.double(), value.double(), grid, factor, scale=scale
            )
            own = F.scaled_dot_product_attention(q, k, v, scale=scale)
            least = 1e-6 * float(exact.norm())  # torch may be exact
            usual = max(float((own.transpose(1, 2) - exact).norm()), least)
            for result in results:
                error = float((result - exact).norm()) / usual
                found = max(found, error) if error == error else float("inf")
    return found


def row(head_dim: int, run: Run, seconds: float = SECONDS) -> dict[str, Any]:
    """:func:`worst` from a process of its own: the configuration, "worst" (None if there is none) and "error"."""
    child = json.dumps([head_dim, asdict(run)])
    result: dict[str, Any] = {"head_dim": head_dim, **asdict(run), "worst": None, "error": None}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.experiments.hopper.check", "--child", child],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return result | {"error": f"no end after {seconds:g} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return result | {"error": lines[-1]}
    found = float(done.stdout)
    wrong = None if found < BOUND else f"off by {found:.2f} times the error of torch's own attention"
    return result | {"worst": found, "error": wrong}


def rows(configurations: Sequence[tuple[int, Run]], seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
    """:func:`row` of each, in order, side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads: each waits for a process
        yield from pool.map(lambda each: row(each[0], each[1], seconds), configurations)


def main(
    head_dim: Annotated[list[int] | None, typer.Option(help=f"Of {', '.join(map(str, RUNS))}; repeatable.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For each configuration.")] = SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Check every configuration of the Hopper candidate on this GPU; fails if one is wrong or does not end."""
    if child is not None:
        number, run = json.loads(child)
        print(worst(number, Run(**run)))
        return
    check_among("head-dim", head_dim or (), RUNS)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise typer.BadParameter("the candidate needs a GPU of compute capability 9.0, and there is none here")
    settings = [(number, run) for number in head_dim or RUNS for run in RUNS[number]]
    found = []
    for (number, run), each in zip(settings, rows(settings, seconds), strict=True):
        found.append(each)
        typer.echo(f"{number}, {run}: {each['error'] or 'right'}", err=True)
    typer.echo(json.dumps(found, indent=1) if as_json else tabulate(found, headers="keys"))
    if any(each["error"] for each in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
