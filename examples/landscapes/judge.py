"""A small classifier of landscapes: how near two images are, how near two sets are, how well an image fits its prompt.

    judge = load_judge()
    judge.agreement(images, ["green hills at night with a lake"])  # (1,), the words' mean probability
    judge.distance(images, others)                                 # (B,), as LPIPS: 0 for equal images
    FrechetInceptionDistance(judge)                                # torchmetrics; KernelInceptionDistance likewise

It is trained on rendered scenes alone (``judge_train.py``), never on images that a model made. Distances see images at
their own size: fine texture is the first thing that approximate attention loses, and a resized image no longer has it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .scenes import GROUNDS, MOUNTAINS, PLACES, SKIES, TIMES

HERE = Path(__file__).parent
# Attribute -> class -> the phrase of a caption.
ATTRIBUTES = {
    "mountains": {name: name for name in MOUNTAINS},
    "time": TIMES,
    "ground": GROUNDS,
    "sky": SKIES,
    "place": PLACES,
}
WIDTHS = (16, 32, 64, 96, 128)
SMALLEST = 32  # pixels a side: the deepest map is 1/32 of the image
NORMAL = 256  # pixels of the shorter side: what a scene shows is read at this size at most


def named(prompt: str) -> dict[str, list[int]]:
    """Attribute -> classes that the prompt names, in the words of ``Scene.caption``.

    Raises:
        ValueError: the prompt names no attribute.
    """
    found = {
        attribute: [k for k, phrase in enumerate(classes.values()) if re.search(rf"\b{phrase}\b", prompt, re.I)]
        for attribute, classes in ATTRIBUTES.items()
    }
    found = {attribute: classes for attribute, classes in found.items() if classes}
    if not found:
        raise ValueError(f"prompt must name mountains, time, ground, sky or place as captions do, got {prompt!r}")
    return found


class Block(nn.Module):
    """Halves the size, then adds a residual of two convolutions."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.down = nn.Conv2d(inputs, width, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.residual = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.down(x)))
        return F.relu(x + self.residual(x))


