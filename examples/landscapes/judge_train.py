"""Train the judge on rendered scenes alone (run from the repository's root):

    python -m examples.landscapes.judge_train              # renders, trains, measures, writes judge/
    python -m examples.landscapes.judge_train measure      # only measures judge/ again

The same command goes on from the checkpoint in work/judge/ after a kill.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer

from .judge import ATTRIBUTES, Judge, load_judge, save_judge
from .judge_data import (
    TEST_SEED,
    TRAIN_SEED,
    blurred,
    cropped,
    draw,
    noisy,
    rendered_scenes,
    spoiled,
)
from .scenes import Scene, scene_of_index
from .stage import Stage

HERE = Path(__file__).parent
WORK, FOLDER = HERE / "work" / "judge", HERE / "judge"
# Sizes in pixels, with their scenes, the batch, and the share of the steps.
SIZES = {
    (128, 128): (3000, 24, 0.50),
    (256, 256): (900, 8, 0.30),
    (160, 256): (300, 10, 0.10),
    (512, 512): (150, 3, 0.10),
}
TEST_SIZES, TEST_SCENES = (128, 256, 512), 300
app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0])


def targets(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """Attribute -> the scenes' classes (B,)."""
    return {
        name: torch.tensor([list(classes).index(getattr(scene, name)) for scene in scenes])
        for name, classes in ATTRIBUTES.items()
    }


