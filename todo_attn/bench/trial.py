"""What a kernel benchmark times at one shape: sets of inputs, ours and the peers, each checked against an oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .. import machine
from .harness import Candidate

_CACHES = 3  # the sets of inputs together, in caches
_MOST_SETS = 64
WRONG = "wrong result, not timed"  # how a row says so


@dataclass(frozen=True)
class Trial:
    """The candidates of one shape; every one is called with one set of inputs.

    Args:
        inputs: the sets, taken in turn.
        ours: the first is compared with every peer, the others with the fastest rival.
        peers: what they are compared with.
        rivals: names of those peers that do the same job: the fastest of them is the one to beat.
    """

    inputs: Sequence[Any]
    ours: Sequence[Candidate]
    peers: Sequence[Candidate]
    rivals: Sequence[str]


def work(moved: int, flops: int = 0) -> dict[str, Any]:
    """What a row says of a candidate's work: at least ``moved`` bytes read and written, and ``flops`` operations."""
    return {"bytes": moved} | ({"flops": flops} if flops else {})


def rates(info: dict[str, Any], seconds: float) -> dict[str, float]:
    """TFLOP/s and GB/s of a candidate with that ``work``."""
    rates = {"gb_per_s": info["bytes"] / seconds / 1e9}
    return rates | ({"tflops": info["flops"] / seconds / 1e12} if "flops" in info else {})


def rotation(make: Callable[[int, torch.Generator], Any], device: torch.device) -> list[Any]:
    """Sets of random inputs, at least two, that together are some times larger than the device's cache.

    ``make(number, generator)`` gives set ``number``, a tuple with tensors in it.
    """
    generator = torch.Generator(device).manual_seed(0)
    first = make(0, generator)
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
    sets = min(_MOST_SETS, max(2, -(-_CACHES * machine.cache_bytes(device) // size)))
    return [first, *(make(number, generator) for number in range(1, sets))]


def ends(x: torch.Tensor) -> torch.Tensor:
    """The first and the last of a batch, which is what an oracle looks at."""
    return x if x.shape[0] <= 2 else x[[0, -1]]


def spread(count: int, most: int, device: torch.device) -> torch.Tensor:
    """At most ``most`` numbers from 0 to ``count - 1``, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most), device=device).long()


def once(compute: Callable[[], Any]) -> Callable[[], Any]:
    """``compute``, done at the first call and kept: all candidates share one oracle."""
    return cache(compute)


def needs_cuda(device: torch.device) -> None:
    """For the build of a candidate that runs on NVIDIA GPUs only.

    Raises:
        RuntimeError: this is none.
    """
    if device.type != "cuda":
        raise RuntimeError("needs a CUDA GPU")


def wrong(what: str) -> ValueError:
    """A result that is not the oracle's."""
    return ValueError(f"{WRONG}: {what}")
