"""ToDo as a patch of ComfyUI's self-attentions."""

from __future__ import annotations

import logging
import math
from typing import Any, TypeAlias

import torch

from todo_attn import ops
from todo_attn.config import ToDoConfig
from todo_attn.config.modes import coarse_grid

from .levels import Levels, grid_of, latent_of, tokens_at
from .steps import Steps

logger = logging.getLogger("todo_attn")

QKV: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Where a patch that has taken tokens out of keys and values leaves them whole, for ToDo: (those it left, the whole).
WHOLE = "todo_attn_whole"


class ToDoPatch:
    """An attn1 patch: the tokens that keys and values will be projected from, on a coarser grid.

    ComfyUI calls it before the projections, so they shrink too. The queries stay as they are. It leaves alone whatever
    it does not know as the image's tokens.
    """

    def __init__(self, config: ToDoConfig, levels: Levels, steps: Steps) -> None:
        levels.check(config)
        self.config, self.levels, self.steps = config, levels, steps
        self._said: tuple[int, int] | None = None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> QKV:
        level = self.levels.of.get(options.get("block", ("", 0)))
        if level is None or not self.steps.hold(options):
            return q, k, v
        key, value = _whole(k, v, options)
        grid = grid_of(key, level, options)
        if grid is None or value.shape[:2] != key.shape[:2]:
            return q, k, v
        self._say(latent_of(options))
        factor = self.factor_at(level, grid)
        if factor == (1, 1):
            return q, k, v
        coarse_key = ops.downsample_tokens(key, grid, factor, mode=self.config.mode)
        if value is key:
            return q, coarse_key, coarse_key
        return q, coarse_key, ops.downsample_tokens(value, grid, factor, mode=self.config.mode)

    def factor_at(self, level: int, grid: tuple[int, int]) -> tuple[float, float]:
        """The factor (fh, fw) for the self-attentions of ``level``, whose tokens are ``grid``."""
        return self.config.factor_for(grid, level, finest=level == self.levels.finest)

    def describe(self, latent: tuple[int, int]) -> str:
        """What it does to a ``latent`` of (height, width), level by level."""
        parts = []
        for level in self.levels.all:
            (height, width) = grid = tokens_at(level, latent)
            fh, fw = self.factor_at(level, grid)
            if (fh, fw) == (1, 1):
                parts.append(f"level {level} dense ({height * width} keys)")
            else:
                factor = fh if fh == fw else f"{fh} x {fw}"
                keys = math.prod(coarse_grid(grid, (fh, fw)))
                parts.append(f"level {level} factor {factor} ({height * width} tokens, {keys} keys)")
        return "; ".join(parts)

    def _say(self, latent: tuple[int, int]) -> None:
        """Log once for each size what happens: a patch that does nothing looks like one that does not work."""
        if latent != self._said:
            self._said = latent
            logger.info("ToDo, latent of %d x %d: %s", *latent, self.describe(latent))


def _whole(k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values before a patch of ours took tokens out of them."""
    left, whole = options.get(WHOLE, ((None, None), (k, v)))
    return whole if k is left[0] and v is left[1] else (k, v)
