"""The feature network: any object with ``features``, ``maps`` and perhaps ``agreement``, checked at every call.

    features(images) -> (B, F)              for the distances between sets of images
    maps(images) -> list of (B, C, h, w)    for the distance between two images
    agreement(images, prompts) -> (B,)      optional

Images are (B, 3, H, W) float32 in [0, 1].
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config.checks import ArgumentError


def load_object(argument: str, text: str) -> Any:
    """The object that ``module:name`` names.

    Raises:
        ArgumentError: of ``argument``: there is none.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ArgumentError(argument, f"must be MODULE:FUNCTION, got {text!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(argument, f"must be MODULE:FUNCTION, and {text!r} cannot be loaded: {error}") from error


class Network:
    """A feature network for single images, each (height, width, 3) uint8.

    Args:
        net: as above.
        name: of it, for messages and rows.
        device: of the images that it is given.
    """

    def __init__(self, net: Any, name: str, device: torch.device) -> None:
        for method in ("features", "maps"):
            if not callable(getattr(net, method, None)):
                raise ArgumentError("features", f"must return an object with features and maps, and {name} has none")
        self.net, self.name, self.device = net, name, device
        self.has_agreement = callable(getattr(net, "agreement", None))

    @classmethod
    def load(cls, text: str, device: torch.device) -> Network:
        """The network that the function ``module:function`` returns; it gets ``device`` if it has such an argument.

        Raises:
            ArgumentError: there is no such function, it fails, or what it returns is no feature network.
        """
        function = load_object("features", text)
        try:
            takes = "device" in inspect.signature(function).parameters
            net = function(device=device) if takes else function()
        except Exception as error:  # of any kind: it is the user's
            raise ArgumentError(
                "features", f"must be a function that returns a network, and {text} failed: {error}"
            ) from error
        return cls(net, text, device)

    def probe(self, height: int, width: int, prompts: Sequence[str]) -> int:
        """Try the network on noise at a size, and its agreement with ``prompts``; returns the number of features.

        Raises:
            ArgumentError: it fails, or returns another shape or NaN.
        """
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        count = len(self.features(noise))
        self.maps(noise)
        if self.has_agreement:
            for prompt in prompts:
                self.agreement(noise, prompt)
        return count

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """(F,) float64."""
        found = self._call("features", self._images(pixels))
        if found.ndim != 2 or len(found) != 1:
            raise self._refusal("features", "(1, F)", found)
        return found[0].double().cpu().numpy()

    def maps(self, pixels: np.ndarray) -> list[torch.Tensor]:
        """Each (1, C, h, w), with channel vectors of unit length."""
        found = self._call("maps", self._images(pixels))
        if not isinstance(found, (list, tuple)) or not found:
            raise ArgumentError("features", f"must have maps that return a list of tensors, and {self.name} does not")
        for x in found:
            if x.ndim != 4 or len(x) != 1:
                raise self._refusal("maps", "(1, C, h, w)", x)
        return [F.normalize(x.float()) for x in found]

    def agreement(self, pixels: np.ndarray, prompt: str) -> float:
        """How well the image fits ``prompt``."""
        found = self._call("agreement", self._images(pixels), [prompt])
        if found.shape != (1,):
            raise self._refusal("agreement", "(1,)", found)
        return float(found[0])

    def _images(self, pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(self.device).float() / 255

    def _call(self, method: str, *args: Any) -> Any:
        try:
            with torch.no_grad():
                found = getattr(self.net, method)(*args)
        except Exception as error:  # of any kind: it is the user's
            raise ArgumentError(
                "features", f"must be a network for these images, and {method} of {self.name} failed: {error}"
            ) from error
        for x in found if isinstance(found, (list, tuple)) else [found]:
            if not isinstance(x, torch.Tensor):
                raise ArgumentError(
                    "features", f"must return tensors, and {method} of {self.name} gave {type(x).__name__}"
                )
            if not x.isfinite().all():
                raise ArgumentError(
                    "features", f"must return finite numbers, and {method} of {self.name} gave NaN or infinity"
                )
        return found

    def _refusal(self, method: str, shape: str, found: torch.Tensor) -> ArgumentError:
        got = f"and {self.name} gave {tuple(found.shape)}"
        return ArgumentError("features", f"must have {method} of shape {shape} for one image, {got}")


def perceptual_distance(maps: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """LPIPS (arXiv 1801.03924) with equal weights: 0 for equal images.

    Squared differences of channel vectors at unit length: the mean over space, the sum over maps.

    Args:
        maps, others: of two images, as :meth:`Network.maps` gives them.
    """
    return sum(float((a - b).square().sum(1).mean()) for a, b in zip(maps, others, strict=True))
