"""The models of a pipeline that ToDo and DaTo act on."""

from __future__ import annotations

from typing import Any

from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..config.checks import ArgumentError


def models_of(pipe_or_model: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """The models to act on, each once: those that must have self-attention, and the ControlNets, which need not."""
    if isinstance(pipe_or_model, nn.Module):
        return list(dict.fromkeys(flatten(pipe_or_model))), []
    unet = getattr(pipe_or_model, "unet", None)
    if not isinstance(unet, nn.Module):
        raise ArgumentError(
            "pipe_or_model",
            "must be a diffusers pipeline with a unet, or a model such as UNet2DConditionModel or "
            f"ControlNetModel, got {type(pipe_or_model).__name__}",
        )
    models, controlnets = flatten(unet), flatten(getattr(pipe_or_model, "controlnet", None))
    return list(dict.fromkeys(models)), [m for m in dict.fromkeys(controlnets) if m not in models]


def flatten(model: Any) -> list[nn.Module]:
    """The models in ``model``: a model, a list of them, a ``MultiControlNetModel``, or anything else (none)."""
    if isinstance(model, (list, tuple, nn.ModuleList)):
        return [m for part in model for m in flatten(part)]
    if not isinstance(model, nn.Module):
        return []
    model = unwrap(model)
    nets = getattr(model, "nets", None)  # of a MultiControlNetModel
    return flatten(nets) if isinstance(nets, nn.ModuleList) else [model]


def unwrap(model: Any) -> Any:
    """``model`` without the wrappers of torch.compile and data parallelism; anything else unchanged."""
    while isinstance(model, nn.Module):
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if parallel else unwrap_module(model)
        if inner is model:
            break
        model = inner
    return model
