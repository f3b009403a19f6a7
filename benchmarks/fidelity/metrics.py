"""The metrics of the table, and what each image adds to them. Images are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from skimage.filters import gaussian

from benchmarks.fidelity import distances, intervals
from benchmarks.fidelity.intervals import Interval
from benchmarks.fidelity.reference import Reference
from benchmarks.fidelity.store import Images, Size, Store
from todo_attn.compare.features import Network, perceptual_distance
from todo_attn.compare.metrics import psnr, ssim
from todo_attn.config.checks import ArgumentError

HIGH_PASS_SIGMA = 1.0  # pixels


@dataclass(frozen=True)
class Metric:
    """A column: its heading, what is better, decimals, and what it needs beside the images."""

    title: str
    better: Literal["higher", "lower", "near 1"]
    decimals: int
    needs: Literal["", "features", "agreement", "reference"] = ""


METRICS = {
    "psnr": Metric("PSNR, dB", "higher", 2),
    "ssim": Metric("SSIM", "higher", 4),
    "perceptual": Metric("perceptual", "lower", 4, "features"),
    "highpass": Metric("high-pass", "near 1", 3),
    "agreement": Metric("agreement", "higher", 3, "agreement"),
    "kid": Metric("KID", "lower", 4, "reference"),
    "fid": Metric("FID", "lower", 3, "reference"),
}


def selected(
    names: Sequence[str], network: Network | None, width: int, images: int, reference: Reference | None, subset: int
) -> tuple[list[str], list[str]]:
    """The metrics of a run, and notes on those that are left out. Without ``names``, all that can be had.

    Args:
        names: of ``METRICS``.
        width: of the network's features.
        images: of each case.
        subset: of KID, in images.

    Raises:
        ArgumentError: an unknown metric, one that cannot be had, or a reference with too few images.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise ArgumentError("metrics", f"must be among {', '.join(METRICS)}, got {', '.join(unknown)}")
    kept, notes = [], []
    for name in names or METRICS:
        lack = _lack(name, network, width, images, reference, subset)
        if lack and names:
            raise ArgumentError("metrics", f"must have what they need, and {name} needs {lack}")
        if lack:
            notes.append(f"no {name}: it needs {lack}")
        else:
            kept.append(name)
    return kept, notes


def _lack(
    name: str, network: Network | None, width: int, images: int, reference: Reference | None, subset: int
) -> str | None:
    needs = METRICS[name].needs
    if needs and network is None:
        return "--features"
    assert not needs or network is not None
    if needs == "agreement" and network is not None and not network.has_agreement:
        return f"a network with agreement, and {network.name} has none"
    if needs != "reference":
        return None
    if reference is None:
        return "--reference"
    least = subset if name == "kid" else width + 1
    why = "--kid-subset" if name == "kid" else f"more than the {width} features of an image"
    if reference.count < least:
        raise ArgumentError(
            "reference",
            f"must have at least {least} images for {name} ({why}), and {reference.name} has {reference.count}",
        )
    if find_spec("torchmetrics") is None:
        return "torchmetrics: pip install torchmetrics"
    return None if images >= least else f"at least {least} images of each case ({why}), and there are {images}"


def high_pass_energy(pixels: np.ndarray) -> float:
    """Mean square of what a Gaussian blur of 1 pixel removes from (h, w, 3) uint8, at full size."""
    image = pixels.astype(np.float64) / 255
    return float(np.square(image - gaussian(image, HIGH_PASS_SIGMA, channel_axis=2)).mean())


@dataclass(frozen=True)
class Part:
    """What one image adds: its values by metric (NaN if there is none), its features, its record."""

    index: int
    values: dict[str, float]
    features: np.ndarray | None
    same_as_dense: bool
    record: dict[str, Any]


def measure(
    store: Store, images: Images, size: Size, case: str, dense: str, metrics: Sequence[str], network: Network | None,
    indexes: Iterable[int], measured: Callable[[], object] = int,
) -> list[Part]:  # fmt: skip
    """The parts of the images ``indexes`` of ``case``.

    Raises:
        ArgumentError: the feature network fails on an image, or returns another shape or NaN.
    """
    found = []
    for index in indexes:
        pixels, other = store.pixels(size, case, index), store.pixels(size, dense, index)
        values = {
            name: _value(name, pixels, other, images[index][0], network) for name in metrics if _is_per_image(name)
        }
        wanted = network is not None and any(METRICS[name].needs == "reference" for name in metrics)
        features = network.features(pixels) if wanted and network is not None else None
        same = bool(np.array_equal(pixels, other))
        found.append(Part(index, values, features, same, store.record(size, case, index)))
        measured()
    return found


def _is_per_image(name: str) -> bool:
    return METRICS[name].needs != "reference"


def _value(name: str, pixels: np.ndarray, dense: np.ndarray, prompt: str, network: Network | None) -> float:
    if name == "psnr":
        return psnr(dense, pixels)  # infinite if they are equal, which intervals leaves out
    if name == "ssim":
        return ssim(dense, pixels)
    if name == "highpass":
        energy = high_pass_energy(dense)
        return high_pass_energy(pixels) / energy if energy else np.nan
    assert network is not None
    if name == "agreement":
        return network.agreement(pixels, prompt)
    return perceptual_distance(network.maps(pixels), network.maps(dense))


@dataclass(frozen=True)
class Column:
    """A metric of one case: its value and what each image adds to it, by image."""

    value: float | None
    parts: np.ndarray  # (N,) float64
    is_mean: bool

    def interval(self) -> Interval | None:
        if self.is_mean:
            return intervals.of_mean(self.parts)
        assert self.value is not None
        return intervals.around(self.value, self.parts)

    def minus(self, other: Column) -> Interval | None:
        """The difference, paired by image."""
        if self.is_mean:
            return intervals.of_difference(self.parts, other.parts)
        assert self.value is not None and other.value is not None
        return intervals.around(self.value - other.value, self.parts - other.parts)


def columns(
    parts: Sequence[Part], metrics: Sequence[str], reference: np.ndarray | None, subset: int
) -> dict[str, Column]:
    """The columns of one case.

    Args:
        parts: of all its images, in order.
        reference: features of the true images, (M, F).
        subset: of KID.
    """
    found = {}
    for name in metrics:
        if _is_per_image(name):
            found[name] = Column(None, np.array([part.values[name] for part in parts]), True)
            continue
        assert reference is not None
        features = np.stack([part.features for part in parts if part.features is not None])
        if name == "kid":
            value, influence = (
                distances.kernel(features, reference, subset),
                distances.kernel_influence(features, reference),
            )
        else:
            value, influence = distances.frechet(features, reference), distances.frechet_influence(features, reference)
        found[name] = Column(value, influence, False)
    return found
