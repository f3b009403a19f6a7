"""The cases of the table: each way to make an image, by name, grouped in families, as data derived from the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from todo_attn.compare.bind import (
    BoundMethod,
    bind_dato,
    bind_deepcache,
    bind_dense,
    bind_todo,
    bind_tome,
    calls_of,
    check_fits,
)
from todo_attn.config.checks import ArgumentError
from todo_attn.config.dato import DaToConfig
from todo_attn.config.modes import Mode
from todo_attn.config.schedule import load as load_schedule
from todo_attn.config.schedule import named as named_schedules
from todo_attn.config.todo import ToDoConfig
from todo_attn.options.settings import MIN_SIZE, SIZE_MULTIPLE

DENSE = "dense"
FACTORS = (2, 3, 4)
CAPS = (4096, 2048, 1024, 512, 256)
RANGES = ((0, 500), (500, 1000), (200, 1000))
RATIOS = (0.25, 0.4, 0.5, 0.6, 0.75)
INTERVALS = (2, 3, 5, 7, 10)
PRUNED = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SCHEDULE = "coco"
STEP_SHARES = (0.2, 0.3, 0.4, 0.5, 0.7)
SMALLER = (1.5, 2.0)  # times smaller along each axis


@dataclass(frozen=True)
class Case:
    """One way to make an image; everything that is not given is as in dense.

    Args:
        name: unique.
        family: of the table.
        todo, dato: a configuration. DaTo's schedule is resampled to the calls of an image.
        schedule: the name of DaTo's schedule.
        tome_ratio: of Token Merging.
        cache_interval: of DeepCache.
        step_share: the share of the steps.
        smaller: the image is made so many times smaller along each axis, and enlarged.
    """

    name: str
    family: str
    todo: ToDoConfig | None = None
    dato: DaToConfig | None = None
    schedule: str | None = None
    tome_ratio: float | None = None
    cache_interval: int | None = None
    step_share: float = 1.0
    smaller: float = 1.0

    @property
    def is_cached(self) -> bool:
        """Whether a call of the UNet may reuse results of an earlier one."""
        return self.cache_interval is not None or (self.dato is not None and self.dato.cache_schedule is not None)

    def steps_of(self, steps: int) -> int:
        """Steps of the scheduler, at least 1, if dense has ``steps``."""
        return max(1, round(self.step_share * steps))

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the image is made, for one of ``height`` x ``width`` pixels."""
        if self.smaller == 1:
            return height, width
        least = -(-MIN_SIZE // SIZE_MULTIPLE)
        fitting = (SIZE_MULTIPLE * max(least, round(s / self.smaller / SIZE_MULTIPLE)) for s in (height, width))
        return next(fitting), next(fitting)

    def bind(self, pipe: Any, steps: int) -> BoundMethod:
        """The case on ``pipe`` for an image of ``steps`` steps of its scheduler; not tried yet."""
        if self.dato is not None:
            config = self.dato.for_calls(calls_of(pipe.scheduler, steps))
            return bind_dato(pipe, config, self.name, self.schedule)
        if self.todo is not None:
            return bind_todo(pipe, self.todo, self.name)
        if self.tome_ratio is not None:
            return bind_tome(pipe, self.tome_ratio, self.name)
        if self.cache_interval is not None:
            return bind_deepcache(pipe, self.cache_interval, self.name)
        return bind_dense(self.name)


def bind_checked(case: Case, pipe: Any, steps: int) -> BoundMethod:
    """``case`` on ``pipe``, put on once and taken off; ``unavailable`` if its package is missing.

    Raises:
        ArgumentError: the pipeline cannot take it, or is not as loaded.
    """
    bound = case.bind(pipe, steps)
    try:
        check_fits(bound, pipe)
    except ValueError as error:
        raise ArgumentError("cases", f"has {case.name!r}, which the pipeline cannot take: {error}") from error
    return bound


def cases_for(levels: Sequence[int], steps: int, schedules: Sequence[str | Path] = ()) -> list[Case]:
    """All cases for a UNet with self-attention at ``levels``, and an image of ``steps`` steps; dense first.

    Args:
        schedules: files, each a case of DaTo more, with the prune ratio and ToDo that it says.

    Raises:
        ArgumentError: one is no schedule, or is given twice.
    """
    found = [Case(DENSE, DENSE), *_baselines(steps), *_todo(levels, steps), *_others(), *_dato()]
    known = {case.name for case in found}
    assert len(known) == len(found)
    for case in map(_of_file, schedules):
        if case.name in known:
            raise ArgumentError("schedules", f"must be given once each, got {case.name!r} twice")
        known.add(case.name)
        found.append(case)
    return found


def _of_file(source: str | Path) -> Case:
    try:
        dato = DaToConfig.from_file(source)
    except ValueError as error:
        raise ArgumentError("schedules", f"must be files of schedules: {error}") from error
    # Files of two searches have the same names, and images are kept by name.
    content = hashlib.sha256(json.dumps(dato.to_dict(), sort_keys=True).encode()).hexdigest()[:6]
    return Case(f"dato:{Path(source).stem}-{content}", "found", dato=dato, schedule=Path(source).stem)


def _fewer(steps: int) -> Iterator[tuple[int, float]]:
    """Numbers of steps below ``steps``, and their shares."""
    shares = {max(1, round(share * steps)): share for share in STEP_SHARES}
    return ((fewer, share) for fewer, share in shares.items() if fewer < steps)


def _baselines(steps: int) -> Iterator[Case]:
    """What a user has for nothing."""
    for fewer, share in _fewer(steps):
        yield Case(f"{DENSE}:steps={fewer}", "fewer steps", step_share=share)
    for times in SMALLER:
        yield Case(f"{DENSE}:enlarged={times:g}", "smaller and enlarged", smaller=times)


def _todo(levels: Sequence[int], steps: int) -> Iterator[Case]:
    for cap in CAPS:
        yield Case(f"todo:kv={cap}", "todo caps", ToDoConfig(max_kv_tokens=cap))
    for factor in FACTORS:
        yield Case(f"todo:factor={factor}", "todo factors", ToDoConfig(factor))
    for level in levels:
        for factor in FACTORS:
            yield Case(f"todo:level{level}={factor}", "todo levels", ToDoConfig({level: factor}))
    for mode in get_args(Mode):
        if mode != ToDoConfig.mode:
            yield Case(f"todo:factor=2:{mode}", "todo modes", ToDoConfig(2, mode=mode))
            yield Case(f"todo:factor=4:{mode}", "todo modes", ToDoConfig(4, mode=mode))
    for fewer, share in _fewer(steps):
        yield Case(f"todo:factor=2:steps={fewer}", "todo, fewer steps", ToDoConfig(2), step_share=share)
    for low, high in RANGES:
        yield Case(f"todo:factor=2:t={low}-{high}", "todo ranges", ToDoConfig(2, timestep_range=(low, high)))


def _others() -> Iterator[Case]:
    for ratio in RATIOS:
        yield Case(f"tome:{ratio:g}", "tome", tome_ratio=ratio)
    for interval in INTERVALS:
        yield Case(f"deepcache:{interval}", "deepcache", cache_interval=interval)


def _dato() -> Iterator[Case]:
    def case(suffix: str, family: str, schedule: str | None = SCHEDULE, **config: Any) -> Case:
        base = DaToConfig() if schedule is None else DaToConfig.from_schedule(load_schedule(schedule))
        method = "dato" if config.get("todo") is None else "todo+dato"
        dato = replace(base, **config)
        return Case(f"{method}:{schedule or 'none'}{suffix}", family, dato=dato, schedule=schedule)

    for name in named_schedules():
        yield case("", "dato presets", name)
        yield case(":prune=0", "caching alone", name, prune_ratio=0.0)
    for ratio in PRUNED:
        if ratio != DaToConfig.prune_ratio:
            yield case(f":prune={ratio:g}", "dato ratios", prune_ratio=ratio)
        yield case(f":prune={ratio:g}", "pruning alone", None, prune_ratio=ratio)
    for weight in (0.0, 1.0, 10.0, 100.0):
        yield case(f":dynamics={weight:g}", "dato scores", dynamics_weight=weight)
    yield case(":noise=0", "dato scores", noise_weight=0.0)
    for factor in FACTORS:
        yield case(f":factor={factor}", "todo+dato", todo=ToDoConfig(factor))
    for cap in CAPS:
        yield case(f":kv={cap}", "todo+dato", todo=ToDoConfig(max_kv_tokens=cap))


def chosen(cases: Iterable[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases whose names match any of ``patterns`` (names, or globs as ``todo:*``), and dense, in their own order.

    Raises:
        ArgumentError: a pattern matches no case.
    """
    cases = list(cases)
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise ArgumentError("cases", f"must be names or globs of cases, which --list prints, got {pattern!r}")
    picked = {DENSE} | {case.name for case in cases for pattern in patterns if fnmatchcase(case.name, pattern)}
    return [case for case in cases if case.name in picked]
