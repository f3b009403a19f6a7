"""Set up a ToDoProcessor that was installed with ``set_attn_processor``, at its first call."""

from __future__ import annotations

from typing import Any

from ..config.todo import ToDoConfig
from .call_stack import running_model, running_transformer
from .install import attach_all
from .state import ATTRIBUTE, AttentionState, ModelState, TransformerState, check_own_config


def adopt_from_call_stack(attn: Any, tokens: int) -> AttentionState | None:
    """Find the grid of ``attn``, an attn1 with a ToDoProcessor but no state, on the call stack, and hook its model.

    From then on the hooks measure the grids of all the model's transformers. So the call stack is read once for each
    model, and never while tracing.

    Args:
        tokens: how many tokens ``attn`` was given.

    Returns:
        The state now attached; None if ``attn`` is not called by a Transformer2DModel with a grid of that many tokens.

    Raises:
        ValueError: the processor's own configuration does not fit the model. Nothing has been changed then.
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
        # Without a configuration of its own, a processor that changes nothing at a small size gives no warning.
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
