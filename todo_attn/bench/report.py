"""Rows for people: a table, and sentences about what is slower, noisy or wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from ..peak_memory import is_out_of_memory
from .trial import WRONG

Row = dict[str, Any]
_NOTE = 100  # characters of an error in the table
_NOISY = 1.25  # ratio of the 80th to the 20th percentile of the rounds
LEGEND = (
    "ms: the median of a candidate's rounds. speed-up: the median (20th to 80th percentile) of the ratios within a "
    "round, which is not the ratio of the two medians. *: the fastest rival"
)


def table(rows: Sequence[Row]) -> str:
    """One line for each row, of any benchmark; :data:`LEGEND` explains the columns."""
    return tabulate([_line(row) for row in rows], headers="keys", disable_numparse=True)


def _line(row: Row) -> dict[str, str]:
    baseline, contender = row["baseline"], row["contender"]
    return {
        "benchmark": row["benchmark"],
        "case": shape_text(row),
        "against": baseline["name"] + "*" * ("best_of" in baseline),
        "ms": _milliseconds(baseline),
        "ours": contender["name"],
        "ms ": _milliseconds(contender),
        "speed-up": "-" if row["speedup"] is None else "{p50:.2f}x ({p20:.2f} to {p80:.2f})".format(**row["speedup"]),
        "rate": _rate(row),
        "note": _note(baseline, contender),
    }


def shape_text(row: Row) -> str:
    """The shape in short: "sd15 2048x2048 level 1, batch 2, fp16"."""
    case = row["case"]
    level = f" level {case['level']}" if "level" in case else ""
    calls = f", {case['calls']} calls" if case.get("calls", 1) != 1 else ""
    more = ", residual" * bool(case.get("residual")) + ", compiled" * bool(case.get("compile"))
    size = f"{case['model']} {case['width']}x{case['height']}"
    return f"{size}{level}, batch {case['batch']}, {case['dtype']}{calls}{more}"


def slower(rows: Iterable[Row]) -> list[str]:
    """A sentence for each row in which ours is not faster than the fastest rival or than dense attention."""
    return [
        f"{row['benchmark']}, {shape_text(row)}: {row['contender']['name']} is not faster here, it takes "
        f"{1 / row['speedup']['p50']:.2f}x the time of {row['baseline']['name']}"
        for row in rows
        if row["speedup"] and row["speedup"]["p50"] <= 1
        if "best_of" in row["baseline"] or row["baseline"]["name"] == "dense"
    ]


def noisy(rows: Sequence[Row]) -> list[str]:
    """A sentence if the speed-up varies much between rounds, as it does if the machine is busy."""

    def spread(row: Row) -> float:
        return row["speedup"]["p80"] / row["speedup"]["p20"]

    timed = [row for row in rows if row["speedup"]]
    loud = [row for row in timed if spread(row) > _NOISY]
    if not loud:
        return []
    worst = max(loud, key=spread)
    return [
        f"this machine is noisy: in {len(loud)} of {len(timed)} rows the speed-up changes by more than "
        f"{_NOISY - 1:.0%} between rounds, most in {worst['benchmark']}, {shape_text(worst)}, against "
        f"{worst['baseline']['name']}: {worst['speedup']['p20']:.2f}x to {worst['speedup']['p80']:.2f}x. Run it again "
        "when nothing else runs"
    ]


def found_no_memory(rows: Sequence[Row]) -> bool:
    """Whether nothing was timed because memory ran out."""
    errors = [candidate["error"] or "" for row in rows for candidate in (row["baseline"], row["contender"])]
    return not any(row["speedup"] for row in rows) and any(map(_is_of_memory, errors))


def refused(rows: Iterable[Row]) -> list[str]:
    """A sentence for each candidate of ours that was not timed because its result was wrong."""
    sentences = (
        f"{row['benchmark']}, {shape_text(row)}: {candidate['name']} was refused: {candidate['error']}"
        for row in rows
        for candidate in (row["baseline"], row["contender"])
        if candidate["name"].startswith("todo") and WRONG in (candidate["error"] or "")
    )
    return list(dict.fromkeys(sentences))


def _note(*candidates: Row) -> str:
    """The errors, each with the candidates that it ended."""
    names: dict[str, list[str]] = {}
    for candidate in candidates:
        if candidate["error"]:
            names.setdefault(candidate["error"], []).append(candidate["name"])
    return "; ".join(f"{', '.join(failed)}: {_shortened(error)}" for error, failed in names.items())


def _is_of_memory(error: str) -> bool:
    return is_out_of_memory(RuntimeError(error))


def _shortened(text: str) -> str:
    if len(text) > _NOTE and _is_of_memory(text):
        return "out of memory"
    return text if len(text) <= _NOTE else f"{text[: _NOTE - 3]}..."


def _milliseconds(candidate: Row) -> str:
    return "-" if candidate["error"] or not candidate["seconds"] else f"{candidate['seconds']['p50'] * 1e3:.4g}"


def _rate(row: Row) -> str:
    """The rate of ours: TFLOP/s if operations are known, else GB/s."""
    candidate = row["contender"]
    if "tflops" in candidate:
        return f"{candidate['tflops']:.3g} TFLOP/s"
    return f"{candidate['gb_per_s']:.4g} GB/s" if "gb_per_s" in candidate else ""
