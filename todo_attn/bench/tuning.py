"""Find the fastest launch configurations on a GPU: of attention for each head dim of a model, and of the match kernel.

Every candidate is compiled first (:mod:`.compiling`). Then each kernel's candidates are checked against the oracle that
the benchmarks use, and timed side by side on the finest level with that head dim. A candidate replaces the
configuration in use if it is faster in four of five rounds, and by 2 % in the median.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .. import machine
from ..kernels import tuned
from ..kernels.configs import KernelConfig
from ..kernels.tuned import Gpu, Tuned
from . import attention, candidates, kernels, matching, report
from .cases import Case
from .compiling import Launch, compile_all
from .harness import Rounds
from .trial import WRONG

_ROUNDS = Rounds(warmup=2, rounds=20, seconds=3)  # of each kernel
_GAIN = 1.02
Watch = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Contest:
    """One kernel at one shape, and what is timed there; the first configuration is the one in use.

    ``head_dim``: of attention; None is the match kernel.
    """

    head_dim: int | None
    case: Case
    configs: Sequence[KernelConfig]

    @property
    def name(self) -> str:
        return "matching" if self.head_dim is None else f"head dim {self.head_dim}"


def contests(device: torch.device, gpu: Gpu, cases: Iterable[Case]) -> list[Contest]:
    """One for each head dim among ``cases``, attentions of one image, at its finest level; then the match kernel's."""
    now = tuned.tuned(device)
    cases = sorted(cases, key=lambda case: case.level)
    finest: dict[int, Case] = {}
    for case in cases:
        finest.setdefault(case.head_dim, case)
    found: list[Contest] = []
    for head_dim, case in sorted(finest.items()):
        if head_dim % 8 == 0 and head_dim <= 256:
            known = candidates.of_attention(gpu.capability, head_dim)
            found.append(Contest(head_dim, case, _fitting(gpu, head_dim, now.attention.get(head_dim), known)))
    if found:
        match = replace(cases[0], benchmark="match_tokens")
        found.append(Contest(None, match, _fitting(gpu, None, now.match, candidates.of_match(gpu.capability))))
    return [contest for contest in found if len(contest.configs) > 1]


def _fitting(gpu: Gpu, head_dim: int | None, now: KernelConfig | None, known: list[KernelConfig]) -> list[KernelConfig]:
    """The configuration in use, and those of ``known`` that fit the GPU."""
    in_use, *others = dict.fromkeys([*([now] if now else []), *known])
    return [in_use, *(config for config in others if tuned.problem(config, gpu, head_dim) is None)]


def tune(device: torch.device, chosen: Sequence[Contest], watch: Watch) -> dict[str, Any]:
    """Compile, check and time; nothing is written.

    Args:
        device: an NVIDIA GPU.
        chosen: from :func:`contests`.
        watch: called with what is done now, and how much of how much is done.

    Returns:
        ``rows``, one for each contest: ``kernel``, ``head_dim``, ``case``, ``before`` and ``kept`` (None if nothing
        ran), ``ratio``, the median of before's time over kept's in a round (None if before did not run), and
        ``tried``, with the seconds, ratio or error of each configuration; ``notes``, one for each that could not be
        timed; ``wrong``, one for each configuration in use whose result was wrong; ``machine``.

    Raises:
        MemoryError: nothing was timed, because memory ran out.
    """
    gpu = tuned.gpu_of(device)
    assert gpu is not None
    launches = [Launch(contest.case, config) for contest in chosen for config in contest.configs]
    total, done = len(launches) + len(chosen), 0

    def compiled() -> None:
        nonlocal done
        done += 1
        watch(f"compiling, {done} of {len(launches)}", done, total)

    watch("compiling", 0, total)
    errors = dict(zip(launches, compile_all(gpu.capability, launches, compiled), strict=True))
    about = machine.describe(device)
    rows, measured = [], []
    for number, contest in enumerate(chosen):
        watch(f"timing {contest.name}", len(launches) + number, total)
        failed = {config: errors[Launch(contest.case, config)] for config in contest.configs}
        timed = _measure(contest, device, about, [config for config in contest.configs if failed[config] is None])
        measured += timed
        rows.append(_row(contest, failed, timed))
    if report.found_no_memory(measured):
        raise MemoryError
    notes, wrong = [], []
    for contest, row in zip(chosen, rows, strict=True):
        for tried in row["tried"]:
            if tried["error"]:
                notes.append(f"{contest.name}, {tried['config']}: {tried['error']}")
                wrong += notes[-1:] if WRONG in tried["error"] and tried["config"] == row["before"] else []
    return {"rows": rows, "notes": notes, "wrong": wrong, "machine": about}


def _measure(
    contest: Contest, device: torch.device, about: dict[str, Any], configs: Sequence[KernelConfig]
) -> list[kernels.Row]:
    """A row for each of ``configs`` after the first, against the first."""
    if len(configs) < 2:
        return []
    make = partial(
        matching.trial if contest.head_dim is None else attention.trial,
        variants={str(config): Launch(contest.case, config) for config in configs},
    )
    return kernels.measure(contest.case, device, _ROUNDS, about, make, bar=False)


def _row(contest: Contest, failed: dict[KernelConfig, str | None], timed: list[kernels.Row]) -> dict[str, Any]:
    before = contest.configs[0]
    tried = []
    for config in contest.configs:
        sides = [side for row in timed for side in (row["baseline"], row["contender"]) if side["name"] == str(config)]
        speedup = next((row["speedup"] for row in timed if row["contender"]["name"] == str(config)), None)
        seconds = sides[0]["seconds"] if sides else None
        error = failed[config] or (sides[0]["error"] if sides else "nothing to compare it with could be compiled")
        tried.append(
            {
                "config": str(config),
                "seconds": seconds["p50"] if seconds and not error else None,
                "ratio": speedup if failed[before] is None else None,
                "error": error,
            }
        )
    kept, ratio = _choose(tried)
    return {
        "kernel": "match" if contest.head_dim is None else "attention",
        "head_dim": contest.head_dim,
        "case": contest.case.describe(),
        "before": str(before),
        "kept": kept,
        "ratio": ratio,
        "tried": tried,
    }


def _choose(tried: list[dict[str, Any]]) -> tuple[str | None, float | None]:
    """What to keep, and how many times faster it is than the first, which is in use."""
    before, *others = tried
    if before["error"]:
        whole = [each for each in others if each["seconds"]]
        return min(whole, key=lambda each: each["seconds"])["config"] if whole else None, None
    faster = [each for each in others if each["ratio"] and each["ratio"]["p20"] > 1 and each["ratio"]["p50"] >= _GAIN]
    if not faster:
        return before["config"], 1.0
    best = max(faster, key=lambda each: each["ratio"]["p50"])
    return best["config"], best["ratio"]["p50"]


def kept(chosen: Sequence[Contest], rows: Sequence[dict[str, Any]]) -> Tuned:
    """The configurations that the rows of :func:`tune` keep."""
    found = {
        contest.head_dim: config
        for contest, row in zip(chosen, rows, strict=True)
        for config in contest.configs
        if str(config) == row["kept"]
    }
    return Tuned({head_dim: config for head_dim, config in found.items() if head_dim is not None}, found.get(None))
