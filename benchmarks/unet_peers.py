"""ToMe and DeepCache, by their authors' packages, on a UNet without a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel


def apply_tome(model: UNet2DConditionModel, options: dict[str, Any]) -> None:
    """Token Merging (arXiv 2303.17604), patched so that torch.compile makes one graph of it.

    Args:
        model: is changed in place.
        options: of its ``apply_patch``. To be compiled, ``use_rand`` must be False, which saves a random draw a block.

    Raises:
        ImportError: tomesd is not installed.
    """
    import tomesd

    tomesd.apply_patch(model, **options)
    # Done here, because its first call would do this by hooks, which break the graph: after a break in its blocks
    # torch would compile no other UNet of this process as a whole.
    info: Any = model._tome_info
    info["args"]["generator"] = tomesd.utils.init_generator(model.device)
    info["hooks"].clear()


def apply_deepcache(
    model: UNet2DConditionModel, timesteps: torch.Tensor, options: dict[str, Any], compiled: bool
) -> Callable[[], None]:
    """DeepCache (arXiv 2312.00858). Returns a function that frees its cache, to be called after each run.

    By itself under torch.compile it would be compiled again at each call, and run uncompiled after the eighth. Here,
    what it looks up at each call stays outside of the graphs: one for full calls, one for all others.

    Args:
        model: is changed in place.
        timesteps: of a run, in order.
        options: of its ``set_params``.
        compiled: whether to compile its computation.

    Raises:
        ImportError: DeepCache is not installed.
    """
    from DeepCache import DeepCacheSDHelper

    # It searches the scheduler's timesteps for that of each call; on the CPU, so that it does not wait for a device.
    scheduler = SimpleNamespace(timesteps=timesteps.cpu())
    helper = DeepCacheSDHelper(SimpleNamespace(unet=model, scheduler=scheduler))
    helper.set_params(**options)
    helper.enable()
    forwards, interval = helper.function_dict, options["cache_interval"]

    def free() -> None:
        helper.cached_output = dict.fromkeys(forwards)  # the same keys in every run, so that the graphs fit

    if compiled:
        inner = torch.compile(forwards["unet_forward"], dynamic=False)

        def forward(*args: Any, **kwargs: Any) -> Any:
            helper.cur_timestep = min(helper.cur_timestep % interval, 1)
            return inner(*args, **kwargs)

        helper.start_timestep = 0
        forwards["unet_forward"] = forward
    free()
    return free
