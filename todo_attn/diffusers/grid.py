"""How a ToDoProcessor that nobody introduced to its model is introduced: once, by the call stack."""

from __future__ import annotations

from typing import Any

from ..config.todo import ToDoConfig
from .call_stack import running_model, running_transformer
from .install import attach_all
from .state import ATTRIBUTE, AttentionState, ModelState, TransformerState, check_own_config


def adopt_from_call_stack(attn: Any, tokens: int) -> AttentionState | None:
    """Learn the grid of ``attn``, an attn1 with a ToDoProcessor and no state, from the Transformer2DModel calling it.

    From then on hooks measure the grids, of all transformers of the model that is calling that one, so each model is
    looked up once, and the lookup is never traced.

    Returns:
        The state now attached, or None where ``attn`` is called by something else.

    Raises:
        ValueError: its processor has a configuration that does not fit the model. Nothing has been changed then.
    """
    running = running_transformer()
    if running is None:
        return None
    transformer, grid = running
    if grid is None or grid[0] * grid[1] != tokens:
        return None
    blocks: Any = transformer.transformer_blocks
    if not any(block.attn1 is attn for block in blocks):
        return None
    model, own = running_model(transformer), attn.processor.config
    if own is not None:
        check_own_config(own, model)
    state: TransformerState | None = getattr(transformer, ATTRIBUTE, None)
    if state is None and model is not None:
        # A processor without configuration is silent where it changes nothing, as any model is small at times.
        attach_all(model.module, ToDoConfig(), report=own is not None)
        state = getattr(transformer, ATTRIBUTE, None)
    if state is None:
        state = TransformerState(ModelState(ToDoConfig()))
        state.attach(transformer)
    for block in blocks:
        if getattr(block.attn1, ATTRIBUTE, None) is None:
            setattr(block.attn1, ATTRIBUTE, AttentionState(state, original=None))
    if own is not None:
        state.follow(own, transformer)
    state.plan = state.plan_for(grid)
    return getattr(attn, ATTRIBUTE)
