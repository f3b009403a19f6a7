"""What docs/recipes.md says in numbers: recipes on the small pipeline, and the VAE's share of a large image.

python -m benchmarks.recipes times    # few steps, int8, layerwise casting, channels_last; torchao adds int8
python -m benchmarks.recipes counts   # operations of Stable Diffusion 1.5's UNet and VAE; computes nothing
python -m benchmarks.recipes memory   # the peak memory of Stable Diffusion's VAE, with tiles and without

``times`` runs whole pipelines in turns, so each ratio is within one run. Every recipe is applied to a pipeline of its
own, and its first image is compared with that of dense attention with as many steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline
from tabulate import tabulate

import todo_attn
from benchmarks import RESULTS
from benchmarks.options import DEFAULT_DEVICE, checked_out, chosen_device, default_dtype
from todo_attn import DaToConfig, ToDoConfig, apply_dato, apply_todo, machine, peak_memory
from todo_attn.bench import harness, jsonl, report
from todo_attn.bench.harness import Candidate, Meter, Rounds
from todo_attn.compare.metrics import psnr
from todo_attn.config.dtypes import DTYPES
from todo_attn.models.architectures import CONFIGS, PIXELS_PER_LATENT
from todo_attn.predict.count import count_work, tallied

PROMPT = "snowy mountains at sunset with a lake, a clear sky, the sun on the left"
# The VAE of Stable Diffusion 1.x, 2.x and SDXL.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
Recipe = Callable[[Any], object]


def int8(pipe: Any) -> None:
    """Weights of linear layers in int8."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.unet, Int8WeightOnlyConfig())


def layerwise(pipe: Any) -> None:
    """Weights stored in fp8, and computed with in the pipeline's dtype."""
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipe.unet.dtype)


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def all_of(*recipes: Recipe) -> Recipe:
    """``recipes`` one after the other."""

    def apply(pipe: Any) -> None:
        for recipe in recipes:
            recipe(pipe)

    return apply


FEW_STEPS: dict[str, Recipe] = {
    "todo": apply_todo,
    "todo-kv1024": partial(apply_todo, config=ToDoConfig(max_kv_tokens=1024)),
    "dato-prune": partial(apply_dato, config=DaToConfig(prune_ratio=0.4)),
    "todo+dato-prune": partial(apply_dato, config=DaToConfig(prune_ratio=0.4, todo=ToDoConfig())),
    "dato-coco": partial(apply_dato, config=DaToConfig.preset("coco")),
}
TOGETHER: dict[str, Recipe] = {
    "int8": int8,
    "todo+int8": all_of(int8, apply_todo),
    "todo+layerwise-fp8": all_of(layerwise, apply_todo),
    "todo+channels-last": all_of(channels_last, apply_todo),
}


def times(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = DEFAULT_DEVICE,
    size: Annotated[int, typer.Option(min=64, help="Pixels of each side, a multiple of 32.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Rows go there.")] = None,
) -> None:
    """Seconds of the small pipeline without guidance, dense and by each recipe, and the distance of the images."""
    resolved, path = chosen_device(device), _path(out, device)
    for steps, recipes in ((4, FEW_STEPS | TOGETHER), (8, FEW_STEPS)):
        rows = timed(recipes, resolved, size, steps, Rounds(rounds=rounds))
        jsonl.append(path, rows)
        typer.echo(report.table(rows))
        for row in rows:
            distance = row["contender"].get("psnr")
            typer.echo(f"{row['contender']['name']}: {'the same' if distance is None else f'{distance:.1f} dB'}")


def timed(
    recipes: dict[str, Recipe], device: torch.device, size: int, steps: int, rounds: Rounds
) -> list[dict[str, Any]]:
    """A row for each of ``recipes`` against dense, at ``steps`` steps."""
    candidate = partial(_candidate, device=device, size=size, steps=steps, dense={})
    candidates = [candidate("dense", lambda pipe: None), *(candidate(*named) for named in recipes.items())]
    measured = harness.measure(candidates, Meter(device), rounds, label=f"{steps} steps")
    case = {
        "model": "landscapes",
        "dtype": default_dtype(device),
        "height": size,
        "width": size,
        "batch": 1,
        "calls": steps,
    }
    return harness.compare("recipes", case, machine.describe(device), measured)


