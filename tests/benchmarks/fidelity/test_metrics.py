"""Metrics against their formulas, and intervals against resampling."""

import numpy as np
import pytest
import scipy.linalg
import torch
from fixtures import features as networks
from skimage.filters import gaussian

from benchmarks.fidelity import distances, intervals
from benchmarks.fidelity.metrics import METRICS, Column, high_pass_energy, selected
from benchmarks.fidelity.reference import Reference
from todo_attn.compare.features import Network, perceptual_distance
from todo_attn.config.checks import ArgumentError

CPU = torch.device("cpu")


def image(seed, height=24, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sets(count=60, width=4, shift=0.3):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(width, width))
    return rng.normal(size=(count, width)) @ mix + shift, rng.normal(size=(count, width)) @ mix.T


def test_high_pass_energy():
    pixels = image(0)
    x = pixels / 255
    blurred = np.stack([gaussian(x[..., c], 1.0) for c in range(3)], -1)
    assert high_pass_energy(pixels) == pytest.approx(((x - blurred) ** 2).mean())
    flat = np.full_like(pixels, 90)
    assert high_pass_energy(flat) == pytest.approx(0)
    assert high_pass_energy(pixels[:, ::1] // 2) < high_pass_energy(pixels)


def test_perceptual_distance():
    network, net = Network(networks.SmallNetwork(), "small", CPU), networks.SmallNetwork()
    one, other = image(1), image(2)

    def maps(pixels):
        with torch.no_grad():
            return net.maps(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)

    expected = 0.0
    for a, b in zip(maps(one), maps(other), strict=True):
        a, b = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (a, b))
        expected += ((a - b) ** 2).sum(1).mean().item()
    assert perceptual_distance(network.maps(one), network.maps(other)) == pytest.approx(expected, rel=1e-5)
    assert perceptual_distance(network.maps(one), network.maps(one)) == 0


def test_frechet_distance():
    pytest.importorskip("torchmetrics")
    x, y = sets()
    s, r = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + r - 2 * scipy.linalg.sqrtm(s @ r).real)
    assert distances.frechet(x, y) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance():
    pytest.importorskip("torchmetrics")
    x, y = sets()
    n = len(x)

    def k(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal(m):
        return (m.sum() - np.trace(m)) / (n * (n - 1))

    expected = off_diagonal(k(x, x)) + off_diagonal(k(y, y)) - 2 * k(x, y).mean()
    assert distances.kernel(x, y, subset=n) == pytest.approx(expected, rel=1e-6)
    assert distances.kernel(x, y, subset=20) == distances.kernel(x, y, subset=20)


@pytest.mark.parametrize("more", [(), (20,)], ids=["frechet", "kernel"])
def test_a_distance_waits_for_no_other_process(more, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # without a group, all waiting is an error
    x, y = (np.random.default_rng(seed).normal(size=(40, 8)) for seed in (1, 2))
    distance = distances.kernel if more else distances.frechet
    assert np.isfinite(distance(x, y, *more))


@pytest.mark.parametrize("name", ["frechet", "kernel"])
def test_an_influence_is_what_leaving_the_image_out_changes(name):
    """The jackknife: N - 1 times the distance minus that without the image."""
    pytest.importorskip("torchmetrics")
    x, y = sets(200)
    influence = getattr(distances, f"{name}_influence")(x, y)
    assert influence.mean() == pytest.approx(0, abs=1e-9)

    def distance(features):
        if name == "frechet":
            return distances.frechet(features, y)
        n, within = len(features), (features @ features.T / features.shape[1] + 1) ** 3
        cross = (features @ y.T / features.shape[1] + 1) ** 3
        return (within.sum() - np.trace(within)) / (n * (n - 1)) - 2 * cross.mean()  # without the reference's own part

    whole = distance(x)
    jackknife = np.array([(len(x) - 1) * (whole - distance(np.delete(x, i, 0))) for i in range(len(x))])
    jackknife -= jackknife.mean()
    assert np.abs(influence - jackknife).max() < 0.04 * np.abs(jackknife).max()


def test_the_interval_of_a_frechet_distance_is_that_of_resampling():
    pytest.importorskip("torchmetrics")
    x, y = sets(150, shift=0.8)
    interval = intervals.around(distances.frechet(x, y), distances.frechet_influence(x, y))
    rng = np.random.default_rng(1)
    resampled = [distances.frechet(x[rng.integers(0, len(x), len(x))], y) for _ in range(200)]
    spread = np.percentile(resampled, 97.5) - np.percentile(resampled, 2.5)
    assert interval.high - interval.low == pytest.approx(spread, rel=0.25)


def test_a_paired_difference_is_told_apart_where_the_means_are_not():
    rng = np.random.default_rng(0)
    hard = rng.normal(30, 5, 40)  # some images are harder for both
    one, other = hard + rng.normal(0.5, 0.2, 40), hard + rng.normal(0, 0.2, 40)
    a, b = intervals.of_mean(one), intervals.of_mean(other)
    assert a.low < b.high
    difference = intervals.of_difference(one, other)
    assert difference.excludes_zero
    assert difference.value == pytest.approx((one - other).mean())
    assert difference.low < difference.value < difference.high
    assert not intervals.of_difference(one, one).excludes_zero
    assert intervals.of_difference(one, other) == difference


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [intervals.of_mean(rng.normal(size=30)) for _ in range(100)]
    assert 85 <= sum(f.low <= 0 <= f.high for f in found) <= 100


def test_values_that_are_not_finite_are_left_out():
    assert intervals.of_mean(np.array([np.inf, 2.0, np.nan, 4.0])).value == 3
    assert intervals.of_mean(np.array([np.inf])) is None
    assert intervals.of_mean(np.array([5.0])) == (5.0, None, None)
    assert intervals.of_difference(np.array([np.inf, 3.0]), np.array([np.inf, 1.0])).value == 2


def test_columns_pair_distances_by_their_influence():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=30)
    one, other = Column(2.0, parts, False), Column(1.5, parts + 1e-3 * rng.normal(size=30), False)
    difference = one.minus(other)
    assert difference.value == 0.5
    assert difference.excludes_zero
    assert one.interval().low < 1.9


@pytest.mark.parametrize(
    ("names", "images", "count", "problem"),
    [
        (["psnr", "sharpness"], 20, 20, "metrics must be among psnr, .*, got sharpness"),
        (["kid"], 20, 9, "reference must have at least 10 images for kid .* has 9"),
        ([], 20, 9, "reference must have at least 10 images for kid .* has 9"),
        (["fid"], 20, 4, "reference must have at least 5 images for fid .* 4 features"),
        (["fid"], 4, 20, "metrics .* fid needs at least 5 images of each case"),
    ],
)
def test_metrics_that_cannot_be_had(names, images, count, problem):
    pytest.importorskip("torchmetrics")
    network = Network(networks.SmallNetwork(), "small", CPU)
    with pytest.raises(ArgumentError, match=f"^{problem}"):
        selected(names, network, 4, images, Reference(networks.draw, count, "drawn"), 10)


def test_by_default_what_cannot_be_had_is_left_out_with_a_note():
    kept, notes = selected([], None, 0, 8, None, 10)
    assert kept == ["psnr", "ssim", "highpass"]
    assert len(notes) == len(METRICS) - 3
    kept, notes = selected([], Network(networks.WithoutAgreement(), "small", CPU), 4, 8, None, 10)
    assert kept == ["psnr", "ssim", "perceptual", "highpass"]
    with pytest.raises(ArgumentError, match=r"^metrics .* perceptual needs --features"):
        selected(["perceptual"], None, 0, 8, None, 10)
