"""Draws the figures of the README from the rows of the benchmarks, one file for each figure and machine.

python -m benchmarks.plot
python -m benchmarks.plot --results benchmarks/results --out docs/images
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

from benchmarks import RESULTS
from benchmarks.plot_model import Row, ceiling, predicted_speedups, rates_of, side_of
from todo_attn import ToDoConfig, machine
from todo_attn.bench import jsonl
from todo_attn.models.architectures import PIXELS_PER_LATENT

IMAGES = Path(__file__).parents[1] / "docs" / "images"
# Okabe and Ito's colours, distinct for every kind of colour vision; ours first.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "figure.dpi": 180,
}
_WIDTH = 8.8  # inches: at the width of the README, letters are as large as its text
_LINE_POINTS = 64


def main(
    results: Annotated[Path, typer.Option(help="Folder of the rows, .jsonl.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = IMAGES,
) -> None:
    """Draw every figure that has rows; for the others, print the command that makes their rows."""
    if not results.is_dir():
        raise typer.BadParameter(f"--results must be a folder, got {str(results)!r}")
    rows = [row for path in sorted(results.glob("*.jsonl")) for row in jsonl.read(path)]
    out.mkdir(parents=True, exist_ok=True)
    for path in draw(rows, out, typer.echo):
        typer.echo(f"drawn: {path}")


def draw(rows: Iterable[Row], out: Path, say: Callable[[str], object]) -> list[Path]:
    """Draw every figure that has rows into ``out`` as PNG; returns the files. ``say`` is called for the others."""
    rows = _latest(rows)
    written = []
    for name, benchmarks, command, figure in _FIGURES:
        chosen = [row for row in rows if row["benchmark"] in benchmarks]
        if not chosen:
            say(f"no rows for {name}: {command} makes them")
        for device, group in _by(chosen, lambda row: machine.slug_of(row["machine"])):
            with plt.rc_context(_STYLE):
                drawn = figure(group)
                drawn.text(0.01, 0.005, _caption(group), fontsize=8, color="#444444", va="bottom")
                path = out / f"{name}-{device}.png"
                drawn.savefig(path)
                plt.close(drawn)
            written.append(path)
    return written


def draw_speedup(rows: list[Row]) -> Figure:
    """Speed-up of a UNet over dense against image size, 20th to 80th percentile; for ToDo with predicted lines."""
    groups = _by(rows, _panel)
    columns, lines_of_panels = min(2, len(groups)), -(-len(groups) // 2)
    figure, panels = plt.subplots(
        lines_of_panels, columns, figsize=(_WIDTH, 4.3 * lines_of_panels + 0.3), squeeze=False
    )
    _leave_room(figure)
    for axes in panels.flat[len(groups) :]:
        axes.set_visible(False)
    for axes, ((model, dtype, compiled, calls), group) in zip(panels.flat, groups, strict=False):
        contenders = _by(group, _contender)
        colours = {name: _COLOURS[i % len(_COLOURS)] for i, (name, _) in enumerate(contenders)}
        for marker, (name, of_one) in zip(cycle(_MARKERS), contenders, strict=False):
            xs = [side_of(row["case"]) for row in of_one]
            _points(axes, xs, [row["speedup"] for row in of_one], name, colours[name], marker)
        rates, source = rates_of(group)
        todo = {name: of_one[0]["contender"]["config"] for name, of_one in contenders if _is_todo(of_one[0])}
        lines = rates is not None and bool(todo)
        if rates is not None and todo:
            measured = list(map(side_of, _cases(group)))
            sizes = _even_sizes(min(*measured, 512), max(measured))
            configs = list(map(ToDoConfig.from_dict, todo.values()))
            curves = zip(*(predicted_speedups(model, side, configs, rates) for side in sizes), strict=True)
            for name, ys in zip(todo, curves, strict=True):
                axes.plot(sizes, ys, color=colours[name], linewidth=1.3, alpha=0.8)
        axes.axhline(1, color="#888888", linewidth=1, linestyle=":")
        more = f", {calls} calls" * (calls > 1) + ", compiled" * compiled
        axes.set_title(f"{_MODEL_NAMES.get(model, model)}, {dtype}{more}", loc="left", fontsize=12)
        axes.set_xlabel("side of the image, pixels")
        axes.set_xscale("log", base=2)
        ticks = sorted({side_of(case) for case in _cases(group)} | ({512, 1024, 2048} if lines else set()))
        axes.set_xticks(ticks, [f"{size:g}" for size in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("speed-up over dense, times" if axes in panels[:, 0] else "")
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # the legend lies above
        if lines:
            axes.plot([], [], color="#888888", linewidth=1.3, label=f"model of time, rates from\ndense at {source}")
        axes.legend(loc="upper left", fontsize=10)
    return figure


def draw_attention(rows: list[Row]) -> Figure:
    """TFLOP/s of each candidate at each shape, and the limit by clocks per score of the compiled loop."""
    cases = _by(rows, lambda row: _shape(row["case"]))
    figure, axes = plt.subplots(figsize=(_WIDTH, 1.9 + 0.42 * len(cases)))
    _leave_room(figure)
    points = [
        (candidate["name"], candidate["tflops"], y)
        for y, (_, group) in enumerate(cases)
        for candidate in _candidates(group)
        if candidate.get("tflops")
    ]
    for i, (name, of_one) in enumerate(_ours_first(points)):
        _, rates, ys = zip(*of_one, strict=True)
        style: Any = {"color": _COLOURS[i % len(_COLOURS)], "markersize": 6 if i else 8, "zorder": 4 - bool(i)}
        axes.plot(rates, ys, _MARKERS[i % len(_MARKERS)], label=name, **style)
    limits = [(limit, y) for y, (_, group) in enumerate(cases) if (limit := ceiling(group[0])) is not None]
    if limits:
        xs, ys = zip(*limits, strict=True)
        axes.plot(xs, ys, "|", color="#000000", markersize=18, markeredgewidth=2, label="limit of the compiled loop")
    axes.set_yticks(range(len(cases)), [shape for shape, _ in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(0, axes.get_xlim()[1])
    axes.set_xlabel("TFLOP/s, of queries x keys and scores x values")
    figure.legend(loc="outside upper center", ncols=4, fontsize=10)
    return figure


def draw_tokens(rows: list[Row]) -> Figure:
    """GB/s of the ops that move tokens, of what they replace, and of a copy, against the bytes moved."""
    groups = _by(rows, lambda row: row["benchmark"] + " + residual" * bool(row["case"].get("residual")))
    figure, panels = plt.subplots(1, len(groups), figsize=(_WIDTH, 4.4), squeeze=False, sharey=True)
    _leave_room(figure)
    names = [name for name, _ in _ours_first((candidate["name"],) for candidate in _candidates(rows))]
    for axes, (title, group) in zip(panels[0], groups, strict=True):
        measured = [each for each in _candidates(group) if each.get("gb_per_s")]
        for name, of_one in _by(measured, itemgetter("name")):
            i = names.index(name)
            xs, ys = zip(*sorted({(each["bytes"] / 1e6, each["gb_per_s"]) for each in of_one}), strict=True)
            colour, line = _COLOURS[i % len(_COLOURS)], "--" if name == "copy" else "-"
            axes.plot(xs, ys, line, marker=_MARKERS[i % len(_MARKERS)], color=colour, label=name, zorder=4 - bool(i))
        axes.set_title(title, loc="left", fontsize=12)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("MB moved")
    panels[0][0].set_ylabel("GB/s")
    panels[0][0].set_ylim(0, 1.05 * max(candidate.get("gb_per_s") or 0 for candidate in _candidates(rows)) or None)
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels[0]]
    handles = {label: handle for pair in pairs for handle, label in pair}
    shown = [name for name in names if name in handles]
    figure.legend([handles[name] for name in shown], shown, loc="outside upper center", ncols=5)
    return figure


_FIGURES: tuple[tuple[str, tuple[str, ...], str, Callable[[list[Row]], Figure]], ...] = (
    ("unet-speedup", ("unet",), "python -m benchmarks.unet", draw_speedup),
    ("attention", ("attention",), "python -m benchmarks.kernels --only attention", draw_attention),
    (
        "token-ops",
        ("gather", "scatter", "recover"),
        "python -m benchmarks.kernels --only gather --only scatter --only recover",
        draw_tokens,
    ),
)
_MODEL_NAMES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}


def _latest(rows: Iterable[Row]) -> list[Row]:
    """The latest row of each measurement on each machine; rows with a failure are left out."""
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["measured"]):
        if row["speedup"] is None:
            continue
        names = row["baseline"]["name"], row["contender"]["name"]
        case = {key: value for key, value in row["case"].items() if key != "keeps_freed_memory"}
        found[json.dumps([row["benchmark"], machine.slug_of(row["machine"]), case, names], sort_keys=True)] = row
    return list(found.values())


def _by(items: Iterable[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    """The items in groups, sorted by key."""
    return [(name, list(group)) for name, group in groupby(sorted(items, key=key), key)]


def _candidates(rows: Iterable[Row]) -> list[Row]:
    """Both candidates of every row."""
    return [candidate for row in rows for candidate in (row["baseline"], row["contender"])]


def _ours_first(points: Iterable[tuple[Any, ...]]) -> list[tuple[str, list[Any]]]:
    """The points grouped by name, which comes first in each; ours come first."""
    return sorted(_by(points, lambda point: point[0]), key=lambda pair: (not pair[0].startswith("todo"), pair[0]))


def _panel(row: Row) -> tuple[str, str, bool, int]:
    case = row["case"]
    return case["model"], case["dtype"], bool(case.get("compile")), case.get("calls", 1)


def _cases(rows: Iterable[Row]) -> list[Row]:
    return [row["case"] for row in rows]


def _contender(row: Row) -> str:
    """The name in the legend: "DaTo, coco" for "dato-coco"; an unknown name is kept."""
    name = row["contender"]["name"]
    kind, _, more = name.partition("-")
    return _NAMES.get(name) or (f"{_METHODS[kind]}, {more}" if kind in _METHODS and more else name)


_NAMES = {"todo": "ToDo, 4096 keys", "todo-kv1024": "ToDo, 1024 keys", "tome": "ToMe"}
_METHODS = {"todo": "ToDo", "dato": "DaTo", "todo+dato": "ToDo and DaTo", "deepcache": "DeepCache"}


def _is_todo(row: Row) -> bool:
    return "max_kv_tokens" in (row["contender"].get("config") or {})


def _even_sizes(low: float, high: float) -> list[float]:
    """Sizes from ``low`` to ``high``, evenly spaced on a logarithmic axis, in whole latents."""
    unit = 8 * PIXELS_PER_LATENT
    steps = (low * (high / low) ** (i / (_LINE_POINTS - 1)) for i in range(_LINE_POINTS))
    return sorted({unit * round(step / unit) for step in steps})


def _points(axes: Axes, xs: list[float], values: list[Row], name: str, colour: str, marker: str) -> None:
    middle = [value["p50"] for value in values]
    below = [value["p50"] - value["p20"] for value in values]
    above = [value["p80"] - value["p50"] for value in values]
    axes.errorbar(
        xs, middle, yerr=[below, above], fmt=marker, color=colour, markersize=8, capsize=3, label=name, zorder=3
    )
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for x, y in zip(xs, middle, strict=True):
        where: Any = {"xytext": (-9, 4), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        axes.annotate(f"{y:.2f}x", (x, y), **where, fontsize=10, color=colour, bbox=box, zorder=2)


def _shape(case: Row) -> str:
    name = f"{case['model']} {case['width']}x{case['height']} level {case['level']}"
    return f"{name}, {case['heads']} x {case['head_dim']}, batch {case['batch']}, {case['dtype']}"


def _leave_room(figure: Figure) -> None:
    """Leave room for the caption below."""
    share = 0.32 / figure.get_figheight()
    figure.set_layout_engine("constrained", rect=(0, share, 1, 1 - share))


def _caption(rows: Sequence[Row]) -> str:
    """The machine, the versions, the commits and the days of ``rows``."""
    in_time = sorted(rows, key=lambda row: row["measured"])
    about = in_time[-1]["machine"]
    threads = about.get("cpu_threads", about.get("threads"))  # older rows have "threads"
    device = about["device"] if about.get("cuda") else f"{about['device']}, {threads} threads"
    driver = f"driver {about['driver']}" if about.get("driver") else None
    packages = [f"{name} {about[key]}" for name, key in _PACKAGES if about.get(key)]
    commits = list(dict.fromkeys(row["machine"]["commit"] for row in in_time if row["machine"].get("commit")))
    commit = f"commit{'s' * (len(commits) > 1)} {' '.join(commits)}" if commits else None
    days = sorted({row["measured"][:10] for row in rows})
    day = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    parts = [device, driver, *packages, commit, day, "medians"]
    return ", ".join(part for part in parts if part)


_PACKAGES = (("torch", "torch"), ("Triton", "triton"), ("diffusers", "diffusers"))


if __name__ == "__main__":
    typer.run(main)
