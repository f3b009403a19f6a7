"""ToDo on a whole pipeline or model, and off again."""

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
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..config.checks import ArgumentError
from ..config.todo import ToDoConfig
from .install import attach_all, take_off
from .levels import check_levels, self_attentions, transformers_by_level
from .processor import ToDoProcessor, written_class

# What ToDo may take the place of: plain softmax attention by the weights of the layer itself, each in its own way.
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

    In place, and undone by :func:`remove_todo`. It works at every height and width, with guidance on or off, in a model
    already compiled, and together with LoRA, IP-Adapter, ControlNet and offloading, whichever comes first. Applied
    again it replaces the configuration. Only the processors of attn1 change, so what replaces those itself (attention
    slicing, xFormers, fused projections) takes ToDo off, and the next call says so: apply it after. A pipeline that
    builds a UNet of its own from this one (``AnimateDiffPipeline.from_pipe``) starts without.

    Calls from several threads at once do not meet: the plan of a call travels with it. But a ``timestep_range`` that
    does not hold all of 0 to 1000 is decided on the model, so such calls must all be inside or all outside of it; and
    nobody may apply or remove anything meanwhile.

    Args:
        pipe_or_model: a pipeline with a ``unet``, whose ControlNets are covered too, or such a model itself
            (``UNet2DConditionModel``, ``ControlNetModel``, ``MultiControlNetModel``, ...), compiled or not, in
            ``DistributedDataParallel`` or ``DataParallel`` or not.
        config: what to do; None is ``ToDoConfig()``, at most 4096 keys at every level.

    Raises:
        ValueError: ``pipe_or_model`` is neither, or has no self-attention over an image; ``config`` is no
            ``ToDoConfig``, or names a level that the model lacks (a pipeline's UNet: a ControlNet without that level
            stays dense there); an attn1 has a processor with weights or a meaning of its own, that is any but
            diffusers' plain ones. Nothing has been changed then.
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
        # One report for a pipeline is enough, and its UNet's tells the whole story.
        _install(model, config, report=False)


def remove_todo(pipe_or_model: Any) -> None:
    """Give back the processors that :func:`apply_todo` replaced, and take off every hook.

    A processor that something else has put there since stays. Where ``ToDoProcessor`` was set by
    ``set_attn_processor``, so that none is remembered, diffusers' default processor takes its place. Removing twice is
    harmless.

    Raises:
        ValueError: ``pipe_or_model`` is neither a pipeline with a ``unet`` nor a model.
    """
    models, controlnets = models_of(pipe_or_model)
    for model in (*models, *controlnets):
        take_off(model)


def models_of(pipe_or_model: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """The models to act on, each once: those that must have self-attention, and a pipeline's ControlNets, which may."""
    if isinstance(pipe_or_model, nn.Module):
        return list(dict.fromkeys(_flatten(pipe_or_model))), []
    unet = getattr(pipe_or_model, "unet", None)
    if not isinstance(unet, nn.Module):
        raise ArgumentError(
            "pipe_or_model",
            "must be a diffusers pipeline with a unet, or a model such as UNet2DConditionModel or "
            f"ControlNetModel, got {type(pipe_or_model).__name__}",
        )
    models, controlnets = _flatten(unet), _flatten(getattr(pipe_or_model, "controlnet", None))
    return list(dict.fromkeys(models)), [m for m in dict.fromkeys(controlnets) if m not in models]


def _flatten(model: Any) -> list[nn.Module]:
    """The models in ``model``, which may be one, a list, a model of models, or no model at all."""
    if isinstance(model, (list, tuple, nn.ModuleList)):
        return [m for part in model for m in _flatten(part)]
    if not isinstance(model, nn.Module):
        return []
    model = unwrap(model)
    nets = getattr(model, "nets", None)  # MultiControlNetModel
    return _flatten(nets) if isinstance(nets, nn.ModuleList) else [model]


def unwrap(model: Any) -> Any:
    """``model`` out of every wrapper, torch.compile's and data-parallel ones; anything else as it is."""
    while isinstance(model, nn.Module):
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if parallel else unwrap_module(model)
        if inner is model:
            break
        model = inner
    return model


def _check_processors(model: nn.Module) -> None:
    """Other processors, a subclass of a plain one too, may have weights or do more than attention."""
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
