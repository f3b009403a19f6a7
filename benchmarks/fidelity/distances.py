"""Kernel and Fréchet distance between two sets of features, by torchmetrics, and what each image adds to them.

Both distances are functions of the whole set, so a resampled set gives another distance, with a bias of its own (a
resampled set has duplicates). The intervals therefore use each image's *influence*: the derivative of the distance by
that image's share of the set. Their mean is 0, and the distance plus the mean influence of a resampled set is the
distance of that set to first order. This costs one decomposition for a case instead of one for each resampling.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

SUBSETS = 100
# All features are here, and the other processes do not compute: torchmetrics would wait for theirs.
_ALONE: Any = {"sync_on_compute": False}


class _Features(nn.Module):
    """Stands for the feature network in torchmetrics, which gets features that are computed already."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet(features: np.ndarray, reference: np.ndarray) -> float:
    """Fréchet distance (FID's formula).

    Args:
        features, reference: (N, F) and (M, F) float64, N and M above F.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(features.shape[1]), **_ALONE).set_dtype(torch.float64)
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(features), real=False)
    return float(metric.compute())


def kernel(features: np.ndarray, reference: np.ndarray, subset: int) -> float:
    """Kernel distance (KID): the mean over ``SUBSETS`` random subsets of ``subset`` images, always the same ones.

    Args:
        features, reference: (N, F) and (M, F) float64.
        subset: at least 2, at most N and M.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all", UserWarning)
        network = _Features(features.shape[1])
        metric = KernelInceptionDistance(feature=network, subsets=SUBSETS, subset_size=subset, **_ALONE)
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(features), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(metric.compute()[0])


def frechet_influence(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of each image on :func:`frechet`: (N,) float64, with mean 0.

    With means m and r and covariances S and R, the distance is |m - r|^2 + tr(S + R - 2 (S R)^1/2), whose derivative by
    S is 1 - A, where A = R^1/2 (R^1/2 S R^1/2)^-1/2 R^1/2 maps one normal distribution to the other.
    """
    mean = features.mean(0)
    centred = features - mean
    root = _power(np.cov(reference, rowvar=False), 0.5)
    map_ = root @ _power(root @ np.cov(features, rowvar=False) @ root, -0.5) @ root
    slope = np.eye(len(map_)) - map_
    found = 2 * centred @ (mean - reference.mean(0)) + np.einsum("nf,fg,ng->n", centred, slope, centred)
    return found - found.mean()


def kernel_influence(features: np.ndarray, reference: np.ndarray, block: int = 1024) -> np.ndarray:
    """Of each image on :func:`kernel`: (N,) float64, with mean 0; the kernel is KID's, (x y / F + 1)^3."""
    count, width = features.shape
    found = np.empty(count)
    for start in range(0, count, block):
        rows = features[start : start + block]
        with_itself = ((rows * rows).sum(1) / width + 1) ** 3
        own = ((rows @ features.T / width + 1) ** 3).sum(1) - with_itself
        found[start : start + block] = 2 * own / (count - 1) - 2 * ((rows @ reference.T / width + 1) ** 3).mean(1)
    return found - found.mean()


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Of a symmetric matrix without negative eigenvalues; those that are 0 but for rounding stay 0."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > values.max() * len(values) * np.finfo(values.dtype).eps
    powers = np.where(kept, np.where(kept, values, 1.0) ** exponent, 0.0)
    return (vectors * powers) @ vectors.T
