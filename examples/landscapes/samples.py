"""A fixed list of 16 prompts, and a contact sheet of what a pipeline makes of them."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

PROMPTS = (
    "snowy mountains at sunset with a lake, a clear sky, the sun on the left",
    "green hills by day with a flower meadow, white clouds, the sun in the center",
    "snowy mountains at night with a lake, a clear sky, the moon on the right",
    "red cliffs by day with a desert, a clear sky, the sun on the right",
    "rocky mountains at dawn with a pine forest, thin clouds, the sun on the left",
    "red cliffs at sunset with a lake, thin clouds, the sun on the right",
    "snowy mountains by day with a pine forest, a clear sky, the sun in the center",
    "green hills at night with a flower meadow, a clear sky, the moon on the left",
    "rocky mountains by day with a lake, white clouds, the sun on the left",
    "green hills at dawn with a lake, a clear sky, the sun in the center",
    "rocky mountains at sunset with a desert, a clear sky, the sun on the left",
    "red cliffs at night with a desert, thin clouds, the moon in the center",
    "snowy mountains at dawn with a flower meadow, a clear sky, the sun on the right",
    "green hills by day with a lake, thin clouds, the sun on the right",
    "rocky mountains at night with a pine forest, a clear sky, the moon on the right",
    "snowy mountains at sunset with a desert, white clouds, the sun in the center",
)


def contact_sheet(folder: Path, out: Path, *, size: int = 256, steps: int = 25, guidance: float = 3.0, seed: int = 0):
    """Generate every prompt with a seed of its own and write the images, four a row, with their prompts below."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i, prompt in enumerate(PROMPTS):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed + i)
        images.append(pipe(prompt, size, size, steps, guidance_scale=guidance, generator=generator).images[0])
        print(f"{time.perf_counter() - started:6.1f} s  {prompt}")
    write_sheet(images, PROMPTS, out)


def write_sheet(images, titles, out: Path, columns: int = 4) -> None:
    width, height = images[0].size
    band = 34
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + band)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        x, y = i % columns * width, i // columns * (height + band)
        sheet.paste(image, (x, y))
        first, _, rest = title.partition(", ")
        draw.multiline_text((x + 4, y + height + 3), f"{first}\n{rest}", fill="black")
    sheet.save(out)
    print(f"{out}: {sheet.size[0]} x {sheet.size[1]}")
