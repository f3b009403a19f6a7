"""The levels of a ComfyUI UNet, and the grid of tokens that one of its self-attentions sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from todo_attn.config import ArgumentError, ToDoConfig
from todo_attn.config.todo import FINEST

Block = tuple[str, int]  # as ComfyUI names a block of a UNet: ("input", 1), ("middle", 0), ("output", 11)


@dataclass(frozen=True)
class Levels:
    """The level of every block that has self-attention over the image.

    A level is the side, in latent pixels, of the square that one token stands for.
    """

    of: Mapping[Block, int]
    unet: str  # the name of its class, for messages

    @property
    def all(self) -> list[int]:
        return sorted(set(self.of.values()))

    @property
    def finest(self) -> int:
        return min(self.of.values())

    def check(self, config: ToDoConfig) -> None:
        """Refuse a ``config`` that names levels which the model lacks, or one twice."""
        if not isinstance(config.factor, dict):
            return
        lacking = [level for level in config.factor if level not in (*self.all, FINEST)]
        if lacking:
            raise ArgumentError(
                "factor",
                f"must name levels that {self.unet} has self-attention at, {', '.join(map(str, self.all))} or "
                f"{FINEST!r}, got {', '.join(map(str, lacking))}",
            )
        if FINEST in config.factor and self.finest in config.factor:
            raise ArgumentError(
                "factor", f"must name a level once, got {FINEST!r} and {self.finest}, the same in this model"
            )


def levels_of(model: Any) -> Levels:
    """The levels of ``model``, a ComfyUI model patcher.

    Each downsampler on the way to a block doubles its level; channel counts say nothing about it.

    Raises:
        ArgumentError: its network is no UNet with self-attention over an image.
    """
    unet = model.get_model_object("diffusion_model")
    of: dict[Block, int] = {}
    level = 1
    for block, module in _blocks(unet):
        if _has_self_attention(module):
            of[block] = level
        if _has(module, "Downsample"):
            level *= 2
        if _has(module, "Upsample"):
            level //= 2
    if not of:
        raise ArgumentError(
            "model",
            "must be a UNet with self-attention over an image (Stable Diffusion 1.x, 2.x, SDXL), got "
            f"{type(unet).__name__}, which has none that this node can patch",
        )
    return Levels(of, type(unet).__name__)


def grid_of(tokens: torch.Tensor, level: int, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the grid that ``tokens`` (B, N, C) are, at ``level``; None if they are no such grid.

    The latent's shape says so: each downsampler rounds up, so a level has ceil(side / level) tokens along a side. If
    another node has resized the image inside of the UNet, ComfyUI's shape of the block's own input says so.
    """
    latent = options.get("original_shape")
    if latent is None or len(latent) != 4 or latent[0] != tokens.shape[0]:  # frames or tiles as a batch: no image
        return None
    grids = [tokens_at(level, latent_of(options))]
    activations = options.get("activations_shape")
    if activations is not None and len(activations) == 4:
        grids.append((activations[2], activations[3]))
    return next((grid for grid in grids if grid[0] * grid[1] == tokens.shape[1]), None)


def latent_of(options: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latent."""
    height, width = options["original_shape"][-2:]
    return int(height), int(width)


def tokens_at(level: int, latent: tuple[int, int]) -> tuple[int, int]:
    """The grid of ``level`` in a UNet that is called on ``latent``, (height, width)."""
    return -(-latent[0] // level), -(-latent[1] // level)


def _blocks(unet: Any) -> Iterator[tuple[Block, Any]]:
    """The blocks in the order of a call."""
    for number, module in enumerate(getattr(unet, "input_blocks", ())):
        yield ("input", number), module
    if getattr(unet, "middle_block", None) is not None:
        yield ("middle", 0), unet.middle_block
    for number, module in enumerate(getattr(unet, "output_blocks", ())):
        yield ("output", number), module


def _has(module: Any, kind: str) -> bool:
    """Whether ``module`` holds a layer of the class named ``kind``. ComfyUI need not be imported to know."""
    return any(type(part).__name__ == kind for part in module.modules())


def _has_self_attention(module: Any) -> bool:
    transformers = [part for part in module.modules() if hasattr(part, "transformer_blocks")]
    return any(not block.disable_self_attn for part in transformers for block in part.transformer_blocks)
