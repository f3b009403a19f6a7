"""The same prompts and seeds without a LoRA and with each of some LoRAs, one row each (run from the repository's root):

python -m examples.lora.samples lora-dense lora-todo
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from .__main__ import PIPELINE

PROMPTS = (
    "snowy mountains with a lake",
    "green hills with a flower meadow",
    "rocky mountains with a pine forest",
    "red cliffs with a desert",
)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    loras: Annotated[list[Path], typer.Argument(exists=True, file_okay=False, help="Folders of LoRAs.")],
    model: Annotated[str, typer.Option(help="The pipeline they are for: a folder or Hub id.")] = str(PIPELINE),
    size: Annotated[int, typer.Option(min=32, help="Pixels of the images' sides.")] = 128,
    out: Path = Path("samples.jpg"),
) -> None:
    """Draw a sheet of images: a column for each prompt, without a LoRA in the first row."""
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    sheet = Image.new("RGB", (size * len(PROMPTS), size * (1 + len(loras))))
    for row, lora in enumerate(tqdm([None, *loras], unit="row")):
        if lora is not None:
            pipe.load_lora_weights(lora)
        for column, prompt in enumerate(PROMPTS):
            generator = torch.Generator().manual_seed(column)
            image = pipe(prompt, size, size, 25, guidance_scale=3.0, generator=generator).images[0]
            sheet.paste(image, (size * column, size * row))
        pipe.unload_lora_weights()
    sheet.save(out)


if __name__ == "__main__":
    app()
