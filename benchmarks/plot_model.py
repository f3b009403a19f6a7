"""Predictions in the figures: the model of time, and the limit of the compiled loop."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import models
from todo_attn import ToDoConfig
from todo_attn.models.architectures import PIXELS_PER_LATENT
from todo_attn.predict.count import count_self_attention, count_work
from todo_attn.predict.model import Rates, rates_from_share

Row = dict[str, Any]


def side_of(case: Row) -> float:
    """The side, in pixels, of the square with as many pixels."""
    return math.sqrt(case["height"] * case["width"])


def predicted_speedups(model: str, side: float, configs: Sequence[ToDoConfig], rates: Rates) -> list[float]:
    """The speed-up of each of ``configs`` by :mod:`todo_attn.predict.model`, for a square of ``side`` pixels."""
    pixels = round(side / PIXELS_PER_LATENT) * PIXELS_PER_LATENT
    dense, *todo = count_work(models.CONFIGS[model], pixels, pixels, configs, batch=1)
    return [rates.seconds(dense.full) / rates.seconds(work.full) for work in todo]


def rates_of(rows: Sequence[Row]) -> tuple[Rates | None, str]:
    """The machine's rates, and the size they are from: the smallest dense call with a known self-attention share."""
    for row in sorted(rows, key=lambda row: side_of(row["case"])):
        case, dense = row["case"], row["baseline"]
        share, calls = dense.get("self_attention_share"), case.get("calls", 1)
        if dense["name"] != "dense" or not share or not dense["seconds"] or case["model"] not in models.CONFIGS:
            continue
        shape = models.CONFIGS[case["model"]], case["height"], case["width"]
        (whole,) = count_work(*shape, [], batch=case["batch"])
        attention = count_self_attention(*shape, batch=case["batch"])
        try:
            found = rates_from_share(whole.full, attention, dense["seconds"]["p50"] / calls, share)
        except ValueError:
            continue
        return found, f"{case['width']} x {case['height']}"
    return None, ""


def ceiling(row: Row) -> float | None:
    """TFLOP/s that the busiest pipe of the compiled loop allows at the clock of the run; None if unknown."""
    case, machine, mhz = row["case"], row["machine"], row["contender"].get("sm_mhz")
    processors = machine.get("multiprocessors")
    if not (mhz and processors) or machine.get("capability") != "9.0" or case["dtype"] not in ("fp16", "bf16"):
        return None
    bound = clocks_per_score(case["head_dim"], case["dtype"])
    return None if bound is None else 4 * case["head_dim"] * processors * mhz * 1e6 / bound / 1e12


@cache
def clocks_per_score(head_dim: int, dtype: str) -> float | None:
    """The static bound of the current attention kernel, compiled for sm_90; None if it cannot be compiled."""
    command = [sys.executable, "-m", "benchmarks.compile_report", "--arch", "90", "--kernel", "attention", "--json"]
    command += ["--head-dim", str(head_dim), "--dtype", dtype, "--jobs", "1"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        return min(row["bound"] for row in json.loads(done.stdout) if "bound" in row)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
