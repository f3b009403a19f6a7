"""Microseconds of host time per call of the ops that launch Triton kernels.

    python -m benchmarks.host_time                                 # on a GPU
    python -m benchmarks.host_time --stand-in 90                   # without one: a driver that computes nothing
    python -m benchmarks.host_time --stand-in 90 --before ../main  # another checkout as well, in turns

Sizes are small, so that the host is what takes the time. It is the time of the calling thread, to which other processes
add little; the minimum over rounds and processes. With the stand-in the tensors are the CPU's: allocations are cheaper
than on a GPU, torch's own operations compute, and index checks wait for no device.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.nn.functional as F
import typer
from tabulate import tabulate

from benchmarks import stand_in
from todo_attn import ops


def cases(device: str) -> dict[str, Callable[[], object]]:
    """The calls to time, on tensors of a few tokens."""
    query, key, value = (torch.zeros(2, 256, 8, 40, dtype=torch.float16, device=device) for _ in range(3))
    one = torch.zeros(1, 1, 1, 8, dtype=torch.float16, device=device)
    x = torch.randn(2, 16, 320, device=device).half()
    score = torch.randn(2, 16, device=device)
    index = torch.zeros(2, 4, dtype=torch.int64, device=device)
    return {
        "ops.downsampled_attention": lambda: ops.downsampled_attention(query, key, value, (16, 16)),
        "ops.match_tokens": lambda: ops.match_tokens(x, index, index),
        "ops.plan_pruning": lambda: ops.plan_pruning(x, score, (4, 4), 0.4),
        "torch's attention, one token": lambda: F.scaled_dot_product_attention(one, one, one),
    }


def microseconds(device: str, calls: int, rounds: int) -> dict[str, float]:
    """The least time of the calling thread for a call of each case; a round is ``calls`` calls of each."""
    torch.set_num_threads(1)
    least: dict[str, float] = {}
    with torch.no_grad():
        timed = cases(device)
        for _ in range(rounds + 1):  # the first warms up
            for name, call in timed.items():
                start = time.thread_time_ns()
                for _ in range(calls):
                    call()
                spent = (time.thread_time_ns() - start) / calls / 1000
                if device == "cuda":
                    torch.cuda.synchronize()
                least[name] = min(spent, least.get(name, spent))
    return least


def on_a_stand_in(arch: int, calls: int, rounds: int) -> dict[str, float]:
    """:func:`microseconds` without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        stand_in.StandIn(stand_in.build(Path(folder)), arch).use()
        from todo_attn.kernels import match

        launch = match.match

        def zero_positions(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            position, similarity = launch(*arguments)
            return position.zero_(), similarity  # they are whatever lay in memory, and plan_pruning's next indices

        with mock.patch.object(match, "match", zero_positions):
            return microseconds("cpu", calls, rounds)


def of_a_checkout(folder: Path, arguments: list[str]) -> dict[str, float]:
    """What this file prints as JSON in a process of its own, with the package of the checkout in ``folder``."""
    script = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", script, "--json", *arguments]
    return json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)


def main(
    stand_in_arch: Annotated[int | None, typer.Option("--stand-in", help="A compute capability, such as 90.")] = None,
    before: Annotated[Path | None, typer.Option(help="Another checkout to time as well.", file_okay=False)] = None,
    processes: Annotated[int, typer.Option(help="Processes for each checkout, with --before.", min=1)] = 5,
    calls: Annotated[int, typer.Option(help="Calls in a round.", min=1)] = 100,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the fastest counts.", min=1)] = 21,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print microseconds of host time per call."""
    if stand_in_arch is None and not torch.cuda.is_available():
        raise typer.BadParameter("must be given if there is no GPU, got none", param_hint="--stand-in")
    if stand_in_arch is not None and (reason := stand_in.unavailable_reason()):
        raise typer.BadParameter(f"cannot be used here: {reason}", param_hint="--stand-in")
    if before is not None and not (before / "todo_attn").is_dir():
        raise typer.BadParameter(f"must be a checkout of todo_attn, got {str(before)!r}", param_hint="--before")
    if before is not None:
        arguments = [f"--calls={calls}", f"--rounds={rounds}"]
        arguments += [] if stand_in_arch is None else [f"--stand-in={stand_in_arch}"]
        folders = (before, Path(__file__).parents[1])
        runs = [[of_a_checkout(folder, arguments) for folder in folders] for _ in range(processes)]
        found = {name: [min(run[side][name] for run in runs) for side in (0, 1)] for name in runs[0][1]}
    else:
        timed = (
            microseconds("cuda", calls, rounds)
            if stand_in_arch is None
            else on_a_stand_in(stand_in_arch, calls, rounds)
        )
        found = {name: [each] for name, each in timed.items()}
    if as_json:
        print(json.dumps({name: each if before else each[0] for name, each in found.items()}))
    else:
        rows = [(name, *each, *([each[1] / each[0]] if before else [])) for name, each in found.items()]
        headers = ["us per call", *(["before", "now", "ratio"] if before else ["now"])]
        print(tabulate(rows, headers=headers, floatfmt=("", ".1f", ".1f", ".2f")))


if __name__ == "__main__":
    typer.run(main)
