"""apply_todo and remove_todo: ToDo on a whole pipeline or model, and off again."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    AttnProcessorNPU,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XLAFlashAttnProcessor2_0,
)
from torch import nn

from ..config.checks import ArgumentError
from ..config.todo import ToDoConfig
from .install import attach_all, take_off
from .levels import check_levels, self_attentions, transformers_by_level
from .models import models_of
from .processor import ToDoProcessor, written_class

# What ToDo may replace: plain softmax attention with the layer's own weights.
_PLAIN = (
    AttnProcessor,
    AttnProcessor2_0,
    AttnProcessorNPU,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XLAFlashAttnProcessor2_0,
    ToDoProcessor,
)


def apply_todo(pipe_or_model: Any, config: ToDoConfig | None = None) -> None:
    """Let the self-attentions of a pipeline or model read a coarser grid of keys (ToDo, arXiv 2402.13573).

    It changes the models in place; :func:`remove_todo` undoes that. It works at every height and width, with guidance
    on or off, on compiled models, and together with LoRA, IP-Adapter, ControlNet and offloading, in any order. Call it
    again to replace the configuration. It sets the processors of attn1 and no others. Whatever replaces those
    (attention slicing, xFormers, fused projections) takes ToDo off, and the next call logs a warning: call
    ``apply_todo`` after it. A pipeline that builds its own UNet from this one (``AnimateDiffPipeline.from_pipe``)
    starts without ToDo.

    Several threads may call a model at once, because each call carries its own plan. There are three exceptions. A
    ``timestep_range`` narrower than 0 to 1000, or ``steps`` narrower than 0 to 1, is decided once for the model, so
    concurrent calls must be all inside it or all outside. Nothing may be applied or removed during a call. The first
    call with a ``ToDoProcessor`` that was set by hand must be made alone.

    Args:
        pipe_or_model: a pipeline with a ``unet``, whose ControlNets are included, or a model (``UNet2DConditionModel``,
            ``ControlNetModel``, ``MultiControlNetModel``, ...). Models may be compiled, or wrapped in
            ``DistributedDataParallel`` or ``DataParallel``.
        config: None is ``ToDoConfig()``: at most 4096 keys at every level.

    Raises:
        ArgumentError: ``pipe_or_model`` is neither of these, or has no self-attention over an image; ``config`` is not
            a ``ToDoConfig``, or names a level that the model lacks (for a pipeline, its UNet; a ControlNet without that
            level stays dense); an attn1 has a processor other than diffusers' plain ones. Nothing has been changed
            then.
    """
    config = ToDoConfig() if config is None else config
    if not isinstance(config, ToDoConfig):
        raise ArgumentError("config", f"must be a ToDoConfig or None, got {type(config).__name__}")
    models, controlnets = models_of(pipe_or_model)
    for model in models:
        check_levels(config, model)
    for model in (*models, *controlnets):
        _check_processors(model)

    remove_todo(pipe_or_model)
    for model in models:
        _install(model, config, report=True)
    for model in controlnets:
        # The UNet's report is enough for the whole pipeline.
        _install(model, config, report=False)


def remove_todo(pipe_or_model: Any) -> None:
    """Restore the processors that :func:`apply_todo` replaced, and remove every hook.

    A processor that something else has set since then stays. A ``ToDoProcessor`` that was set by
    ``set_attn_processor`` is replaced by diffusers' default processor. Removing twice is harmless.

    Raises:
        ArgumentError: ``pipe_or_model`` is neither a pipeline with a ``unet`` nor a model.
    """
    models, controlnets = models_of(pipe_or_model)
    for model in (*models, *controlnets):
        take_off(model)


def _check_processors(model: nn.Module) -> None:
    """Refuse other processors: even a subclass of a plain one may have weights or do more than attention."""
    attns = {attn1 for _, transformer in transformers_by_level(model) for attn1 in self_attentions(transformer)}
    for name, module in model.named_modules():
        if module in attns and written_class(module.processor) not in _PLAIN:
            raise ArgumentError(
                "pipe_or_model",
                "must have diffusers' plain attention processors on its self-attention, got "
                f"{type(module.processor).__name__} at {type(model).__name__}.{name}: what that does would be lost. "
                "Set AttnProcessor2_0 there first if it may be",
            )


def _install(model: nn.Module, config: ToDoConfig, *, report: bool) -> None:
    attach_all(model, config, report=report)
    processor: Any = ToDoProcessor()
    for _, transformer in transformers_by_level(model):
        for attn1 in self_attentions(transformer):
            attn1.set_processor(processor)
