"""PSNR and SSIM of one image against another, by scikit-image."""

from __future__ import annotations

import math

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ..config.checks import ArgumentError


def _check(reference: np.ndarray, image: np.ndarray) -> None:
    for name, x in (("reference", reference), ("image", image)):
        if x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] != 3:
            raise ArgumentError(name, f"must be uint8 of shape (height, width, 3), got {x.dtype} of shape {x.shape}")
    if reference.shape != image.shape:
        raise ArgumentError("image", f"must have the shape of reference, {reference.shape}, got {image.shape}")


def psnr(reference: np.ndarray, image: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels; infinite for equal images.

    Args:
        reference, image: (height, width, 3) uint8.

    Raises:
        ArgumentError: another dtype or shape, or different shapes.
    """
    _check(reference, image)
    if np.array_equal(reference, image):
        return math.inf
    return float(peak_signal_noise_ratio(reference, image, data_range=255))


def ssim(reference: np.ndarray, image: np.ndarray) -> float:
    """Structural similarity, at most 1, which equal images have.

    As Wang et al. (2004) define it: a Gaussian window of standard deviation 1.5, per channel, averaged.

    Args:
        reference, image: (height, width, 3) uint8, at least 11 pixels a side.

    Raises:
        ValueError: another dtype or shape, different shapes, or a side below 11 pixels.
    """
    _check(reference, image)
    return float(
        structural_similarity(
            reference,
            image,
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
