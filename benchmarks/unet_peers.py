"""The published methods that ToDo and DaTo are held against, by their authors' packages, on a UNet alone."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel


def apply_tome(model: UNet2DConditionModel, options: dict[str, Any]) -> None:
    """Token Merging (arXiv 2303.17604) in a form that torch.compile takes in one graph.

    Args:
        model: is changed in place.
        options: of its ``apply_patch``; to be compiled, ``use_rand`` must be False, which saves it a draw a block.

    Raises:
        ImportError: tomesd is not installed.
    """
    import tomesd

    tomesd.apply_patch(model, **options)
    # What it would do in its first call, and what a graph cannot hold. A break in its blocks would keep torch from
    # compiling any UNet of this process whole.
    info: Any = model._tome_info
    info["args"]["generator"] = tomesd.utils.init_generator(model.device)
    info["hooks"].clear()


def apply_deepcache(
    model: UNet2DConditionModel, timesteps: torch.Tensor, options: dict[str, Any], compiled: bool
) -> Callable[[], None]:
    """DeepCache (arXiv 2312.00858); what is returned frees what it keeps, as must be done after each run.

    Left to itself under torch.compile it is compiled anew at each call, and runs uncompiled after the eighth. Here it
    shows what it can do: what it looks up at each call stays outside, and there is one graph for the full calls and one
    for the others.

    Args:
        model: is changed in place.
        timesteps: those of a run, in order.
        options: of its ``set_params``.
        compiled: whether what it computes is to be compiled.

    Raises:
        ImportError: DeepCache is not installed.
    """
    from DeepCache import DeepCacheSDHelper

    # It finds each call's timestep among the scheduler's, one by one: on a CPU that does not wait for a device.
    scheduler = SimpleNamespace(timesteps=timesteps.cpu())
    helper = DeepCacheSDHelper(SimpleNamespace(unet=model, scheduler=scheduler))
    helper.set_params(**options)
    helper.enable()
    forwards, interval = helper.function_dict, options["cache_interval"]

    def free() -> None:
        helper.cached_output = dict.fromkeys(forwards)  # the same keys in every run, or the graphs would not do

    if compiled:
        inner = torch.compile(forwards["unet_forward"], dynamic=False)

        def forward(*args: Any, **kwargs: Any) -> Any:
            helper.cur_timestep = min(helper.cur_timestep % interval, 1)
            return inner(*args, **kwargs)

        helper.start_timestep = 0
        forwards["unet_forward"] = forward
    free()
    return free
