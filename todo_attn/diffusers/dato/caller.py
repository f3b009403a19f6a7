"""Which pipeline calls a UNet, and what only it knows: whether guidance is on, and how many calls will come.

A UNet is shared: by ``from_pipe``, by a request's own copy of a pipeline, by the user's own loop. So neither is asked
of the pipeline that DaTo was applied to, but of the one that is calling, which is found on the call stack.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from diffusers.configuration_utils import ConfigMixin
from torch import nn

from ..apply import unwrap
from ..call_stack import running_methods


class Caller(NamedTuple):
    """A pipeline in the middle of a run."""

    pipe: Any
    guided: bool  # each batch is two halves of the same images, without and with their prompts
    calls: int | None  # of the UNet in this run; None if the pipeline does not say


def calling_pipeline(unet: nn.Module) -> Caller | None:
    """The pipeline in whose call ``unet`` is being called; None in a loop of the user's own."""
    for pipe, variables in running_methods():
        # ConfigMixin is what DiffusionPipeline and ModularPipeline have in common; models have it too.
        if isinstance(pipe, ConfigMixin) and unwrap(getattr(pipe, "unet", None)) is unet:
            return Caller(pipe, _guided(pipe, variables), _calls(pipe))
    return None


def _guided(pipe: Any, variables: Any) -> bool:
    """Some pipelines have it as a property, older ones as a variable; a modular one calls the UNet for each part."""
    if hasattr(pipe, "image_guidance_scale") or getattr(pipe, "do_perturbed_attention_guidance", False):
        return False  # three parts, not two halves
    name = "do_classifier_free_guidance"
    return bool(variables[name] if name in variables else getattr(pipe, name, False))


def _calls(pipe: Any) -> int | None:
    """Counted after ``strength`` and ``denoising_end`` have taken their part of the steps away."""
    calls = getattr(pipe, "num_timesteps", None)
    return calls if isinstance(calls, int) and calls > 0 else None
