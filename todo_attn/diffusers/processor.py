"""ToDo as an attention processor: ``AttnProcessor2_0`` with keys and values taken on a coarser grid of tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.utils import deprecate

from .. import ops
from ..config.checks import ArgumentError
from ..config.modes import coarse_grid
from ..config.todo import ToDoConfig
from ..logs import logger
from ..ops.downsample import coarse_tokens
from ..ops.tracing import as_numbers, constant_in_graphs
from .grid import adopt_from_call_stack
from .install import replaced_processor
from .state import ATTRIBUTE, AttentionState, Plan, TakesPlan, check_own_config

_DEFAULT_CONFIG = ToDoConfig()


class ToDoProcessor(TakesPlan):
    """Token Downsampling (ToDo, arXiv 2402.13573) for ``unet.set_attn_processor(ToDoProcessor())``.

    Self-attention keeps every query and reads keys and values of a coarser grid. They are taken before ``to_k`` and
    ``to_v``, so that the projections shrink too. One processor serves any number of layers and models; all blocks of a
    ``Transformer2DModel`` must have the same configuration.

    It calls the processor that it replaced, or else diffusers' default one, wherever ToDo does not apply: in
    cross-attention, with an ``attention_mask``, at factor 1, in a call outside the configured ranges, and in a
    self-attention whose grid of tokens is not known. The last case logs one warning. It occurs if ``torch.compile``
    traces a model that was neither called before nor given to ``apply_todo``, and in self-attention outside a
    ``Transformer2DModel`` (a video model's motion modules) on inputs that are not images.

    Args:
        config: None is the configuration that :func:`todo_attn.apply_todo` left on the model, or else
            ``ToDoConfig()``: at most 4096 keys at every level and any size. A configuration given here takes precedence
            over the model's. A factor by level, a narrower ``timestep_range`` or narrower ``steps`` work in the
            self-attentions of a UNet or ControlNet only, because they need the model's levels or timestep.

    Raises:
        ArgumentError: ``config`` is neither a ``ToDoConfig`` nor None. At the first call: it names a level that the
            model lacks, or needs levels or a timestep that are not known (in a VAE, for example).
    """

    # diffusers rebuilds a processor as ``processor.__class__()`` when an IP-Adapter is loaded or unloaded, even before
    # the first call. So a processor with a configuration has a class of its own, which holds the configuration.
    def __new__(cls, config: ToDoConfig | None = None, *args: Any, **kwargs: Any) -> ToDoProcessor:
        return super().__new__(_class_with(cls, config) if isinstance(config, ToDoConfig) else cls)

    def __init__(self, config: ToDoConfig | None = None) -> None:
        if config is not None and not isinstance(config, ToDoConfig):
            raise ArgumentError("config", f"must be a ToDoConfig or None, got {type(config).__name__}")
        self._warned = False

    def __repr__(self) -> str:
        """diffusers' errors show this when they refuse a processor of an unknown class."""
        config = "" if self.config is None else repr(self.config)
        return f"<ToDoProcessor({config}), which todo_attn.remove_todo(model) takes off>"

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        _todo_attn: Plan | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``hidden_states`` (B, N, C) or (B, C, H, W) -> the same shape and dtype. See ``AttnProcessor2_0``.

        Raises:
            ArgumentError: ``encoder_hidden_states`` is a tuple of text and image tokens, as an IP-Adapter gives; or, at
                the first call, the configuration does not fit the model.
        """
        if isinstance(encoder_hidden_states, tuple):
            raise ArgumentError(
                "encoder_hidden_states",
                "must be a tensor or None, got tuple: an IP-Adapter is loaded, and "
                "set_attn_processor took its own processors off. Load it again and use apply_todo(pipe), which sets "
                "those of self-attention only",
            )
        plan = None
        if encoder_hidden_states is None and attention_mask is None:
            plan = self._plan(attn, hidden_states, _todo_attn)
        if plan is None or plan.coarse == plan.grid:
            dense = replaced_processor(attn)
            # Some processors, such as the sliced one, take no temb.
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

        # Taking tokens commutes with a linear layer. Done first, it leaves to_k and to_v M tokens instead of N.
        coarse = coarse_tokens(hidden_states, plan.grid, plan.coarse, plan.mode)  # (B, M, C)
        if plan.queries is not None:
            hidden_states = ops.gather_tokens(hidden_states, plan.queries)  # (B, K, C)
        query, key, value = attn.to_q(hidden_states), attn.to_k(coarse), attn.to_v(coarse)
        head_dim = key.shape[-1] // attn.heads
        query = query.unflatten(-1, (attn.heads, head_dim))  # (B, N, H, D)
        key = key.unflatten(-1, (attn.heads, head_dim))  # (B, M, H, D)
        value = value.unflatten(-1, (attn.heads, head_dim))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)

        hidden_states = ops.downsampled_attention(query, key, value, plan.coarse, scale=attn.scale)
        hidden_states = attn.to_out[0](hidden_states.flatten(2))
        hidden_states = attn.to_out[1](hidden_states)  # dropout

        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        # Dividing by 1 would be a pass over the whole output.
        return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor

    def _plan(self, attn: Attention, hidden_states: torch.Tensor, sent: Plan | None) -> Plan | None:
        """The plan of this self-attention; None if its grid is not known, which makes it dense."""
        if hidden_states.ndim == 4:  # an image is its own grid
            config = _DEFAULT_CONFIG if self.config is None else self.config
            check_own_config(config, None)
            height, width = as_numbers(hidden_states.shape[2:])
            grid = (height, width)
            return Plan(grid, coarse_grid(grid, config.factor_for(grid)), config.mode)
        (tokens,) = as_numbers(hidden_states.shape[1:2])
        state: AttentionState | None = getattr(attn, ATTRIBUTE, None)
        if state is None and not torch.compiler.is_compiling():
            state = adopt_from_call_stack(attn, tokens)
        plan = state.transformer.plan if sent is None and state is not None else sent
        if plan is None or (plan.coarse != plan.grid and plan.grid[0] * plan.grid[1] != tokens):
            self._warn_no_grid()
            if state is not None:
                state.transformer.misfit = plan is not None
            return None
        return plan

    @constant_in_graphs  # so that torch.compile warns while tracing, without a graph break
    def _warn_no_grid(self) -> None:
        if self._warned:
            return
        self._warned = True
        logger.warning(
            "ToDoProcessor: the grid of tokens of a self-attention is not known, so it runs dense. apply_todo(pipe) "
            "sets up every self-attention that has one, also before torch.compile."
        )


_CLASSES: dict[tuple[type[ToDoProcessor], ToDoConfig], type[ToDoProcessor]] = {}


def written_class(processor: object) -> type:
    """The class of ``processor``; of a ToDoProcessor with a configuration the class that was given it."""
    return getattr(type(processor), "_written_class", type(processor))


def _class_with(cls: type[ToDoProcessor], config: ToDoConfig) -> type[ToDoProcessor]:
    """A subclass of ``cls`` that holds ``config``, under the same name; one for each configuration."""
    cls = getattr(cls, "_written_class", cls)
    if (cls, config) in _CLASSES:
        return _CLASSES[cls, config]

    def reduce(self: ToDoProcessor) -> tuple[Any, ...]:  # pickle finds a class by its name, which is that of ``cls``
        return cls, (config,), self.__dict__

    body = {"config": config, "_written_class": cls, "__reduce__": reduce, "__doc__": cls.__doc__}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return _CLASSES.setdefault((cls, config), type(cls.__name__, (cls,), body))
