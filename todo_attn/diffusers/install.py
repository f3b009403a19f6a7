"""A model's states, processors and hooks of ToDo's: put on, and taken off again with what was there put back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
)
from torch import nn

from ..config.todo import ToDoConfig
from .levels import self_attentions, transformers_by_level
from .state import ATTRIBUTE, AttentionState, ModelState, TakesPlan, TransformerState

_DENSE = AttnProcessor2_0()
_DENSE_UNSCALED = AttnProcessor()
_DENSE_ADDED_KV = AttnAddedKVProcessor2_0()
# What diffusers' models have under these names.
_SET_DEFAULT = "set_default_attn_processor"
_KEPT_BY_FUSING = "original_attn_processors"


def default_processor(attn: Attention) -> Any:
    """The processor that diffusers itself gives ``attn``. AttnProcessor2_0 ignores ``attn.scale``: see scale_qk."""
    if attn.added_kv_proj_dim is not None:
        return _DENSE_ADDED_KV
    return _DENSE if attn.scale_qk else _DENSE_UNSCALED


def attach_all(model: nn.Module, config: ToDoConfig, *, report: bool) -> None:
    """State and hooks on ``model`` and each of its transformers; processors are left as they are, and remembered.

    ``report`` says whether a configuration that changes nothing, or leaves a single key, is logged.
    """
    transformers = transformers_by_level(model)
    finest = min((level for level, _ in transformers), default=None)
    shared, states = ModelState(config), []
    for level, transformer in transformers:
        state = TransformerState(shared, level, finest=level == finest)
        state.attach(transformer)
        states.append(state)
        for attn1 in self_attentions(transformer):
            there = attn1.processor
            setattr(attn1, ATTRIBUTE, AttentionState(state, None if isinstance(there, TakesPlan) else there))
    shared.attach(model, states, report=report)
    if hasattr(type(model), _SET_DEFAULT):
        setattr(model, _SET_DEFAULT, SetDefaultProcessors(model))


def take_off(model: nn.Module) -> None:
    """Every processor, state and hook of ToDo's; where ToDo's processors are, those that they replaced come back."""
    _give_back(model)
    if isinstance(model.__dict__.get(_SET_DEFAULT), SetDefaultProcessors):
        delattr(model, _SET_DEFAULT)
    for module in model.modules():
        state = module.__dict__.pop(ATTRIBUTE, None)
        if state is not None:
            state.detach()


def _give_back(model: nn.Module) -> None:
    for attn in _attentions_under_todo(model):
        attn.set_processor(_replaced(attn))
    # What unfuse_qkv_projections would put back.
    kept: dict[str, Any] = getattr(model, _KEPT_BY_FUSING, None) or {}
    for name, processor in kept.items():
        if isinstance(processor, TakesPlan):
            kept[name] = _replaced(model.get_submodule(name.removesuffix(".processor")))


def _attentions_under_todo(model: nn.Module) -> Iterator[Attention]:
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.processor, TakesPlan):
            yield module


def _replaced(attn: Any) -> Any:
    state: AttentionState | None = getattr(attn, ATTRIBUTE, None)
    return default_processor(attn) if state is None or state.original is None else state.original


class SetDefaultProcessors:
    """In place of ``set_default_attn_processor`` on a model under ToDo: as diffusers does it without ToDo.

    diffusers refuses where it finds a processor of a class that is not in a list of its own. It holds the model weakly,
    so that a model is freed with its last reference, and a copy of the model has one of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self) -> None:
        model: Any = self._model()
        attentions = {attn: attn.processor for attn in _attentions_under_todo(model)}
        for attn in attentions:
            attn.set_processor(_replaced(attn))
        try:
            getattr(type(model), _SET_DEFAULT)(model)
        except BaseException:
            for attn, processor in attentions.items():
                attn.set_processor(processor)
            raise
        take_off(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(),)
