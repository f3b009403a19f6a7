"""What a kernel benchmark times at one shape: sets of inputs, and candidates that are checked against an oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import machine
from .harness import Candidate

_CACHES = 3  # total size of the sets of inputs, in multiples of the cache
_MOST_SETS = 64
WRONG = "wrong result, not timed"  # in the error of a row


@dataclass(frozen=True)
class Trial:
    """The candidates at one shape. Each call of one takes one set of inputs.

    Args:
        inputs: the sets, used in turn.
        ours: the first is compared with every peer, each other one with the fastest rival alone.
        peers: the baselines.
        rivals: the names of the peers that compute the same on the same inputs.
    """

    inputs: Sequence[Any]
    ours: Sequence[Candidate]
    peers: Sequence[Candidate]
    rivals: Sequence[str]


def work(moved: int, flops: int = 0) -> dict[str, Any]:
    """What a row says of a candidate's work: at least ``moved`` bytes read and written, and ``flops`` operations."""
    return {"bytes": moved} | ({"flops": flops} if flops else {})


def rates(info: dict[str, Any], seconds: float) -> dict[str, float]:
    """TFLOP/s and GB/s of a candidate with this ``work``."""
    rates = {"gb_per_s": info["bytes"] / seconds / 1e9}
    return rates | ({"tflops": info["flops"] / seconds / 1e12} if "flops" in info else {})


def rotation(make: Callable[[int, torch.Generator], Any], device: torch.device) -> list[Any]:
    """Sets of random inputs, at least two, whose total size is a few times the device's cache.

    ``make(number, generator)`` returns set ``number``, a tuple that contains tensors.
    """
    generator = torch.Generator(device).manual_seed(0)
    first = make(0, generator)
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
    sets = min(_MOST_SETS, max(2, -(-_CACHES * machine.cache_bytes(device) // size)))
    return [first, *(make(number, generator) for number in range(1, sets))]


def ends(x: torch.Tensor) -> torch.Tensor:
    """The first and the last of a batch: those that an oracle checks."""
    return x if x.shape[0] <= 2 else x[[0, -1]]


def spread(count: int, most: int, device: torch.device) -> torch.Tensor:
    """At most ``most`` evenly spaced numbers from 0 to ``count - 1``, both included."""
    return torch.linspace(0, count - 1, min(count, most), device=device).long()


def needs_cuda(device: torch.device) -> None:
    """Refuse to build a candidate that runs on NVIDIA GPUs only.

    Raises:
        RuntimeError: ``device`` is not a CUDA device.
    """
    if device.type != "cuda":
        raise RuntimeError("needs a CUDA GPU")


def wrong(what: str) -> ValueError:
    """The error for a result that the oracle rejects."""
    return ValueError(f"{WRONG}: {what}")
