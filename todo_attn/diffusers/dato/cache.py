"""The block cache: hooks that leave out what a call does not compute (DaTo, section 3.1).

A shallow call computes conv_in, the last resnet and attention of the last up block, and the head. All it needs of the
rest is one tensor, the hidden state that enters that resnet; what the other blocks return is read by nobody, and only
its shape matters. A call that reuses computes nothing of the blocks.
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
    """On a module that is left out of some kinds of calls: zeros of the right shapes are its output there."""

    def __init__(self, run: Run, skipped_in: tuple[str, ...]) -> None:
        super().__init__()
        self.run = run
        self.skipped_in = skipped_in
        self._seen: Any = ()  # what the module returned in a full call, as _Like or tuples of it
        self.shapes: Any = ()  # the same as tensors of one element, expanded; of the stream that is running

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.run.kind in self.skipped_in:
            return self.stand_in()
        output = self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]
        if self.run.kind == FULL:
            self.remember(output)
        return output

    def remember(self, output: Any) -> None:
        outputs = output if isinstance(output, torch.Tensor) else tuple(output)
        self._seen = _map(lambda tensor: _Like(tuple(tensor.shape), tensor.dtype, tensor.device), outputs)

    def keep(self) -> None:
        """After a full call, outside of any graph: what the next calls stand in for.

        A tensor, because a graph takes every size of it, where it would be compiled anew for numbers.
        """
        self.shapes = _map(_Like.tensor, self._seen)

    def stand_in(self) -> Any:
        return _map(_zeros, self.shapes)


class HiddenHook(SkipHook):
    """On the module whose output enters the last resnet: kept in full calls, given back in shallow ones."""

    def remember(self, output: Any) -> None:
        super().remember(output)
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        self.run.hidden = hidden.detach().clone()  # FreeU writes into what a block returned

    def keep(self) -> None:
        super().keep()
        assert self.run.hidden is not None
        self.run.hidden = self.run.hidden.clone()  # a CUDA graph's own copy is overwritten by its next call

    def stand_in(self) -> Any:
        assert self.run.hidden is not None
        hidden = self.run.hidden.clone()
        return (hidden,) if isinstance(self.shapes, tuple) else hidden


class _Like:
    """The shape, dtype and device of a tensor that is not kept."""

    # Given their values and not the tensor, which would leave a compiled UNet together with an object made of it.
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def tensor(self) -> torch.Tensor:
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


def _map(function: Any, tree: Any) -> Any:
    return tuple(_map(function, part) for part in tree) if isinstance(tree, tuple) else function(tree)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    # Memory of its own, because a T2I-Adapter adds to it in place.
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def computed_in_shallow(unet: Any) -> list[nn.Module]:
    """The parts of the blocks that a shallow call computes: the last resnet, and its attention where it has one."""
    last = unet.up_blocks[-1]
    return [last.resnets[-1], *getattr(last, "attentions", ())[-1:]]


def hooks_for(unet: Any, run: Run) -> list[tuple[nn.Module, SkipHook]]:
    """Which module of ``unet`` gets which hook. By structure alone: any number of blocks and layers."""
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
    """Hook the blocks of ``unet``. Each hook that is returned is to :meth:`~SkipHook.keep` after a full call."""
    hooks = hooks_for(unet, run)
    for module, hook in hooks:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
    _forget_registries(unet)
    return [hook for _, hook in hooks]


def detach(unet: nn.Module) -> None:
    """Take every such hook off, and the registries that nobody else uses."""
    for module in unet.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is None:
            continue
        registry.remove_hook(NAME, recurse=False)
        if not registry.hooks:
            del module._diffusers_hook
            # The registry leaves the module's own forward as an attribute of it.
            if module.__dict__.get("forward") == MethodType(type(module).forward, module):
                del module.forward
    _forget_registries(unet)


def _forget_registries(unet: nn.Module) -> None:
    """The list of the hooks below a module is cached, by versions of diffusers that have the cache."""
    for module in unet.modules():
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and hasattr(registry, "_child_registries_cache"):
            registry._child_registries_cache = None
