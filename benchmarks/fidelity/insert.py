"""Tables of the rows within Markdown files, so that no figure is copied by hand.

A comment in the file says what stands between it and its end, in the words of a command line::

    <!-- fidelity benchmarks/results/fidelity-256.jsonl --case dense --case 'todo:factor=*' --metric psnr -->
    <!-- /fidelity -->
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.fidelity import table
from benchmarks.fidelity.cases import DENSE
from benchmarks.fidelity.metrics import METRICS
from todo_attn.bench import jsonl
from todo_attn.config.checks import ArgumentError

_UNTIMED = "--no-seconds"  # of cases that were not timed under equal conditions
_BLOCK = re.compile(r"(<!-- fidelity (?P<options>.*?) -->\n).*?(<!-- /fidelity -->)", re.DOTALL)


def inserted(text: str, root: Path) -> str:
    """``text`` with each block filled from the rows that it names; files are relative to ``root``.

    Raises:
        ArgumentError: a block names a file, case or metric that is not there.
    """

    def fill(block: re.Match[str]) -> str:
        file, *options = shlex.split(block["options"])
        timed = _UNTIMED not in options
        options = [option for option in options if option != _UNTIMED]
        if len(options) % 2 or not set(options[::2]) <= {"--case", "--metric"}:
            expected = f"must be a file, --case NAME, --metric NAME and {_UNTIMED}"
            raise ArgumentError("block", f"{expected}, got {block['options']!r}")
        given: dict[str, list[str]] = {"--case": [], "--metric": []}
        for name, value in zip(options[::2], options[1::2], strict=True):
            given[name].append(value)
        if not (root / file).is_file():
            raise ArgumentError("block", f"must name a file of rows, got {file!r}")
        return f"{block[1]}{_table(jsonl.read(root / file), given['--case'], given['--metric'], timed)}\n{block[3]}"

    return _BLOCK.sub(fill, text)


def _table(rows: Sequence[table.Row], cases: Sequence[str], metrics: Sequence[str], timed: bool) -> str:
    """A Markdown table of the cases, in the order of their patterns, with half the widths of the intervals."""
    names = {row["case"] for row in rows}
    for pattern in cases:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError("case", f"must be in the file of rows, got {pattern!r}")
    for metric in metrics:
        if metric not in METRICS or not any(metric in row["columns"] for row in rows):
            raise ArgumentError("metric", f"must be in the file of rows, got {metric!r}")
    [(_, same, dense)] = table.grouped([row | {"columns": _only(row["columns"], metrics)} for row in rows])
    picked = [row for pattern in cases for row in same if fnmatchcase(row["case"], pattern)] if cases else same
    picked = list({row["case"]: row for row in picked}.values())
    shown = [table.cells(row, dense, same, narrow=True) for row in picked]
    for row in shown:
        row[0] = row[0] if row[0] == DENSE else f"`{row[0]}`"
    return table.github(shown, same, timed)


def _only(columns: Mapping[str, object], metrics: Sequence[str]) -> dict[str, object]:
    return {name: column for name, column in columns.items() if not metrics or name in metrics}
