"""Full-size UNets with random weights: diffusers' own attention against ToDo, DaTo and their peers.

python -m benchmarks.unet --device cpu
python -m benchmarks.unet --device cuda --model sdxl --size 2048 --size 1920x1080 --methods todo,tome
python -m benchmarks.unet --device cuda --methods dato,todo+dato,deepcache --schedule coco --schedule search --compile

One sample is one call of the UNet. If any method reuses results of an earlier call (DaTo, DeepCache), one sample is a
whole run for all candidates: 50 calls on a GPU, 10 on a CPU, or ``--calls``. Schedules are resampled to that number.
Time does not depend on the values of the weights.

First, each self-attention under ToDo is compared with the reference at that size. Warm-up runs have only the first few
calls, so ``--rounds 1`` takes one whole run of each candidate. Rows are written after each size; after an interruption
the file has the rows of what was timed by then.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._dynamo
import typer
from diffusers.models import UNet2DConditionModel

from benchmarks import RESULTS, models
from benchmarks.options import DEFAULT_DEVICE, check_among, checked_out, chosen_device, default_dtype
from benchmarks.unet_candidates import Candidates, check_exact, check_output, checked
from benchmarks.unet_plan import (
    PEERS,
    Choice,
    Contender,
    Size,
    calls_of,
    check_sizes,
    kinds_of,
    parse_size,
    plan,
)
from benchmarks.unet_stop import Stoppable, as_far_as_it_got, pairs
from todo_attn import machine
from todo_attn.bench import harness, jsonl, report
from todo_attn.bench.harness import Meter, Rounds
from todo_attn.config.dtypes import DTYPES
from todo_attn.models.unets import with_random_weights

_INTERRUPTED = 130  # as a shell says of a process that SIGINT has ended


def rows_at(
    size: Size,
    unet: UNet2DConditionModel,
    contenders: Sequence[Contender],
    batch: int,
    calls: int,
    meter: Stoppable,
    rounds: Rounds,
    case: dict[str, Any],
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Rows of dense against every contender at one size; ``case`` has the rest of the rows' case.

    If ``meter`` is stopped, only of what was measured by then, which may be nothing.
    """
    height, width = size
    about = machine.describe(unet.device)
    make = Candidates(unet, height, width, batch, calls, warmup=rounds.warmup, compiled=compiled)
    candidates = [make.dense(), *map(make.of, contenders)]
    with room_to_compile(len(candidates)), meter.listening():
        measured = harness.measure(candidates, meter, rounds, check=check_output, label=f"{width}x{height}")
        measured = [as_far_as_it_got(result) for result in measured]
        for candidate, result in zip(candidates, measured, strict=True):
            if calls > 1 and result.error is None and result.seconds:
                candidate.info["by_kind"] = candidate.times.by_kind()
    shape = {"height": height, "width": width, "batch": batch, "calls": calls, "compile": compiled}
    return [row for pair in pairs(measured) for row in harness.compare("unet", case | shape, about, pair)]


@contextmanager
def room_to_compile(candidates: int) -> Iterator[None]:
    """Raise torch's limit of graphs per function, which it counts over all UNets in the process, for ``candidates``.

    A candidate that still exceeds the limit fails, so that no uncompiled code is measured.
    """
    torch.compiler.reset()  # each size is compiled by itself, as for a user
    limit = torch._dynamo.config.recompile_limit * candidates
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        yield


