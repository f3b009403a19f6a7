"""The curve of quality against time: where its axes, points and labels go, for the page to draw as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

# One for each family, in turns: round, square, diamond, triangle, triangle pointing down, cross; 10 units wide.
MARKERS = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "M-4.5-4.5h9v9h-9z",
    "M0-6L6 0L0 6L-6 0z",
    "M0-6L5.5 4H-5.5z",
    "M0 6L5.5-4H-5.5z",
    "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
)
_LINE, _CHARACTER = 15, 7.0  # pixels: a line of a label, and a generous width of a character
_MARGIN = {"left": 52, "right": 16, "top": 26, "bottom": 44}
_Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Estimate:
    """A number, and its interval if there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Point:
    """A method; those of one ``family`` share a colour and a marker."""

    method: str
    family: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Curve:
    """Quality (y) against cost (x, at least 0, where less is better).

    Args:
        points: a point for each method; the best ones at each cost are joined.
        higher_is_better: of y.
        lines: a label and a cost each, drawn as a vertical line: for a method whose quality is no number.
        note: below the curve.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[Point]
    higher_is_better: bool = True
    lines: Sequence[tuple[str, float]] = ()
    note: str = ""


@dataclass(frozen=True)
class Mark:
    """A point as drawn: its place, whiskers as (from, to), and its label's place and anchor, None without room."""

    point: Point
    x: float
    y: float
    x_whisker: tuple[float, float] | None
    y_whisker: tuple[float, float] | None
    label: tuple[float, float, str] | None
    best: bool


@dataclass(frozen=True)
class Drawing:
    """A curve in pixels; ``front`` is the path that joins the best points."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[float, str, str]]  # place, label, anchor
    marks: list[Mark]
    front: str


def families_of(curves: Sequence[Curve]) -> list[str]:
    """The families of all curves, in the order in which they first appear."""
    return list(dict.fromkeys(point.family for curve in curves for point in curve.points))


def pareto_front(curve: Curve) -> list[Point]:
    """The points that no other point beats in both cost and quality, by cost."""
    sign = 1 if curve.higher_is_better else -1
    front: list[Point] = []
    for point in sorted(curve.points, key=lambda p: (p.x.value, -sign * p.y.value)):
        if not front or sign * point.y.value > sign * front[-1].y.value:
            front.append(point)
    return front


def draw_curve(curve: Curve, families: Sequence[str], width: int) -> Drawing:
    """``curve`` at a width in pixels. The x axis begins at 0."""
    height = round(width * (0.56 if width > 500 else 0.9))
    left, right = _MARGIN["left"], width - _MARGIN["right"]
    top, bottom = _MARGIN["top"], height - _MARGIN["bottom"]
    ys = [end for point in curve.points for end in _ends(point.y)]
    xs = [end for point in curve.points for end in _ends(point.x)] + [x for _, x in curve.lines]
    most = max(xs) * 1.06 or 1.0
    pad = 0.1 * (max(ys) - min(ys)) or abs(max(ys)) * 0.1 or 1.0
    low, high = min(ys) - pad, max(ys) + pad

    def x_of(value: float) -> float:
        return left + (right - left) * value / most

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    front = pareto_front(curve)
    places = {point.method: (x_of(point.x.value), y_of(point.y.value)) for point in curve.points}
    labels = _place_labels(places, [p.method for p in front], (left, top, right, bottom))
    marks = [
        Mark(
            point,
            *places[point.method],
            _whisker(point.x, x_of),
            _whisker(point.y, y_of),
            labels.get(point.method),
            point in front,
        )
        for point in curve.points
    ]
    path = "M{:.1f} {:.1f}".format(*places[front[0].method])
    for point in front[1:]:  # in steps: between two points, only the cheaper one can be had
        path += "H{:.1f}V{:.1f}".format(*places[point.method])
    lines = [(x_of(x), label, "end" if x_of(x) > (left + right) / 2 else "start") for label, x in curve.lines]
    few = 4 if width < 500 else 8
    return Drawing(
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=[(x_of(tick), text) for tick, text in ticks(0, most, few)],
        y_ticks=[(y_of(tick), text) for tick, text in ticks(low, high, 5)],
        lines=lines,
        marks=marks,
        front=path,
    )


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """At most ``most`` + 1 round numbers between ``low`` and ``high``, with their texts."""
    least = (high - low) / most
    decade = 10.0 ** math.floor(math.log10(least))
    step = next(decade * round_one for round_one in (1, 2, 5, 10) if decade * round_one >= least)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(low / step - 1e-9)
    numbers: list[tuple[float, str]] = []
    for i in count(first):
        if i * step > high + 1e-9 * step:
            return numbers
        numbers.append((i * step, f"{i * step:.{digits}f}"))
    raise AssertionError


def _ends(estimate: Estimate) -> tuple[float, ...]:
    return tuple(v for v in (estimate.value, estimate.low, estimate.high) if v is not None)


def _whisker(estimate: Estimate, place: Callable[[float], float]) -> tuple[float, float] | None:
    if estimate.low is None or estimate.high is None or estimate.low == estimate.high:
        return None
    return place(estimate.low), place(estimate.high)


def _place_labels(
    places: dict[str, tuple[float, float]], first: Sequence[str], inside: _Box
) -> dict[str, tuple[float, float, str]]:
    """A place and an anchor for the label of each point, the ``first`` ones first; none where there is no room."""
    taken: list[_Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in places.values()]
    labels: dict[str, tuple[float, float, str]] = {}
    for name in dict.fromkeys([*first, *places]):
        x, y = places[name]
        width = _CHARACTER * len(name)
        for dx, dy, anchor in _ABOVE + _BELOW if name in first else _BELOW + _ABOVE:
            start = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
            box = (start, y + dy - _LINE + 4, start + width, y + dy + 4)
            if _is_inside(box, inside) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                labels[name] = (x + dx, y + dy, anchor)
                break
    return labels


# Where a label may go, from its point: first beside the whiskers, then over them. Above left of the front is free.
_ABOVE = [(-8.0, -7.0, "end"), (8.0, -7.0, "start"), (0.0, -11.0, "middle"), (-10.0, 4.0, "end")]
_BELOW = [(8.0, 16.0, "start"), (-8.0, 16.0, "end"), (0.0, 20.0, "middle"), (10.0, 4.0, "start")]


def _is_inside(box: _Box, outer: _Box) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def _overlap(one: _Box, two: _Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
