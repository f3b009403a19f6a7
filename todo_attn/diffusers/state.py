"""The state of a model under ToDo: plain objects under one attribute of its modules, and the hooks.

The configuration of ``apply_todo`` is here and not in the processors, because an IP-Adapter rebuilds processors without
arguments. Nothing here is a module or a registered tensor, so nothing enters the state dict. Nothing refers to the
model, so a deep copy of the model has its own state.

The hooks are torch's own. diffusers' ``HookRegistry`` and accelerate's offloading both replace ``module.forward``, and
the first to be removed takes the other's wrapper with it. torch's hooks run outside ``forward``, and can be added and
removed beside both in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config.checks import ArgumentError
from ..config.modes import coarse_grid
from ..config.todo import ToDoConfig
from ..logs import logger
from ..ops.tracing import as_numbers, constant_in_graphs
from .call_stack import RunningModel, running_model
from .levels import check_levels
from .running_call import RunningCall

_Args: TypeAlias = tuple[Any, ...]
_Kwargs: TypeAlias = dict[str, Any]

# The attribute that holds a model's ModelState, a Transformer2DModel's TransformerState and an attn1's AttentionState;
# also the key of the plan in the cross_attention_kwargs, from a Transformer2DModel to the attentions in its blocks.
ATTRIBUTE = "_todo_attn"


class Plan(NamedTuple):
    """How a self-attention takes its keys and values in one call: from ``grid`` to the grid ``coarse``, by ``mode``.

    Equal grids are dense. ``queries`` (B, K) are the indices of the tokens that DaTo keeps as queries; None is all.
    """

    grid: tuple[int, int]
    coarse: tuple[int, int]
    mode: str
    queries: torch.Tensor | None = None


class TakesPlan:
    """A processor that gets the :class:`Plan` of the running call, as the argument named :data:`ATTRIBUTE`.

    ``config`` is its own configuration; None follows the model's.
    """

    config: ToDoConfig | None = None


def check_own_config(config: ToDoConfig, model: RunningModel | None) -> None:
    """Refuse a processor's own ``config`` that needs what is not known; ``model`` is None if it is not known.

    Raises:
        ValueError: ``config`` needs the model's levels or timestep, or names a level that the model lacks.
    """
    by_level = isinstance(config.factor, dict)
    for argument, needed, known in (
        ("factor", by_level, model is not None),
        ("timestep_range", not config.every_timestep, model is not None and model.timestep is not None),
        ("steps", not config.every_step, model is not None and model.timestep is not None),
    ):
        if needed and not known:
            raise ArgumentError(
                argument,
                f"of a ToDoProcessor must not be {getattr(config, argument)!r} if the model that calls it "
                "is not known: use apply_todo(model, config), or call the model once before it is compiled",
            )
    if model is not None and by_level:
        check_levels(config, model.module)


class ModelState:
    """On the model: the configuration of its layers, and its running call."""

    def __init__(self, config: ToDoConfig) -> None:
        self.config = config
        self.call = RunningCall()
        self._transformers: list[TransformerState] = []
        self._said_replaced = False
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, transformers: list[TransformerState], *, report: bool) -> None:
        """Hook ``model``. ``report``: whether to log a configuration that leaves all keys, or one row or column."""
        setattr(model, ATTRIBUTE, self)
        self.call.watch(model, self.config, None)
        if report:
            self._transformers = transformers
            self._handles.append(model.register_forward_hook(self._after_forward))

    def detach(self) -> None:
        self.call.detach()
        for handle in self._handles:
            handle.remove()

    def _after_forward(self, model: nn.Module, args: _Args, output: Any) -> None:
        self._report_first_call()

    # torch.compile runs these two while tracing: there is no graph break at the logger, and no guard on what they read.
    @constant_in_graphs
    def _report_first_call(self) -> None:
        """After the model's first call, warn if ToDo changed nothing, or left a single row or column of keys."""
        seen = [(t, t.plan.grid) for t in self._transformers if t.plan is not None]
        if not seen:
            return
        self._transformers = []
        if all(t.factor_for(grid) == (1, 1) for t, grid in seen):
            logger.warning(
                "%s changes nothing at this size: the factor is 1 on every grid of tokens (%s). "
                "Lower max_kv_tokens or give a factor to read fewer keys.",
                seen[0][0].config,
                _sizes_text(grid for _, grid in seen),
            )
        spent = [grid for t, grid in seen if t.config.factor != "auto" and _reaches_side(t.factor_for(grid), grid)]
        if spent:
            logger.warning(
                "%s leaves a single row or column of keys on some grids of tokens (%s): factor is how many tokens "
                "along each axis become one. max_kv_tokens is the number of keys.",
                seen[0][0].config,
                _sizes_text(spent),
            )

    @constant_in_graphs
    def say_replaced(self, processor: str) -> None:
        """Warn once that ToDo's processor was replaced by one of the class ``processor``."""
        if self._said_replaced:
            return
        self._said_replaced = True
        logger.warning(
            "ToDo is off in a self-attention whose processor was replaced by %s since. Attention slicing, xFormers, "
            "fused projections and loaded processors (Custom Diffusion's) do that, switched on or off: call apply_todo "
            "after them, or remove_todo to take ToDo off everywhere. print(todo_attn.status(model)) lists the layers.",
            processor,
        )