def _candidate(
    name: str, recipe: Recipe, *, device: torch.device, size: int, steps: int, dense: dict[str, Any]
) -> Candidate:
    """A pipeline with ``recipe``. ``dense`` keeps dense's image, which is made first."""
    info: dict[str, Any] = {}

    def build() -> Callable[[], Any]:
        pipe: Any = StableDiffusionPipeline.from_pretrained(todo_attn.example_pipeline())
        pipe.set_progress_bar_config(disable=True)
        recipe(pipe.to(device, getattr(torch, DTYPES[default_dtype(device)])))
        options = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": 1.0}

        def generate() -> Any:
            generator = torch.Generator("cpu").manual_seed(0)
            return pipe(PROMPT, generator=generator, output_type="np", **options).images[0]

        return generate

    def check(image: Any) -> None:
        pixels = (image * 255).round().astype("uint8")
        distance = psnr(dense.setdefault("pixels", pixels), pixels)
        info["psnr"] = distance if math.isfinite(distance) else None

    return Candidate(name, build, info, check)


def counts(
    size: Annotated[list[int] | None, typer.Option(help="Pixels of each side; repeatable. 512 to 2048.")] = None,
    out: Annotated[Path | None, typer.Option(help="Rows go there.")] = None,
) -> None:
    """The VAE's share of the operations of an image by Stable Diffusion 1.5: dense, and under ToDo's default."""
    rows = [counted(side) for side in size or (512, 1024, 1536, 2048)]
    jsonl.append(_path(out, "cpu"), rows)
    typer.echo(tabulate([{"size": row["case"]["width"], **row["operations"], **row["share"]} for row in rows], "keys"))


def counted(size: int) -> dict[str, Any]:
    """A row: operations of a call (one image with guidance) and of the VAE, and the VAE's shares of a run."""
    dense, todo = (work.full.operations for work in count_work(CONFIGS["sd15"], size, size, [ToDoConfig()]))
    whole, tiles = decoding(size, tiled=False), decoding(size, tiled=True)
    share = {}
    for calls, guidance in ((25, True), (8, False), (4, False)):
        for name, call in (("dense", dense), ("todo", todo)):
            unet = calls * call if guidance else calls * call // 2
            share[f"{name}, {calls} calls{'' if guidance else ' without guidance'}"] = round(whole / (whole + unet), 4)
    return {
        "benchmark": "recipes-counts",
        "case": {"model": "sd15", "height": size, "width": size, "batch": 2},
        "operations": {"dense": dense, "todo": todo, "vae": whole, "vae in tiles": tiles},
        "share": share,
        "machine": machine.describe(torch.device("cpu")),
    }


def decoding(size: int, *, tiled: bool) -> int:
    """Operations of the VAE for one image."""
    with torch.device("meta"), torch.no_grad(), tallied() as work:
        _vae(tiled).decode(torch.empty(1, 4, size // PIXELS_PER_LATENT, size // PIXELS_PER_LATENT))
    return work().operations


def memory(
    size: Annotated[int, typer.Option(min=64, help="Pixels of each side.")] = 768,
    out: Annotated[Path | None, typer.Option(help="Rows go there.")] = None,
) -> None:
    """Peak memory of the VAE for one image on the CPU, in fp32, beyond its weights."""
    path = _path(out, "cpu")
    for tiled in (True, False):
        vae, latents = _vae(tiled), torch.randn(1, 4, size // PIXELS_PER_LATENT, size // PIXELS_PER_LATENT)
        peak = peak_memory.watch_peak(torch.device("cpu"))
        with torch.no_grad():
            vae.decode(latents)
        found = peak()
        row = {
            "benchmark": "recipes-memory",
            "case": {"model": "sd15", "height": size, "width": size, "batch": 1, "dtype": "fp32", "tiled": tiled},
            "peak_gib": None if found is None else round(found / 2**30, 3),
            "machine": machine.describe(torch.device("cpu")),
        }
        jsonl.append(path, [row])
        typer.echo(f"{size}x{size}, {'in tiles' if tiled else 'whole'}: {row['peak_gib']} GiB")


def _vae(tiled: bool) -> Any:
    vae: Any = AutoencoderKL(**VAE)
    if tiled:
        vae.enable_tiling()
    return vae.eval()


def _path(out: Path | None, device: str) -> Path:
    return checked_out(out or RESULTS / f"recipes-{device}.jsonl")


app = typer.Typer(add_completion=False, help=__doc__)
for _command in (times, counts, memory):
    app.command()(_command)

if __name__ == "__main__":
    app()
