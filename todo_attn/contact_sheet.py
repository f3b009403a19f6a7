"""Pictures side by side with words, drawn by Pillow: a column per method, a row per prompt and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT, _RULE, _ACCENT = "#ffffff", "#181a1f", "#6c727d", "#dee1e6", "#0b7a4b"
_MARGIN, _GAP = 32, 20
_MAX_CELL = 512  # pixels along a picture's longer side
_MIN_PITCH = 320  # words need some room also under tiny pictures

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Column:
    """The words above a column; ``badge`` is large and at the right, coloured if ``good``."""

    heading: str
    badge: str
    detail: str
    good: bool = True


@dataclass(frozen=True)
class Row:
    """What the row shows, and per column a picture ((height, width, 3) uint8, None where there is none) and words."""

    title: str
    cells: Sequence[tuple[np.ndarray | None, str]]


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)  # comes with Pillow: the sheet looks the same everywhere


def draw_sheet(title: str, subtitle: str, columns: Sequence[Column], rows: Sequence[Row]) -> Image.Image:
    """The contact sheet, RGB. Pictures above 512 pixels on their longer side are shown scaled down.

    Args:
        title, subtitle: lines at the top.
        columns: at least one.
        rows: at least one, each with a cell per column; at least one cell with a picture.
    """
    shape = next(pixels.shape for row in rows for pixels, _ in row.cells if pixels is not None)
    shrink = min(1.0, _MAX_CELL / max(shape[:2]))
    height, width = round(shape[0] * shrink), round(shape[1] * shrink)
    pitch = max(width, _MIN_PITCH) + _GAP
    big, normal, small = _font(26), _font(18), _font(15)
    title_height, head_height, caption_height, row_gap = 84, 66, 30, 34
    row_height = row_gap + height + caption_height + 14
    sheet = Image.new(
        "RGB",
        (2 * _MARGIN + pitch * len(columns) - _GAP, _MARGIN + title_height + head_height + row_height * len(rows) + 12),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    inner = sheet.width - 2 * _MARGIN

    def write(x: int, y: int, text: str, font: _Font, ink: str, room: int) -> None:
        draw.text((x, y), _cut(text, font, room), font=font, fill=ink)

    write(_MARGIN, _MARGIN - 6, title, big, _INK, inner)
    write(_MARGIN, _MARGIN + 32, subtitle, small, _FAINT, inner)
    y = _MARGIN + title_height - 12
    draw.line((_MARGIN, y, sheet.width - _MARGIN, y), fill=_RULE, width=1)
    for i, column in enumerate(columns):
        x = _MARGIN + i * pitch
        badge_width = math.ceil(big.getlength(column.badge))
        write(x, y + 14, column.heading, _font(22), _INK, pitch - _GAP - badge_width)
        write(
            x + max(width, _MIN_PITCH) - badge_width,
            y + 11,
            column.badge,
            big,
            _ACCENT if column.good else _INK,
            badge_width,
        )
        write(x, y + 42, column.detail, normal, _INK, pitch - _GAP)
    y += 12 + head_height
    for row in rows:
        write(_MARGIN, y + 8, row.title, small, _FAINT, inner)
        for i, (pixels, caption) in enumerate(row.cells):
            x, top = _MARGIN + i * pitch, y + row_gap
            if pixels is None:
                draw.rectangle((x, top, x + width - 1, top + height - 1), outline=_RULE)
            else:
                picture = Image.fromarray(pixels)
                sheet.paste(
                    picture.resize((width, height), Image.Resampling.LANCZOS) if shrink < 1 else picture, (x, top)
                )
            write(x, top + height + 8, caption, small, _INK if pixels is not None else _FAINT, pitch - _GAP)
        y += row_height
    return sheet


def _cut(text: str, font: _Font, room: int) -> str:
    """``text``, its end cut off and marked where it is wider than ``room`` pixels."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."
