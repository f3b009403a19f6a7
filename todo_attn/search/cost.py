"""What an image costs, dense's and a candidate's: operations of the UNet, or seconds."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from ..options.methods import SettingError
from ..options.settings import CompareSettings
from ..predict.count import RunCounter
from .checkpoint import Checkpoint
from .images import Images
from .space import Candidate


class Cost:
    """Of a dense image, and of a candidate's.

    Args:
        dense: operations, or seconds.
        of: finds the same of a candidate.
    """

    def __init__(self, dense: float, of: Callable[[Candidate], float]) -> None:
        self.dense, self._of = dense, of
        self._known: dict[str, float] = {}

    def of(self, candidate: Candidate) -> float:
        """Of a candidate that has figures."""
        if candidate.key not in self._known:
            self._known[candidate.key] = self._of(candidate)
        return self._known[candidate.key]


def cost_for(pipe: Any, settings: CompareSettings, kind: str, images: Images, checkpoint: Checkpoint) -> Cost:
    """The cost of the kind that a plan names. Dense's images must be there.

    Raises:
        SettingError: the operations of this model cannot be counted.
    """
    if kind == "seconds":
        dense = median(images.dense(index).seconds for index in range(len(images)))
        return Cost(dense, lambda candidate: median(s for _, s in checkpoint.figures(candidate.key) or ()))
    calls, batch = images.dense_calls(0).calls, images.dense_calls(0).batch
    assert settings.height is not None and settings.width is not None
    try:
        counter = RunCounter(pipe.unet.config, settings.height, settings.width, batch, pipe.vae_scale_factor)
    except ValueError as error:
        raise SettingError("cost", f"must be seconds for this model, which cannot be counted: {error}") from error
    return Cost(counter.dense(calls), lambda candidate: counter.operations(candidate.config, calls))
