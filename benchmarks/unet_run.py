"""One run of a UNet: as many calls as a picture has, each on what the last one made of the latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel

from todo_attn.bench.harness import between, stamp
from todo_attn.peak_memory import watch_peak
from todo_attn.schedule import FULL, REUSE, SHALLOW

_KINDS = {FULL: "full", SHALLOW: "shallow", REUSE: "reuse"}


@dataclass
class CallTimes:
    """When each call of the last run began, and when that run ended; ``kinds`` has a schedule's digit per call."""

    kinds: str
    marks: list[Any] = field(default_factory=list)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """For each kind that there is, how many calls, and the median of their seconds; waits for a device."""
        seconds = [between(*span) for span in pairwise(self.marks)]
        return {
            name: {
                "calls": self.kinds.count(kind),
                "seconds": median(s for s, k in zip(seconds, self.kinds, strict=True) if k == kind),
            }
            for kind, name in _KINDS.items()
            if kind in self.kinds
        }


@dataclass
class Run:
    """What is timed: a run of the UNet from the same latents every time.

    Between calls the latents take a small step against the output, as in Euler's method, for all methods alike: so
    they change as a picture's do, which DaTo's choice of tokens goes by.

    Args:
        model: the UNet.
        call: what is called: ``model``, or that compiled.
        inputs: of each call but for the timestep (:func:`benchmarks.models.inputs`).
        timesteps: (calls,), those of the run in order.
        after: frees what the run leaves on the model, so that it does not count as another side's memory.
        times: takes the times of each run's calls.
        info: takes what run number ``observed`` (from 1) is found to need: the share of its time that self-attention
            takes, and on a CPU its memory ("peak_gib", above what was resident before).
        share: whether to take that share; hooks would cut a compiled graph in pieces.
    """

    model: UNet2DConditionModel
    call: Callable[..., Any]
    inputs: dict[str, Any]
    timesteps: torch.Tensor
    after: Callable[[], object]
    times: CallTimes
    info: dict[str, Any]
    observed: int
    share: bool
    runs: int = 0

    def __call__(self) -> torch.Tensor:
        self.runs += 1
        return self._observed() if self.runs == self.observed else self._run()

    @torch.no_grad()  # as pipelines do; in inference mode the first call's latents would want a graph of their own
    def _run(self) -> torch.Tensor:
        """The last call's output."""
        sample, others = self.inputs["sample"], {k: v for k, v in self.inputs.items() if k != "sample"}
        self.times.marks = marks = [stamp(sample.device)]
        for timestep in self.timesteps[:-1]:
            output = self.call(sample, timestep, **others, return_dict=False)[0]
            sample = sample.sub(output, alpha=1 / len(self.timesteps))
            marks.append(stamp(sample.device))
        output = self.call(sample, self.timesteps[-1], **others, return_dict=False)[0]
        marks.append(stamp(sample.device))
        self.after()
        return output

    def _observed(self) -> torch.Tensor:
        device = self.inputs["sample"].device
        peak = watch_peak(device) if device.type == "cpu" else lambda: None  # the harness has a GPU's
        if self.share:
            with self_attention(self.model) as spans:
                output = self._run()
            whole = between(self.times.marks[0], self.times.marks[-1])
            self.info["self_attention_share"] = sum(between(*span) for span in spans) / whole
        else:
            output = self._run()
        if (held := peak()) is not None:
            self.info["peak_gib"] = round(held / 2**30, 3)
        return output


@contextmanager
def self_attention(model: UNet2DConditionModel) -> Iterator[list[tuple[Any, Any]]]:
    """Collects the start and end stamps of every self-attention (attn1, its projections included) inside."""
    starts: list[Any] = []
    spans: list[tuple[Any, Any]] = []

    def enter(*_: Any) -> None:
        starts.append(stamp(model.device))

    def leave(*_: Any) -> None:
        spans.append((starts.pop(), stamp(model.device)))

    layers = [module for name, module in model.named_modules() if name.endswith(".attn1")]
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()
