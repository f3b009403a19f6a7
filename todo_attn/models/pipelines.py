"""Loads the pipeline that ``compare`` runs, and fills in its image size."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import diffusers
import torch

from ..diffusers.levels import transformers_by_level
from ..options.settings import SCHEDULERS, CompareSettings, SettingError
from .architectures import Architecture, chosen_size
from .loading import load_weights


def load_pipeline(settings: CompareSettings) -> Any:
    """The pipeline of ``settings``, on its device, in its dtype, with its scheduler.

    Raises:
        SettingError: the model cannot be loaded, or is no text-to-image pipeline with self-attention in a UNet.
        torch.OutOfMemoryError: it does not fit in memory.
    """
    dtype, source = getattr(torch, settings.dtype), settings.source
    pipe = load_weights(diffusers.DiffusionPipeline, source, dtype, variant=settings.variant, config=settings.config)
    check_pipeline(pipe, source)
    if settings.scheduler is not None:
        name, extra = SCHEDULERS[settings.scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **extra)
    return pipe.to(torch.device(settings.device))


def check_pipeline(pipe: Any, source: str) -> None:
    """Refuse a pipeline that cannot be compared.

    Raises:
        SettingError: ``pipe`` does not make images from text alone at a given size, or has no self-attention over
            an image in a UNet.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    takes = {"prompt", "height", "width", "generator", "callback_on_step_end"} <= parameters.keys()
    if not takes or {"image", "mask_image"} & parameters.keys():
        raise SettingError("model", f"must be a text-to-image pipeline, and {source!r} is a {type(pipe).__name__}")
    if not transformers_by_level(getattr(pipe, "unet", torch.nn.Module())):
        raise SettingError("model", f"must have a UNet with self-attention, and {source!r} has none")


def sized(settings: CompareSettings, pipe: Any, times: int = 2) -> CompareSettings:
    """The settings with height and width filled in, in pixels: ``times`` the model's normal size if none was given.

    Raises:
        SettingError: a size that is no multiple of the pipeline's own, or a model that does not say its normal size.
    """
    architecture = Architecture(settings.source, pipe.unet.config, pipe.vae_scale_factor)
    height, width = chosen_size(architecture, settings.height, settings.width, times=times)
    return replace(settings, height=height, width=width)
