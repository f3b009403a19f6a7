"""What a model carries already: ToDo's processors, and patches of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from .processor import ToDoProcessor


def has_todo(model: nn.Module) -> bool:
    """Whether an attention of ``model`` has ToDo's processor, set by ``apply_todo`` or by hand."""
    return any(isinstance(processor, ToDoProcessor) for processor in _processors(model))


def has_deepcache(model: nn.Module) -> bool:
    """Whether DeepCache has replaced the forward of ``model`` or of a part of it."""
    return any(_replaced_by("DeepCache", module) for module in model.modules())


def has_tgate(attn: nn.Module) -> bool:
    """Whether T-GATE has replaced the forward of ``attn``, which then calls no processor."""
    return _replaced_by("tgate", attn)


def _replaced_by(package: str, module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return (getattr(forward, "__module__", None) or "").startswith(package)


def keeps_maps(processor: object) -> bool:
    """Whether an attention processor stores attention maps, which its pipeline reads after each call."""
    return any(hasattr(processor, name) for name in ("attention_probs", "attnstore", "attention_store"))


def keeps_attention_maps(model: nn.Module) -> bool:
    """Whether an attention of ``model`` has such a processor: SAG's, Attend-and-Excite's, LEDITS++'s."""
    return any(map(keeps_maps, _processors(model)))


def _processors(model: nn.Module) -> Iterator[Any]:
    return (module.processor for module in model.modules() if isinstance(module, Attention))
