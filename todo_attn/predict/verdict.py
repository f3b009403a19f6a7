"""Whether ToDo or DaTo is worth it on a model at a size, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.dato import DaToConfig
from ..config.schedule import FULL
from ..config.todo import ToDoConfig
from .model import WORTH, Rates, Work, gain

NO = "this will not help here"


@dataclass(frozen=True)
class Gains:
    """How many times less one run takes than another.

    Args:
        counted: fewer operations.
        predicted: fewer seconds, by the machine's rates.
        measured: fewer seconds, by the clock; None if nothing was timed.
    """

    counted: float
    predicted: float
    measured: float | None = None

    @property
    def best(self) -> float:
        """Measured if it was timed, else predicted."""
        return self.predicted if self.measured is None else self.measured

    @property
    def helps(self) -> bool:
        """Whether that is worth a change. A clock is noisy, so the count must agree."""
        return self.best >= WORTH and self.counted > 1

    @property
    def times(self) -> str:
        """The gains in seconds, such as "1.61x predicted, 1.58x measured"."""
        return f"{self.predicted:.2f}x predicted" + (
            "" if self.measured is None else f", {self.measured:.2f}x measured"
        )

    def __str__(self) -> str:
        return f"{self.times} ({self.counted:.2f} times fewer operations)"


def compare_runs(
    before: tuple[Sequence[Work], Sequence[float] | None],
    after: tuple[Sequence[Work], Sequence[float] | None],
    rates: Rates,
) -> Gains:
    """What ``after`` gains over ``before``.

    Args:
        before, after: the work of each call of a run, and the seconds of each if they were measured.
        rates: of the machine.
    """
    (work_before, clock_before), (work_after, clock_after) = before, after
    predicted = gain(list(map(rates.seconds, work_before)), list(map(rates.seconds, work_after)))
    measured = None if clock_before is None or clock_after is None else gain(clock_before, clock_after)
    counted = gain([work.operations for work in work_before], [work.operations for work in work_after])
    return Gains(counted, predicted, measured)


@dataclass(frozen=True)
class Verdict:
    """Whether one configuration is worth it on one model at one size, and why not.

    Args:
        config: the configuration.
        gains: of a run over a dense one.
        downsamples: whether ToDo, alone or as ``config.todo``, drops any key at that size.
        share: of a dense call's time that self-attention takes.
        beside_dato: what ``config.todo`` gains over the same DaTo without it; None unless the configuration is both.
        beside_todo: what DaTo gains over ``config.todo`` alone; None likewise.
        starts_slowly: whether a dense call's operations take longer to launch than to compute, on a machine that does
            both at once.
    """

    config: ToDoConfig | DaToConfig
    gains: Gains
    downsamples: bool
    share: float
    beside_dato: Gains | None = None
    beside_todo: Gains | None = None
    starts_slowly: bool = False

    @property
    def todo_helps(self) -> bool | None:
        """Whether ToDo adds something to DaTo; None unless the configuration is both."""
        if self.beside_dato is None:
            return None
        return self.downsamples and self.beside_dato.helps

    @property
    def dato_helps(self) -> bool | None:
        """Whether DaTo adds something to ToDo; None unless the configuration is both."""
        return None if self.beside_todo is None else self.beside_todo.helps

    def __str__(self) -> str:
        """In words: the gain, or that this will not help here, and why."""
        if not self.gains.helps:
            return f"{NO}: {self._reason()} ({self.gains.times})"
        if self.downsamples and self.beside_todo is not None and not self.beside_todo.helps:
            if self.beside_todo.best < 1:
                return f"{self.gains}, less than ToDo alone: at this size choosing tokens takes more than it saves"
            return f"{self.gains}, of which DaTo adds only {self.beside_todo.best - 1:.1%} to ToDo alone"
        if self.beside_dato is None or self.todo_helps:
            return str(self.gains)
        if not self.downsamples and isinstance(self.config, DaToConfig) and self.config.todo is not None:
            return f"{self.gains}, to which ToDo adds nothing: {_why_dense(self.config.todo)}"
        return f"{self.gains}, to which ToDo adds only {max(0, self.beside_dato.best - 1):.1%}"

    def _reason(self) -> str:
        """Why there is hardly anything to gain."""
        if why_idle := self._why_idle():
            return why_idle
        if self.gains.measured is not None and self.gains.predicted >= WORTH:
            return "timed, it does not gain what the operations promise"
        if self.gains.counted >= WORTH and self.starts_slowly:
            return "starting the operations one by one takes longer than computing them; torch.compile helps first"
        if isinstance(self.config, ToDoConfig):
            return f"self-attention takes only {self.share:.0%} of the time at this size"
        if self.gains.counted == 1:
            return "it leaves nothing out at this size"
        if self.gains.counted < 1:
            return "choosing tokens takes more operations than it saves at this size"
        return f"what it leaves out is only {1 - 1 / self.gains.counted:.0%} of the operations"

    def _why_idle(self) -> str | None:
        """Why the configuration changes nothing at this size; None if it changes something."""
        if self.downsamples:
            return None
        if isinstance(self.config, ToDoConfig):
            return _why_dense(self.config)
        if not self.config.computes_everything:
            return None
        todo = "" if self.config.todo is None else f", and of ToDo {_why_dense(self.config.todo)}"
        return f"prune_ratio is 0 and cache_schedule has every call computed in full{todo}"


def kinds_of(config: ToDoConfig | DaToConfig) -> str:
    """The kind of each call of a run, the first included, as a schedule's digits; ToDo has one kind."""
    return FULL + (config.cache_schedule or "") if isinstance(config, DaToConfig) else FULL


def _why_dense(config: ToDoConfig) -> str:
    """Why ToDo drops no key."""
    if config.factor != "auto":
        return "the factor is 1 at every level, so nothing is downsampled"
    most = f"max_kv_tokens={config.max_kv_tokens}"
    return f"nothing is downsampled, no level having more than {most} tokens at this size"
