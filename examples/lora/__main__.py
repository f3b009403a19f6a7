"""Train a LoRA under ToDo (run from the repository's root):

python -m examples.lora --images my-images --out my-lora
python -m examples.lora --images my-images --compare comparison.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import typer
from accelerate import PartialState
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from tabulate import tabulate

from todo_attn import ToDoConfig, machine
from todo_attn.bench import jsonl
from todo_attn.config.checks import ArgumentError

from .train import Settings, Trained, train

PIPELINE = Path(__file__).parents[1] / "landscapes" / "pipeline"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    images: Annotated[Path, typer.Option(help="Folder of images with captions in metadata.jsonl.")],
    model: Annotated[str, typer.Option(help="Pipeline of Stable Diffusion 1.x or 2.x: a folder or Hub id.")] = str(
        PIPELINE
    ),
    out: Annotated[Path, typer.Option(help="Folder for the LoRA.")] = Path("lora"),
    size: Annotated[int, typer.Option(min=8, help="Pixels of the images' sides.")] = 512,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-4,
    seed: int = 0,
    mixed_precision: Annotated[Literal["no", "fp16", "bf16"], typer.Option(help="fp16 needs a GPU.")] = "no",
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations: less memory, more time.")] = False,
    todo: Annotated[bool, typer.Option(help="Train under ToDo, or dense.")] = True,
    max_kv_tokens: Annotated[int, typer.Option(min=1, help="The most keys that ToDo leaves.")] = 4096,
    compare: Annotated[
        Path | None, typer.Option(help="Train dense and under ToDo, save no LoRA, and write times and losses there.")
    ] = None,
) -> None:
    """Train a LoRA of a Stable Diffusion UNet on a folder of images."""
    settings = Settings(
        model, images, size, steps, batch, rank, learning_rate, seed, mixed_precision, checkpointing=checkpointing
    )
    config = ToDoConfig(max_kv_tokens=max_kv_tokens)
    try:
        if compare is None:
            jsonl.check_appendable(out / LORA_WEIGHT_NAME_SAFE, "out")
            trained = train(settings, config if todo else None, out)
            typer.echo(f"{out}: {median(trained.seconds):.2f} s a step, last loss {trained.losses[-1]:.4f}")
        else:
            jsonl.check_appendable(compare, "compare")
            compare_methods(settings, config, compare)
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from error


def compare_methods(settings: Settings, config: ToDoConfig, out: Path) -> None:
    """Train dense, then under ToDo, and write both to ``out`` as JSON."""
    runs = {"dense": train(settings), "todo": train(settings, config)}
    about = asdict(settings) | {"model": "/".join(Path(settings.model).parts[-2:]), "images": settings.images.name}
    report = {
        "settings": about | {"max_kv_tokens": config.max_kv_tokens},
        "machine": machine.describe(PartialState().device),
        "runs": {name: asdict(run) for name, run in runs.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    dense = torch.tensor(runs["dense"].losses)
    rows = [row_of(name, run, runs["dense"], dense) for name, run in runs.items()]
    typer.echo(tabulate(rows, headers="keys", tablefmt="github"))


def row_of(name: str, run: Trained, dense: Trained, dense_losses: torch.Tensor) -> dict[str, str]:
    losses = torch.tensor(run.losses)
    return {
        "": name,
        "s a step": f"{median(run.seconds):.2f}",
        "speed-up": f"{median(dense.seconds) / median(run.seconds):.2f}x",
        "peak, MiB": "?" if run.peak_memory is None else f"{run.peak_memory / 2**20:.0f}",
        "mean loss": f"{losses.mean():.4f}",
        "mean difference to dense": f"{(losses - dense_losses).abs().mean():.4f}",
    }


if __name__ == "__main__":
    app()
