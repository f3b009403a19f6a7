"""What a model under ToDo carries: plain objects under one attribute of the modules concerned.

Configuration lives here and not in the processor, because loading an IP-Adapter rebuilds every processor as
``processor.__class__()``. Nothing here is a module or a tensor, so nothing enters the state dict, and nothing refers to
the model, so a deep copy of it has a state of its own.

The hooks are torch's own. diffusers' ``HookRegistry`` and accelerate's offloading both replace ``module.forward``, and
whichever is removed first takes the other's wrapper with it; torch's hooks run outside ``forward`` and can be added and
removed in any order beside both.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import ToDoConfig

logger = logging.getLogger("todo_attn")

# Under this name a model has its ModelState, a Transformer2DModel its TransformerState, an attn1 its AttentionState.
ATTRIBUTE = "_todo_attn"


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
    def _read_timestep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        low, high = self.config.timestep_range
        if isinstance(timestep, torch.Tensor):
            self.active = bool(((timestep >= low) & (timestep <= high)).all())
        elif timestep is not None:
            self.active = low <= timestep <= high

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._report_idle()

    # Where this is traced it runs while tracing: torch.compile neither breaks the graph at the logger nor guards on
    # what is read here.
    @torch.compiler.assume_constant_result
    def _report_idle(self) -> None:
        """After the first call of the model, say so once if no self-attention had a factor above 1."""
        seen = [t for t in self._transformers if t.grid is not None]
        if not seen:
            return
        self._transformers = []
        if all(t.factor() == (1, 1) for t in seen):
            grids = ", ".join(f"{h}x{w}" for h, w in sorted({t.grid for t in seen if t.grid}, reverse=True))
            logger.warning(
                "%s changes nothing at this size: the factor is 1 on every grid of tokens (%s). "
                "Lower max_kv_tokens or give a factor to read fewer keys.",
                self.config,
                grids,
            )


class TransformerState:
    """On a Transformer2DModel, and its pre-forward hook: the grid of tokens, as height and width, of its last call.

    The input is still an image there, so the grid is measured and never computed: it is right for every size, and for
    whatever rounding the model's downsamplers do.
    """

    def __init__(self, model: ModelState, level: int | None = None, *, finest: bool = False) -> None:
        self.model = model
        self.level = level
        self.finest = finest
        self.grid: tuple[int, int] | None = None
        self._handle: RemovableHandle | None = None

    def attach(self, transformer: nn.Module) -> None:
        setattr(transformer, ATTRIBUTE, self)
        self._handle = transformer.register_forward_pre_hook(self, with_kwargs=True)

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def __call__(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        image = args[0] if args else kwargs["hidden_states"]
        self.grid = (image.shape[-2], image.shape[-1])

    def factor(self) -> tuple[int, int]:
        """The factor (fh, fw) on the current grid, which must be known."""
        assert self.grid is not None
        return self.model.config.factor_for(self.grid, self.level, finest=self.finest)


class AttentionState(NamedTuple):
    """On an attn1: where it is, and the processor that ToDo replaced (None where the user put ToDo's in)."""

    transformer: TransformerState
    original: Any | None

    def detach(self) -> None:
        """Nothing to undo: an attn1 carries no hook."""


def detach_all(model: nn.Module) -> None:
    """Take every state and every hook of ToDo's off ``model`` and the modules in it."""
    for module in model.modules():
        state = module.__dict__.pop(ATTRIBUTE, None)
        if state is not None:
            state.detach()
