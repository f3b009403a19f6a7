"""How near an image is to the dense one: the metrics of a search, each a number for one pair of images."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio

from ..compare.features import Network, load_object, perceptual_distance
from ..compare.metrics import psnr, ssim
from ..config.checks import ArgumentError
from ..options.methods import SettingError

MOST_DB = 100.0  # the PSNR of equal images, which is infinite


@dataclass(frozen=True)
class Made:
    """An image as it is compared.

    Args:
        latents: the last ones, (C, h, w) float32.
        pixels: (height, width, 3) uint8; None if only latents are compared.
        seconds: that it took.
        blacked_out: whether the pipeline's safety checker blacked it out.
    """

    latents: np.ndarray
    pixels: np.ndarray | None
    seconds: float
    blacked_out: bool = False


@dataclass(frozen=True)
class Metric:
    """Its heading, which way is better, decimals, and whether it needs pixels or latents alone."""

    title: str
    higher_is_better: bool = True
    decimals: int = 2
    needs_pixels: bool = True


METRICS = {
    "latents": Metric("PSNR of latents, dB", needs_pixels=False),
    "psnr": Metric("PSNR, dB"),
    "ssim": Metric("SSIM", decimals=4),
    "perceptual": Metric("feature distance", higher_is_better=False, decimals=4),
}
Measure = Callable[[Made, Made, str], float]


class MetricError(Exception):
    """A metric that gives no number for an image: what it gave instead."""


class Fidelity:
    """A metric by its name.

    Args:
        name: in ``METRICS``, or ``module:function``.
        features: for "perceptual": the ``module:function`` of a feature network.
        device: of the feature network.

    Raises:
        ArgumentError: there is no such function or network, or it cannot be called.
    """

    def __init__(self, name: str, features: str | None, device: torch.device) -> None:
        self.name = name
        self.metric = METRICS.get(name, Metric(name, decimals=4))
        if features is not None and name != "perceptual":
            raise SettingError("features", f"is for the metric perceptual, got {name}")
        if name == "perceptual":
            if features is None:
                raise SettingError("features", "must be given for the metric perceptual: MODULE:FUNCTION")
            self._measure = _perceptual(Network.load(features, device))
        else:
            self._measure = _MEASURES[name] if name in _MEASURES else _of_user(name)

    def of(self, image: Made, dense: Made, prompt: str) -> float:
        """Of one image against the dense one of the same prompt and seed.

        Raises:
            MetricError: the metric raises, or gives anything but a finite number.
        """
        if not np.isfinite(image.latents).all():
            raise MetricError("the image has NaN or infinity")
        if image.blacked_out:
            raise MetricError("the pipeline's safety checker blacked it out")
        try:
            found = self._measure(image, dense, prompt)
            value = float(found)
        except Exception as error:  # of any kind: a metric may be the user's
            raise MetricError(f"{self.name} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise MetricError(f"{self.name} gave {value}")
        return value


def _latents(image: Made, dense: Made, prompt: str) -> float:
    spread = float(dense.latents.max() - dense.latents.min())
    with np.errstate(divide="ignore"):
        return min(MOST_DB, float(peak_signal_noise_ratio(dense.latents, image.latents, data_range=spread)))


def _psnr(image: Made, dense: Made, prompt: str) -> float:
    return min(MOST_DB, psnr(*_pixels(dense, image)))


def _ssim(image: Made, dense: Made, prompt: str) -> float:
    return ssim(*_pixels(dense, image))


_MEASURES: dict[str, Measure] = {"latents": _latents, "psnr": _psnr, "ssim": _ssim}


def _perceptual(network: Network) -> Measure:
    def measure(image: Made, dense: Made, prompt: str) -> float:
        maps = [network.maps(pixels) for pixels in _pixels(image, dense)]
        return perceptual_distance(*maps)

    return measure


def _of_user(name: str) -> Measure:
    function = load_object("metric", name)
    try:
        inspect.signature(function).bind("image", "dense", "prompt")
    except TypeError as error:
        raise ArgumentError(
            "metric", f"must be a function of (image, dense, prompt), and {name} is not: {error}"
        ) from None
    except ValueError:  # of a compiled function, whose arguments cannot be known
        pass

    def measure(image: Made, dense: Made, prompt: str) -> float:
        return function(*_pixels(image, dense), prompt)

    return measure


def _pixels(*images: Made) -> list[np.ndarray]:
    """Copies, because a metric of the user may write into them."""
    return [image.pixels.copy() for image in images if image.pixels is not None]
