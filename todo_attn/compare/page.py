"""One HTML page that shows methods side by side: a slider over images, differences, curves, tables, settings to copy.

The page is a single file that loads nothing. It knows nothing of a comparison: whoever has images and figures fills in
a :class:`Page`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from ..config.checks import ArgumentError
from .curve import MARKERS, Curve, Estimate, draw_curve, families_of
from .fonts import one_line

QUALITY = 92  # of WebP: a third of lossless, and 512 x 512 pixels take about 50 kB
AMPLIFICATION = 4  # of the differences as stored; the page brightens them for the larger factors
FACTORS = (AMPLIFICATION, 8, 16)
MAX_SIDE = 4096  # pixels; WebP's own limit is 16383
_TWO_IN_A_ROW = 640  # pixels: wider images get a row of their own


@dataclass(frozen=True)
class Column:
    """A column of numbers, and how they are written."""

    heading: str
    text: Callable[[float], str] = "{:.3g}".format


@dataclass(frozen=True)
class TableRow:
    """The figures of a method by the headings of their columns; ``note`` stands in place of all, if there are none."""

    method: str
    values: Mapping[str, Estimate | str | None] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[Column]
    rows: Sequence[TableRow]


@dataclass(frozen=True)
class Example:
    """The same image by several methods.

    Args:
        prompt: the heading.
        detail: beside it, such as "seed 0".
        images: (height, width, 3) uint8 by method, all of one size, that of the reference among them if there is one.
        captions: by method: what to say about its image, or why there is none.
    """

    prompt: str
    detail: str
    images: Mapping[str, np.ndarray]
    captions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What to copy to use a method: the code by its kind, such as {"Python": "apply_todo(pipe)"}."""

    method: str
    code: Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """What the page shows, from top to bottom.

    Args:
        title, subtitle: at the top.
        reference: the method that all others are compared with.
        notes: what the reader must know first, a paragraph each.
        examples, curves, tables, settings: a section each, left out if empty.
        about: what the numbers mean, at the end.
    """

    title: str
    subtitle: str
    reference: str = "dense"
    notes: Sequence[str] = ()
    examples: Sequence[Example] = ()
    curves: Sequence[Curve] = ()
    tables: Sequence[Table] = ()
    settings: Sequence[Setting] = ()
    about: Sequence[str] = ()


def build_page(page: Page) -> str:
    """The page as HTML; the same page gives the same text.

    Images are stored as WebP at quality 92, and scaled down above 4096 pixels a side. Differences are taken between
    the exact pixels.

    Raises:
        ArgumentError: an image of another dtype or shape, images of different sizes in an example, a value of a column
            that the table lacks, a method twice in a table or curve, or a number that is not finite or outside of its
            interval.
    """
    _check(page)
    methods = list(dict.fromkeys(m for example in page.examples for m in example.images if m != page.reference))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    families = families_of(page.curves)
    return environment.get_template("page.html.j2").render(
        page=page,
        methods=methods,
        examples=[_shown(example, page.reference, methods) for example in page.examples],
        curves=[(curve, [draw_curve(curve, families, width) for width in (720, 340)]) for curve in page.curves],
        families=families,
        markers=MARKERS,
        tables=[(table, [_cells(row, table.columns) for row in table.rows]) for table in page.tables],
        amplification=AMPLIFICATION,
        factors=FACTORS if methods else (),
        quality=QUALITY,
        max_side=MAX_SIDE,
        scaled=any(max(i.shape) > MAX_SIDE for example in page.examples for i in example.images.values()),
    )


def _shown(example: Example, reference: str, methods: Sequence[str]) -> dict[str, Any]:
    """What the template needs of an example."""
    height, width = next(iter(example.images.values())).shape[:2]
    dense = example.images.get(reference)

    def difference(image: np.ndarray) -> str | None:
        return None if dense is None else _data_uri(_difference(dense, image))

    layers = [
        {
            "method": method,
            "caption": example.captions.get(method, ""),
            "image": _data_uri(example.images[method]) if method in example.images else None,
            "difference": difference(example.images[method]) if method in example.images else None,
        }
        for method in methods
    ]
    return {
        "prompt": one_line(example.prompt),
        "detail": one_line(example.detail),
        "height": height,
        "width": width,
        "wide": width > _TWO_IN_A_ROW,
        "reference": None if dense is None else _data_uri(dense),
        "caption": example.captions.get(reference, ""),
        "layers": layers,
    }


def _difference(reference: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The largest absolute difference of the three channels, amplified: (height, width) uint8."""
    apart = np.abs(reference.astype(np.int16) - image).max(-1)
    return np.minimum(apart * AMPLIFICATION, 255).astype(np.uint8)


def _data_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    webp = io.BytesIO()
    image.save(webp, "webp", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(webp.getvalue()).decode("ascii")


def _cells(row: TableRow, columns: Sequence[Column]) -> list[tuple[str, str]]:
    """The text of each cell, and that of its interval."""
    cells = []
    for column in columns:
        value = row.values.get(column.heading)
        text, interval = "-", ""
        if isinstance(value, Estimate):
            text = column.text(value.value)
            if value.low is not None and value.high is not None:
                interval = f"{column.text(value.low)} to {column.text(value.high)}"
        elif value is not None:
            text = value
        cells.append((text, interval))
    return cells


def _check(page: Page) -> None:
    for number, example in enumerate(page.examples):
        where = f"examples[{number}].images"
        if not example.images:
            raise ArgumentError(where, "must have an image, got none")
        first = next(iter(example.images))
        for method, image in example.images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                found = f"{image.dtype} of shape {image.shape} by {method!r}"
                raise ArgumentError(where, f"must be uint8 of shape (height, width, 3), got {found}")
            if image.shape != example.images[first].shape:
                found = f"{example.images[first].shape} by {first!r} and {image.shape} by {method!r}"
                raise ArgumentError(where, f"must be of one size, got {found}")
    for number, table in enumerate(page.tables):
        headings = [column.heading for column in table.columns]
        _check_once(f"tables[{number}].columns", headings)
        _check_once(f"tables[{number}].rows", [row.method for row in table.rows])
        for row in table.rows:
            for heading, value in row.values.items():
                where = f"tables[{number}] {row.method!r} {heading!r}"
                if heading not in headings:
                    raise ArgumentError(where, f"must be in a column of the table, {headings}")
                if isinstance(value, Estimate):
                    _check_estimate(where, value)
    for number, curve in enumerate(page.curves):
        _check_once(f"curves[{number}].points", [point.method for point in curve.points])
        if not curve.points:
            raise ArgumentError(f"curves[{number}].points", "must have a point, got none")
        for point in curve.points:
            for axis, value in (("x", point.x), ("y", point.y)):
                _check_estimate(f"curves[{number}] {point.method!r} {axis}", value)
            if point.x.value < 0:
                raise ArgumentError(f"curves[{number}] {point.method!r} x", f"must be at least 0, got {point.x.value}")


def _check_once(where: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(where, f"must have each name once, got {', '.join(map(repr, twice))} again")


def _check_estimate(where: str, estimate: Estimate) -> None:
    ends = [end for end in (estimate.low, estimate.high) if end is not None]
    if not all(map(math.isfinite, (estimate.value, *ends))):
        raise ArgumentError(where, f"must be finite, got {estimate}")
    if len(ends) == 1:
        raise ArgumentError(where, f"must have both ends of its interval or none, got {estimate}")
    if ends and not ends[0] <= estimate.value <= ends[1]:
        raise ArgumentError(where, f"must be inside of its interval, got {estimate}")
