"""Options that both commands share, read and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.fidelity.store import Size
from todo_attn.config.checks import ArgumentError
from todo_attn.options.settings import SIZE_MULTIPLE, check_area, check_size


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
