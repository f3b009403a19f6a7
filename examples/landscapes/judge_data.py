"""Rendered scenes for the judge, kept on disk, and what spoils them on purpose during training."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from .scenes import Scene, render, scene_of_index

TRAIN_SEED, TEST_SEED = 11, 12  # of sequences of scenes that the pipeline is not trained on


def rendered_scenes(work: Path, seed: int, size: tuple[int, int], count: int) -> np.ndarray:
    """The first scenes of a sequence as uint8 (count, height, width, 3).

    A file in ``work`` keeps them; a call after a kill renders what is missing.
    """
    work.mkdir(parents=True, exist_ok=True)
    path, shape = work / f"scenes-{seed}-{size[0]}x{size[1]}-{count}.npy", (count, *size, 3)
    if path.exists():
        images = np.lib.format.open_memmap(path, "r+")
    else:
        images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    missing = [i for i in range(count) if not images[i].any()]  # no scene is black
    for i in tqdm(missing, f"scenes {size[0]} x {size[1]}", mininterval=10, disable=not missing):
        images[i] = np.rint(255 * render(scene_of_index(seed, i), *size))
    return images


def draw(images: np.ndarray, seed: int, count: int, rng: np.random.Generator) -> tuple[list[Scene], torch.Tensor]:
    """Random scenes of ``rendered_scenes``, and their images (count, 3, height, width) in [0, 1]; half are mirrored."""
    picked = rng.integers(0, len(images), count)
    flips = rng.integers(0, 2, count)
    scenes = [scene_of_index(seed, int(i)) for i in picked]
    scenes = [scene.mirrored() if flip else scene for scene, flip in zip(scenes, flips, strict=True)]
    pixels = np.stack([images[i][:, :: 1 - 2 * flip] for i, flip in zip(picked, flips, strict=True)])
    return scenes, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Images (B, C, H, W) blurred by a Gaussian of ``sigma`` pixels."""
    reach = min(max(1, round(3 * sigma)), images.shape[-1] - 1, images.shape[-2] - 1)
    x = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    images = F.pad(images, (reach, reach, reach, reach), mode="reflect")
    images = F.conv2d(images, kernel, groups=images.shape[1])
    return F.conv2d(images, kernel.transpose(2, 3), groups=images.shape[1])


def enlarged_thumbnail(image: torch.Tensor, factor: float) -> torch.Tensor:
    """An image (B, C, H, W) made smaller by ``factor`` and large again."""
    size = image.shape[-2:]
    small = F.interpolate(image, scale_factor=1 / factor, mode="bilinear", antialias=True)
    return F.interpolate(small, size, mode="bicubic").clamp(0, 1)


def noisy(image: torch.Tensor, sigma: float, cell: int, generator: torch.Generator) -> torch.Tensor:
    """An image (B, C, H, W) with normal noise in cells of ``cell`` pixels: 4 is what noise in a latent looks like."""
    *batch, height, width = image.shape
    noise = torch.randn((*batch, -(-height // cell), -(-width // cell)), generator=generator)
    noise = F.interpolate(noise, scale_factor=cell, mode="bilinear")[..., :height, :width]
    return (image + sigma * noise).clamp(0, 1)


def jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """An image (1, 3, H, W) as JPEG gives it back."""
    file = io.BytesIO()
    Image.fromarray((255 * image[0]).round().byte().permute(1, 2, 0).numpy()).save(file, "jpeg", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255


def recoloured(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """An image (B, 3, H, W) with slightly different brightness, contrast and balance of colours."""
    gain = torch.tensor(rng.normal(1, 0.06, 3) * rng.normal(1, 0.06), dtype=torch.float32)[:, None, None]
    shift = torch.tensor(rng.normal(0, 0.02, 3) + rng.normal(0, 0.02), dtype=torch.float32)[:, None, None]
    return (gain * (image - 0.5) + 0.5 + shift).clamp(0, 1)


def spoiled(images: torch.Tensor, rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
    """Each image (B, 3, H, W) with some of the faults that generated images have; about one in five has none."""
    out = []
    for image in images.split(1):
        side = min(image.shape[-2:])
        fault = rng.random(5) < (0.3, 0.25, 0.3, 0.15, 0.4)
        if fault[0]:
            image = blurred(image, rng.uniform(0.5, max(1.0, side / 80)))
        if fault[1]:
            image = enlarged_thumbnail(image, rng.uniform(1.3, 4))
        if fault[2]:
            image = noisy(image, rng.uniform(0.01, 0.08), int(rng.choice((1, 2, 4))), generator)
        if fault[3]:
            image = jpeg(image, int(rng.integers(25, 90)))
        if fault[4]:
            image = recoloured(image, rng)
        out.append(image)
    return torch.cat(out)


def cropped(images: torch.Tensor, rng: np.random.Generator, most: float = 0.07) -> torch.Tensor:
    """The images (B, 3, H, W) without up to ``most`` of each side's length; places stay what they were."""
    height, width = images.shape[-2:]
    top, bottom = (int(rng.uniform(0, most / 2) * height) for _ in range(2))
    left, right = (int(rng.uniform(0, most / 2) * width) for _ in range(2))
    return images[..., top : height - bottom, left : width - right]
