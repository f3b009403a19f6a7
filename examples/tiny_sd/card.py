"""Images for the model card, made as a user would make them (run from the repository's root):

python -m examples.tiny_sd.card samples    # samples.png: a labelled grid at the normal size
python -m examples.tiny_sd.card large      # samples_large.png: twice the size, and 5:3
python -m examples.tiny_sd.card loss       # loss.png, from train_log.jsonl
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PROMPTS = (
    "a red circle and a blue square on a yellow background",
    "a green star on a striped blue background",
    "a large purple heart on a white background",
    "a small white ring on a black background",
    "a yellow triangle above a red diamond on a green background",
    "a dotted orange square on a blue to pink gradient background",
    "a large striped green circle on a checkered pink background",
    "a black cross next to a white star on an orange background",
    "a blue diamond on a white and red checkered background",
    "a pink heart and a yellow star on a purple background",
    "a large red star on a dotted green background",
    "a white triangle on a black and purple striped background",
)
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.splitlines()[0])


def generate(prompts, seed, steps, guidance, height=None, width=None):
    """One image for each prompt, with its seconds."""
    pipe = StableDiffusionPipeline.from_pretrained(HERE / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(prompts):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed + i)
        image = pipe(prompt, height, width, steps, guidance_scale=guidance, generator=generator).images[0]
        print(f"{time.perf_counter() - started:6.1f} s  {image.size}  {prompt}")
        yield image


def grid(images, titles, columns, path, side=2.6, dpi=100):
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, (side + 0.35) * rows), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in zip(axes.flat, images, titles, strict=False):
        ax.imshow(image)
        half = title.rfind(" ", 0, len(title) // 2 + 6)
        ax.set_title(f"{title[:half]}\n{title[half + 1 :]}", fontsize=7.5)
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


@app.command()
def samples(
    out: Path = HERE / "samples.png", count: int = 12, seed: int = 0, steps: int = 20, guidance: float = 4.0,
    size: int = 0,
):  # fmt: skip
    """A grid of prompts at the normal size."""
    prompts = PROMPTS[:count]
    side = size or None
    grid(list(generate(prompts, seed, steps, guidance, side, side)), prompts, 4, out)


@app.command()
def large(out: Path = HERE / "samples_large.png", seed: int = 0, steps: int = 14, guidance: float = 4.0):
    """Twice the normal size, and a wide one."""
    images = [*generate(PROMPTS[1:2], seed, steps, guidance, 1024, 1024)]
    images += generate(PROMPTS[:1], seed, steps, guidance, 768, 1280)
    titles = [f"{PROMPTS[1]} - 1024 x 1024", f"{PROMPTS[0]} - 1280 x 768"]
    grid(images, titles, 2, out, side=4.2)


@app.command()
def loss(out: Path = HERE / "loss.png", log: Path = HERE / "train_log.jsonl"):
    """The loss curves of every stage."""
    stages = defaultdict(list)
    for line in log.read_text().splitlines():
        record = json.loads(line)
        done = stages[record["stage"]]
        begun = done[-1]["begun"] if done else 0
        # A stage started anew, from shipped weights, counts from 0; one resumed goes back at most to its checkpoint.
        if done and record["step"] < 100 < done[-1]["step"] - begun:
            begun = done[-1]["step"]
        done.append({**record, "begun": begun, "step": begun + record["step"]})
    figure, axes = plt.subplots(1, len(stages), figsize=(3.2 * len(stages), 2.6), squeeze=False)
    for ax, (name, records) in zip(axes[0], stages.items(), strict=True):
        key = "picture" if "picture" in records[0] else "loss"
        steps, values = [r["step"] for r in records], [r[key] for r in records]
        smooth = [sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        ax.plot(steps, values, linewidth=0.6, alpha=0.4)
        ax.plot(steps, smooth, linewidth=1.4)
        ax.set(title=name, xlabel="step", ylabel=key, yscale="log")
        ax.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    app()
