"""An interruption ends the timing and keeps the samples taken by then."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from todo_attn.bench.harness import Measured, Sample

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptError(Exception):
    """Ends one candidate after the other; unlike after KeyboardInterrupt, their samples are kept."""


class Stoppable:
    """A meter that a signal stops: after it, no sample is taken.

    Args:
        meter: takes a sample, as :class:`todo_attn.bench.harness.Meter` does.
    """

    def __init__(self, meter: Callable[[Callable[..., Any]], Sample]) -> None:
        self.stopped = False
        self._meter, self._inside, self._samples = meter, False, 0

    def __call__(self, call: Callable[..., Any]) -> Sample:
        self._inside = True
        try:
            if self.stopped:
                raise InterruptError
            sample = self._meter(call)
            self._samples += 1
            return sample
        except KeyboardInterrupt as interrupt:
            raise InterruptError from interrupt
        finally:
            self._inside = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM stop this meter. Before its first sample they raise KeyboardInterrupt."""
        self._samples = 0
        before = {kind: signal.signal(kind, self._stop) for kind in _SIGNALS}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _stop(self, *_: Any) -> None:
        self.stopped = True
        if self._inside or not self._samples:
            raise KeyboardInterrupt


def as_far_as_it_got(result: Measured) -> Measured:
    """``result``, without an error if it was interrupted."""
    interrupted = (result.error or "").startswith(InterruptError.__name__)
    return replace(result, error=None) if interrupted else result


def pairs(results: Sequence[Measured]) -> Iterator[tuple[Measured, Measured]]:
    """The baseline ``results[0]`` with each contender, cut to the same number of samples.

    Only an interruption makes these numbers differ. A pair without samples, because it was interrupted, is left out.
    """
    baseline, *contenders = results
    for contender in contenders:
        if baseline.error is None and contender.error is None:
            shared = min(len(baseline.seconds), len(contender.seconds))
            if shared:
                yield _first(shared, baseline), _first(shared, contender)
        elif baseline.error or baseline.seconds:
            yield baseline, contender


def _first(samples: int, result: Measured) -> Measured:
    return replace(result, seconds=result.seconds[:samples])
