"""The rows and some of the images as one HTML page, as ``todo-attn compare --report`` writes it."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.fidelity import table
from benchmarks.fidelity.cases import DENSE
from benchmarks.fidelity.metrics import METRICS
from benchmarks.fidelity.store import Images, Store
from todo_attn.compare.curve import Curve, Estimate, Point, pareto_front
from todo_attn.compare.lines import python_lines
from todo_attn.compare.page import Column, Example, Page, Setting, Table, TableRow

CURVES = ("psnr", "perceptual", "agreement", "fid", "kid")
SHOWN_CASES = 7
_ABOUT = (
    "Seconds: of an image from prompt to pixels, the median. Operations: multiply-adds of the UNet over a run, against "
    "dense's.",
    "PSNR, SSIM and the perceptual distance compare an image with dense's of the same prompt and seed. High-pass: the "
    "energy above a blur of one pixel, over dense's. KID and FID: distances to true images. Agreement: the probability "
    "that a classifier gives to what the prompt says.",
)


def page_of(rows: Sequence[table.Row], store: Store, images: Images, shown: int) -> Page:
    """The page of a run.

    Args:
        rows: of the run, dense among them at each size.
        store: the images of the run.
        images: their prompts and seeds.
        shown: how many images of each size are on the page, by dense and by the cases on the fronts of the first
            curve, at most 7.
    """
    groups = table.grouped(rows)
    curves = [(size, curve) for size in groups for curve in _curves(*size)]
    firsts = {title: curve for (title, *_), curve in reversed(curves)}
    best = list(dict.fromkeys(p.method for curve in reversed(firsts.values()) for p in pareto_front(curve)))
    picked = _spread([name for name in best if name != DENSE], SHOWN_CASES)
    dense = groups[0][2]
    return Page(
        title="Quality against time",
        subtitle=f"{dense['made']['pipeline']}, {dense['made']['steps']} steps, {dense['machine']['device']}, "
        f"torch {dense['machine']['torch']}",
        notes=table.notes(rows),
        examples=[_example(same, store, images, index, picked) for _, same, _ in groups for index in range(shown)],
        curves=[curve for _, curve in curves],
        tables=[_table(*size, rows) for size in groups],
        settings=_settings(rows),
        about=_ABOUT,
    )


def _spread(names: list[str], most: int) -> list[str]:
    """At most so many, evenly spread."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _estimate(interval: dict[str, float | None] | None) -> Estimate | None:
    if interval is None or interval["value"] is None:
        return None
    return Estimate(interval["value"], interval["low"], interval["high"])


def _curves(title: str, rows: Sequence[table.Row], dense: table.Row) -> list[Curve]:
    found = []
    for name in CURVES:
        metric = METRICS[name]
        points = [
            Point(row["case"], row["family"], Estimate(row["seconds"]), estimate)
            for row in rows
            if (estimate := _estimate(row["columns"].get(name))) is not None
            # Dense is at no distance from itself.
            and (row["case"] != DENSE or metric.needs in ("agreement", "reference"))
        ]
        if points:
            found.append(
                Curve(
                    f"{metric.title} against seconds, {title}",
                    "seconds",
                    metric.title,
                    points,
                    metric.better == "higher",
                    [(DENSE, dense["seconds"])],
                )
            )
    return found


def _example(rows: Sequence[table.Row], store: Store, images: Images, index: int, picked: Sequence[str]) -> Example:
    size = rows[0]["height"], rows[0]["width"]
    prompt, seed = images[index]
    names = [DENSE, *(name for name in picked if any(row["case"] == name for row in rows))]
    return Example(
        prompt,
        f"seed {seed}, {size[1]} x {size[0]}",
        {name: store.pixels(size, name, index) for name in names},
        {name: f"{store.record(size, name, index)['seconds']:.3g} s" for name in names},
    )


def _table(title: str, same: Sequence[table.Row], dense: table.Row, rows: Sequence[table.Row]) -> Table:
    names = table.metrics_of(rows)
    columns = [
        Column("seconds"),
        Column("speed-up", "{:.2f}x".format),
        Column("operations saved", "{:.1%}".format),
        *(Column(METRICS[name].title, f"{{:.{METRICS[name].decimals}f}}".format) for name in names),
    ]

    def row_of(row: table.Row) -> TableRow:
        values: dict[str, Estimate | str | None] = {
            "seconds": Estimate(row["seconds"]),
            "speed-up": Estimate(dense["seconds"] / row["seconds"]),
            "operations saved": Estimate(row["operations_saved"]),
        }
        same_as_dense = row["same_as_dense"] == row["images"]
        for name in names:
            missing = "same" if same_as_dense else None
            values[METRICS[name].title] = _estimate(row["columns"].get(name)) or missing
        return TableRow(row["case"], values)

    return Table(title, columns, [row_of(row) for row in same])


def _settings(rows: Sequence[table.Row]) -> list[Setting]:
    """The lines of Python of each case that is more than dense with other steps or at another size."""
    options = {row["case"]: row["about"]["options"] for row in rows}
    lines = {name: python_lines(name.partition(":")[0], given) for name, given in options.items()}
    return [Setting(name, {"Python": code}) for name, code in lines.items() if code is not None]
