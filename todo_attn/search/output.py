"""What a search leaves in its folder: a schedule file for each point of the front, the table, and a page with the plot.

schedules/front-01.json   the cheapest point: DaToConfig.from_file and --schedule take it
front.json                every candidate with its figures, and what decided them
report.html               the front, drawn, and its table
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..compare.curve import Curve, Estimate
from ..compare.curve import Point as PointOfCurve
from ..compare.files import json_bytes, write_whole
from ..compare.lines import command_line
from ..compare.page import Column, Page, Setting, Table, TableRow, build_page
from ..compare.words import steps_text
from ..config import schedule
from ..config.schedule import FULL, KINDS, Schedule
from .found import Found, Point
from .plan import COSTS
from .space import EVERYTHING

SCHEDULES, FRONT, PAGE = "schedules", "front.json", "report.html"
SHOWN = 7  # points of the front whose lines of Python are on the page
_ABOUT = (
    "Cost is that of one image. Operations: matrix products, convolutions, attention and the search for similar tokens "
    "of the UNet, counted, a multiplication with its addition as two. Seconds: from prompt to image, the median.",
    "Fidelity compares each image with dense's of the same prompt and seed, the mean of all. Equal images have a PSNR "
    "of 100 dB.",
    "The figures are of the prompts and seeds that the search was run on. On others they are a little lower: compare "
    "the schedules on prompts of your own before you rely on them.",
)


def write_found(found: Found, folder: Path) -> None:
    """Write everything but the checkpoint; schedules of an older front are removed.

    Raises:
        OSError: a file cannot be written.
    """
    names = names_of(found)
    for point in found.front:
        write_whole(file_of(folder, names[point.key]), schedule.dumps(schedule_of(found, point)).encode())
    write_whole(folder / FRONT, json_bytes(table_of(found)))
    write_whole(folder / PAGE, build_page(page_of(found, folder)).encode("utf-8", "replace"))
    for file in (folder / SCHEDULES).glob("front-*.json"):
        if file.stem not in names.values():
            file.unlink()


def names_of(found: Found) -> dict[str, str]:
    """The name of each point of the front by its key: "front-01" is the cheapest."""
    width = max(2, len(str(len(found.front))))
    return {point.key: f"front-{number:0{width}}" for number, point in enumerate(found.front, 1)}


def file_of(folder: Path, name: str) -> Path:
    return folder / SCHEDULES / f"{name}.json"


def schedule_of(found: Found, point: Point) -> Schedule:
    """The schedule file of ``point``, with what decided its figures."""
    assert point.config.cache_schedule is not None
    about = {name: value for name, value in found.about.items() if name not in ("start", "scheduler_config")}
    figures = {
        "fidelity": point.fidelity,
        "cost": point.cost,
        "dense_cost": found.dense_cost,
        "generation": point.generation,
        "generations": found.generations,
    }
    scheduler = str(found.about["scheduler"]).removesuffix("Scheduler")
    return Schedule(
        point.config.cache_schedule,
        names_of(found)[point.key],
        f"todo-attn search on {model_name(found)}; speed-up by {found.plan.cost}: {found.speedup(point):.2f}x; "
        f"{found.metric.title}: {fidelity_text(found, point)}",
        found.settings.steps,
        scheduler,
        prune_ratio=point.config.prune_ratio,
        todo=point.config.todo,
        provenance={
            "model_name": model_name(found),
            "figures": figures,
            "images": len(found.settings.images),
            "search": about,
        },
    )


def table_of(found: Found) -> dict[str, Any]:
    """Every candidate, as plain data; those of the front have the name of their file."""
    names = names_of(found)
    return {
        "search": hashlib.sha256(json_bytes(found.about)).hexdigest()[:16],
        "about": {"model_name": model_name(found), **found.about},
        "prompts": list(found.settings.prompts),
        "generations": found.generations,
        "calls": found.calls,
        "dense_cost": found.dense_cost,
        "front": [names[point.key] for point in found.front],
        "points": [
            {
                "file": names.get(point.key),
                "origin": point.origin,
                "fidelity": point.fidelity,
                "cost": point.cost,
                "speedup": found.speedup(point),
                "generation": point.generation,
                "config": point.config.to_dict(),
            }
            for point in found.points
        ],
        "failures": dict(found.failures),
    }


def model_name(found: Found) -> str:
    """Of a folder its last part, else the Hub id."""
    source = found.settings.source
    path = Path(source).expanduser()
    # Not the target of a link, as the shipped pipeline is one in a checkout.
    return os.path.basename(os.path.abspath(path)) if path.exists() else source


def fidelity_text(found: Found, point: Point) -> str:
    return f"{point.fidelity:.{found.metric.decimals}f}"


def kinds_of(point: Point) -> dict[str, int]:
    """How many calls of each kind, by "full", "shallow" and "reuse"."""
    calls = FULL + (point.config.cache_schedule or "")
    return {name: calls.count(kind) for kind, name in KINDS.items()}


def pruning_text(point: Point) -> str:
    """ "0.4", or "0 to 0.4" if calls differ."""
    ratio = point.config.prune_ratio
    if not isinstance(ratio, tuple):
        return f"{ratio:g}"
    return f"{min(ratio):g} to {max(ratio):g}"


def factors_text(point: Point) -> str:
    """ "1=4+2=2", as ``--factor`` takes it; "-" without ToDo."""
    factor = None if point.config.todo is None else point.config.todo.factor
    return "+".join(f"{level}={n}" for level, n in factor.items()) if isinstance(factor, dict) else "-"


def page_of(found: Found, folder: Path) -> Page:
    """The page of a search."""
    settings = found.settings
    names = names_of(found)
    failure = next(iter(found.failures.values()), "")
    return Page(
        title=f"Schedules for {steps_text(settings.steps or 0)} at {settings.width} x {settings.height}",
        subtitle=f"{model_name(found)}, {found.about['scheduler']}, {found.generations} generations, "
        f"{len(found.points)} candidates, {len(settings.images)} images each",
        notes=[f"{len(found.failures)} candidates have no figures. The first: {failure}"] if failure else [],
        curves=[curve] if (curve := _curve(found, names)).points else [],
        tables=[_table(found, names)],
        settings=[_setting(found, folder, names[point.key]) for point in spread(found.front, SHOWN)],
        about=_ABOUT,
    )


def spread(points: list[Point], most: int) -> list[Point]:
    """At most so many of ``points``, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _curve(found: Found, names: dict[str, str]) -> Curve:
    """The front, and what is known from elsewhere."""
    shown = [(names[point.key], "found", point) for point in found.front]
    known = sorted((point for point in found.points if point.origin and point.key not in names), key=lambda p: p.cost)
    taken = set(names.values())
    for point in known:  # the same schedule may be there with several ratios and factors
        name, family = _known_as(point)
        unique = next(
            n for n in itertools.chain([name], (f"{name} ({i})" for i in itertools.count(2))) if n not in taken
        )
        taken.add(unique)
        shown.append((unique, family, point))
    share = found.plan.cost == "operations"
    unit = found.dense_cost if share else 1.0
    return Curve(
        f"{found.metric.title} against {COSTS[found.plan.cost]}",
        "share of dense's operations" if share else "seconds",
        found.metric.title,
        [
            PointOfCurve(name, family, Estimate(point.cost / unit), Estimate(point.fidelity))
            for name, family, point in shown
        ],
        found.metric.higher_is_better,
        [("dense", found.dense_cost / unit)],
        note="Found: the front. Published schedules and uniform intervals are resampled to this number of calls.",
    )


