"""One run of a UNet: as many calls as a picture has, each on what the last one made of the latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel

from todo_attn.bench.harness import elapsed, stamp
from todo_attn.config.schedule import FULL, REUSE, SHALLOW
from todo_attn.peak_memory import watch_peak

_KINDS = {FULL: "full", SHALLOW: "shallow", REUSE: "reuse"}


@dataclass
class CallTimes:
    """When each call of the last run began, and when that run ended; ``kinds`` has a schedule's digit per call.

    The last run that was not interrupted; where that was a short one, its calls are the first of ``kinds``.
    """

    kinds: str
    marks: list[Any] = field(default_factory=list)

    @property
    def first(self) -> int:
        """How many calls, from the first on, show all that the others do: each kind, and a second full one."""
        return 1 + max(*map(self.kinds.index, self.kinds), self.kinds.find(FULL, 1))

    def seconds(self) -> list[float]:
        """Of each call; waits for a device."""
        return [elapsed(*span) for span in pairwise(self.marks)]

    def by_kind(self) -> dict[str, dict[str, float]]:
        """For each kind that there is, how many calls, and the median of their seconds."""
        seconds = self.seconds()
        return {
            name: {"calls": self.kinds.count(kind), "seconds": self._of(kind, seconds)}
            for kind, name in _KINDS.items()
            if kind in self.kinds
        }

    def whole(self, seconds: Sequence[float]) -> float:
        """What all calls take where the first ones take ``seconds``: the median of each kind."""
        return sum(self.kinds.count(kind) * self._of(kind, seconds) for kind in set(self.kinds))

    def _of(self, kind: str, seconds: Sequence[float]) -> float:
        return median(s for s, k in zip(seconds, self.kinds, strict=False) if k == kind)


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
        after: frees what the run leaves on the model, so that it does not count as another candidate's memory.
        times: takes the times of each run's calls.
        info: takes what the last warm-up run is found to need: the share of a run's time that self-attention takes, and
            on a CPU its memory ("peak_gib", above what was resident before).
        warmup: the first so many runs are short: no more calls than show all that the others do
            (:attr:`CallTimes.first`), which takes seconds where a whole run takes minutes.
        share: whether to take that share; hooks would cut a compiled graph in pieces.
    """

    model: UNet2DConditionModel
    call: Callable[..., Any]
    inputs: dict[str, Any]
    timesteps: torch.Tensor
    after: Callable[[], object]
    times: CallTimes
    info: dict[str, Any]
    warmup: int
    share: bool
    runs: int = 0

    def __call__(self) -> torch.Tensor:
        self.runs += 1
        if self.runs == self.warmup:
            return self._observed()
        return self._run(self.call, self.times.first if self.runs < self.warmup else len(self.timesteps))

    def rehearse(self) -> torch.Tensor:
        """A short run, uncompiled, that counts as none."""
        return self._run(self.model, self.times.first)

    @torch.no_grad()  # as pipelines do; in inference mode the first call's latents would want a graph of their own
    def _run(
        self, call: Callable[..., Any], calls: int, after_each: Callable[[], object] = lambda: None
    ) -> torch.Tensor:
        """The last call's output."""
        sample, others = self.inputs["sample"], {k: v for k, v in self.inputs.items() if k != "sample"}
        marks = [stamp(sample.device)]
        for timestep in self.timesteps[: calls - 1]:
            output = call(sample, timestep, **others, return_dict=False)[0]
            sample = sample.sub(output, alpha=1 / len(self.timesteps))
            marks.append(stamp(sample.device))
            after_each()
        output = call(sample, self.timesteps[calls - 1], **others, return_dict=False)[0]
        marks.append(stamp(sample.device))
        after_each()
        self.times.marks = marks  # only now: an interruption leaves those of the run before
        self.after()
        return output

    def _observed(self) -> torch.Tensor:
        device = self.inputs["sample"].device
        peak = watch_peak(device) if device.type == "cpu" else lambda: None  # the harness has a GPU's
        if self.share:
            with self_attention(self.model) as spans:
                ends = [0]
                output = self._run(self.call, self.times.first, lambda: ends.append(len(spans)))
            attention = [sum(elapsed(*span) for span in spans[slice(*call)]) for call in pairwise(ends)]
            self.info["self_attention_share"] = self.times.whole(attention) / self.times.whole(self.times.seconds())
        else:
            output = self._run(self.call, self.times.first)
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
