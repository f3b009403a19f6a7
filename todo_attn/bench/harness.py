"""Two or more ways to compute the same thing, timed fairly side by side, and the rows that say what came out.

All candidates are built and warmed, then run in turn, round after round, every other round in reverse, so that a steady
drift of the machine's clocks cancels out. The ratio is taken within each round. A row holds one baseline, one contender
and their ratio, never a candidate alone; a candidate that fails gives a row that says so and holds up no other. What a
candidate returns can be checked, and a wrong result is never timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
_MIN_ROUNDS = 2
_HOLD_TICKS = 20_000_000  # of a GPU's clock: about 10 ms
_HELD_CALLS = 4  # which the host queues meanwhile: a call may take it 2 ms, and a GPU takes 1024 launches in advance


def nothing(*_: Any) -> None:
    """A call that does nothing."""


@dataclass
class Candidate:
    """One way to compute it.

    Args:
        name: as it stands in the rows.
        build: makes the function to time. An import or an allocation that may fail belongs here.
        info: what else the rows say of this candidate; may be filled until the rows are made.
        check: sees the first warm-up's output and raises where it is wrong; the candidate is then not timed.
    """

    name: str
    build: Callable[[], Callable[..., Any]]
    info: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Rounds:
    """How often: ``warmup`` untimed rounds, then ``rounds`` timed ones.

    After two timed rounds no further one starts once they took ``seconds``.
    """

    warmup: int = 1
    rounds: int = 5
    seconds: float = float("inf")


class Sample(NamedTuple):
    """One timed call: what it returned, seconds per call, and the most memory allocated on a GPU meanwhile."""

    output: Any
    seconds: float
    peak_bytes: int | None = None


@dataclass
class Measured:
    """What became of a candidate: its samples, one a round, or the error that ended it."""

    candidate: Candidate
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None
    call: Callable[..., Any] = nothing

    def add(self, sample: Sample) -> None:
        self.seconds.append(sample.seconds)
        if sample.peak_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, sample.peak_bytes)

    def row(self) -> dict[str, Any]:
        """This candidate's part of a row."""
        return {
            "name": self.candidate.name,
            "seconds": quantiles(self.seconds) if self.seconds else None,
            "samples": self.seconds,
            "peak_gib": None if self.peak_bytes is None else round(self.peak_bytes / 2**30, 3),
            "error": self.error,
            **self.candidate.info,
        }


def stamp(device: torch.device) -> Any:
    """Now, on the device's own time line: a recorded event on CUDA, elsewhere the clock (MPS is waited for)."""
    if device.type == "mps":
        torch.mps.synchronize()
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed(start: Any, end: Any) -> float:
    """Seconds from one stamp to a later one; waits until the device has reached it."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Meter:
    """Times one sample on ``device``.

    Args:
        calls: calls per sample (and set of inputs), for what is too short to time alone.
        inputs: what the function is called with, one after the other: sets that together exceed the caches, so that no
            call finds its own still there. The sample's output is that of the last. Empty: called with nothing.
        alone: on CUDA, count the calls' own work: the device is held until the host has queued them, a few at a time,
            so that no launch shows, and memory is what they took beyond what was there. Otherwise both are as the
            caller sees them.
    """

    device: torch.device
    calls: int = 1
    inputs: Sequence[Any] = ()
    alone: bool = False

    def __call__(self, call: Callable[..., Any]) -> Sample:
        cuda = self.device.type == "cuda"
        held = cuda and self.alone
        before = 0
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            if self.alone:
                before = torch.cuda.memory_allocated(self.device)
        each: list[tuple[Any, ...]] = [(x,) for x in self.inputs]
        turns = (each or [()]) * self.calls
        part = _HELD_CALLS if held else len(turns)
        spans = []
        output = None
        for first in range(0, len(turns), part):
            if held:
                torch.cuda._sleep(_HOLD_TICKS)
            start = stamp(self.device)
            for argument in turns[first : first + part]:
                output = None  # freed before the next one is made
                output = call(*argument)
            spans.append((start, stamp(self.device)))
        seconds = sum(elapsed(*span) for span in spans) / len(turns)
        return Sample(output, seconds, torch.cuda.max_memory_allocated(self.device) - before if cuda else None)


def measure(
    candidates: Sequence[Candidate],
    meter: Callable[[Callable[..., Any]], Sample],
    rounds: Rounds,
    *,
    check: Callable[[Any, Any], None] | None = None,
    label: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measured]:
    """Build, warm, check and time all ``candidates``; the first is the baseline. An exception ends its candidate only.

    Each candidate's own ``check`` gets its first warm-up output. ``check(baseline_output, output)`` gets it too, also
    for the baseline, and raises if it is wrong. If the baseline failed, there is nothing to check against.

    Raises:
        ValueError: fewer than two candidates, or a check without a warm-up round.
    """
    if len(candidates) < 2:
        names = [candidate.name for candidate in candidates]
        raise ValueError(f"candidates must be a baseline and at least one contender, got {names}")
    if (check or any(candidate.check for candidate in candidates)) and rounds.warmup < 1:
        raise ValueError(f"rounds.warmup must be at least 1 for the outputs to be checked, got {rounds.warmup}")
    results = [Measured(candidate) for candidate in candidates]
    for result in results:
        with _ending(result):
            result.call = result.candidate.build()
    with tqdm(total=len(candidates) * (rounds.warmup + rounds.rounds), desc=label, leave=False, disable=None) as bar:
        reference = None
        for i in range(rounds.warmup):
            for result in _turns(results, bar):
                with _ending(result):
                    output = meter(result.call).output
                    if i == 0 and result.candidate.check:
                        result.candidate.check(output)
                    if i == 0 and check:
                        reference = output if result is results[0] else reference
                        if reference is not None:
                            check(reference, output)
                    output = None
        start = clock()
        for i in range(rounds.rounds):
            if i >= _MIN_ROUNDS and clock() - start >= rounds.seconds:
                break
            for result in _turns(results[::-1] if i % 2 else results, bar):
                with _ending(result):
                    result.add(meter(result.call))
    for result in results:
        result.call = nothing
    _free()
    return results


def compare(benchmark: str, case: dict[str, Any], machine: dict[str, Any], results: Sequence[Measured]) -> list[dict]:
    """One row per contender, each against the baseline ``results[0]``.

    ``speedup`` is the baseline's time over the contender's, within each round; None where either failed.
    """
    baseline, *contenders = results
    rows = []
    for contender in contenders:
        whole = baseline.error is None and contender.error is None and contender.seconds
        ratios = [a / b for a, b in zip(baseline.seconds, contender.seconds, strict=True)] if whole else None
        rows.append(
            {
                "benchmark": benchmark,
                "case": case,
                "baseline": baseline.row(),
                "contender": contender.row(),
                "speedup": quantiles(ratios) if ratios else None,
                "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "machine": machine,
            }
        )
    return rows


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, interpolated."""
    return {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}


@contextmanager
def _ending(result: Measured) -> Iterator[None]:
    """An exception ends this candidate, and nothing else."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        result.error = ": ".join([type(error).__name__, *lines[:1]])
        result.call = nothing


def _turns(order: Sequence[Measured], bar: tqdm) -> Iterator[Measured]:
    """The candidates still running, in that order; what a failing one held is freed before the next one's turn."""
    for result in order:
        if result.error is None:
            bar.set_postfix_str(result.candidate.name)
            yield result
            if result.error:
                _free()
        bar.update()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a device that a candidate has broken
            torch.cuda.empty_cache()