def _known_as(point: Point) -> tuple[str, str]:
    """The name and the family of a point whose schedule is known from elsewhere."""
    if point.origin == EVERYTHING:
        pruned = f", pruned {pruning_text(point)}" if pruning_text(point) != "0" else ""
        todo = f"ToDo {factors_text(point)}" if point.config.todo else "no ToDo"
        return f"{todo}{pruned}", EVERYTHING
    if point.origin.startswith("uniform "):
        return point.origin, "uniform"
    if point.origin not in schedule.named():
        return point.origin, "given"
    return point.origin, "published" if schedule.load(point.origin).published_speedup else "shipped"


def _table(found: Found, names: dict[str, str]) -> Table:
    cost = "share of operations" if found.plan.cost == "operations" else "seconds"
    unit = found.dense_cost if found.plan.cost == "operations" else 1.0
    figure = f"{{:.{found.metric.decimals}f}}".format
    counts = [Column(name, "{:.0f}".format) for name in KINDS.values()]
    columns = [Column(cost), Column("speed-up", "{:.2f}x".format), Column(found.metric.title, figure), *counts]
    columns += [Column("pruned"), Column("factors"), Column("known as")]

    def row(point: Point) -> TableRow:
        values: dict[str, Estimate | str | None] = {
            cost: Estimate(point.cost / unit),
            "speed-up": Estimate(found.speedup(point)),
            found.metric.title: Estimate(point.fidelity),
            **{name: Estimate(count) for name, count in kinds_of(point).items()},
            "pruned": pruning_text(point),
            "factors": factors_text(point),
            "known as": point.origin or None,
        }
        return TableRow(names[point.key], values)

    dense: dict[str, Estimate | str | None] = {
        cost: Estimate(found.dense_cost / unit),
        "speed-up": Estimate(1.0),
        found.metric.title: "the same",
        "full": Estimate(found.calls),
    }
    return Table("The front, the cheapest first", columns, [TableRow("dense", dense), *map(row, found.front)])


def _setting(found: Found, folder: Path, name: str) -> Setting:
    file = str(file_of(folder, name))
    # On other prompts than those that the schedule was chosen for.
    compare = command_line(replace(found.settings, methods="dense,dato", prompts=()))
    code = f"from todo_attn import DaToConfig, apply_dato\n\napply_dato(pipe, DaToConfig.from_file({file!r}))"
    return Setting(name, {"Python": code, "Command": f"{compare} {shlex.join(['--schedule', file])}"})
