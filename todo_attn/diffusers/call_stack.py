"""What the call stack says of the running call.

A ToDoProcessor installed with ``set_attn_processor`` reads there what ``apply_todo`` would have told it. An attention
sees only a row of tokens, and their count does not give the grid: 160 x 90 (16:9) is also 120 x 120. The enclosing
``Transformer2DModel.forward`` has height and width in its frame, and the model's the timestep.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from .levels import transformers_by_level


class RunningTransformer(NamedTuple):
    """The innermost Transformer2DModel that is running; its grid is None where it is not known yet."""

    module: Transformer2DModel
    grid: tuple[int, int] | None


class RunningModel(NamedTuple):
    """The model that is running it, and what that was given as timestep, if anything."""

    module: nn.Module
    timestep: Any


def running_transformer() -> RunningTransformer | None:
    for module, variables in running_methods("forward"):
        if isinstance(module, Transformer2DModel):
            height, width = variables.get("height"), variables.get("width")
            return RunningTransformer(module, None if height is None or width is None else (int(height), int(width)))
    return None


def running_model(transformer: nn.Module) -> RunningModel | None:
    """The model built of down blocks, a mid block and up blocks of which ``transformer`` is a part."""
    for module, variables in running_methods("forward"):
        if not isinstance(module, nn.Module):
            continue
        if any(transformer is part for _, part in transformers_by_level(module)):
            return RunningModel(module, variables.get("timestep"))
    return None


def running_methods(name: str | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """``self`` and variables of each method on the call stack, or of those of that name, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        # Reading f_locals copies them, so the name comes first.
        if name in (None, frame.f_code.co_name) and "self" in frame.f_locals:
            yield frame.f_locals["self"], frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
