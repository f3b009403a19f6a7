"""What DaTo did in the last call of a UNet, for :func:`todo_attn.status`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...config.schedule import KINDS
from .apply import ATTRIBUTE, DaToState


@dataclass(frozen=True)
class DaToStatus:
    """The last call of a UNet under DaTo that began.

    Args:
        kind: "full", "shallow" (the last layers only) or "reuse" (the previous output again); "not called yet" if there
            was no call since :func:`todo_attn.apply_dato` or :func:`todo_attn.reset_dato`.
        call: the number of the call in its run, from 1; None if there was no call.
        calls: how many calls the run has; None if it is not known or there was no call.
        schedule: the digits that the run follows; None if every call is computed in full.
        prune_ratio: the share of the tokens that the call pruned, from 0 to 1.
        streams: the number of runs for which something is kept.
    """

    kind: str
    call: int | None
    calls: int | None
    schedule: str | None
    prune_ratio: float
    streams: int

    def __str__(self) -> str:
        if self.call is None:
            return f"DaTo: {self.kind}"
        of = "" if self.calls is None else f" of {self.calls}"
        follows = "no schedule: every call is full" if self.schedule is None else f"schedule {self.schedule}"
        runs = "1 run" if self.streams == 1 else f"{self.streams} runs"
        return (
            f"DaTo, in the last call: {self.kind}, call {self.call}{of}, {self.prune_ratio:g} of the tokens pruned\n"
            f"{follows}; kept for calls to come: {runs}"
        )


def dato_status(unet: Any) -> DaToStatus | None:
    """None if DaTo is not on ``unet``."""
    state: DaToState | None = getattr(unet, ATTRIBUTE, None)
    if state is None:
        return None
    run = state.run
    if not run.called:
        return DaToStatus("not called yet", None, None, None, 0.0, 0)
    stream = run.stream
    kind, call = KINDS[run.kind], stream.index + 1
    return DaToStatus(kind, call, stream.calls, stream.digits, state.pruned, len(run.streams))
