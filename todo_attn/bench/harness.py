"""Times two or more ways to compute the same thing side by side, and makes rows of the results.

All candidates are built and warmed up. Then they take turns in rounds, every other round in reverse order, so that a
steady drift of the machine's clocks cancels out. Speed-ups are ratios within a round. A row has one baseline, one
contender and their ratio. A candidate that fails gets a row with its error and does not stop the others. Outputs can be
checked; a wrong result is never timed.
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

from ..machine import GPU_TICKS

QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
_MIN_ROUNDS = 2
_HELD_CALLS = 4  # queued meanwhile: one may take the host 2 ms, and a GPU's queue holds 1024 launches


def nothing(*_: Any) -> None:
    """A call that does nothing."""


@dataclass
class Candidate:
    """One way to compute it.

    Args:
        name: in the rows.
        build: makes the function to time. Imports and allocations that may fail belong here.
        info: more to write into this candidate's part of a row; may be filled in until the rows are made.
        check: gets the output of the first warm-up call and raises if it is wrong; then the candidate is not timed.
    """

    name: str
    build: Callable[[], Callable[..., Any]]
    info: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Rounds:
    """``warmup`` untimed rounds, then at most ``rounds`` timed ones.

    After two timed rounds, none is started once the timed rounds have taken ``seconds``.
    """

    warmup: int = 1
    rounds: int = 5
    seconds: float = float("inf")


class Sample(NamedTuple):
    """One sample: the output, seconds per call, and the peak of memory allocated on a GPU."""

    output: Any
    seconds: float
    peak_bytes: int | None = None


@dataclass
class Measured:
    """The results of a candidate: seconds of each round, the highest memory, and the error that ended it, if any."""

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
        """The candidate's part of a row."""
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
        calls: calls per sample for each set of inputs, for functions that are too short to time once.
        inputs: sets of inputs, used in turn; together larger than the caches, so that no call finds its inputs there.
            The output of a sample is that of the last call. Empty: the function takes no argument.
        alone: on CUDA, measure only the work of the calls. The device is held while the host queues them, a few at a
            time, so that launching takes no time; memory is counted beyond what was allocated before. Otherwise time
            and memory are as the caller sees them.
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
                torch.cuda._sleep(GPU_TICKS)
            start = stamp(self.device)
            for argument in turns[first : first + part]:
                output = None  # freed before the next output is allocated
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
    bar: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measured]:
    """Build, warm up, check and time all ``candidates``; the first is the baseline. An exception ends one candidate.

    Each candidate's own ``check`` gets its first warm-up output. ``check(baseline_output, output)`` gets it too, also
    for the baseline, and raises if it is wrong. If the baseline failed, there is nothing to check against. ``bar``:
    show the progress on a terminal, named ``label``.

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
    turns = len(candidates) * (rounds.warmup + rounds.rounds)
    with tqdm(total=turns, desc=label, leave=False, disable=None if bar else True) as shown:
        reference = None
        for i in range(rounds.warmup):
            for result in _turns(results, shown):
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
            for result in _turns(results[::-1] if i % 2 else results, shown):
                with _ending(result):
                    result.add(meter(result.call))
    for result in results:
        result.call = nothing
    _free()
    return results


def compare(benchmark: str, case: dict[str, Any], machine: dict[str, Any], results: Sequence[Measured]) -> list[dict]:
    """One row for each contender, against the baseline ``results[0]``.

    ``speedup`` has quantiles of the baseline's time over the contender's within each round; None if either failed.
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
    """An exception inside ends this candidate only."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        result.error = ": ".join([type(error).__name__, *lines[:1]])
        result.call = nothing


def _turns(order: Sequence[Measured], bar: tqdm) -> Iterator[Measured]:
    """The candidates that have not failed, in order. The memory of one that fails is freed before the next turn."""
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
        with suppress(RuntimeError):  # if a candidate has broken the device
            torch.cuda.empty_cache()