def remarks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table leaves out of the rows of one size: the share of self-attention, and each kind of call."""
    if not rows:
        return []
    dense = rows[0]["baseline"]
    lines = []
    if (share := dense.get("self_attention_share")) is not None:
        lines.append(f"self-attention takes {share:.0%} of dense, projections included")
    for candidate in (dense, *(row["contender"] for row in rows)):
        kinds = candidate.get("by_kind", {}).items()
        if kinds:
            told = ", ".join(f"{kind} {of['seconds']:.3g} s ({of['calls']} times)" for kind, of in kinds)
            lines.append(f"a call of {candidate['name']}: {told}")
    return lines


def rounds_of(
    device: torch.device, calls: int, compiled: bool, warmup: int | None, rounds: int | None, seconds: float
) -> Rounds:
    """As given; by default few if a sample takes long. Compiled, a warm-up round before the observed one compiles."""
    few = device.type == "cpu" or calls > 1
    warmup = warmup or ((2 if compiled else 1) if few else 3)
    return Rounds(warmup, rounds or (3 if device.type == "cpu" else 5 if few else 20), seconds)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = DEFAULT_DEVICE,
    model: Annotated[str, typer.Option(help="sd15 or sdxl.")] = "sd15",
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; fp32 on a CPU, fp16 on a GPU.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Pixels, as 1024 or 1280x720; repeatable.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; with --width, one more size.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; with --height, one more size.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="1 on a CPU, 2 (guidance) on a GPU.")] = None,
    methods: Annotated[
        str,
        typer.Option(help="Of todo, tome, dato, todo+dato, deepcache, separated by commas; dense is always included."),
    ] = "dense,todo",
    calls: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=models.TRAINING_STEPS,
            help="Calls of the UNet in a sample; 1, and with dato, todo+dato or deepcache 50 (10 on a CPU).",
        ),
    ] = None,
    max_kv_tokens: Annotated[list[int] | None, typer.Option(help="ToDo's cap on keys; repeatable.")] = None,
    factor: Annotated[list[str] | None, typer.Option(help="ToDo's factor, or paper; repeatable.")] = None,
    schedule: Annotated[
        list[str] | None, typer.Option(help="DaTo's: a published name or a JSON file; repeatable. coco.")
    ] = None,
    prune_ratio: Annotated[
        float | None, typer.Option(help="DaTo's share of tokens pruned, at most 0.75; the schedule's own, or 0.4.")
    ] = None,
    cache_interval: Annotated[
        list[int] | None, typer.Option(help="DeepCache: every n-th call is full; repeatable. 3 and 5.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="All candidates through torch.compile.")] = False,
    warmup: Annotated[
        int | None,
        typer.Option(min=1, help="Untimed rounds; 3 on a GPU, 1 on a CPU or for runs of many calls, 2 compiled."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed rounds; 3 on a CPU, 20 on a GPU, 5 there for runs of many calls.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="After two rounds, start none past this time at one size.")
    ] = 300,
    out: Annotated[Path | None, typer.Option(help="Rows go there; benchmarks/results/unet-DEVICE.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, no table.")] = False,
) -> None:
    """Time a UNet with diffusers' own attention and under other methods, alternating in one run.

    One sample is one call, or a run of --calls if a method reuses results of an earlier call.
    """
    resolved = chosen_device(device)
    cpu = resolved.type == "cpu"
    dtype = dtype or default_dtype(resolved)
    batch = batch or (1 if cpu else 2)
    if (height is None) != (width is None):
        raise typer.BadParameter("--height and --width must be given together")
    sizes = [parse_size(text) for text in size or ()]
    if height is not None and width is not None:
        sizes.append((height, width))
    check_among("model", [model], models.CONFIGS)
    check_among("dtype", [dtype], DTYPES)
    check_sizes(sizes)
    kinds = kinds_of(methods)
    calls = calls_of(calls, kinds, resolved)
    choice = Choice(
        kinds, max_kv_tokens or (), factor or (), schedule or ("coco",), prune_ratio, cache_interval or (3, 5)
    )
    cases = plan(resolved, calls, sizes, choice)
    often = rounds_of(resolved, calls, compile, warmup, rounds, seconds)
    path = checked_out(out or RESULTS / f"unet-{machine.slug(resolved)}.jsonl")
    case: dict[str, Any] = {"model": model, "dtype": dtype}
    if cpu:
        case["keeps_freed_memory"] = machine.keep_freed_memory()

    typer.echo(f"{model}, {dtype}, batch {batch}, calls {calls}: drawing the weights", err=True)
    unet = with_random_weights(models.CONFIGS[model], resolved, getattr(torch, DTYPES[dtype]))
    check_exact(unet, kinds)
    meter, rows = Stoppable(checked(Meter(resolved))), []
    for at, contenders in cases:
        new = rows_at(at, unet, contenders, batch, calls, meter, often, case, compile)
        jsonl.append(path, new)
        rows += new
        typer.echo("\n".join([report.table(new), *remarks(new)]), err=True)
        if meter.stopped:
            break
    typer.echo(json.dumps(rows, indent=1) if as_json else report.table(rows))
    typer.echo(f"rows added to {path}: {len(rows)}", err=True)
    if meter.stopped:
        typer.echo("interrupted", err=True)
        raise typer.Exit(_INTERRUPTED)
    peers = {contender.name for _, contenders in cases for contender in contenders if contender.kind in PEERS}
    if any(row["contender"]["error"] for row in rows if row["contender"]["name"] not in peers):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
