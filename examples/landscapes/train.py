"""Train the landscape pipeline from formulas alone (run from the repository's root):

    python -m examples.landscapes.train --hours 2                  # every stage, then the export
    python -m examples.landscapes.train --hours 1                  # goes on, from the checkpoints in work/
    python -m examples.landscapes.train --hours 1 --from FOLDER    # goes on, from an exported pipeline
    torchrun --nproc_per_node 2 -m examples.landscapes.train --threads 1   # in two processes, the same batches
    python -m examples.landscapes.train export                     # write pipeline/ from the checkpoints
    python -m examples.landscapes.train samples                    # a contact sheet of 16 prompts

The stages are ``vae`` (the autoencoder), ``latents`` (render and encode scenes) and ``unet`` (with the text encoder).
Each saves a checkpoint every few minutes; the same command goes on after a kill and repeats the steps that were lost.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from . import processes
from .latents import Pools, load_vae
from .model import (
    LATENTS,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    export_pipeline,
    thumbnail,
    tokenize,
    write_tokenizer,
)
from .naming import WEIGHT, build_heads, naming_loss
from .samples import contact_sheet
from .scenes import render, scene_of_index
from .stage import Stage

HERE = Path(__file__).parent
WORK = HERE / "work"
PIPELINE = HERE / "pipeline"
NOTES = "training.json"  # beside an exported pipeline: how far it was trained
VAE_SEED, UNET_SEED = 1, 2
app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0])

# Latent sizes with their batch, and the scenes kept of each.
SIZES = {(32, 32): (16, 6000), (64, 64): (4, 3000), (48, 80): (4, 500), (128, 128): (2, 300)}
# From which step on each size has which share of the steps.
SHARES = {
    0: {(32, 32): 1.0},
    3000: {(32, 32): 0.25, (64, 64): 0.70, (48, 80): 0.05},
    6000: {(32, 32): 0.15, (64, 64): 0.70, (48, 80): 0.10, (128, 128): 0.05},
}
CHANNEL_WEIGHTS = (1.2, 1.0, 1.0, *[0.5] * (LATENTS - 3))  # less for the texture, which is half noise


def shares_at(step: int, shares=None) -> dict[tuple[int, int], float]:
    """The shares of the sizes at a step."""
    shares = SHARES if shares is None else shares
    return shares[max(first for first in shares if first <= step)]


# --- stage vae ---


@functools.lru_cache(maxsize=96)
def rendered(index: int, size: int) -> np.ndarray:
    return render(scene_of_index(VAE_SEED, index), size, size)


def crops(rng: np.random.Generator, step: int, sizes: tuple[int, ...], side: int, count: int = 12) -> torch.Tensor:
    """Square cuts (count, 3, side, side) in [-1, 1] from scenes of a window that moves on by two scenes a step."""
    cuts = []
    for index in 2 * step + rng.integers(0, 48, count):
        size = sizes[index % len(sizes)]
        image = rendered(int(index), size)
        y, x = rng.integers(0, size - side + 1, 2)
        cuts.append(image[y : y + side, x : x + side, :: (-1, 1)[rng.integers(2)]])
    return torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2) * 2 - 1


def edges(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.diff(x, dim=d) for d in (2, 3)]


def train_vae(work: Path, steps: int, *, sizes=(256, 256, 128), side: int = 64, dtype=torch.bfloat16, **run) -> None:
    """L1 on pixels and their differences; three latent channels stay near the thumbnail, the others find their own use.

    Noise on the latents makes the decoder tolerate what the UNet gets wrong.
    """
    torch.manual_seed(VAE_SEED)
    vae = build_vae().to(memory_format=torch.channels_last)
    groups = [{"params": list(vae.parameters()), "lr": 1e-3}]
    stage = Stage("vae", work, {"vae": vae}, groups, VAE_SEED, steps=steps, decay=steps // 4, warmup=50)

    def loss_of_step(rng, generator):
        pixels = crops(rng, stage.step, sizes, side).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            latents = vae.encode(pixels).latents.float()
            noise = torch.randn(latents.shape, generator=generator)
            out = vae.decode(latents + 0.04 * noise).sample.float()
        pixel = F.l1_loss(out, pixels)
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(pixels), strict=True))
        anchor = F.mse_loss(latents[:, :3], thumbnail(pixels))
        texture = latents[:, 3:].square().mean()
        loss = pixel + edge + 0.3 * anchor + 0.1 * F.relu(texture - 0.5)
        return loss, {"pixel": pixel.item(), "anchor": anchor.item(), "texture": texture.sqrt().item()}

    stage.run(loss_of_step, **run)


# --- stage unet ---


def shared_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a folder, which the first process writes and the others wait for."""
    if processes.is_first():
        write_tokenizer(folder)
    processes.wait()
    return CLIPTokenizer.from_pretrained(folder)


