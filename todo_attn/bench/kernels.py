"""Runs the cases of :mod:`.cases`: checks each candidate, times it alone on the device, and makes a row for each pair.

In a row, ``baseline`` is a peer and ``contender`` is ours. The rivals are the peers that compute the same on the same
inputs. The part of the fastest rival has ``best_of``, the median seconds of all rivals; claims may rest on rows with
``best_of`` only. If :attr:`.Case.best_only`, no other rival has a row. Other forms of ours (the kernel without packing)
are compared with the fastest rival. ``peak_gib`` is the memory that a candidate's calls took beyond the inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch

from .. import machine
from . import attention, harness, matching, tokens, training
from .cases import Case
from .harness import Candidate, Measured, Meter, Rounds
from .trial import Trial, rates

Row = dict[str, Any]
MakeTrial = Callable[[Case, torch.device], Trial]
_SAMPLE_CALLS = 4  # of each candidate, at least, in a sample on a GPU
_TRIALS: dict[str, MakeTrial] = {
    "attention": attention.trial,
    "training": training.trial,
    "gather": tokens.trial,
    "scatter": tokens.trial,
    "recover": tokens.trial,
    "match_tokens": matching.trial,
    "plan_pruning": matching.trial,
}


def rounds_for(device: torch.device) -> Rounds:
    """How long to time a case: at most 6 s, and at most 20 rounds on a GPU or 3 on a CPU."""
    return Rounds(warmup=1, rounds=3, seconds=6) if device.type == "cpu" else Rounds(warmup=3, rounds=20, seconds=6)


def run(
    cases: Iterable[Case],
    device: torch.device,
    rounds: Rounds,
    trial: MakeTrial | None = None,
) -> Iterator[list[Row]]:
    """Yield the rows of each case as soon as it is measured. A case that fails, of memory for example, fails alone.

    ``trial`` makes the candidates of a case; None: ours and the peers that the case names.
    """
    about = machine.describe(device)
    for case in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backend that cannot run warns at every call; its row has the error
            rows = measure(case, device, rounds, about, trial or _TRIALS[case.benchmark])
        yield rows


def measure(
    case: Case, device: torch.device, rounds: Rounds, about: dict[str, Any], make: MakeTrial, *, bar: bool = True
) -> list[Row]:
    """The rows of one case; ``about`` describes the machine; ``bar``: whether a terminal shows the progress."""
    with torch.no_grad():
        try:
            trial = make(case, device)
        except Exception as error:  # most likely out of memory; an error of a candidate ends only that candidate
            return _no_inputs(case, about, error)
        calls = -(-_SAMPLE_CALLS // len(trial.inputs)) if device.type == "cuda" else 1
        meter = Meter(device, calls, trial.inputs, alone=True)
        label = f"{case.benchmark} {case.width}x{case.height}"
        results = harness.measure([*trial.peers, *trial.ours], meter, rounds, label=label, bar=bar)
        for result in results:
            if result.error is None:
                result.candidate.info.update(rates(result.candidate.info, _median(result)))
        if results[len(trial.peers)].error is None:
            with suppress(RuntimeError):  # if a later candidate has broken the device
                call = trial.ours[0].build()
                trial.ours[0].info["sm_mhz"] = machine.sm_mhz(device, lambda: call(trial.inputs[0]))
    return _rows(case, trial, results, about)


def _rows(case: Case, trial: Trial, results: list[Measured], about: dict[str, Any]) -> list[Row]:
    peers, (main, *forms) = results[: len(trial.peers)], results[len(trial.peers) :]
    rivals = [peer for peer in peers if peer.candidate.name in trial.rivals]
    best = min(rivals, key=_median)
    if best.error is None:
        medians = {rival.candidate.name: None if rival.error else _median(rival) for rival in rivals}
        best.candidate.info["best_of"] = medians
        if case.best_only:
            peers = [best, *(peer for peer in peers if peer not in rivals)]
    pairs = [(peer, main) for peer in peers] + [(best, form) for form in forms]
    return [row for pair in pairs for row in harness.compare(case.benchmark, case.describe(), about, pair)]


def _median(result: Measured) -> float:
    return float("inf") if result.error else harness.quantiles(result.seconds)["p50"]


def _no_inputs(case: Case, about: dict[str, Any], error: Exception) -> list[Row]:
    reason = f"no inputs: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    candidates = [Measured(Candidate(name, lambda: lambda: None), error=reason) for name in ("any peer", "todo")]
    return harness.compare(case.benchmark, case.describe(), about, candidates)
