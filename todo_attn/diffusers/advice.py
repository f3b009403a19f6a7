"""What ToDo and DaTo would save of a UNet, from the shapes of its layers alone: cheap enough to say when applied.

:mod:`.cost` counts what a UNet really does, in half a second or more; here the same comes from each layer's weight and
the grid that it works on, in milliseconds. Extras that few models use (GLIGEN, IP-Adapter's attention) are not in it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from .. import logs
from ..config import ToDoConfig
from ..dato_config import DaToConfig
from ..roofline import Rates, Work
from ..schedule import FULL, REUSE, SHALLOW
from .levels import blocks_by_level, self_attentions, transformers_by_level
from .verdict import NO, Verdict, compare_runs, computes_everything, kinds_of

TEXT_TOKENS = 77
Grid = tuple[int, int]  # height, width

_TIMES = (1, 2, 4)  # the model's normal size, on which a line of the log is about
# What machines do in a second, where it was measured in this process: by device, dtype, heads and head dim.
_RATES: dict[tuple[torch.device, torch.dtype, int, int], Rates] = {}


def remember_rates(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, rates: Rates) -> None:
    """Let the log predict by ``rates`` from now on, for models on ``device`` whose finest attention is such a one."""
    _RATES[_where(device), dtype, heads, head_dim] = rates


def log_todo(pipe_or_model: Any, model: nn.Module, config: ToDoConfig) -> None:
    """Say in one line, at level INFO, whether ``config`` helps ``model`` at its normal size and above, and how much.

    By operations; by seconds only where the machine's rates are known, because finding them takes one. Where it changes
    nothing at the size that is really used, the first call warns.
    """
    when = "" if config.every_timestep else ", in a call at a timestep of its range"
    _log(f"ToDo{when}", pipe_or_model, model, config)


def log_dato(pipe_or_unet: Any, unet: nn.Module, config: DaToConfig) -> None:
    """As :func:`log_todo`, ToDo in ``config`` included; warn where it is certain to gain nothing at any size."""
    if computes_everything(config) and config.todo is None:
        logs.logger.warning(
            "DaTo: %s: prune_ratio is 0 and cache_schedule has every call computed in full. "
            "DaToConfig.preset('coco') does both.",
            NO,
        )
        return
    kinds = kinds_of(config)
    name = "DaTo" if config.todo is None else "DaTo with ToDo"
    counts = f"{kinds.count(FULL)} full, {kinds.count(SHALLOW)} shallow, {kinds.count(REUSE)} reused"
    run = "" if len(kinds) == 1 else f", in a run of {len(kinds)} calls ({counts})"
    _log(f"{name}{run}", pipe_or_unet, unet, config)


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
    dense = Work(products, sum(counted.values()) - products)
    return (dense if config is None else _under_todo(dense, model, latents, config)) * batch


def self_attention_work(model: nn.Module, latents: Grid, batch: int = 1) -> Work:
    """Of all self-attentions over the image in one dense call, their projections with the other operations."""
    work = Work()
    for level, attn, _ in _attentions(model):
        tokens = _tokens(latents, level)
        work = work + _attention(attn, tokens, tokens)
    return work * batch


def run_work(model: Any, latents: Grid, config: ToDoConfig | DaToConfig) -> tuple[Work, list[Work]]:
    """Of a dense call, and of each call of a run under ``config``, the first included; without launches.

    A run of ToDo is one call. What leaves cross-attention and the feed-forward under DaTo is not counted.
    """
    if isinstance(config, ToDoConfig):
        dense = call_work(model, latents)
        return dense, [_under_todo(dense, model, latents, config)]
    kinds = kinds_of(config)
    calls = [(kind, config.ratio_for(i, len(kinds))) for i, kind in enumerate(kinds)]
    counted = operations_by_module(model, latents)
    products = {name for name, module in model.named_modules() if isinstance(module, Attention)}

    def work_in(*prefixes: str) -> Work:
        inside = {name: n for name, n in counted.items() if name.startswith(prefixes)}
        attention = sum(n for name, n in inside.items() if name in products)
        return Work(attention, sum(inside.values()) - attention)

    last = f"up_blocks.{len(model.up_blocks) - 1}"
    final = f"{last}.resnets.{len(model.up_blocks[-1].resnets) - 1}."
    attended = f"{last}.attentions.{len(getattr(model.up_blocks[-1], 'attentions', ())) - 1}."
    full = work_in("")
    outside = full - work_in("down_blocks.", "mid_block.", "up_blocks.")
    computed = {FULL: full, SHALLOW: outside + work_in(final, attended), REUSE: outside}

    names = {module: f"{name}." for name, module in model.named_modules()}
    attentions = list(_attentions(model))
    works = {}
    for kind, ratio in set(calls):
        work = computed[kind]
        for level, attn, finest in attentions:
            if kind == FULL or (kind == SHALLOW and names[attn].startswith(attended)):
                work = work - _saved_by_dato(attn, _grid(latents, level), level, finest, ratio, config)
        works[kind, ratio] = work
    return full, [works[call] for call in calls]


def downsamples(model: nn.Module, latents: Grid, config: ToDoConfig) -> bool:
    """Whether ToDo leaves any key out for ``latents``."""
    return any(
        config.factor_for(_grid(latents, level), level, finest=finest) != (1, 1)
        for level, _, finest in _attentions(model)
    )


def heads_by_level(model: nn.Module) -> dict[int, tuple[int, int]]:
    """Heads and head dim of each level's self-attention, the finest first; of several in a level, the first one's."""
    found: dict[int, tuple[int, int]] = {}
    for level, transformer in transformers_by_level(model):
        attn: Any = self_attentions(transformer)[0]
        found.setdefault(level, (attn.heads, attn.inner_dim // attn.heads))
    return dict(sorted(found.items()))


def finest_heads(model: nn.Module) -> tuple[int, int]:
    """Heads and head dim of the finest self-attention."""
    return next(iter(heads_by_level(model).values()))


def _under_todo(work: Work, model: nn.Module, latents: Grid, config: ToDoConfig) -> Work:
    """Of a call whose dense ``work`` is given."""
    for level, attn, finest in _attentions(model):
        grid = _grid(latents, level)
        tokens, keys = grid[0] * grid[1], _keys(grid, level, finest, config)
        work = work - _attention(attn, tokens, tokens) + _attention(attn, tokens, keys)
    return work


def _saved_by_dato(attn: Any, grid: Grid, level: int, finest: bool, ratio: float, config: DaToConfig) -> Work:
    """Of one self-attention in one call."""
    tokens = grid[0] * grid[1]
    bases = (grid[0] // config.patch[0]) * (grid[1] // config.patch[1])
    pruned = int(ratio * tokens) if finest and bases else 0
    keys = tokens - pruned
    if config.todo is not None and (coarse := _keys(grid, level, finest, config.todo)) < tokens:
        keys = coarse
    # All others with the bases, then the pruned with those that stay and are no bases.
    matching = 2 * attn.query_dim * ((tokens - bases) * bases + pruned * (tokens - pruned - bases)) if pruned else 0
    return _attention(attn, tokens, tokens) - _attention(attn, tokens - pruned, keys) - Work(0, matching)


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
    scale = pixels if isinstance(pixels, int) else 1
    return {(height * k, width * k): f"{width * k * scale} x {height * k * scale}" for k in _TIMES}


def _log(name: str, pipe_or_model: Any, model: nn.Module, config: ToDoConfig | DaToConfig) -> None:
    """One line: what is gained at each size."""
    if not logs.logger.isEnabledFor(logging.INFO) or not (sizes := _sizes(pipe_or_model, model)):
        return
    unit = "pixels" if isinstance(getattr(pipe_or_model, "vae_scale_factor", None), int) else "latents"
    weight = next(model.parameters())
    rates = _RATES.get((_where(weight.device), weight.dtype, *finest_heads(model)))
    found = "; ".join(f"{text}: {_verdict(model, latents, config, rates)}" for latents, text in sizes.items())
    how = "Operations are counted" if rates is None else "Predicted by rates measured before, without time to start"
    logs.logger.info(
        "%s, by width x height in %s: %s. %s, nothing is timed: todo-attn doctor --model MODEL --height H --width W "
        "--measure does that on this machine.",
        *(name, unit, found, how),
    )


def _where(device: torch.device) -> torch.device:
    """With its number."""
    return torch.device(device.type, device.index or 0)


def _verdict(model: nn.Module, latents: Grid, config: ToDoConfig | DaToConfig, rates: Rates | None) -> Verdict:
    """Without ``rates`` from the operations alone."""
    dense, works = run_work(model, latents, config)
    todo = config if isinstance(config, ToDoConfig) else config.todo
    beside_dato = beside_todo = None
    if isinstance(config, DaToConfig) and todo is not None:
        _, alone = run_work(model, latents, replace(config, todo=None))
        beside_dato = compare_runs((alone, None), (works, None), rates)
        _, coarse = run_work(model, latents, todo)
        beside_todo = compare_runs((coarse * len(works), None), (works, None), rates)
    equal = Rates(1, 1) if rates is None else rates
    return Verdict(
        config,
        compare_runs(([dense] * len(works), None), (works, None), rates),
        downsamples=todo is not None and downsamples(model, latents, todo),
        share=equal.computing(self_attention_work(model, latents)) / equal.computing(dense),
        beside_dato=beside_dato,
        beside_todo=beside_todo,
    )