def build_model(tokenizer: CLIPTokenizer, widths, source: Path | None) -> torch.nn.ModuleDict:
    """UNet and text encoder, new or from an exported pipeline."""
    torch.manual_seed(UNET_SEED)
    if source:
        unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet").float()
        text = CLIPTextModel.from_pretrained(source, subfolder="text_encoder").float()
    else:
        unet, text = build_unet(widths), build_text_encoder(tokenizer)
    return torch.nn.ModuleDict({"unet": unet, "text_encoder": text})


def sample_timesteps(count: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Spread evenly over the batch, then shifted to the noisy end: larger images average more noise out."""
    spread = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    shift = (size[0] * size[1]) ** 0.5 / 32
    return (1000 * shift * spread / (1 + (shift - 1) * spread)).long().clamp(max=999)


def train_unet(
    work: Path,
    steps: int | None,
    *,
    decay: int = 0,
    lr: float = 1e-3,
    dropout: float = 0.1,
    fresh: float = 0.1,
    sizes=None,
    shares=None,
    widths=(40, 80, 160, 160),
    dtype=torch.bfloat16,
    source: Path | None = None,
    background: bool = True,
    only_latents: bool = False,
    **run,
) -> None:
    """v-prediction with min-SNR weights on the pools' latents; captions are left empty now and then.

    The text encoder has a second task beside it: see ``naming.py``.
    """
    sizes = SIZES if sizes is None else sizes
    tokenizer = shared_tokenizer(work / "tokenizer")
    scheduler = build_scheduler()
    model, average = (build_model(tokenizer, widths, source) for _ in range(2))
    model["unet"].to(memory_format=torch.channels_last)
    average.requires_grad_(False)
    heads = build_heads(model["unet"].add_embedding.proj.out_features)
    groups = [{"params": list(part.parameters()), "lr": lr} for part in (model, heads)]
    begun = json.loads((source / NOTES).read_text()) if source and (source / NOTES).exists() else {}
    models = {"model": model, "average": average, "heads": heads}
    stage = Stage("unet", work, models, groups, UNET_SEED, steps=steps, decay=decay, begun=begun.get("step", 0))
    stage.extra = {str(size): 0 for size in sizes} | begun.get("drawn", {}) | stage.extra
    counts = {size: stage.extra[str(size)] for size in sizes}
    pools = Pools(work, {size: capacity for size, (_, capacity) in sizes.items()}, UNET_SEED, fresh, background)
    # Sizes that are used later come from the background.
    pools.fill(counts, sizes if only_latents else shares_at(stage.step, shares))
    if only_latents:
        return
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    snr_weight = (snr + 1).clamp(max=5) / (snr + 1)  # pure noise in full, the almost clean end less
    channel_weight = torch.tensor(CHANNEL_WEIGHTS)[:, None, None]

    def loss_of_step(rng, generator):
        share = shares_at(stage.step, shares)
        height, width = size = list(share)[rng.choice(len(share), p=list(share.values()))]
        count = sizes[size][0]
        scenes, latents = pools.draw(size, rng, count, stage.extra[str(size)])
        stage.extra[str(size)] += count
        captions = ["" if rng.random() < dropout else scene.caption(rng) for scene in scenes]
        t = sample_timesteps(count, size, generator)
        noise = torch.randn(latents.shape, generator=generator)
        latents, captions, t, noise = map(processes.part, (latents, captions, t, noise))
        noisy = scheduler.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            words = model["text_encoder"](tokenize(tokenizer, captions))[0]
            out = model["unet"](noisy, t, words).sample
        error = (out.float() - scheduler.get_velocity(latents, noise, t)).square()
        loss = ((error * channel_weight).mean((1, 2, 3)) * snr_weight[t]).mean()
        naming, place = naming_loss(model, heads, tokenizer, rng)
        numbers = {f"v_{height}x{width}": error.mean().item(), "naming": naming.item(), "place": place}
        return loss + WEIGHT * naming, numbers

    @torch.no_grad()
    def after_step(step):
        keep = min(0.9995, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)

    pools.begin(counts)
    try:
        stage.run(loss_of_step, after_step, **run)
    finally:
        pools.end()


# --- commands ---


def start_from(source: Path, work: Path) -> None:
    """Take the autoencoder of an exported pipeline for a finished stage ``vae``, unless the work folder has one."""
    if not (source / "model_index.json").is_file():
        raise typer.BadParameter(f"{source} is no pipeline folder: it has no model_index.json")
    if not (work / "vae.pt").exists():
        notes = json.loads((source / NOTES).read_text()) if (source / NOTES).exists() else {}
        vae = AutoencoderTiny.from_pretrained(source, subfolder="vae").float()
        step = notes.get("vae_step", 0)
        work.mkdir(parents=True, exist_ok=True)
        state = {"models": {"vae": vae.state_dict()}, "optimizer": None, "step": step, "begun": step, "extra": {}}
        torch.save(state, work / "vae.pt")


def export_from(work: Path, folder: Path, averaged: bool = True) -> None:
    """Write the checkpoints of a work folder as a pipeline."""
    vae, vae_step = load_vae(work / "vae.pt")
    state = torch.load(work / "unet.pt", map_location="cpu", weights_only=True)
    tokenizer = write_tokenizer(work / "tokenizer")
    weights = state["models"]["average" if averaged else "model"]
    widths = widths_of(weights)
    model = torch.nn.ModuleDict({"unet": build_unet(widths), "text_encoder": build_text_encoder(tokenizer)})
    model.load_state_dict(weights)
    export_pipeline(vae, model["text_encoder"].eval(), tokenizer, model["unet"].eval(), folder)
    notes = {"step": state["step"], "vae_step": vae_step, "drawn": state["extra"]}
    (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: step {state['step']}, {size / 1e6:.1f} MB")


def widths_of(weights) -> tuple[int, ...]:
    """The UNet's widths, read from its weights."""
    keys = (f"unet.down_blocks.{i}.resnets.0.conv1.weight" for i in itertools.count())
    return tuple(len(weights[key]) for key in itertools.takewhile(weights.__contains__, keys))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    hours: Annotated[float, typer.Option(help="Stop after so long, with a checkpoint and an export.")] = 2.0,
    stage: Annotated[str, typer.Option(help="all, vae, latents or unet")] = "all",
    vae_steps: Annotated[int, typer.Option(help="Length of stage vae.")] = 2400,
    steps: Annotated[int | None, typer.Option(help="End stage unet at this step, not only by the clock.")] = None,
    decay: Annotated[int, typer.Option(help="Learning rate falls to 0 over the last steps before --steps.")] = 0,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the UNet.")] = 1e-3,
    fresh: Annotated[float, typer.Option(help="New scenes rendered for each sample drawn.")] = 0.1,
    source: Annotated[Path | None, typer.Option("--from", help="Start from an exported pipeline.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of checkpoints, latents and log.")] = WORK,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    nice: Annotated[int, typer.Option(help="Added to the process's niceness.")] = 10,
    save_minutes: Annotated[float, typer.Option(help="Time between two checkpoints.")] = 3.0,
):
    """Train every stage and export; goes on from what is in the work folder."""
    if context.invoked_subcommand:
        return
    if stage not in ("all", "vae", "latents", "unet"):
        raise typer.BadParameter(f"stage must be all, vae, latents or unet, not {stage!r}")
    os.nice(nice)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, lambda *_: setattr(Stage, "stopped", True))
    with processes.joined():
        run_stages(stage, vae_steps, steps, source, work, hours, save_minutes, decay=decay, lr=lr, fresh=fresh)


