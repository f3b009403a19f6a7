"""The UNet timer: one run of a UNet with each call timed by its kind, and the share that self-attention takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from ..config.schedule import FULL, KINDS
from ..peak_memory import watch_peak
from .harness import elapsed, nothing, stamp


@dataclass
class CallTimes:
    """The times of the calls of each run.

    Args:
        kinds: the kind of each call, as the digits of a schedule.
        runs: for each complete run, in order, the stamps at its start and after each of its calls. A short run has the
            first calls of ``kinds`` only.
    """

    kinds: str
    runs: list[list[Any]] = field(default_factory=list)

    @property
    def first(self) -> int:
        """The length of a short run: its calls include every kind and, if there is one, a second full call."""
        return 1 + max(*map(self.kinds.index, self.kinds), self.kinds.find(FULL, 1))

    def seconds(self) -> list[float]:
        """Seconds of each call of the last run; waits for the device."""
        return _seconds(self.runs[-1])

    def by_kind(self) -> dict[str, dict[str, float]]:
        """For each kind of call, how many a run has, and the median of their seconds in the last run."""
        medians = self._medians(self.seconds())
        return {
            name: {"calls": self.kinds.count(kind), "seconds": medians[kind]}
            for kind, name in KINDS.items()
            if kind in self.kinds
        }

    def medians(self, skip: int = 0) -> dict[str, float]:
        """Median seconds of each kind of call, over all runs but the first ``skip``."""
        return self._medians(*map(_seconds, self.runs[skip:]))

    def whole(self, seconds: Sequence[float]) -> float:
        """Seconds of a whole run, estimated from the ``seconds`` of its first calls by the median of each kind."""
        medians = self._medians(seconds)
        return sum(medians[kind] for kind in self.kinds)

    def _medians(self, *runs: Sequence[float]) -> dict[str, float]:
        calls = [call for run in runs for call in zip(self.kinds, run, strict=False)]
        return {kind: median(seconds for each, seconds in calls if each == kind) for kind in set(self.kinds)}


@dataclass
class Run:
    """A run of a UNet, to be timed; each run starts from the same latents.

    Between calls the latents take a small step against the output, as in Euler's method. So they change as the latents
    of an image do, on which DaTo's choice of tokens depends.

    Args:
        model: the UNet.
        inputs: the arguments of each call except the timestep.
        timesteps: (calls,), in order. DaTo places a call by its timestep, an element of this tensor.
        times: is given the times of each run.
        call: what is called; None is ``model``. A compiled model, for example.
        after: frees what a run leaves on the model, so that it does not count as another candidate's memory.
        info: is given what the last warm-up run finds: "self_attention_share", the share of a run's time that
            self-attention takes, and on a CPU "peak_gib", the memory above what was resident before.
        warmup: how many runs, from the first on, are short (:attr:`CallTimes.first` calls): seconds, not minutes.
        share: whether to measure the share. Its hooks would break a compiled graph.
    """

    model: nn.Module
    inputs: dict[str, Any]
    timesteps: torch.Tensor
    times: CallTimes
    call: Callable[..., Any] | None = None
    after: Callable[[], object] = nothing
    info: dict[str, Any] = field(default_factory=dict)
    warmup: int = 0
    share: bool = False
    runs: int = 0

    def __post_init__(self) -> None:
        self._call = self.model if self.call is None else self.call

    def __call__(self) -> torch.Tensor:
        self.runs += 1
        if self.runs == self.warmup:
            return self._observed()
        return self._run(self._call, self.times.first if self.runs < self.warmup else len(self.timesteps))

    def rehearse(self) -> torch.Tensor:
        """A short run, not compiled, that is not counted as a warm-up run."""
        return self._run(self.model, self.times.first)

    @torch.no_grad()  # as pipelines do; under inference mode the first call's latents would compile another graph
    def _run(self, call: Callable[..., Any], calls: int, after_each: Callable[[], object] = nothing) -> torch.Tensor:
        """The output of the last call."""
        sample, others = self.inputs["sample"], {k: v for k, v in self.inputs.items() if k != "sample"}
        output = sample
        marks = [stamp(sample.device)]
        for number, timestep in enumerate(self.timesteps[:calls], start=1):
            output = call(sample, timestep, **others, return_dict=False)[0]
            if number < calls:
                sample = sample.sub(output, alpha=1 / len(self.timesteps))
            marks.append(stamp(sample.device))
            after_each()
        self.times.runs.append(marks)  # only now: an interrupted run leaves no times
        self.after()
        return output

    def _observed(self) -> torch.Tensor:
        device = self.inputs["sample"].device
        # On a GPU the harness measures memory.
        peak: Callable[[], int | None] = watch_peak(device) if device.type == "cpu" else nothing
        if self.share:
            with self_attention(self.model, device) as spans:
                ends = [0]
                output = self._run(self._call, self.times.first, lambda: ends.append(len(spans)))
            attention = [sum(elapsed(*span) for span in spans[slice(*call)]) for call in pairwise(ends)]
            self.info["self_attention_share"] = self.times.whole(attention) / self.times.whole(self.times.seconds())
        else:
            output = self._run(self._call, self.times.first)
        if (held := peak()) is not None:
            self.info["peak_gib"] = round(held / 2**30, 3)
        return output


@contextmanager
def self_attention(model: nn.Module, device: torch.device) -> Iterator[list[tuple[Any, Any]]]:
    """Inside, collect the start and end stamps of every self-attention (attn1, its projections included)."""
    starts: list[Any] = []
    spans: list[tuple[Any, Any]] = []

    def enter(*_: Any) -> None:
        starts.append(stamp(device))

    def leave(*_: Any) -> None:
        spans.append((starts.pop(), stamp(device)))

    layers = [module for name, module in model.named_modules() if name.endswith(".attn1")]
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def _seconds(marks: Sequence[Any]) -> list[float]:
    return [elapsed(*span) for span in pairwise(marks)]
