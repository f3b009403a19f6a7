"""How a ToDoProcessor that nobody introduced to its model finds the grid: once, on the call stack."""

from __future__ import annotations

import sys

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from ..config import ToDoConfig
from .state import ATTRIBUTE, AttentionState, ModelState, TransformerState


def adopt_from_call_stack(attn: nn.Module, tokens: int) -> AttentionState | None:
    """Learn the grid of ``attn``, an attn1 without state, from the Transformer2DModel that is calling it.

    An attention sees only a row of tokens, and their count does not give the grid: 160 x 90 (16:9) is also 120 x 120.
    The enclosing ``Transformer2DModel.forward`` has the image's height and width in its frame. From then on hooks on
    that module measure them, so each module is looked up once, and the lookup is never traced.

    Returns:
        The state now attached, or None where ``attn`` is called by something else.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name != "forward":
            continue
        transformer = frame.f_locals.get("self")
        if not isinstance(transformer, Transformer2DModel):
            continue
        blocks = [block.attn1 for block in transformer.transformer_blocks]
        height, width = frame.f_locals.get("height"), frame.f_locals.get("width")
        if height is None or width is None or height * width != tokens or not any(a is attn for a in blocks):
            return None
        state = getattr(transformer, ATTRIBUTE, None)
        if state is None:
            state = TransformerState(ModelState(ToDoConfig()))
            state.attach(transformer)
        state.plan = state.plan_for((height, width))
        for attn1 in blocks:
            if getattr(attn1, ATTRIBUTE, None) is None:
                setattr(attn1, ATTRIBUTE, AttentionState(state, original=None))
        return getattr(attn, ATTRIBUTE)
    return None
