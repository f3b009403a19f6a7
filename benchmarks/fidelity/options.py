"""Options that both commands share, read and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fidelity.store import Size
from todo_attn.config.checks import ArgumentError
from todo_attn.options.settings import SIZE_MULTIPLE, check_area, check_size


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a UTF-8 file; empty ones are left out.

    Raises:
        ArgumentError: it cannot be read, is not UTF-8, or has no prompt.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ArgumentError(
            "prompts", f"must be a file that can be read, got {str(path)!r}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise ArgumentError("prompts", f"must be a UTF-8 file, and {str(path)!r} is not: {error.reason}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ArgumentError("prompts", f"must be a file with a prompt a line, and {str(path)!r} has none")
    return prompts


def parse_sizes(texts: Sequence[str]) -> list[Size]:
    """(height, width) of "512" or "768x512" (width x height).

    Raises:
        ArgumentError: a size that no pipeline makes.
    """
    found = []
    for text in texts:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
        if not match:
            raise ArgumentError("size", f"must be a side or WIDTHxHEIGHT in pixels, got {text!r}")
        width, height = int(match[1]), int(match[2] or match[1])
        for side in (height, width):
            check_size("size", side, SIZE_MULTIPLE)
        check_area(height, width)
        found.append((height, width))
    return list(dict.fromkeys(found))


def split(texts: Sequence[str] | None) -> list[str]:
    """The parts of a repeatable option, which may have commas."""
    return [part.strip() for text in texts or () for part in text.split(",") if part.strip()]
