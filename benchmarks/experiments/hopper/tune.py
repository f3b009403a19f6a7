"""The Hopper candidate in each of its configurations against the shipped kernel, at the shapes that have a target.

python -m benchmarks.experiments.hopper.tune --head-dim 40    options as of ``python -m benchmarks.tune``

Each configuration is checked first, in a process of its own, all of a head dim side by side; one that is not right is
reported and not timed.
"""

from __future__ import annotations

import torch
import typer

from benchmarks import tune
from benchmarks.experiments.hopper import check, launch
from todo_attn.bench import attention
from todo_attn.bench.cases import Case
from todo_attn.bench.peers import Call
from todo_attn.bench.trial import Trial


def calls(case: Case) -> dict[str, Call]:
    """By name, the candidate in each configuration that is right here; reports those that are not."""
    found = {}
    runs = launch.RUNS[case.head_dim]
    # In a process of its own, with a time limit: a wrong barrier is a hang, and would take all other rows along.
    checked = check.rows([(case.head_dim, run) for run in runs])
    for run, result in zip(runs, checked, strict=True):
        flags = [name for name in ("ahead", "halves", "persistent") if getattr(run, name)]
        name = ", ".join([f"hopper {run.consumers}x64x{run.block_n}", f"{run.stages} slots", *flags])
        if error := result["error"]:
            typer.echo(f"{case.head_dim}, {name}: not timed, {error}", err=True)
        else:
            found[name] = _call(case, run)
    return found


def _call(case: Case, run: launch.Run) -> Call:
    scale = case.head_dim**-0.5
    return lambda x: launch.attention(x.query, x.key, x.value, case.grid, case.coarse, "nearest", scale, run=run)


def trial(case: Case, device: torch.device) -> Trial:
    """Every configuration that is right against the kernel as it is shipped.

    Raises:
        RuntimeError: none is right here.
    """
    if not (found := calls(case)):
        raise RuntimeError("no candidate is right on this device")
    return attention.trial(case, device, {"todo": tune.shipped(case, device), **found})


def main(
    head_dim: tune.HeadDims = None,
    size: tune.Size = 2048,
    device: tune.Device = "cuda",
    minutes: tune.Minutes = float("inf"),
    out: tune.Out = None,
    as_json: tune.AsJson = False,
) -> None:
    """Time the Hopper candidate against the shipped kernel, alternating in one run."""
    tune.run(trial, head_dim, size, device, minutes, out, as_json)


if __name__ == "__main__":
    typer.run(main)
