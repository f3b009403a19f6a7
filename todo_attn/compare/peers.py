"""ToMe and DeepCache on a UNet and off it, by their authors' packages; eager or compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..diffusers.levels import transformers_by_level


def tome_options(unet: nn.Module, ratio: float) -> dict[str, Any]:
    """Arguments of tomesd's ``apply_patch`` that merge on the finest level with self-attention.

    tomesd's own default is level 1, where SDXL has no attention.
    """
    return {"ratio": ratio, "max_downsample": min(level for level, _ in transformers_by_level(unet))}


def apply_tome(unet: nn.Module, options: dict[str, Any], for_good: bool = False) -> None:
    """Put Token Merging (arXiv 2303.17604) on ``unet``.

    Args:
        options: of its ``apply_patch``. To be compiled, ``use_rand`` must be False, which saves a random draw a block.
        for_good: whether it stays on the UNet, which torch.compile then makes one graph of. :func:`remove_tome` would
            leave its hook there.

    Raises:
        ImportError: tomesd is not installed.
    """
    import tomesd

    tomesd.apply_patch(unet, **options)
    if for_good:
        # Done here, because its first call would do this by hooks, which break the graph: after a break in its blocks
        # torch would compile no other UNet of this process as a whole.
        info: Any = unet._tome_info
        info["args"]["generator"] = tomesd.utils.init_generator(unet.device)
        info["hooks"].clear()


def remove_tome(unet: nn.Module) -> None:
    """Take Token Merging off ``unet``, also after an ``apply_patch`` that did not complete."""
    import tomesd

    tomesd.remove_patch(unet)
    for module in unet.modules():  # remove_patch leaves a mark on each
        module.__dict__.pop("_tome_info", None)


class DeepCache:
    """DeepCache (arXiv 2312.00858) for one UNet.

    Args:
        pipe: has a ``unet`` and a ``scheduler``, in whose timesteps it searches for that of each call.
        options: of its ``set_params``.

    Raises:
        ImportError: DeepCache is not installed.
    """

    def __init__(self, pipe: Any, options: dict[str, Any]) -> None:
        from DeepCache import DeepCacheSDHelper

        self._unet, self._interval = pipe.unet, options["cache_interval"]
        self._helper = DeepCacheSDHelper(pipe)
        self._helper.set_params(**options)
        self._forwards: dict[nn.Module, Any] = {}  # set on the module itself, as offloading does

    def apply(self) -> None:
        """Put it on the UNet."""
        self._forwards.update((m, m.__dict__["forward"]) for m in self._unet.modules() if "forward" in m.__dict__)
        self._helper.enable()

    def remove(self) -> None:
        """Take it off the UNet, also after an :meth:`apply` that did not complete."""
        # Not disable(), which leaves a forward on every module and fails after an enable() that did not complete.
        for module in self._unet.modules():
            module.__dict__.pop("forward", None)
        for module, forward in self._forwards.items():
            module.__dict__["forward"] = forward
        self._forwards.clear()
        self._helper.reset_states()

    def free(self) -> None:
        """Free the cache between two runs."""
        # The same keys in every run, so that compiled graphs fit.
        self._helper.cached_output = dict.fromkeys(self._helper.function_dict)

    def compile(self) -> None:
        """Compile the UNet's computation, after :meth:`apply`.

        By itself under torch.compile it would be compiled again at each call, and run uncompiled after the eighth.
        Here, what it looks up at each call stays outside of the graphs: one for full calls, one for all others.
        """
        helper, interval = self._helper, self._interval
        inner = torch.compile(helper.function_dict["unet_forward"], dynamic=False)

        def forward(*args: Any, **kwargs: Any) -> Any:
            helper.cur_timestep = min(helper.cur_timestep % interval, 1)
            return inner(*args, **kwargs)

        helper.start_timestep = 0
        helper.function_dict["unet_forward"] = forward
