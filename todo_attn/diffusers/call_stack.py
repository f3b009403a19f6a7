"""The running forward methods, read from the call stack.

A ToDoProcessor installed with ``set_attn_processor`` has no hooks to tell it the grid. It sees a sequence of tokens,
whose length does not determine the grid: 160 x 90 (16:9) has as many as 120 x 120. But the frame of the enclosing
``Transformer2DModel.forward`` holds height and width, and the frame of the model's forward holds the timestep.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from .levels import transformers_by_level


class RunningTransformer(NamedTuple):
    """The innermost running Transformer2DModel; its grid is None if it is not known yet."""

    module: Transformer2DModel
    grid: tuple[int, int] | None


class RunningModel(NamedTuple):
    """The model that runs it, and the timestep that the model was given, if any."""

    module: nn.Module
    timestep: Any


def running_transformer() -> RunningTransformer | None:
    for module, variables in running_methods("forward"):
        if isinstance(module, Transformer2DModel):
            height, width = variables.get("height"), variables.get("width")
            return RunningTransformer(module, None if height is None or width is None else (int(height), int(width)))
    return None


def running_model(transformer: nn.Module) -> RunningModel | None:
    """The model with ``transformer`` in its down, mid or up blocks; None if none of the kind is running."""
    for module, variables in running_methods("forward"):
        if not isinstance(module, nn.Module):
            continue
        if any(transformer is part for _, part in transformers_by_level(module)):
            return RunningModel(module, variables.get("timestep"))
    return None


def running_methods(name: str | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """``self`` and local variables of each method on the call stack (of that name), the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        # Reading f_locals copies it, so check the name first.
        if name in (None, frame.f_code.co_name) and "self" in frame.f_locals:
            yield frame.f_locals["self"], frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
