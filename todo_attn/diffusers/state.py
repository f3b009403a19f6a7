"""What a model under ToDo carries: plain objects under one attribute of the modules concerned.

The configuration of ``apply_todo`` lives here and not in the processors, which others rebuild and replace. Nothing here
is a module or a tensor, so nothing enters the state dict, and nothing refers to the model, so a deep copy of it has a
state of its own.

The hooks are torch's own. diffusers' ``HookRegistry`` and accelerate's offloading both replace ``module.forward``, and
whichever is removed first takes the other's wrapper with it; torch's hooks run outside ``forward`` and can be added and
removed in any order beside both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config.checks import ArgumentError
from ..config.todo import ToDoConfig
from ..logs import logger
from ..ops.tracing import as_numbers, constant_in_graphs
from .call_stack import RunningModel, running_model
from .levels import check_levels

_Args: TypeAlias = tuple[Any, ...]
_Kwargs: TypeAlias = dict[str, Any]


# Under this name a model has its ModelState, a Transformer2DModel its TransformerState, an attn1 its AttentionState.
# Under it, too, a plan travels in the cross_attention_kwargs from a Transformer2DModel to the attentions in its blocks.
ATTRIBUTE = "_todo_attn"


class Plan(NamedTuple):
    """How a self-attention takes its keys and values in one call: every (fh, fw)-th token of the grid, by ``mode``.

    Factor (1, 1) is dense. ``queries`` (B, K) are the tokens whose queries are wanted, where DaTo prunes the others.
    """

    grid: tuple[int, int]
    factor: tuple[int, int]
    mode: str
    queries: torch.Tensor | None = None


class TakesPlan:
    """A processor that is given the :class:`Plan` of the running call, as the argument named :data:`ATTRIBUTE`.

    ``config`` is one of its own, which it follows in place of its model's.
    """

    config: ToDoConfig | None = None


def check_own_config(config: ToDoConfig, model: RunningModel | None) -> None:
    """Refuse a processor's own ``config`` that asks for more than is known; ``model`` is None where it is not known.

    Raises:
        ValueError: it needs the model's levels or timestep, or names a level that the model lacks.
    """
    by_level = isinstance(config.factor, dict)
    for argument, needed, known in (
        ("factor", by_level, model is not None),
        ("timestep_range", not config.every_timestep, model is not None and model.timestep is not None),
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
    """On the model: what its layers share, the configuration and which ranges the running call's timestep lies in."""

    def __init__(self, config: ToDoConfig) -> None:
        self.config = config
        self._in_range: dict[tuple[float, float], bool] = {}
        self._transformers: list[TransformerState] = []
        self._said_replaced = False
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, transformers: list[TransformerState], *, report: bool) -> None:
        """Hook ``model``; ``report`` says whether a configuration that leaves all keys, or one, is logged."""
        setattr(model, ATTRIBUTE, self)
        self.watch(model, self.config, None)
        if report:
            self._transformers = transformers
            self._handles.append(model.register_forward_hook(self._after_forward))

    def watch(self, model: nn.Module, config: ToDoConfig, timestep: Any) -> None:
        """From now on read the timestep of ``model`` for ``config``, too; in the running call it is ``timestep``."""
        if config.every_timestep or config.timestep_range in self._in_range:
            return
        if not self._in_range:
            self._handles.append(model.register_forward_pre_hook(self._read_timestep, with_kwargs=True))
        self._in_range[config.timestep_range] = True
        self._compare(timestep)

    def acts(self, config: ToDoConfig) -> bool:
        """Whether ToDo acts by ``config`` at the running call's timestep."""
        return config.every_timestep or self._in_range[config.timestep_range]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    # torch.compile runs the hooks of the module that it compiles outside of the graph. Disabled, this one is not
    # compiled at all: it may read the timestep, and the model has one graph with ToDo and one without.
    @torch.compiler.disable(reason="ToDo reads the timestep: compile the model itself, not a function that calls it")
    def _read_timestep(self, model: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        self._compare(args[1] if len(args) > 1 else kwargs.get("timestep"))

    def _compare(self, timestep: Any) -> None:
        if isinstance(timestep, torch.Tensor) and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            low, high = next(iter(self._in_range))
            raise ArgumentError(
                "timestep_range",
                "must hold all of 0 to 1000 while torch.jit.trace or torch.export records the model, "
                f"whose graph is one for every timestep, got {(low, high)}",
            )
        for low, high in self._in_range:
            if isinstance(timestep, torch.Tensor):
                self._in_range[low, high] = bool(((timestep >= low) & (timestep <= high)).all())
            elif timestep is not None:
                self._in_range[low, high] = low <= timestep <= high

    def _after_forward(self, model: nn.Module, args: _Args, output: Any) -> None:
        self._report_first_call()

    # Where these two are traced they run while tracing: torch.compile neither breaks the graph at the logger nor guards
    # on what is read here.
    @constant_in_graphs
    def _report_first_call(self) -> None:
        """After the first call of the model, say so once if every self-attention kept all its keys, or one a single."""
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
        """Once: a self-attention has another processor than ToDo's now, of the class named."""
        if self._said_replaced:
            return
        self._said_replaced = True
        logger.warning(
            "ToDo is off in a self-attention whose processor was replaced by %s since. Attention slicing, xFormers, "
            "fused projections and loaded processors (Custom Diffusion's) do that, switched on or off: call apply_todo "
            "after them, or remove_todo to take ToDo off everywhere. print(todo_attn.status(model)) lists the layers.",
            processor,
        )


def _reaches_side(factor: tuple[int, int], grid: tuple[int, int]) -> bool:
    return any(f == side > 1 for f, side in zip(factor, grid, strict=True))


def _sizes_text(grids: Iterable[tuple[int, int]]) -> str:
    """Each once, the largest first."""
    return ", ".join(f"{h}x{w}" for h, w in sorted(set(grids), reverse=True))


class TransformerState:
    """On a Transformer2DModel, whose hooks give each attn1 in it the plan of the running call.

    The transformer's input is still an image, so its grid of tokens is measured and never computed: it is right for
    every size, and for whatever rounding the model's downsamplers do. From there the plan goes as an argument through
    the blocks and their attentions to the processors; it is taken out before others, which do not know it. So calls
    from several threads do not meet, gradient checkpointing recomputes a block with its own arguments, whatever the
    model was called with since, and a block compiled alone has dynamic numbers among its arguments, where it would
    compile anew for each that it finds on a module.

    What is kept here of the last call is for reports: ``plan``, and whether attention was ``masked``, or had another
    number of tokens than the grid (``misfit``). Only a processor that was introduced in the middle of a call
    (:mod:`.grid`) reads its plan here.
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
        """Let the plans be by ``config``, the model's or one of a processor's own, checked at its first use."""
        if config is not self.model.config and (isinstance(config.factor, dict) or not config.every_timestep):
            model = None if torch.compiler.is_compiling() else running_model(transformer)
            check_own_config(config, model)
            if model is not None:
                self.model.watch(model.module, config, model.timestep)
        self.config = config

    def factor_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The factor (fh, fw) on ``grid``, at a timestep where ToDo acts."""
        return self.config.factor_for(grid, self.level, finest=self.finest)

    def plan_for(self, grid: tuple[int, int]) -> Plan:
        """The plan of the running call on ``grid``."""
        return Plan(grid, self.factor_for(grid) if self.model.acts(self.config) else (1, 1), self.config.mode)

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
            ValueError: its processor has a configuration of its own that is not that of the transformer's others.
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
        if getattr(attn, ATTRIBUTE).original is not processor:  # but where the user put back what was there
            self.model.say_replaced(type(processor).__name__)
        return self._drop_plan(attn, args, kwargs)

    def _drop_plan(self, attn: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
        return args, {name: x for name, x in kwargs.items() if name != ATTRIBUTE}


class AttentionState(NamedTuple):
    """On an attn1: where it is, and the processor that ToDo replaced (None where the user put ToDo's in)."""

    transformer: TransformerState
    original: Any | None

    def detach(self) -> None:
        """Nothing to undo: the hook on an attn1 is its transformer's."""