def _reaches_side(factor: tuple[float, float], grid: tuple[int, int]) -> bool:
    return any(f == side > 1 for f, side in zip(factor, grid, strict=True))


def _sizes_text(grids: Iterable[tuple[int, int]]) -> str:
    """Each size once, the largest first."""
    return ", ".join(f"{h}x{w}" for h, w in sorted(set(grids), reverse=True))


class TransformerState:
    """On a Transformer2DModel, whose hooks give each of its attn1 the plan of the running call.

    The transformer's input is still an image, so the grid of tokens is measured: it is right for every size, however
    the model's downsamplers round. The plan then travels as an argument through the blocks and their attentions to the
    processors; a hook removes it before processors that do not know it. So threads do not share plans, gradient
    checkpointing recomputes a block with the plan of its own call, and a block that is compiled alone sees dynamic
    numbers (a number on a module would be a constant of the graph).

    ``plan``, ``masked`` (attention had a mask) and ``misfit`` (it had another number of tokens than the grid) record
    the last call for :func:`todo_attn.status`. One reader is not a report: a processor that is set up in the middle of
    a call (:mod:`.grid`) finds its plan here.
    """

    def __init__(self, model: ModelState, level: int | None = None, *, finest: bool = False) -> None:
        self.model = model
        self.level = level
        self.finest = finest
        self.config = model.config
        self.plan: Plan | None = None
        self.masked = self.misfit = False
        self._handles: list[RemovableHandle] = []

    def attach(self, transformer: Transformer2DModel) -> None:
        setattr(transformer, ATTRIBUTE, self)
        blocks: Any = transformer.transformer_blocks
        self._handles = [transformer.register_forward_pre_hook(self._send_plan, with_kwargs=True)]
        for block in blocks:
            attentions = {block.attn1: self._meet_plan, block.attn2: self._drop_plan}
            if block.only_cross_attention:
                attentions[block.attn1] = self._drop_plan
            self._handles += [
                attn.register_forward_pre_hook(hook, with_kwargs=True)
                for attn, hook in attentions.items()
                if attn is not None
            ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def follow(self, config: ToDoConfig, transformer: nn.Module) -> None:
        """Make plans by ``config``, the model's or a processor's own; the latter is checked at its first use."""
        needs_model = isinstance(config.factor, dict) or not (config.every_timestep and config.every_step)
        if config is not self.model.config and needs_model:
            model = None if torch.compiler.is_compiling() else running_model(transformer)
            check_own_config(config, model)
            if model is not None:
                self.model.call.watch(model.module, config, model.timestep)
        self.config = config

    def factor_for(self, grid: tuple[int, int]) -> tuple[float, float]:
        """The factor (fh, fw) on ``grid``, at timesteps at which ToDo acts."""
        return self.config.factor_for(grid, self.level, finest=self.finest)

    def plan_for(self, grid: tuple[int, int]) -> Plan:
        """The plan of the running call on ``grid``."""
        coarse = coarse_grid(grid, self.factor_for(grid)) if self.model.call.acts(self.config) else grid
        return Plan(grid, coarse, self.config.mode)

    def _send_plan(self, transformer: Any, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
        config = self._config_of(transformer)
        if config is not self.config:
            self.follow(config, transformer)
        image = args[0] if args else kwargs["hidden_states"]
        height, width = as_numbers(image.shape[-2:])
        self.plan = self.plan_for((height, width))
        self.masked, self.misfit = kwargs.get("attention_mask") is not None, False
        given = kwargs.get("cross_attention_kwargs") or {}
        return args, {**kwargs, "cross_attention_kwargs": {**given, ATTRIBUTE: self.plan}}

    def _config_of(self, transformer: Any) -> ToDoConfig:
        for block in transformer.transformer_blocks:
            if isinstance(processor := block.attn1.processor, TakesPlan):
                return processor.config or self.model.config
        return self.config

    def _meet_plan(self, attn: Any, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
        """Before a self-attention.

        Raises:
            ValueError: its processor has another configuration than the other blocks of the transformer.
        """
        processor = attn.processor
        if isinstance(processor, TakesPlan):
            config = processor.config or self.model.config
            if config is not self.config and config != self.config:
                raise ArgumentError(
                    "config",
                    "of a ToDoProcessor must be the same in all blocks of a Transformer2DModel, got "
                    f"{config} beside {self.config}",
                )
            return None
        if getattr(attn, ATTRIBUTE).original is not processor:  # the user may restore the original
            self.model.say_replaced(type(processor).__name__)
        return self._drop_plan(attn, args, kwargs)

    def _drop_plan(self, attn: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
        return args, {name: x for name, x in kwargs.items() if name != ATTRIBUTE}


class AttentionState(NamedTuple):
    """On an attn1: its transformer's state, and the processor that ToDo replaced (None if the user set ToDo's)."""

    transformer: TransformerState
    original: Any | None

    def detach(self) -> None:
        """Nothing to undo: the hook on an attn1 belongs to its transformer's state."""
