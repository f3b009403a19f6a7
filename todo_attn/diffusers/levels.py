"""The self-attentions of a UNet or ControlNet, and their levels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from ..config.checks import ArgumentError
from ..config.todo import FINEST, ToDoConfig


def self_attentions(transformer: Transformer2DModel) -> list[Attention]:
    """The attn1 of every block of ``transformer``, except in blocks that only cross-attend."""
    blocks: Any = transformer.transformer_blocks
    return [block.attn1 for block in blocks if not block.only_cross_attention]


def transformers_by_level(model: nn.Module) -> list[tuple[int, Transformer2DModel]]:
    """Every ``Transformer2DModel`` of ``model`` that has self-attention over an image, with its level.

    The level is the side, in latent pixels, of the square that one token stands for. Each downsampler on the way to the
    transformer doubles it; channel counts say nothing about it. Motion modules, GLIGEN's fusers and IP-Adapter's own
    attention are no such transformers. The list is empty for a model without down, mid and up blocks (a ControlNet
    needs no up blocks).
    """
    return [
        (level, module)
        for level, block in blocks_by_level(model)
        for module in block.modules()
        if isinstance(module, Transformer2DModel) and module.is_input_continuous and self_attentions(module)
    ]


def blocks_by_level(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The down, mid and up blocks in the order of a call, each with its level."""
    level = 1
    for block in getattr(model, "down_blocks", ()):
        yield level, block
        # The blocks of ControlNet-XS hold the layers of two models, and have base_downsamplers.
        if getattr(block, "downsamplers", None) or getattr(block, "base_downsamplers", None):
            level *= 2
    mid_block = getattr(model, "mid_block", None)
    if mid_block is not None:
        yield level, mid_block
    for block in getattr(model, "up_blocks", ()):
        yield level, block
        if getattr(block, "upsamplers", None):
            level //= 2


def check_levels(config: ToDoConfig, model: nn.Module) -> None:
    """Refuse a ``config`` that names levels which ``model`` lacks.

    Raises:
        ArgumentError: ``model`` has no self-attention over an image, or not at a level of the factor; or the factor
            names a level twice.
    """
    levels = sorted({level for level, _ in transformers_by_level(model)})
    if not levels:
        raise ArgumentError(
            "pipe_or_model",
            "must have self-attention over an image (Transformer2DModel, in the blocks of a UNet), got "
            f"{type(model).__name__}, which has none",
        )
    if not isinstance(config.factor, dict):
        return
    lacking = [level for level in config.factor if level not in (*levels, FINEST)]
    if lacking:
        raise ArgumentError(
            "factor",
            f"must name levels that {type(model).__name__} has self-attention at, "
            f"{', '.join(map(str, levels))} or {FINEST!r}, got {', '.join(map(str, lacking))}",
        )
    if FINEST in config.factor and levels[0] in config.factor:
        raise ArgumentError("factor", f"must name a level once, got {FINEST!r} and {levels[0]}, the same in this model")


def heads_by_level(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Heads and head_dim of the first self-attention of each level, the finest level first."""
    found: dict[int, tuple[int, int]] = {}
    for level, transformer in transformers_by_level(model):
        attn: Any = self_attentions(transformer)[0]
        found.setdefault(level, (attn.heads, attn.inner_dim // attn.heads))
    return dict(sorted(found.items()))
