"""Measures the rates of the model of time on this machine, in about a second, with the layers of a UNet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from ..bench.harness import elapsed, stamp
from ..models.unets import SMALLEST
from .count import count_work
from .model import Rates

_SECONDS = 0.8  # of all rounds
_MIN_ROUNDS = 3
# Side, in tokens, of the image for attention and convolution; on a GPU large enough to fill it.
_CPU_SIDE, _SIDE = 64, 128


def measure_rates(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, batch: int) -> Rates:
    """The rates of ``device``, in about a second.

    Attention: torch's own, dense, with ``heads`` heads of ``head_dim``, those of the model's finest level. The rest:
    the two layers that most of a UNet consists of, a 3 x 3 convolution and a gated feed-forward of the same width, each
    with its norm and activation. They take turns, and the fastest run of each counts, so that other load on the machine
    does not change their proportion.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    side = _CPU_SIDE if device.type == "cpu" else _SIDE
    channels, count = heads * head_dim, side**2
    query, key, value = (noise(batch, count, heads, head_dim).transpose(1, 2) for _ in range(3))
    image, kernel = noise(batch, channels, side, side), noise(channels, channels, 3, 3, scale=1 / (3 * channels**0.5))
    tokens = noise(batch, count, channels)
    widen, narrow = noise(8 * channels, channels, scale=channels**-0.5), noise(channels, 4 * channels, scale=0.02)

    def attention() -> None:
        F.scaled_dot_product_attention(query, key, value)

    def layers() -> None:
        F.conv2d(F.silu(F.group_norm(image, 1)), kernel, padding=1)
        values, gate = F.linear(F.layer_norm(tokens, (channels,)), widen).chunk(2, -1)
        F.linear(values * F.gelu(gate), narrow)

    with torch.random.fork_rng(devices=[]):
        # So small that a call is all launches.
        unet: Any = UNet2DConditionModel(**SMALLEST)
    torch.nn.Module.to(unet.eval(), device, dtype)  # diffusers' own would warn of float32 weights, though it has none
    inputs = noise(1, 4, 8, 8), 1, noise(1, 2, 8)
    launches = count_work(unet, 64, 64, [], batch=1)[0].full.launches

    with torch.inference_mode():
        fastest = _fastest([attention, layers, lambda: unet(*inputs)], device)
    per_position = 2 * batch * count * channels**2
    return Rates(
        attention=4 * batch * count**2 * channels / fastest[0],
        other=per_position * (9 + 12) / fastest[1],
        launch=fastest[2] / launches,
        overlaps=device.type != "cpu",
    )


def _fastest(calls: list[Callable[[], Any]], device: torch.device) -> list[float]:
    """Seconds of the fastest run of each; they take turns."""
    for call in calls:  # compiles, chooses algorithms, fills caches
        call()
    seconds: list[list[float]] = []
    end = time.perf_counter() + _SECONDS
    while len(seconds) < _MIN_ROUNDS or time.perf_counter() < end:
        round_ = []
        for call in calls:
            start = stamp(device)
            call()
            round_.append(elapsed(start, stamp(device)))
        seconds.append(round_)
    return [min(times) for times in zip(*seconds, strict=True)]