class Judge(nn.Module):
    """The network. Images are (B, 3, H, W), float in [0, 1] or uint8, of any size from 32 x 32 on.

    Features are means over space of three maps: the first two see texture, the last sees the scene; some channels of
    the last also have their mean times x, from -1 at the left to 1 at the right. Each feature has mean 0 and variance 1
    over scenes as they are rendered at 256 x 256.

    Every public method raises a ValueError if images have another shape, dtype or range, or are not finite.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, embedding: int = 64):
        super().__init__()
        self.config = {"widths": list(widths), "embedding": embedding}
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.blocks = nn.ModuleList(Block(*pair) for pair in itertools.pairwise(widths))
        # Coordinates as two more channels: the same colours mean sky above and lake below.
        self.embed = nn.Conv2d(widths[-1] + 2, embedding, 1)
        self.placed = embedding // 4  # channels whose mean side, left or right, is a feature too
        self.num_features = widths[0] + widths[1] + embedding + self.placed  # torchmetrics reads it
        self.register_buffer("mean", torch.zeros(self.num_features))
        self.register_buffer("std", torch.ones(self.num_features))
        self.heads = nn.ModuleDict({name: nn.Linear(self.num_features, len(c)) for name, c in ATTRIBUTES.items()})

    def _maps(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(2 * x - 1)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps

    def _features(self, x: Tensor) -> Tensor:
        maps = self._maps(x)
        last = maps[-1]
        height, width = last.shape[-2:]
        at_y, at_x = (((torch.arange(n, device=x.device) + 0.5) / n * 2 - 1).to(x) for n in (height, width))
        grid = torch.stack([at_y[:, None].expand(height, width), at_x.expand(height, width)])
        embedded = F.relu(self.embed(torch.cat([last, grid.expand(len(x), -1, -1, -1)], 1)))
        side = 2 * embedded[:, : self.placed] * at_x  # a mean over space alone does not know left from right
        pooled = torch.cat([m.mean((2, 3)) for m in (maps[0], maps[1], embedded, side)], 1)
        return (pooled - self.mean) / self.std

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Attribute -> (B, classes) logits, with gradients, for the training."""
        features = self._features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def standardize(self, features: Tensor) -> None:
        """From now on, what gave these features (N, F) gives features of mean 0 and variance 1; logits stay."""
        mean, std = features.mean(0), features.std(0)
        std = std.clamp(min=0.1 * std.median().item())  # a feature that hardly varies is not blown up
        for head in self.heads.values():
            head.bias += head.weight @ mean
            head.weight *= std
        self.mean += self.std * mean
        self.std *= std

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (B, num_features) float32, for Fréchet and kernel distances."""
        return self._features(checked(images))

    forward = features

    @torch.no_grad()
    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, widths[k], ~H / 2^(k+1), ~W / 2^(k+1)) float32 at five depths."""
        return self._maps(checked(images))

    @torch.no_grad()
    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """Perceptual distance (B,) of images to others (B, 3, H, W), as LPIPS (arXiv 1801.03924) without its weights.

        Squared differences of the maps' channel vectors at unit length: the mean over space, the sum over depths.
        """
        if images.shape != others.shape:
            raise ValueError(f"others must have the shape of images {tuple(images.shape)}, got {tuple(others.shape)}")
        pairs = zip(self.maps(images), self.maps(others), strict=True)
        return sum((F.normalize(a) - F.normalize(b)).square().sum(1).mean((1, 2)) for a, b in pairs)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """Attribute -> (B, classes) probabilities, in the order of ``ATTRIBUTES``.

        Larger images are shrunk to 256 pixels of their shorter side: most scenes of the training were no larger, and
        what a scene shows does not need its finest texture.
        """
        images = checked(images)
        ratio = NORMAL / min(images.shape[2:])
        if ratio < 1:
            size = [round(ratio * side) for side in images.shape[2:]]
            images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
        return {name: logits.softmax(1) for name, logits in self.logits(images).items()}

    def agreement(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Agreement (B,) of each image with its prompt: the mean probability over the attributes that the prompt names.

        If a prompt names two classes of one attribute, their probabilities are added.

        Raises:
            ValueError: a prompt names no attribute, or there are not as many prompts as images.
        """
        if isinstance(prompts, str) or len(prompts) != len(images):
            raise ValueError(f"prompts must be a list of {len(images)}, one an image, got {prompts!r}")
        classes = [named(prompt) for prompt in prompts]
        probabilities = self.probabilities(images)
        rows = [
            torch.stack([probabilities[name][i, chosen].sum() for name, chosen in found.items()]).mean()
            for i, found in enumerate(classes)
        ]
        return torch.stack(rows) if rows else torch.zeros(0)


def checked(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]; see ``Judge`` for what is refused."""
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SMALLEST:
        raise ValueError(f"images must be (B, 3, H, W), H and W at least {SMALLEST}, got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    images = images.float()
    if not images.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity")
    if images.numel() and not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):
        raise ValueError(f"images must be in [0, 1], got values from {images.min():.3g} to {images.max():.3g}")
    return images.clamp(0, 1)


def save_judge(judge: Judge, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, convolutions in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**judge.config, "attributes": {name: list(classes) for name, classes in ATTRIBUTES.items()}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: w.half() if w.ndim == 4 else w for name, w in judge.state_dict().items()}
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors")


def load_judge(folder: str | Path = HERE / "judge", device: str | torch.device = "cpu") -> Judge:
    """The trained judge in float32 and eval mode.

    Raises:
        ValueError: the folder holds no judge, or one with other attributes than the scenes have.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise ValueError(f"folder must hold a judge's config.json and model.safetensors, got {folder}")
    config = json.loads((folder / "config.json").read_text())
    attributes = config.pop("attributes")
    if attributes != {name: list(classes) for name, classes in ATTRIBUTES.items()}:
        raise ValueError(f"folder must hold a judge of the attributes of scenes.py, got {attributes} in {folder}")
    judge = Judge(**config)
    judge.load_state_dict(load_file(folder / "model.safetensors"))
    return judge.to(device).eval().requires_grad_(False)
