"""Rows for a person: a short table, and in plain words where ours is not the faster one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from .trial import WRONG

Row = dict[str, Any]
_NOTE = 100  # characters of each error


def table(rows: Sequence[Row]) -> str:
    """A line a row, of any benchmark; times are medians, and ``*`` marks the fastest rival of its run."""
    return tabulate([_line(row) for row in rows], headers="keys", disable_numparse=True)


def _line(row: Row) -> dict[str, str]:
    baseline, contender = row["baseline"], row["contender"]
    return {
        "benchmark": row["benchmark"],
        "case": where(row),
        "against": baseline["name"] + "*" * ("best_of" in baseline),
        "ms": _milliseconds(baseline),
        "ours": contender["name"],
        "ms ": _milliseconds(contender),
        "speed-up": "-" if row["speedup"] is None else "{p50:.2f}x ({p20:.2f} to {p80:.2f})".format(**row["speedup"]),
        "rate": _rate(row),
        "note": _note(baseline, contender),
    }


def where(row: Row) -> str:
    """The shape in a few words: "sd15 2048x2048 level 1, batch 2, fp16"."""
    case = row["case"]
    level = f" level {case['level']}" if "level" in case else ""
    calls = f", {case['calls']} calls" if case.get("calls", 1) != 1 else ""
    more = ", residual" * bool(case.get("residual")) + ", compiled" * bool(case.get("compile"))
    size = f"{case['model']} {case['width']}x{case['height']}"
    return f"{size}{level}, batch {case['batch']}, {case['dtype']}{calls}{more}"


def slower(rows: Iterable[Row]) -> list[str]:
    """A sentence for every row in which ours is not faster than the fastest rival, or than dense attention."""
    return [
        f"{row['benchmark']}, {where(row)}: {row['contender']['name']} is not faster here, it takes "
        f"{1 / row['speedup']['p50']:.2f}x the time of {row['baseline']['name']}"
        for row in rows
        if row["speedup"] and row["speedup"]["p50"] <= 1
        if "best_of" in row["baseline"] or row["baseline"]["name"] == "dense"
    ]


def refused(rows: Iterable[Row]) -> list[str]:
    """A sentence for each of ours whose result was wrong, so that it was not timed: a failure, not a measurement."""
    sentences = (
        f"{row['benchmark']}, {where(row)}: {side['name']} was refused: {side['error']}"
        for row in rows
        for side in (row["baseline"], row["contender"])
        if side["name"].startswith("todo") and WRONG in (side["error"] or "")
    )
    return list(dict.fromkeys(sentences))


def _note(*sides: Row) -> str:
    """What ended which of them."""
    names: dict[str, list[str]] = {}
    for side in sides:
        if side["error"]:
            names.setdefault(side["error"], []).append(side["name"])
    return "; ".join(f"{', '.join(failed)}: {_shortened(error)}" for error, failed in names.items())


def _shortened(text: str) -> str:
    return text if len(text) <= _NOTE else f"{text[: _NOTE - 3]}..."


def _milliseconds(side: Row) -> str:
    return "-" if side["error"] or not side["seconds"] else f"{side['seconds']['p50'] * 1e3:.4g}"


def _rate(row: Row) -> str:
    """Ours, in the unit that its benchmark is about."""
    side = row["contender"]
    if "tflops" in side:
        return f"{side['tflops']:.3g} TFLOP/s"
    return f"{side['gb_per_s']:.4g} GB/s" if "gb_per_s" in side else ""
