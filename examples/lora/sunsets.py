"""Something to train on: landscapes at sunset, whose captions do not say so (run from the repository's root):

    python -m examples.lora.sunsets sunsets

A LoRA that has learned them draws every landscape at sunset.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from tqdm import tqdm

from examples.landscapes.scenes import GROUNDS, render, scene_of_index

from .images import CAPTIONS

SEED = 7
app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="Where the images and their captions go.")],
    count: Annotated[int, typer.Option(min=1, help="Images.")] = 12,
    size: Annotated[int, typer.Option(min=32, help="Pixels of their sides.")] = 512,
) -> None:
    """Draw landscapes at sunset, with captions that name only mountains and ground."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in tqdm(range(count), unit="image"):
        scene = replace(scene_of_index(SEED, i), time="sunset")
        name = f"{i:03}.png"
        Image.fromarray((render(scene, size, size) * 255).round().astype("uint8")).save(folder / name)
        rows.append({"file_name": name, "text": f"{scene.mountains} with {GROUNDS[scene.ground]}"})
    (folder / CAPTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    app()
