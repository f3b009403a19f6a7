"""The block cache: hooks that skip the blocks which a call does not compute (DaTo, section 3.1).

A shallow call computes conv_in, the last resnet and attention of the last up block, and the head. From the other blocks
it needs one tensor, the hidden state that enters that resnet. Their other outputs are not used, so only the shapes
matter. A call that reuses the last output computes no block at all.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ...config.schedule import FULL, REUSE, SHALLOW
from .run import Run

NAME = "todo_attn_dato"


class SkipHook(ModelHook):
    """On a module that is skipped in some kinds of calls: there it returns zeros of the right shapes."""

    def __init__(self, run: Run, skipped_in: tuple[str, ...]) -> None:
        super().__init__()
        self.run = run
        self.skipped_in = skipped_in
        self._seen: Any = ()  # the outputs of a full call, as TensorSpec or nested tuples of them
        self.shapes: Any = ()  # the same of the running stream, as expanded one-element tensors

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.run.kind in self.skipped_in:
            return self.placeholder()
        output = self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]
        if self.run.kind == FULL:
            self.remember(output)
        return output

    def remember(self, output: Any) -> None:
        outputs = output if isinstance(output, torch.Tensor) else tuple(output)
        self._seen = _map(lambda tensor: TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device), outputs)

    def keep(self) -> None:
        """After a full call, outside of any graph: keep the shapes for the calls that skip the module.

        As tensors, whose sizes may vary in one graph; each new number would compile another.
        """
        self.shapes = _map(TensorSpec.tensor, self._seen)

    def placeholder(self) -> Any:
        """What the module returns if it is skipped."""
        return _map(_zeros, self.shapes)


class HiddenHook(SkipHook):
    """On the module whose output enters the last resnet: kept in full calls, returned in shallow ones."""

    def remember(self, output: Any) -> None:
        super().remember(output)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        self.run.hidden = hidden.detach().clone()  # FreeU writes into the outputs of blocks

    def keep(self) -> None:
        super().keep()
        assert self.run.hidden is not None
        self.run.hidden = self.run.hidden.clone()  # the next call of a CUDA graph overwrites the copy made inside it

    def placeholder(self) -> Any:
        assert self.run.hidden is not None
        hidden = self.run.hidden.clone()
        return (hidden,) if isinstance(self.shapes, tuple) else hidden


class TensorSpec:
    """The shape, dtype and device of a tensor that is not kept."""

    # It takes three values and not the tensor, which would become an output of the compiled graph.
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def tensor(self) -> torch.Tensor:
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


def _map(function: Any, tree: Any) -> Any:
    return tuple(_map(function, part) for part in tree) if isinstance(tree, tuple) else function(tree)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    # Allocated, not expanded, because a T2I-Adapter adds to it in place.
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def computed_in_shallow(unet: Any) -> list[nn.Module]:
    """The modules that a shallow call computes: the last resnet, and the attention after it if there is one."""
    last = unet.up_blocks[-1]
    return [last.resnets[-1], *getattr(last, "attentions", ())[-1:]]


def hooks_for(unet: Any, run: Run) -> list[tuple[nn.Module, SkipHook]]:
    """The modules of ``unet`` to hook, each with its hook, for any number of blocks and layers."""
    last = unet.up_blocks[-1]
    attentions = list(getattr(last, "attentions", ()))
    entry = (attentions or last.resnets)[-2]
    inner = [module for module in (*last.resnets[:-1], *attentions[:-1]) if module is not entry]
    whole = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks[:-1]]
    return [
        *((block, SkipHook(run, (SHALLOW, REUSE))) for block in whole),
        *((module, SkipHook(run, (SHALLOW,))) for module in inner),
        (entry, HiddenHook(run, (SHALLOW,))),
        (last, SkipHook(run, (REUSE,))),
    ]


def attach(unet: Any, run: Run) -> list[SkipHook]:
    """Hook the blocks of ``unet``. The caller calls :meth:`SkipHook.keep` of each returned hook after a full call."""
    hooks = hooks_for(unet, run)
    for module, hook in hooks:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
    _forget_registries(unet)
    return [hook for _, hook in hooks]


def detach(unet: nn.Module) -> None:
    """Remove these hooks, and every registry that is empty then."""
    for module in unet.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is None:
            continue
        registry.remove_hook(NAME, recurse=False)
        if not registry.hooks:
            del module._diffusers_hook
            # The registry leaves the module's own forward behind as an attribute of the module.
            if module.__dict__.get("forward") == MethodType(type(module).forward, module):
                del module.forward
    _forget_registries(unet)


def _forget_registries(unet: nn.Module) -> None:
    """Clear the cached lists of registries below a module, in versions of diffusers that have that cache."""
    for module in unet.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and hasattr(registry, "_child_registries_cache"):
            registry._child_registries_cache = None
