"""Loading the pipeline that ``compare`` runs, and asking it for its sizes."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..compare_settings import DTYPES, SCHEDULERS, SIZE_MULTIPLE, CompareSettings, SettingError, check_size
from .levels import transformers_by_level


def load_pipeline(settings: CompareSettings) -> Any:
    """The pipeline of ``settings``, on its device, in its dtype, with its scheduler.

    Raises:
        SettingError: the model cannot be loaded, or is no text-to-image pipeline with self-attention in a UNet.
    """
    dtype = DTYPES[settings.dtype]
    source = settings.source
    try:
        folder = Path(source).expanduser()
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder if folder.exists() else source, dtype=dtype, variant=settings.variant
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind: the Hub's, the file system's, JSON's, a missing package's
        reason = " ".join(str(error).split())
        raise SettingError("model", f"{source!r} cannot be loaded: {type(error).__name__}: {reason}") from error
    check_pipeline(pipe, source)
    if settings.scheduler is not None:
        name, extra = SCHEDULERS[settings.scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **extra)
    if pipe.unet.dtype != dtype:  # a diffusers that still calls the argument torch_dtype has loaded float32
        pipe.to(dtype)
    return pipe.to(torch.device(settings.device))


def check_pipeline(pipe: Any, source: str) -> None:
    """Refuse what cannot be compared.

    Raises:
        SettingError: ``pipe`` does not make pictures from text alone at a given size, or has no self-attention over
            an image in a UNet.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    takes = {"prompt", "height", "width", "generator", "callback_on_step_end"} <= parameters.keys()
    if not takes or {"image", "mask_image"} & parameters.keys():
        raise SettingError("model", f"must be a text-to-image pipeline, and {source!r} is a {type(pipe).__name__}")
    if not transformers_by_level(getattr(pipe, "unet", torch.nn.Module())):
        raise SettingError("model", f"must have a UNet with self-attention, and {source!r} has none")


def sized(settings: CompareSettings, pipe: Any) -> CompareSettings:
    """The settings with height and width filled in, in pixels: twice the model's normal size where none was given.

    Raises:
        SettingError: a size that is no multiple of the pipeline's own, or a model that does not say its normal size.
    """
    sample = pipe.unet.config.sample_size
    sides = (sample, sample) if isinstance(sample, int) else sample or (None, None)
    scale = pipe.vae_scale_factor
    filled = {}
    for name, side in zip(("height", "width"), sides, strict=True):
        size = getattr(settings, name)
        if size is None and side is None:
            raise SettingError(name, "must be given: the model does not say its normal size")
        filled[name] = 2 * side * scale if size is None else size
        check_size(name, filled[name], math.lcm(SIZE_MULTIPLE, scale))
    return replace(settings, **filled)
