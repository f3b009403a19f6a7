"""The share of the sampling in which a node acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from todo_attn.config import ArgumentError


class Steps:
    """From ``start`` to ``end``, shares of the sampling as ComfyUI counts them: 0 is the first step, 1 is the end.

    The noise level (sigma) of a call tells where it is. It is read once for each call of the UNet, because that waits
    for the device, and never for the whole sampling.

    Raises:
        ArgumentError: not 0 <= start < end <= 1.
    """

    def __init__(self, model: Any, start: float, end: float) -> None:
        for name, share in (("start_percent", start), ("end_percent", end)):
            if not 0 <= share <= 1:
                raise ArgumentError(name, f"must be a share of the sampling from 0 to 1, got {share!r}")
        if start >= end:
            raise ArgumentError("end_percent", f"must be above start_percent, {start!r}, got {end!r}")
        self.everything = start == 0 and end == 1
        sampling = model.get_model_object("model_sampling")
        self._high, self._low = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
        self._read: tuple[torch.Tensor | None, float] = (None, 0.0)

    def sigma(self, options: Mapping[str, Any]) -> float | None:
        """The sigma of the running call; None if the caller does not say."""
        sigmas = options.get("sigmas")
        if sigmas is None:
            return None
        read = self._read
        if read[0] is not sigmas:  # the same tensor in every block of a call
            read = self._read = (sigmas, float(sigmas.max()))
        return read[1]

    def hold(self, options: Mapping[str, Any]) -> bool:
        """Whether the running call is one of these steps."""
        if self.everything:
            return True
        sigma = self.sigma(options)
        return sigma is not None and self._low <= sigma <= self._high
