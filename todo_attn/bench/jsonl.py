"""Rows in a file, one JSON object a line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from os import SEEK_END
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from ..config.checks import ArgumentError


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append ``rows`` to the file in one write; rows that it has already are left alone.

    A last line that an interrupted run left unfinished is ended first, so that it spoils no new row.

    Raises:
        ValueError: a number is not finite; nothing is written then.
    """
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(("\n" * _is_torn(path) + text).encode())


def _is_torn(path: Path) -> bool:
    """Whether the last line has no end."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, SEEK_END)
        return file.read() != b"\n"


def check_appendable(path: Path, argument: str = "out") -> None:
    """Check, before a long run, that :func:`append` can write to ``path``; nothing is left behind.

    Folders that are missing are no problem if they can be made.

    Raises:
        ArgumentError: of ``argument``: it cannot be written, with the path and the reason.
    """
    try:
        target = path.resolve()  # a link may lead to a file that does not exist yet
        if target.exists():
            target.open("ab").close()
        else:
            nearest = next(folder for folder in target.parents if folder.exists())
            with TemporaryFile(dir=nearest):
                pass
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(argument, f"must be a file that can be written, got {str(path)!r}: {reason}") from error


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that :func:`append` wrote. A line that is not a row is skipped with a warning."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            warnings.warn(f"{path}, line {number}: not a row, skipped", stacklevel=2)
    return rows
