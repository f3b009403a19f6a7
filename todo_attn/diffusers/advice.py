"""What ToDo and DaTo would save of a UNet, from the shapes of its layers alone: cheap enough to say when applied.

:mod:`.cost` counts what a UNet really does, in half a second or more; here the same comes from each layer's weight and
the grid that it works on, in milliseconds. Extras that few models use (GLIGEN, IP-Adapter's attention) are not in it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from .. import logs
from ..config import ToDoConfig
from ..dato_config import DaToConfig
from ..roofline import WORTH, Work
from ..schedule import FULL, REUSE, SHALLOW
from .levels import blocks_by_level, self_attentions, transformers_by_level

TEXT_TOKENS = 77
Grid = tuple[int, int]  # height, width

_TIMES = (1, 2, 4)  # the model's normal size, on which a line of the log is about


def log_todo(pipe_or_model: Any, model: nn.Module, config: ToDoConfig) -> None:
    """Say, at level INFO, what ``config`` saves of ``model`` at its normal size and above.

    Where it changes nothing at the size that is really used, the first call warns.
    """
    sizes = _sizes(pipe_or_model, model)
    if not sizes or not logs.logger.isEnabledFor(logging.INFO):
        return
    gains = {text: _gain_of_todo(model, latents, config) for latents, text in sizes.items()}
    logs.logger.info("ToDo: %s.", _sentence(gains, "a call"))


def log_dato(pipe_or_unet: Any, unet: nn.Module, config: DaToConfig) -> None:
    """Say, at level INFO, what ``config`` saves of ``unet``; warn where it is certain to save nothing at any size."""
    ratios = config.prune_ratio if isinstance(config.prune_ratio, tuple) else (config.prune_ratio,)
    kinds = FULL + (config.cache_schedule or "")
    if not any(ratios) and set(kinds) == {FULL} and config.todo is None:
        logs.logger.warning(
            "DaTo: this will not help: prune_ratio is 0 and cache_schedule has every call computed in full. "
            "DaToConfig.preset('coco') does both."
        )
        return
    sizes = _sizes(pipe_or_unet, unet)
    if not sizes or not logs.logger.isEnabledFor(logging.INFO):
        return
    gains = {text: _gain_of_dato(unet, latents, config, kinds) for latents, text in sizes.items()}
    counts = f"{kinds.count(FULL)} full, {kinds.count(SHALLOW)} shallow, {kinds.count(REUSE)} reused"
    what = "a call" if len(kinds) == 1 else f"a run of {len(kinds)} calls ({counts})"
    logs.logger.info("DaTo: %s.", _sentence(gains, what))


def operations_by_module(model: nn.Module, latents: Grid) -> dict[str, int]:
    """Operations of one call for one sample, two for a multiplication with its addition, by the module's name.

    A convolution or linear layer multiplies its whole weight at each position that it works on; attention has its two
    products of every query with every key.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, int] = {}
    inside: set[str] = set()
    for level, block in blocks_by_level(model):
        cross = [part for part, m in block.named_modules() if isinstance(m, Attention) and m.is_cross_attention]
        of_text = tuple(f"{part}.{layer}" for part in cross for layer in ("to_k", "to_v"))
        for part, module in block.named_modules():
            name = f"{names[block]}.{part}"
            inside.add(name)
            # A block's last layer makes the grid of the next block.
            on = {"downsamplers": 2 * level, "upsamplers": level // 2}.get(part.partition(".")[0], level)
            tokens = _tokens(latents, on)
            if isinstance(module, nn.Conv2d):
                found[name] = 2 * module.weight.numel() * tokens
            elif isinstance(module, nn.Linear):
                positions = 1 if "time_emb" in part else TEXT_TOKENS if part.startswith(of_text) else tokens
                found[name] = 2 * module.weight.numel() * positions
            elif isinstance(module, Attention):
                found[name] = 4 * tokens * (TEXT_TOKENS if module.is_cross_attention else tokens) * module.inner_dim
    for name, module in model.named_modules():
        if name not in inside and isinstance(module, (nn.Conv2d, nn.Linear)):
            positions = _tokens(latents, 1) if isinstance(module, nn.Conv2d) else 1
            positions = TEXT_TOKENS if name.startswith("encoder_hid_proj") else positions
            found[name] = 2 * module.weight.numel() * positions
    return found


def call_work(model: nn.Module, latents: Grid, config: ToDoConfig | None = None, batch: int = 1) -> Work:
    """Of one call, dense or under ``config`` where it acts; without launches, which shapes do not tell."""
    counted = operations_by_module(model, latents)
    products = sum(counted[name] for name, module in model.named_modules() if isinstance(module, Attention))
    work = Work(products, sum(counted.values()) - products)
    if config is not None:
        for level, attn, finest in _attentions(model):
            grid = _grid(latents, level)
            tokens, keys = grid[0] * grid[1], _keys(grid, level, finest, config)
            work = work - _attention(attn, tokens, tokens) + _attention(attn, tokens, keys)
    return work * batch


def self_attention_work(model: nn.Module, latents: Grid, batch: int = 1) -> Work:
    """Of all self-attentions over the image in one dense call, their projections with the other operations."""
    work = Work()
    for level, attn, _ in _attentions(model):
        tokens = _tokens(latents, level)
        work = work + _attention(attn, tokens, tokens)
    return work * batch


def _gain_of_todo(model: nn.Module, latents: Grid, config: ToDoConfig) -> float:
    return call_work(model, latents).operations / call_work(model, latents, config).operations


def _gain_of_dato(unet: Any, latents: Grid, config: DaToConfig, kinds: str) -> float:
    """Over a run of ``kinds``, first call included; what leaves cross-attention and the feed-forward is not counted."""
    counted = operations_by_module(unet, latents)
    last = f"up_blocks.{len(unet.up_blocks) - 1}"
    final = f"{last}.resnets.{len(unet.up_blocks[-1].resnets) - 1}."
    attended = f"{last}.attentions.{len(getattr(unet.up_blocks[-1], 'attentions', ())) - 1}."
    outside = sum(n for name, n in counted.items() if not name.startswith(("down_blocks.", "mid_block.", "up_blocks.")))
    shallow = outside + sum(n for name, n in counted.items() if name.startswith((final, attended)))
    computed = {FULL: sum(counted.values()), SHALLOW: shallow, REUSE: outside}

    names = {module: f"{name}." for name, module in unet.named_modules()}
    attentions = list(_attentions(unet))
    total = 0
    for (kind, ratio), calls in Counter((k, config.ratio_for(i, len(kinds))) for i, k in enumerate(kinds)).items():
        pruned_in = [a for a in attentions if kind == FULL or (kind == SHALLOW and names[a[1]].startswith(attended))]
        saved = sum(
            _saved_by_dato(attn, _grid(latents, level), level, finest, ratio, config)
            for level, attn, finest in pruned_in
        )
        total += calls * (computed[kind] - saved)
    return computed[FULL] * len(kinds) / total


def _saved_by_dato(attn: Any, grid: Grid, level: int, finest: bool, ratio: float, config: DaToConfig) -> int:
    """Of one self-attention in one call."""
    tokens = grid[0] * grid[1]
    bases = (grid[0] // config.patch[0]) * (grid[1] // config.patch[1])
    pruned = int(ratio * tokens) if finest and bases else 0
    keys = tokens - pruned
    if config.todo is not None and (coarse := _keys(grid, level, finest, config.todo)) < tokens:
        keys = coarse
    # All others with the bases, then the pruned with those that stay and are no bases.
    matching = 2 * attn.query_dim * ((tokens - bases) * bases + pruned * (tokens - pruned - bases)) if pruned else 0
    return (_attention(attn, tokens, tokens) - _attention(attn, tokens - pruned, keys)).operations - matching


def _attention(attn: Any, queries: int, keys: int) -> Work:
    """Of a self-attention with its four projections."""
    return Work(4 * queries * keys * attn.inner_dim, 4 * (queries + keys) * attn.query_dim * attn.inner_dim)


def _attentions(model: nn.Module) -> Iterator[tuple[int, Any, bool]]:
    """Each self-attention with its level and whether that is the finest."""
    transformers = transformers_by_level(model)
    finest = min(level for level, _ in transformers)
    for level, transformer in transformers:
        for attn in self_attentions(transformer):
            yield level, attn, level == finest


def _keys(grid: Grid, level: int, finest: bool, config: ToDoConfig) -> int:
    factor = config.factor_for(grid, level, finest=finest)
    return (grid[0] // factor[0]) * (grid[1] // factor[1])


def _grid(latents: Grid, level: int) -> Grid:
    return -(-latents[0] // level), -(-latents[1] // level)  # a stride-2 convolution rounds up


def _tokens(latents: Grid, level: int) -> int:
    height, width = _grid(latents, level)
    return height * width


def _sizes(pipe_or_model: Any, model: Any) -> dict[Grid, str]:
    """Latents at the model's normal size, twice and four times that, each with a name; none where it does not say.

    Nor where shapes do not tell: a video's model works on frames, too, and has attentions outside of its blocks.
    """
    sample = model.config.sample_size if isinstance(model, UNet2DConditionModel) else None
    if sample is None:
        return {}
    height, width = (sample, sample) if isinstance(sample, int) else sample
    pixels = getattr(pipe_or_model, "vae_scale_factor", None)
    unit, scale = ("pixels", pixels) if isinstance(pixels, int) else ("latents", 1)
    return {
        (height * k, width * k): f"{width * k * scale} x {height * k * scale}{f' {unit}' if k == 1 else ''}"
        for k in _TIMES
    }


def _sentence(gains: dict[str, float], what: str) -> str:
    listed = ", ".join(f"{gain:.2f} at {text}" for text, gain in gains.items())
    verdict = "" if max(gains.values()) >= WORTH else ": this will not help"
    return (
        f"times fewer operations in {what} than dense, {listed}{verdict} (counted, not timed: todo-attn doctor "
        "--model MODEL --measure times it on this machine)"
    )
