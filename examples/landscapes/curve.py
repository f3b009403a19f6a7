"""``curve.png``: the loss of the UNet by size over the steps, from a training log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import typer

HERE = Path(__file__).parent
BIN = 200  # steps that a point is the mean of


def write_curve(log: Path, out: Path) -> None:
    """Plot the squared error of the velocity for each size of latents in ``log``, the mean of each ``BIN`` steps."""
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if row["stage"] == "unet"]
    names = {name for row in rows for name in row if name.startswith("v_")}
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name in sorted(names, key=lambda name: int(name.removeprefix("v_").split("x")[0])):
        points: dict[int, list[float]] = {}
        for row in rows:
            if name in row:
                points.setdefault(BIN * (row["step"] // BIN), []).append(row[name])
        axes.plot(list(points), list(map(np.mean, points.values())), label=name.removeprefix("v_").replace("x", " x "))
    axes.set(xlabel="step", ylabel="squared error of the velocity", ylim=(0, None))
    axes.legend(title="latents")
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def main(
    log: Annotated[Path, typer.Argument(exists=True, dir_okay=False)] = HERE / "training_log.jsonl",
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = HERE / "curve.png",
):
    """Plot a training log; after a training, name its work/log.jsonl."""
    write_curve(log, out)


if __name__ == "__main__":
    typer.run(main)
