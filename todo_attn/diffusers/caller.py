"""The pipeline that calls a model: it knows whether guidance is on, and how many calls will come.

Several pipelines may share a model (``from_pipe``, a copy of a pipeline for each request), and so may a loop of the
user's. So the pipeline that is asked is the one on the call stack, not the one that ToDo or DaTo was applied to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from diffusers.configuration_utils import ConfigMixin
from torch import nn

from .call_stack import running_methods
from .models import flatten


class Caller(NamedTuple):
    """A pipeline that is running."""

    pipe: Any
    guided: bool  # each batch has two halves: the same images without and with their prompts
    calls: int | None  # of the model in this run; None if the pipeline does not say


def calling_pipeline(model: nn.Module) -> Caller | None:
    """The running pipeline that calls ``model``, its UNet or a ControlNet; None in a loop of the user's own."""
    for pipe, variables in running_methods():
        # ConfigMixin is the common base of DiffusionPipeline and ModularPipeline, and of models.
        if not isinstance(pipe, ConfigMixin):
            continue
        if any(each is model for name in ("unet", "controlnet") for each in flatten(getattr(pipe, name, None))):
            return Caller(pipe, _guided(pipe, variables), _calls(pipe))
    return None


def _guided(pipe: Any, variables: Any) -> bool:
    """A property of some pipelines, a local variable of older ones. Modular ones call the UNet once for each half."""
    if hasattr(pipe, "image_guidance_scale") or getattr(pipe, "do_perturbed_attention_guidance", False):
        return False  # three parts, not two halves
    name = "do_classifier_free_guidance"
    return bool(variables[name] if name in variables else getattr(pipe, name, False))


def _calls(pipe: Any) -> int | None:
    """The number of steps left after ``strength`` and ``denoising_end``."""
    calls = getattr(pipe, "num_timesteps", None)
    return calls if isinstance(calls, int) and calls > 0 else None
