"""Settings for a wish: a short search, the best of its front, the comparison that shows what it costs, the code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..compare.files import write_whole
from ..compare.lines import python_lines
from ..config import schedule
from ..config.checks import ArgumentError
from ..config.todo import ToDoConfig
from ..options.settings import RECOMMEND_MINUTES, CompareSettings
from .found import Found, Point
from .output import factors_text, fidelity_text, schedule_of
from .plan import Plan

_SEEDS_APART = 1_000_003  # the comparison's seeds are so much later than those of the search


def short_plan(cost: str = "seconds", minutes: float = RECOMMEND_MINUTES) -> Plan:
    """Of a search over ToDo's factors and DaTo's schedules and ratios that ends after so many minutes."""
    return Plan(
        metric="psnr",
        cost=cost,
        prune_ratios=(0.0, 0.4),
        todo_factors=(1, 2, 4),
        population=12,
        generations=1000,
        minutes=minutes,
    )


def recommended(found: Found, *, speedup: float | None = None, psnr: float | None = None) -> Point:
    """The best of the front for a wish: a speed-up of at least so much, or a PSNR of at least so many dB.

    Raises:
        ArgumentError: of the wish: nothing that was found fulfils it, and what comes nearest; or there is not exactly
            one wish.
    """
    if (speedup is None) == (psnr is None):
        raise ArgumentError("speedup", f"or psnr must be given, and only one, got {speedup} and {psnr}")
    if (point := found.choose(speedup=speedup, fidelity=psnr)) is not None:
        return point
    name, wish = ("psnr", f"{psnr:g} dB") if speedup is None else ("speedup", f"{speedup:g}x")
    if not found.front:
        raise ArgumentError(name, f"must be in reach, and nothing that was found is faster than dense, got {wish}")
    nearest = found.front[-1 if speedup is None else 0]
    there = f"{found.speedup(nearest):.2f}x at {fidelity_text(found, nearest)} dB"
    what = "the nearest to dense is" if speedup is None else "the fastest is"
    raise ArgumentError(name, f"must be in reach: {what} {there}, got {wish}")


def comparison_of(found: Found, point: Point, file: str | Path) -> CompareSettings:
    """Dense against ``point`` on the prompts of the search, with seeds that it has not seen.

    Args:
        file: that the schedule of ``point`` is written to, if it has one.

    Raises:
        OSError: it cannot be written.
    """
    seeds = tuple((seed + _SEEDS_APART) % 2**63 for seed in found.settings.seeds)
    if point.config.computes_everything:
        return replace(found.settings, seeds=seeds, methods="dense,todo", factor=factors_text(point))
    write_whole(Path(file), schedule.dumps(replace(schedule_of(found, point), name=Path(file).stem)).encode())
    return replace(found.settings, seeds=seeds, methods="dense,dato", schedule=str(file))


def code_of(found: Found, point: Point) -> str:
    """Lines of Python that put ``point`` on a pipeline."""
    config = point.config
    if config.computes_everything:
        assert isinstance(config.todo, ToDoConfig)
        lines = python_lines("todo", config.todo.to_dict())
    else:
        comment = f"for {found.calls} calls of the UNet, found with {found.about['scheduler']}"
        lines = python_lines("dato", config.to_dict(), comment)
    assert lines is not None
    return lines
