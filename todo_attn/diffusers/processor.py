"""ToDo as an attention processor: ``AttnProcessor2_0`` with keys and values from a coarser grid of tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
)
from diffusers.utils import deprecate

from .. import ops
from ..config import ToDoConfig
from ..logs import logger
from ..ops.tracing import constant_in_graphs
from .grid import adopt_from_call_stack
from .state import ATTRIBUTE, AttentionState, Plan

_DEFAULT_CONFIG = ToDoConfig()
_DENSE = AttnProcessor2_0()
_DENSE_UNSCALED = AttnProcessor()
_DENSE_ADDED_KV = AttnAddedKVProcessor2_0()


def default_processor(attn: Attention) -> Any:
    """The processor that diffusers itself gives ``attn``. AttnProcessor2_0 ignores ``attn.scale``: see scale_qk."""
    if attn.added_kv_proj_dim is not None:
        return _DENSE_ADDED_KV
    return _DENSE if attn.scale_qk else _DENSE_UNSCALED


class ToDoProcessor:
    """Token Downsampling (ToDo, arXiv 2402.13573) for ``unet.set_attn_processor(ToDoProcessor())``.

    Self-attention keeps every query and reads keys and values of a coarser grid, taken before ``to_k`` and ``to_v`` so
    that the projections shrink too. Alone it follows ``ToDoConfig()``: at most 4096 keys, at every level and any size.
    :func:`todo_attn.apply_todo` installs it with another configuration, which is kept on the model, not here.

    It runs dense, through the processor that it replaced, or diffusers' default one, wherever ToDo does not apply:
    cross-attention, a given ``attention_mask``, factor 1, a timestep outside the configured range, and a self-attention
    whose grid of tokens is not known. The last logs one warning: it is the case when ``torch.compile`` traces a model
    that has this processor and has neither been called before nor given to ``apply_todo``, and for self-attention
    outside a ``Transformer2DModel`` (a video model's motion modules, say) on inputs that are not images.
    """

    def __init__(self) -> None:
        self._warned = False

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``hidden_states`` (B, N, C) or (B, C, H, W) -> the same shape and dtype. See ``AttnProcessor2_0``.

        Raises:
            ValueError: ``encoder_hidden_states`` is what an IP-Adapter gives, text and image tokens as a tuple.
        """
        if isinstance(encoder_hidden_states, tuple):
            raise ValueError(
                "encoder_hidden_states must be a tensor or None, got tuple: an IP-Adapter is loaded, and "
                "set_attn_processor took its own processors off. Load it again and use apply_todo(pipe), which sets "
                "those of self-attention only"
            )
        plan = None
        if encoder_hidden_states is None and attention_mask is None:
            plan = self._plan(attn, hidden_states)
        if plan is None or plan.factor == (1, 1):
            state = getattr(attn, ATTRIBUTE, None)
            dense = default_processor(attn) if state is None or state.original is None else state.original
            # Some processors, the sliced one for one, have no temb: it is passed on only where it was given.
            rest = (temb, *args) if temb is not None or args else ()
            return dense(attn, hidden_states, encoder_hidden_states, attention_mask, *rest, **kwargs)
        if args or kwargs.get("scale") is not None:
            deprecate("scale", "1.0.0", "The `scale` argument is ignored. Pass it through `cross_attention_kwargs`.")

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (B, N, C)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        # Taking tokens commutes with a linear layer, so it comes first and to_k and to_v see M tokens instead of N.
        coarse = ops.downsample_tokens(hidden_states, plan.grid, plan.factor, mode=plan.mode)  # (B, M, C)
        if plan.queries is not None:
            hidden_states = ops.gather_tokens(hidden_states, plan.queries)  # (B, K, C)
        coarse_grid = (plan.grid[0] // plan.factor[0], plan.grid[1] // plan.factor[1])
        query, key, value = attn.to_q(hidden_states), attn.to_k(coarse), attn.to_v(coarse)
        head_dim = key.shape[-1] // attn.heads
        query = query.unflatten(-1, (attn.heads, head_dim))  # (B, N, H, D)
        key = key.unflatten(-1, (attn.heads, head_dim))  # (B, M, H, D)
        value = value.unflatten(-1, (attn.heads, head_dim))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        hidden_states = ops.downsampled_attention(query, key, value, coarse_grid, scale=attn.scale)
        hidden_states = attn.to_out[0](hidden_states.flatten(2))
        hidden_states = attn.to_out[1](hidden_states)  # dropout

        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _plan(self, attn: Attention, hidden_states: torch.Tensor) -> Plan | None:
        """What to do in a self-attention; None for dense, because no grid is known."""
        if hidden_states.ndim == 4:  # an image is its own grid
            grid = (hidden_states.shape[2], hidden_states.shape[3])
            return Plan(grid, _DEFAULT_CONFIG.factor_for(grid), _DEFAULT_CONFIG.mode)
        tokens = hidden_states.shape[1]
        state: AttentionState | None = getattr(attn, ATTRIBUTE, None)
        if state is None and not torch.compiler.is_compiling():
            state = adopt_from_call_stack(attn, tokens)
        plan = None if state is None else state.transformer.plan
        if plan is None or (plan.factor != (1, 1) and plan.grid[0] * plan.grid[1] != tokens):
            self._warn_no_grid()
            return None
        return plan

    @constant_in_graphs  # traced, it runs while tracing
    def _warn_no_grid(self) -> None:
        if self._warned:
            return
        self._warned = True
        logger.warning(
            "ToDoProcessor: the grid of tokens of a self-attention is not known, so it runs dense. apply_todo(pipe) "
            "sets up every self-attention that has one, also before torch.compile."
        )
