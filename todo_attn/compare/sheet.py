"""Images side by side with words, drawn by Pillow: a column per method, a row per prompt and seed."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .fonts import draw_text, length, one_line

_PAPER, _INK, _FAINT, _RULE, _ACCENT = "#ffffff", "#181a1f", "#6c727d", "#dee1e6", "#0b7a4b"
_MARGIN, _GAP = 32, 20
_MAX_CELL = 512  # pixels along an image's longer side
_MIN_PITCH = 320  # room for the words under tiny images

_BIG, _HEADING, _NORMAL, _SMALL = 26, 22, 18, 15  # font sizes
_LINE = 22  # from one small line to the next


@dataclass(frozen=True)
class Column:
    """The text above a column; ``badge`` is large and at the right, coloured if ``good``."""

    heading: str
    badge: str
    detail: str
    good: bool = True


@dataclass(frozen=True)
class Row:
    """The title of a row, and per column an image ((height, width, 3) uint8, or None) and its caption."""

    title: str
    cells: Sequence[tuple[np.ndarray | None, str]]


def draw_sheet(title: str, subtitle: str, columns: Sequence[Column], rows: Sequence[Row]) -> Image.Image:
    """The contact sheet, RGB. Images above 512 pixels on their longer side are shown scaled down.

    Args:
        title, subtitle: at the top; the subtitle takes as many lines as it needs.
        columns: at least one.
        rows: at least one, each with a cell per column; at least one cell with an image.
    """
    shape = next(pixels.shape for row in rows for pixels, _ in row.cells if pixels is not None)
    shrink = min(1.0, _MAX_CELL / max(shape[:2]))
    height, width = round(shape[0] * shrink), round(shape[1] * shrink)
    pitch = max(width, _MIN_PITCH) + _GAP
    inner = pitch * len(columns) - _GAP
    subtitles = _wrapped(one_line(subtitle), _SMALL, inner)
    title_height, head_height, caption_height, row_gap = 62 + _LINE * len(subtitles), 66, 30, 34
    row_height = row_gap + height + caption_height + 14
    sheet = Image.new(
        "RGB",
        (2 * _MARGIN + inner, _MARGIN + title_height + head_height + row_height * len(rows) + 12),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, size: int, ink: str, room: int) -> None:
        draw_text(draw, x, y, _cut(one_line(text), size, room), size, ink)

    write(_MARGIN, _MARGIN - 6, title, _BIG, _INK, inner)
    for i, line in enumerate(subtitles):
        write(_MARGIN, _MARGIN + 32 + _LINE * i, line, _SMALL, _FAINT, inner)
    y = _MARGIN + title_height - 12
    draw.line((_MARGIN, y, sheet.width - _MARGIN, y), fill=_RULE, width=1)
    for i, column in enumerate(columns):
        x = _MARGIN + i * pitch
        badge_width = math.ceil(length(column.badge, _BIG))
        write(x, y + 14, column.heading, _HEADING, _INK, pitch - _GAP - badge_width)
        write(
            x + max(width, _MIN_PITCH) - badge_width,
            y + 11,
            column.badge,
            _BIG,
            _ACCENT if column.good else _INK,
            badge_width,
        )
        write(x, y + 42, column.detail, _NORMAL, _INK, pitch - _GAP)
    y += 12 + head_height
    for row in rows:
        write(_MARGIN, y + 8, row.title, _SMALL, _FAINT, inner)
        for i, (pixels, caption) in enumerate(row.cells):
            x, top = _MARGIN + i * pitch, y + row_gap
            if pixels is None:
                draw.rectangle((x, top, x + width - 1, top + height - 1), outline=_RULE)
            else:
                image = Image.fromarray(pixels)
                sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS) if shrink < 1 else image, (x, top))
            write(x, top + height + 8, caption, _SMALL, _INK if pixels is not None else _FAINT, pitch - _GAP)
        y += row_height
    return sheet


def _cut(text: str, size: int, room: int) -> str:
    """``text``, cut off with "..." if it is wider than ``room`` pixels."""
    if length(text, size) <= room:
        return text
    ends = range(len(text) + 1)
    kept = bisect_right(ends, room, key=lambda end: math.ceil(length(text[:end] + "...", size))) - 1
    return text[: max(kept, 0)].rstrip() + "..."


def _wrapped(text: str, size: int, room: int) -> list[str]:
    """``text`` in lines of at most ``room`` pixels, broken between words; a dot stays with the word before it."""
    lines = [""]
    for word in re.findall(r"\S+(?:\s+·)?\s*", text):
        if lines[-1] and length(lines[-1] + word.rstrip(), size) > room:
            lines.append("")
        lines[-1] += word
    return [line.rstrip(" ·") for line in lines]
