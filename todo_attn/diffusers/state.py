"""What a model under ToDo carries: plain objects under one attribute of the modules concerned.

Configuration lives here and not in the processor, because loading an IP-Adapter rebuilds every processor as
``processor.__class__()``. Nothing here is a module or a tensor, so nothing enters the state dict, and nothing refers to
the model, so a deep copy of it has a state of its own.

The hooks are torch's own. diffusers' ``HookRegistry`` and accelerate's offloading both replace ``module.forward``, and
whichever is removed first takes the other's wrapper with it; torch's hooks run outside ``forward`` and can be added and
removed in any order beside both.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import ToDoConfig
from ..logs import logger
from ..ops.tracing import constant_in_graphs

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


class ModelState:
    """On the model: what its layers share. ``active`` says whether ToDo acts at the running call's timestep."""

    def __init__(self, config: ToDoConfig) -> None:
        self.config = config
        self.active = True
        self._transformers: list[TransformerState] = []
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, transformers: list[TransformerState], *, report: bool) -> None:
        """Hook ``model``; ``report`` says whether a configuration that changes nothing is logged."""
        setattr(model, ATTRIBUTE, self)
        if not self.config.every_timestep:
            self._handles.append(model.register_forward_pre_hook(self._read_timestep, with_kwargs=True))
        if report:
            self._transformers = transformers
            self._handles.append(model.register_forward_hook(self._after_forward))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    # torch.compile runs the hooks of the module that it compiles outside of the graph. Disabled, this one is not
    # compiled at all: it may read the timestep, and the model has one graph with ToDo and one without.
    @torch.compiler.disable(reason="ToDo reads the timestep: compile the model itself, not a function that calls it")
    def _read_timestep(self, model: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        low, high = self.config.timestep_range
        if isinstance(timestep, torch.Tensor):
            self.active = bool(((timestep >= low) & (timestep <= high)).all())
        elif timestep is not None:
            self.active = low <= timestep <= high

    def _after_forward(self, model: nn.Module, args: _Args, output: Any) -> None:
        self._report_idle()

    # Where this is traced it runs while tracing: torch.compile neither breaks the graph at the logger nor guards on
    # what is read here.
    @constant_in_graphs
    def _report_idle(self) -> None:
        """After the first call of the model, say so once if no self-attention had a factor above 1."""
        seen = [(t, t.plan.grid) for t in self._transformers if t.plan is not None]
        if not seen:
            return
        self._transformers = []
        if all(t.factor_for(grid) == (1, 1) for t, grid in seen):
            grids = ", ".join(f"{h}x{w}" for h, w in sorted({grid for _, grid in seen}, reverse=True))
            logger.warning(
                "%s changes nothing at this size: the factor is 1 on every grid of tokens (%s). "
                "Lower max_kv_tokens or give a factor to read fewer keys.",
                self.config,
                grids,
            )


class TransformerState:
    """On a Transformer2DModel, whose hooks give each attn1 in it the ``plan`` of the running call.

    The transformer's input is still an image, so its grid of tokens is measured and never computed: it is right for
    every size, and for whatever rounding the model's downsamplers do. From there the plan goes through the blocks as
    an argument, and is taken out where it arrives. Gradient checkpointing recomputes a block with its own arguments,
    whatever the model was called with since; and a block compiled alone has dynamic numbers among its arguments, where
    it would compile anew for each that it finds on a module.
    """

    def __init__(self, model: ModelState, level: int | None = None, *, finest: bool = False) -> None:
        self.model = model
        self.level = level
        self.finest = finest
        self.plan: Plan | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, transformer: Transformer2DModel) -> None:
        setattr(transformer, ATTRIBUTE, self)
        blocks: Any = transformer.transformer_blocks
        self._handles = [
            transformer.register_forward_pre_hook(self._send_plan, with_kwargs=True),
            *(
                attn.register_forward_pre_hook(self._take_plan, with_kwargs=True)
                for block in blocks
                for attn in (block.attn1, block.attn2)
                if attn is not None
            ),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def factor_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The factor (fh, fw) on ``grid``, at a timestep where ToDo acts."""
        return self.model.config.factor_for(grid, self.level, finest=self.finest)

    def plan_for(self, grid: tuple[int, int]) -> Plan:
        """The plan of the running call on ``grid``."""
        return Plan(grid, self.factor_for(grid) if self.model.active else (1, 1), self.model.config.mode)

    def _send_plan(self, transformer: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
        image = args[0] if args else kwargs["hidden_states"]
        plan = self.plan_for((image.shape[-2], image.shape[-1]))
        given = kwargs.get("cross_attention_kwargs") or {}
        return args, {**kwargs, "cross_attention_kwargs": {**given, ATTRIBUTE: plan}}

    def _take_plan(self, attn: nn.Module, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
        self.plan = kwargs.get(ATTRIBUTE, self.plan)
        return args, {name: x for name, x in kwargs.items() if name != ATTRIBUTE}


class AttentionState(NamedTuple):
    """On an attn1: where it is, and the processor that ToDo replaced (None where the user put ToDo's in)."""

    transformer: TransformerState
    original: Any | None

    def detach(self) -> None:
        """Nothing to undo: the hook on an attn1 is its transformer's."""


def detach_all(model: nn.Module) -> None:
    """Take every state and every hook of ToDo's off ``model`` and the modules in it."""
    for module in model.modules():
        state = module.__dict__.pop(ATTRIBUTE, None)
        if state is not None:
            state.detach()
