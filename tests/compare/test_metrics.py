"""PSNR and SSIM against their formulas."""

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from todo_attn.compare.metrics import psnr, ssim


def noise(seed: int, shape: tuple[int, ...] = (24, 32, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_psnr_of_a_known_difference():
    image = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(image, image + np.uint8(10)) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(image + np.uint8(10), image) == pytest.approx(20 * math.log10(255 / 10))


def test_equal_pictures():
    assert psnr(noise(0), noise(0)) == math.inf
    assert ssim(noise(0), noise(0)) == pytest.approx(1.0)


def test_ssim_is_that_of_wang():
    a, b = noise(0).astype(float), noise(1).astype(float)

    def mean(x):
        return gaussian_filter(x, sigma=(1.5, 1.5, 0), truncate=3.5)

    variance = {k: mean(x * y) - mean(x) * mean(y) for k, x, y in (("aa", a, a), ("bb", b, b), ("ab", a, b))}
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    map_ = (2 * mean(a) * mean(b) + c1) * (2 * variance["ab"] + c2)
    map_ /= (mean(a) ** 2 + mean(b) ** 2 + c1) * (variance["aa"] + variance["bb"] + c2)
    assert ssim(noise(0), noise(1)) == pytest.approx(map_[5:-5, 5:-5].mean(), abs=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("reference", "image", "names"),
    [
        (noise(0).astype(np.float32), noise(0), "reference must be uint8"),
        (noise(0), noise(0)[..., 0], "image must be uint8"),
        (noise(0), noise(0)[:-1], "image must have the shape"),
    ],
    ids=["dtype", "channels", "size"],
)
def test_refuses(metric, reference, image, names):
    with pytest.raises(ValueError, match=names):
        metric(reference, image)