def train(work: Path, steps: int, *, sizes=None, lr: float = 3e-3, dtype=torch.bfloat16, **run) -> Judge:
    """Cross-entropy of every attribute, on spoiled and mirrored scenes of several sizes."""
    sizes = SIZES if sizes is None else sizes
    pools = {size: rendered_scenes(work, TRAIN_SEED, size, count) for size, (count, *_) in sizes.items()}
    torch.manual_seed(TRAIN_SEED)
    judge = Judge().to(memory_format=torch.channels_last).train()
    for module in judge.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.02  # the mean of all sizes, not of the last one
    groups = [{"params": list(judge.parameters()), "lr": lr}]
    schedule = {"steps": steps, "decay": max(1, steps // 2), "warmup": 50, "constant": steps}
    stage = Stage("judge", work, {"judge": judge}, groups, TRAIN_SEED, **schedule)
    shares = np.array([share for *_, share in sizes.values()])

    def loss_of_step(rng, generator):
        size = list(sizes)[rng.choice(len(sizes), p=shares / shares.sum())]
        scenes, images = draw(pools[size], TRAIN_SEED, sizes[size][1], rng)
        images = cropped(images, rng)
        if size[0] == size[1] == 256 and rng.random() < 0.5:  # sizes in between
            images = F.interpolate(images, int(rng.integers(112, 256)), mode="bilinear", antialias=True).clamp(0, 1)
        images = spoiled(images, rng, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = {name: logits.float() for name, logits in judge.logits(images).items()}
        truth = targets(scenes)
        losses = {name: F.cross_entropy(logits[name], truth[name]) for name in ATTRIBUTES}
        right = {f"{name}_right": (logits[name].argmax(1) == truth[name]).float().mean().item() for name in ATTRIBUTES}
        return sum(losses.values()), right

    stage.run(loss_of_step, **run)
    judge.eval()
    if stage.step < steps:
        return judge
    size = (256, 256) if (256, 256) in sizes else next(iter(sizes))
    clean = pools[size][:600]
    judge.standardize(torch.cat([judge.features(to_images(clean[i : i + 20])) for i in range(0, len(clean), 20)]))
    return judge


# --- measure ---


def to_images(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) as float (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2) / 255


def variants(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The images (B, 3, H, W) as they are, with a blur of 1/128 of their side, and with noise of 0.05."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    blur = blurred(images, min(images.shape[-2:]) / 128)
    return {"clean": images, "blurred": blur, "noisy": noisy(images, 0.05, 1, generator)}


def accuracies(judge: Judge, work: Path) -> tuple[dict, dict]:
    """Held-out accuracy by size, variant and attribute; and the errors on clean scenes of all sizes, counted."""
    scenes = [scene_of_index(TEST_SEED, i) for i in range(TEST_SCENES)]
    truth = targets(scenes)
    table: dict = {}
    confusion = {name: np.zeros((len(classes),) * 2, int) for name, classes in ATTRIBUTES.items()}
    for side in TEST_SIZES:
        pixels = rendered_scenes(work, TEST_SEED, (side, side), TEST_SCENES)
        batch = max(1, 2**21 // side**2)
        found: dict = {}
        for start in range(0, TEST_SCENES, batch):
            for variant, images in variants(to_images(pixels[start : start + batch])).items():
                for name, p in judge.probabilities(images).items():
                    found.setdefault(variant, {}).setdefault(name, []).append(p)
        for variant, lists in found.items():
            p = {name: torch.cat(parts) for name, parts in lists.items()}
            guesses = {name: p[name].argmax(1) for name in ATTRIBUTES}
            row = {name: (guesses[name] == truth[name]).float().mean().item() for name in ATTRIBUTES}
            # With the scene's own caption, which names every attribute.
            own = [p[name].gather(1, truth[name][:, None]).mean().item() for name in ATTRIBUTES]
            row["agreement"] = float(np.mean(own))
            table.setdefault(str(side), {})[variant] = {name: round(value, 4) for name, value in row.items()}
            for name in ATTRIBUTES:
                np.add.at(confusion[name], (truth[name].numpy(), guesses[name].numpy()), variant == "clean")
    names = {name: list(classes) for name, classes in ATTRIBUTES.items()}
    errors = {
        name: {
            f"{names[name][i]} taken for {names[name][k]}": int(n)
            for (i, k), n in np.ndenumerate(matrix)
            if i != k and n
        }
        for name, matrix in confusion.items()
    }
    return table, errors


def distances(judge: Judge, work: Path, count: int = 24) -> dict:
    """Mean perceptual distance of clean scenes at 256 x 256 to themselves with a fault of growing strength."""
    images = to_images(rendered_scenes(work, TEST_SEED, (256, 256), TEST_SCENES)[:count])
    generator = torch.Generator().manual_seed(TEST_SEED)
    faults = {
        "blur, pixels": {s: blurred(images, s) for s in (0.5, 1.0, 2.0, 4.0, 8.0)},
        "noise": {s: noisy(images, s, 1, generator) for s in (0.01, 0.02, 0.05, 0.1, 0.2)},
        "shift, pixels": {s: images.roll(s, 3) for s in (1, 2, 4, 8, 16)},
        "another scene": {1: images.roll(1, 0)},
    }
    return {
        fault: {str(s): round(judge.distance(images, other).mean().item(), 4) for s, other in strengths.items()}
        for fault, strengths in faults.items()
    }


def write_metrics(folder: Path, work: Path, steps: int | None = None) -> None:
    """Measure the judge as it is loaded, from half precision, and write ``metrics.json``."""
    judge, path = load_judge(folder), folder / "metrics.json"
    if steps is None and path.exists():
        steps = json.loads(path.read_text())["steps"]
    table, errors = accuracies(judge, work)
    metrics = {
        "steps": steps,
        "train_seed": TRAIN_SEED,
        "test_seed": TEST_SEED,
        "test_scenes": TEST_SCENES,
        "accuracy": table,
        "errors of clean scenes, all sizes": errors,
        "distance": distances(judge, work),
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n")
    columns = [*ATTRIBUTES, "agreement"]
    print("| size | |", " | ".join(columns), "|\n| ---: | --- |", "---: | " * len(columns))  # for the README
    for side, rows in table.items():
        for variant, row in rows.items():
            print(f"| {side} | {variant} |", " | ".join(f"{100 * row[name]:.1f} %" for name in columns), "|")
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.2f} MB")


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    steps: Annotated[int, typer.Option(min=1, help="Length of the training.")] = 4500,
    work: Annotated[Path, typer.Option(help="Folder of scenes, checkpoint and log.")] = WORK,
    folder: Annotated[Path, typer.Option(help="Where the judge is written.")] = FOLDER,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    nice: Annotated[int, typer.Option(min=0, help="Added to the process's niceness.")] = 10,
    save_minutes: Annotated[float, typer.Option(help="Time between two checkpoints.")] = 2.0,
):
    """Train, measure and write the judge; goes on from what is in the work folder."""
    if context.invoked_subcommand:
        return
    os.nice(nice)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, lambda *_: setattr(Stage, "stopped", True))
    judge = train(work, steps, save_minutes=save_minutes)
    if Stage.stopped:
        print("Stopped with a checkpoint; the same command goes on from here.")
        return
    save_judge(judge, folder)
    write_metrics(folder, work, steps)


@app.command()
def measure(folder: Path = FOLDER, work: Path = WORK, threads: int = 2):
    """Write metrics.json of a trained judge again."""
    torch.set_num_threads(threads)
    try:
        load_judge(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    write_metrics(folder, work)


if __name__ == "__main__":
    app()