def run_stages(stage: str, vae_steps: int, steps: int | None, source, work: Path, hours: float, save_minutes, **unet):
    """What the command does; the arguments are its options, ``unet`` those of the stage alone."""
    run = {"deadline": time.monotonic() + 3600 * hours, "save_minutes": save_minutes}
    if source and processes.is_first():
        start_from(source, work)
    processes.wait()
    if stage in ("all", "vae") and not (source and stage == "all"):
        train_vae(work, vae_steps, **run)
        if Stage.over(run["deadline"]):
            print("The time was up in stage vae; the same command goes on from here.")
            return
    if stage != "vae":
        if not (work / "vae.pt").exists():
            raise typer.BadParameter(f"{work} has no vae.pt: run stage vae first, or name a pipeline with --from")
        train_unet(work, steps, source=source, only_latents=stage == "latents", **unet, **run)
    if stage in ("all", "unet") and processes.is_first():
        export_from(work, PIPELINE if work == WORK else work / "pipeline")


@app.command()
def export(work: Path = WORK, folder: Path = PIPELINE, averaged: bool = True):
    """Write a pipeline folder in half precision from the checkpoints."""
    export_from(work, folder, averaged)


@app.command()
def samples(
    folder: Path = PIPELINE, out: Path = HERE / "samples.png", size: int = 256, steps: int = 25,
    guidance: float = 3.0, seed: int = 0, threads: int = 2,
):  # fmt: skip
    """Generate the 16 prompts, each with its own seed, as one contact sheet."""
    torch.set_num_threads(threads)
    contact_sheet(folder, out, size=size, steps=steps, guidance=guidance, seed=seed)


if __name__ == "__main__":
    app()
