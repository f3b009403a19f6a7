"""Compares every self-attention of a UNet under ToDo with the reference, at the size that is timed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel

from todo_attn import ToDoConfig
from todo_attn.config.modes import coarse_grid
from todo_attn.diffusers.levels import self_attentions, transformers_by_level
from todo_attn.diffusers.state import ATTRIBUTE
from todo_attn.ops import reference

_SCORES = 1 << 25  # computed for a layer, at most: all scores of one 512 x 512 image with 1024 keys
# Relative to the mean norm of a head's output. Errors of right outputs were at most 1.3 eps in half precision and 1e-6
# in fp32; the error of zeros is 1 or more.
_PRECISIONS, _LEAST = 16, 1e-4


@contextmanager
def against_oracle(model: UNet2DConditionModel, config: ToDoConfig) -> Iterator[None]:
    """Inside, each self-attention of ``model``, which has ToDo by ``config`` on it, must agree with the reference.

    The reference uses only the input and the weights of a layer. It computes grid, level, factor, keys and values by
    itself. If DaTo prunes, the outputs are those of the kept tokens. In a large layer every n-th token is compared, in
    each head.

    Raises:
        ValueError: an output differs.
    """
    levels = transformers_by_level(model)
    finest = min(level for level, _ in levels)
    handles = []
    for level, transformer in levels:
        grid: list[int] = []

        def measure(module: Any, args: Any, kwargs: Any, grid: list[int] = grid) -> None:
            grid[:] = (args[0] if args else kwargs["hidden_states"]).shape[-2:]

        handles.append(transformer.register_forward_pre_hook(measure, with_kwargs=True))
        for attn in self_attentions(transformer):
            layer = _Layer(attn, grid, level, level == finest, config)
            handles += [
                attn.register_forward_pre_hook(layer.enter, with_kwargs=True),
                attn.to_out[0].register_forward_pre_hook(layer.answered),
                attn.register_forward_hook(layer.leave),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Layer:
    """The hooks of one self-attention, which compare its output, before ``to_out``, with the reference."""

    def __init__(self, attn: Any, grid: list[int], level: int, finest: bool, config: ToDoConfig) -> None:
        self.attn, self.grid, self.level, self.finest, self.config = attn, grid, level, finest, config
        self.x: torch.Tensor | None = None
        self.answer: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None

    def enter(self, module: Any, args: Any, kwargs: Any) -> None:
        self.x, self.answer = args[0] if args else kwargs["hidden_states"], None
        self.kept = kwargs[ATTRIBUTE].queries if ATTRIBUTE in kwargs else None

    def answered(self, module: Any, args: Any) -> None:
        self.answer = args[0]

    def leave(self, module: Any, args: Any, output: Any) -> None:
        (x, self.x), (answer, self.answer) = (self.x, None), (self.answer, None)
        assert x is not None
        grid = (self.grid[0], self.grid[1])
        factor = self.config.factor_for(grid, self.level, finest=self.finest)
        what = f"self-attention of {grid[0]} x {grid[1]} tokens with factor {factor[0]:g} x {factor[1]:g}"
        queries = x
        if factor == (1, 1):
            grid = (1, x.shape[1])  # dense: attention among the given tokens
        else:
            queries = x if self.kept is None else reference.gather_tokens(x, self.kept)
        if answer is None or answer.shape[:2] != queries.shape[:2]:
            got = None if answer is None else tuple(answer.shape[:2])
            raise ValueError(f"{what} must answer for {tuple(queries.shape[:2])} tokens, got {got}")
        self._compare(what, queries, x, grid, factor, answer)

    def _compare(
        self,
        what: str,
        queries: torch.Tensor,
        x: torch.Tensor,
        grid: tuple[int, int],
        factor: tuple[float, float],
        answer: torch.Tensor,
    ) -> None:
        """``answer`` (B, K, heads * head_dim) is for ``queries`` (B, K, C) over the tokens ``x`` (B, N, C)."""
        attn, (batch, tokens) = self.attn, queries.shape[:2]
        keys = math.prod(coarse_grid(grid, factor))
        # An odd step reaches every row of the tiles of 64 or 128; the last token is always included.
        step = -(-batch * tokens * attn.heads * keys // _SCORES) | 1
        rows = slice((tokens - 1) % step, None, step)
        wide = torch.float64 if x.dtype == torch.float32 else torch.float32

        def heads(t: torch.Tensor) -> torch.Tensor:
            return t.to(wide).unflatten(-1, (attn.heads, -1))

        query, key, value = heads(attn.to_q(queries[:, rows])), heads(attn.to_k(x)), heads(attn.to_v(x))
        right = reference.downsampled_attention(
            query, key, value, grid, factor, mode=self.config.mode, scale=attn.scale
        )
        error = (heads(answer[:, rows]) - right).norm(dim=-1).max() / right.norm(dim=-1).mean()
        limit = max(_LEAST, _PRECISIONS * torch.finfo(x.dtype).eps)
        if not error <= limit:  # also if it is NaN
            raise ValueError(f"{what} must be within {limit:.2g} of the reference, got {error.item():.2g}")
