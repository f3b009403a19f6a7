"""What a search has found: every candidate with its figures, and the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..compare.curve import Curve, Estimate, pareto_front
from ..compare.curve import Point as PointOfCurve
from ..config.checks import ArgumentError
from ..config.dato import DaToConfig
from ..options.settings import CompareSettings
from .fidelity import Metric
from .plan import Plan


@dataclass(frozen=True)
class Point:
    """A candidate with its figures.

    Args:
        key: its name, unique.
        config: what it does.
        fidelity: the mean of the metric over the images.
        cost: of an image: operations, or seconds.
        generation: that first had it, from 1.
        origin: the name of the schedule if it is known from elsewhere, such as "coco" or "uniform 3".
    """

    key: str
    config: DaToConfig
    fidelity: float
    cost: float
    generation: int
    origin: str = ""


@dataclass(frozen=True)
class Found:
    """The result of :func:`~todo_attn.search.search`, or what there is of it so far.

    Args:
        settings, plan: of the search, filled in.
        calls: of the UNet for an image.
        metric: of fidelity.
        dense_cost: of a dense image.
        generations: done.
        points: every candidate that has figures, in the order of evaluation.
        failures: why each of the others has none, by its name.
        about: what decided all figures, as plain data.
    """

    settings: CompareSettings
    plan: Plan
    calls: int
    metric: Metric
    dense_cost: float
    generations: int
    points: Sequence[Point]
    failures: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def front(self) -> list[Point]:
        """The points that no other beats in both cost and fidelity, and that cost less than dense, by cost."""
        cheaper = {point.key: point for point in self.points if point.cost < self.dense_cost}
        points = [PointOfCurve(p.key, "", Estimate(p.cost), Estimate(p.fidelity)) for p in cheaper.values()]
        best = pareto_front(Curve("", "", "", points, self.metric.higher_is_better))
        return [cheaper[point.method] for point in best]

    def choose(self, *, speedup: float | None = None, fidelity: float | None = None) -> Point | None:
        """The best of the front for a wish; None if no point has it.

        Args:
            speedup: at least so much: of these the one nearest to dense.
            fidelity: at least so much of the metric, or at most if lower is better: of these the cheapest.

        Raises:
            ArgumentError: not one of the two is given.
        """
        if speedup is not None and fidelity is None:
            fast = [point for point in self.front if self.speedup(point) >= speedup]
            return fast[-1] if fast else None
        if fidelity is None or speedup is not None:
            raise ArgumentError("speedup", f"or fidelity must be given, and only one, got {speedup} and {fidelity}")
        sign = 1 if self.metric.higher_is_better else -1
        return next((point for point in self.front if sign * point.fidelity >= sign * fidelity), None)

    def speedup(self, point: Point) -> float:
        """Dense's cost over the point's."""
        return self.dense_cost / point.cost
