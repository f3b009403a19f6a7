"""Attach ToDo's states and hooks to a model, and take them off again with the original processors restored."""

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
# Attributes of diffusers' models.
_SET_DEFAULT = "set_default_attn_processor"
_KEPT_BY_FUSING = "original_attn_processors"


def default_processor(attn: Attention) -> Any:
    """The processor that diffusers itself gives ``attn``; AttnProcessor2_0 cannot follow ``scale_qk=False``."""
    if attn.added_kv_proj_dim is not None:
        return _DENSE_ADDED_KV
    return _DENSE if attn.scale_qk else _DENSE_UNSCALED


def attach_all(model: nn.Module, config: ToDoConfig, *, report: bool) -> None:
    """Attach states and hooks to ``model`` and its transformers, and remember the processors, which stay as they are.

    ``report``: whether to log a configuration that changes nothing, or that leaves a single row or column of keys.
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
    """Remove ToDo's states and hooks from ``model``, and restore the processors that ToDo's replaced."""
    _give_back(model)
    if isinstance(model.__dict__.get(_SET_DEFAULT), SetDefaultProcessors):
        delattr(model, _SET_DEFAULT)
    for module in model.modules():
        state = module.__dict__.pop(ATTRIBUTE, None)
        if state is not None:
            state.detach()


def _give_back(model: nn.Module) -> None:
    for attn in _attentions_under_todo(model):
        attn.set_processor(replaced_processor(attn))
    # unfuse_qkv_projections would restore these.
    kept: dict[str, Any] = getattr(model, _KEPT_BY_FUSING, None) or {}
    for name, processor in kept.items():
        if isinstance(processor, TakesPlan):
            kept[name] = replaced_processor(model.get_submodule(name.removesuffix(".processor")))


def _attentions_under_todo(model: nn.Module) -> Iterator[Attention]:
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.processor, TakesPlan):
            yield module


def replaced_processor(attn: Any) -> Any:
    """The processor that ToDo's replaced in ``attn``, or diffusers' default one if none is remembered."""
    state: AttentionState | None = getattr(attn, ATTRIBUTE, None)
    return default_processor(attn) if state is None or state.original is None else state.original


class SetDefaultProcessors:
    """Replaces ``set_default_attn_processor`` on a model under ToDo, and does what diffusers' does without ToDo.

    diffusers' own method refuses processors of classes that it does not know. The reference to the model is weak, so
    that the model is freed with its last other reference; a copy of the model gets an instance of its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self) -> None:
        model: Any = self._model()
        attentions = {attn: attn.processor for attn in _attentions_under_todo(model)}
        for attn in attentions:
            attn.set_processor(replaced_processor(attn))
        try:
            getattr(type(model), _SET_DEFAULT)(model)
        except BaseException:
            for attn, processor in attentions.items():
                attn.set_processor(processor)
            raise
        take_off(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._model(),)
