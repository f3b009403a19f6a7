"""The table: rows as plain data, a file of them, and as text for a terminal or for Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from tabulate import tabulate

from benchmarks.fidelity.metrics import METRICS, Column, Part
from todo_attn.bench import jsonl
from todo_attn.compare.files import write_whole

BENCHMARK = "fidelity"
Row = dict[str, Any]


def row_of(
    about: Mapping[str, Any], parts: Sequence[Part], columns: Mapping[str, Column], versus: Mapping[str, Column] | None
) -> Row:
    """The row of one case at one size.

    Args:
        about: what else it says: the run, the case, the machine.
        parts: of its images.
        versus: the columns of the case that it is compared with.
    """
    seconds = [part.record["seconds"] for part in parts]
    return {
        "benchmark": BENCHMARK,
        **about,
        "images": len(parts),
        "processes": max(part.record["processes"] for part in parts),
        "calls": parts[0].record["calls"],
        "same_as_dense": sum(part.same_as_dense for part in parts),
        "not_finite": sum(not part.record["finite"] for part in parts),
        "columns": {name: _plain(column.interval()) for name, column in columns.items()},
        "differences": versus
        and {name: _plain(column.minus(versus[name])) for name, column in columns.items() if name in versus},
        "seconds": statistics.median(seconds),
    }


def _plain(interval: Any) -> dict[str, float | None] | None:
    return None if interval is None else interval.to_dict()


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a file of rows has once."""
    return tuple(row.get(name) for name in ("benchmark", "run", "case", "height", "width"))


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put ``rows`` into the file: they replace those of the same run, case and size, and all others stay.

    Raises:
        OSError: it cannot be written; it is then as it was.
    """
    new = {key_of(row): row for row in rows}
    kept = [row for row in (jsonl.read(path) if path.exists() else []) if key_of(row) not in new]
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in [*kept, *rows])
    write_whole(path, text.encode())


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """The names of the metrics that any row has, in their own order."""
    return [name for name in METRICS if any(name in row["columns"] for row in rows)]


def headings(rows: Sequence[Row]) -> list[str]:
    return ["case", "s", "speed", "operations saved", *(METRICS[name].title for name in metrics_of(rows))]


def cells(row: Row, dense: Row, rows: Sequence[Row], narrow: bool) -> list[str]:
    """Of a row; ``narrow`` gives half the width of an interval instead of its ends."""
    return [
        row["case"],
        f"{row['seconds']:.3g}",
        f"{dense['seconds'] / row['seconds']:.2f}x",
        f"{row['operations_saved']:.1%}",
        *(_cell(row, name, narrow) for name in metrics_of(rows)),
    ]


def _cell(row: Row, name: str, narrow: bool) -> str:
    interval, decimals = row["columns"].get(name), METRICS[name].decimals
    if interval is None:
        return "same" if row["same_as_dense"] == row["images"] else "-"
    text = f"{interval['value']:.{decimals}f}"
    if interval["low"] is not None and narrow:
        text += f" ±{(interval['high'] - interval['low']) / 2:.{decimals}f}"
    elif interval["low"] is not None:
        text += f" ({interval['low']:.{decimals}f} to {interval['high']:.{decimals}f})"
    return text + _verdict(row, name)


def _verdict(row: Row, name: str) -> str:
    """ "+" if better than the case that it is compared with, "-" if worse, beyond the interval; "=" if neither."""
    difference = (row.get("differences") or {}).get(name)
    better = METRICS[name].better
    if difference is None or difference["low"] is None or better == "near 1" or row["case"] == row["versus"]:
        return ""
    if not (difference["low"] > 0 or difference["high"] < 0):
        return " ="
    return " +" if (difference["low"] > 0) == (better == "higher") else " -"


def grouped(rows: Sequence[Row]) -> list[tuple[str, list[Row], Row]]:
    """The rows by size: its title, its rows, the row of dense."""
    found = []
    for size in dict.fromkeys((row["height"], row["width"]) for row in rows):
        same = [row for row in rows if (row["height"], row["width"]) == size]
        dense = next(row for row in same if row["case"] == "dense")
        found.append((f"{size[1]} x {size[0]} pixels, {dense['images']} images", same, dense))
    return found


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know of the table."""
    found = ["95 % intervals by bootstrap over images; seconds are medians"]
    if any(row["processes"] > 1 for row in rows):
        most = max(row["processes"] for row in rows)
        found.append(f"seconds are of an image on a machine that {most} processes shared")
    if versus := {row["versus"] for row in rows if row["versus"]}:
        found.append(
            f"+ and -: better and worse than {', '.join(versus)} beyond the interval, paired by image; =: neither"
        )
    for row in rows:
        if row["not_finite"]:
            found.append(f"{row['case']}: {row['not_finite']} images had NaN or infinity")
        if 0 < row["same_as_dense"] < row["images"]:
            found.append(f"{row['case']}: {row['same_as_dense']} images are the same as dense, and not in its PSNR")
    return found


def rich_tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each size."""
    found = []
    for title, same, dense in grouped(rows):
        table = Table(title=title)
        for number, heading in enumerate(headings(rows)):
            table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
        for row in same:
            table.add_row(*cells(row, dense, rows, narrow=True))
        found.append(table)
    return found


def github(body: Sequence[Sequence[str]], rows: Sequence[Row], timed: bool = True) -> str:
    """Cells of some of ``rows`` as a table of Markdown, with or without the columns of time."""
    lines = [headings(rows), *body]
    if not timed:
        lines = [[*line[:1], *line[3:]] for line in lines]
    return tabulate(lines, headers="firstrow", tablefmt="github", disable_numparse=True)


def markdown(rows: Sequence[Row]) -> str:
    """The tables and notes as Markdown."""
    parts = []
    for title, same, dense in grouped(rows):
        body = [cells(row, dense, rows, narrow=False) for row in same]
        parts.append(f"**{title}**\n\n{github(body, rows)}")
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(rows))])
