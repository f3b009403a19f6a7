"""Trains a LoRA of a Stable Diffusion UNet with diffusers, PEFT and accelerate, under ToDo or dense."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from todo_attn import ToDoConfig, apply_todo
from todo_attn.config.checks import ArgumentError
from todo_attn.models.loading import load_weights
from todo_attn.peak_memory import watch_peak

from .images import read_captions, read_image

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # the layers that get a LoRA
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What is trained, and how. ``images`` is a folder as in images.py; ``size`` is in pixels."""

    model: str
    images: Path
    size: int = 512
    steps: int = 100
    batch: int = 1
    rank: int = 8
    learning_rate: float = 1e-4
    seed: int = 0
    mixed_precision: str = "no"
    checkpointing: bool = False


@dataclass(frozen=True)
class Trained:
    """The loss and the seconds of each step, and the peak memory of all steps in bytes (None if it is not known)."""

    losses: list[float]
    seconds: list[float]
    peak_memory: int | None


def train(settings: Settings, todo: ToDoConfig | None = None, out: Path | None = None) -> Trained:
    """Train a LoRA, dense if ``todo`` is None, and save it in the folder ``out``.

    The same settings give the same initial weights, order of images, timesteps and noise, whatever ``todo`` is.

    Raises:
        ArgumentError: of a setting that cannot be used, before any training.
    """
    captions = read_captions(settings.images)
    try:
        accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    except ValueError as error:  # fp16 on a CPU
        raise ArgumentError("mixed_precision", f"cannot be {settings.mixed_precision!r} here: {error}") from error
    pipe = load(settings)
    pipe.to(accelerator.device)
    set_seed(settings.seed)
    data = encode(pipe, captions, settings)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    unet = pipe.unet
    del pipe  # the text encoder and the VAE have done their part

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=ATTENTION))
    cast_training_params(unet, torch.float32)
    if settings.checkpointing:
        unet.enable_gradient_checkpointing()
    if todo is not None:
        apply_todo(unet, todo)  # before `prepare`, which may wrap the UNet
    unet.train()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.learning_rate)
    loader = DataLoader(data, settings.batch, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    generator = torch.Generator(accelerator.device).manual_seed(settings.seed + accelerator.process_index)
    losses, seconds = [], []
    peak = watch_peak(accelerator.device)
    name = "dense" if todo is None else "ToDo"
    batches = endless(loader)
    for _ in (bar := tqdm(range(settings.steps), name, disable=not accelerator.is_main_process)):
        latents, prompts = next(batches)
        started = time.perf_counter()
        loss = loss_of(unet, noise_scheduler, latents, prompts, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - started)
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    trained = Trained(losses, seconds, peak())
    if out is not None and accelerator.is_main_process:
        weights = get_peft_model_state_dict(accelerator.unwrap_model(unet))
        StableDiffusionPipeline.save_lora_weights(out, unet_lora_layers=convert_state_dict_to_diffusers(weights))
    return trained


def load(settings: Settings) -> StableDiffusionPipeline:
    """The pipeline, checked against the settings."""
    pipe = load_weights(DiffusionPipeline, settings.model, DTYPES[settings.mixed_precision])
    if not isinstance(pipe, StableDiffusionPipeline):
        kind = type(pipe).__name__
        raise ArgumentError("model", f"must be a pipeline of Stable Diffusion 1.x or 2.x, got {kind}")
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    if settings.size % multiple:
        raise ArgumentError("size", f"must be a multiple of {multiple} pixels for this model, got {settings.size}")
    return pipe


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, captions: list[tuple[Path, str]], settings: Settings) -> TensorDataset:
    """Latents (C, H, W) and prompt embeddings (L, D) of every image, made once, before training."""
    latents, prompts = [], []
    for path, caption in tqdm(captions, "encoding", leave=False):
        pixels = pipe.image_processor.preprocess(read_image(path, settings.size))
        encoded = retrieve_latents(pipe.vae.encode(pixels.to(pipe.device, pipe.vae.dtype)))
        latents.append(encoded.float() * pipe.vae.config.scaling_factor)
        prompts.append(pipe.encode_prompt(caption, pipe.device, 1, do_classifier_free_guidance=False)[0])
    return TensorDataset(torch.cat(latents), torch.cat(prompts))


def endless(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from loader


def loss_of(unet, noise_scheduler, latents, prompts, generator) -> torch.Tensor:
    """The mean squared error of the prediction, in fp32, at a random timestep for each image."""
    device = latents.device
    noise = torch.randn(latents.shape, generator=generator, device=device)
    last = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(last, latents.shape[:1], generator=generator, device=device)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    predicts_velocity = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if predicts_velocity else noise
    prediction = unet(noisy.to(prompts.dtype), timesteps, prompts).sample
    return F.mse_loss(prediction.float(), target)
