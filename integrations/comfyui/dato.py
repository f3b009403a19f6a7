"""DaTo's token pruning as patches of ComfyUI's self-attentions. It caches nothing."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from todo_attn import ops
from todo_attn.config import DaToConfig

from .levels import Levels, grid_of
from .steps import Steps
from .todo import QKV, WHOLE

# Where ``enter`` leaves for ``leave``, in the options of one block's call, what fills the pruned tokens in.
_SOURCE = "todo_attn_source"


class DaToPatch:
    """An attn1 patch and an attn1 output patch: redundant tokens stay out of the finest self-attentions.

    Of ``config`` it uses the prune ratio, the patch and the seed. The base tokens are chosen by noise alone, as the
    published code does when it caches nothing: a patch does not see the outputs of the UNet. Similarity is that of the
    normed tokens, which are all that a patch sees.
    """

    def __init__(self, config: DaToConfig, levels: Levels, steps: Steps) -> None:
        self.config, self.levels, self.steps = config, levels, steps

    def enter(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> QKV:
        """The attn1 patch: only the kept tokens. Keys and values that ToDo has made coarse stay."""
        options.pop(_SOURCE, None)
        level = self.levels.of.get(options.get("block", ("", 0)))
        if level != self.levels.finest or not self.steps.hold(options):
            return q, k, v
        grid = grid_of(q, level, options)
        height, width = self.config.patch
        if grid is None or grid[0] < height or grid[1] < width:  # no whole patch, so no base token
            return q, k, v
        kept, source = ops.plan_pruning(q, self._score(q, options), grid, self.config.ratio_for(0), self.config.patch)
        options[_SOURCE] = source
        query = ops.gather_tokens(q, kept)
        if k.shape[:2] != q.shape[:2] or v.shape[:2] != q.shape[:2]:
            return query, k, v
        key = query if k is q else ops.gather_tokens(k, kept)
        value = key if v is k else ops.gather_tokens(v, kept)
        options[WHOLE] = ((key, value), (k, v))
        return query, key, value

    def leave(self, n: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """The attn1 output patch: each pruned token gets the output of its most similar kept token."""
        source = options.pop(_SOURCE, None)
        return n if source is None else ops.recover_tokens(n, source)

    def _score(self, q: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Noise (B, N), the same for all images of a batch; from the seed, the step and the block, so it repeats."""
        place = (self.config.seed, self.steps.sigma(options), options["block"], options.get("block_index", 0))
        digest = hashlib.blake2b(repr(place).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        noise = torch.randn((1, q.shape[1]), generator=generator)
        return noise.to(q.device).expand(q.shape[0], -1)
