"""The candidates of a search: integer variables to configurations and back, and the first population."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import schedule
from ..config.dato import DaToConfig
from ..config.schedule import FULL, REUSE, SHALLOW
from ..config.todo import FINEST, ToDoConfig
from ..options.methods import SettingError
from .plan import Plan

UNIFORM = (2, 3, 4, 5, 6, 8, 10)  # intervals between full calls, as DeepCache's
EVERYTHING = "no cache"  # each call is full


@dataclass(frozen=True)
class Candidate:
    """A configuration, and its name in the checkpoint: equal for equal runs."""

    key: str
    config: DaToConfig


class Space:
    """The variables: a digit for each call after the first, then indexes of prune ratios, then of factors by level.

    Args:
        calls: of the UNet in a run, at least 2.
        levels: of the UNet's self-attentions.
        plan: the choices.

    Raises:
        SettingError: a run has a single call, or a schedule to start with is for another number of calls.
    """

    def __init__(self, calls: int, levels: Sequence[int], plan: Plan) -> None:
        if calls < 2:
            raise SettingError("steps", f"must give at least 2 calls of the UNet, got {calls}")
        self.calls, self.levels, self.plan = calls, list(levels), plan
        self.digits = calls - 1
        ratios = 0 if len(plan.prune_ratios) == 1 else calls if plan.prune_per_call else 1
        factors = 0 if len(plan.todo_factors) == 1 else len(self.levels)
        self._ratios = slice(self.digits, self.digits + ratios)
        self._factors = slice(self.digits + ratios, self.digits + ratios + factors)
        # The largest value of each variable; the least is 0.
        self.largest = np.array(
            [len(schedule.KINDS) - 1] * self.digits
            + [len(plan.prune_ratios) - 1] * ratios
            + [len(plan.todo_factors) - 1] * factors
        )
        self.known = dict(self._known())
        self._own = {given.digits: DaToConfig.from_schedule(given) for given in plan.start}
        for found in map(schedule.load, schedule.named()):
            if found.prune_ratio is not None:
                config = DaToConfig.from_schedule(found).for_calls(calls)
                assert config.cache_schedule is not None  # there are at least 2 calls
                self._own.setdefault(config.cache_schedule, config)

    def _known(self) -> Iterator[tuple[str, str]]:
        """Digits that are known from elsewhere, each once, with their names."""
        named = [(schedule.resample(schedule.load(name).digits, self.digits), name) for name in schedule.named()]
        for interval in UNIFORM:
            if interval < self.calls:
                for between, name in ((SHALLOW, f"uniform {interval}"), (REUSE, f"uniform {interval}, reuse")):
                    kinds = (FULL if call % interval == 0 else between for call in range(1, self.calls))
                    named.append(("".join(kinds), name))
        named.append((FULL * self.digits, EVERYTHING))
        for number, given in enumerate(self.plan.start):
            if given.calls != self.calls:
                found = f"{given.name or f'number {number + 1}'} for {given.calls}{given.made_for}"
                raise SettingError("start", f"must be schedules for the {self.calls} calls of this search, got {found}")
            named.append((given.digits, given.name or f"start {number + 1}"))
        yield from reversed(named)  # of equal digits, the first name stays

    def first_population(self, random: np.random.Generator) -> np.ndarray:
        """(candidates, variables): those that are known, and random ones, a quarter of a population at least.

        First ToDo alone, without a cache and with the least pruning: each factor at the finest level, and at all of
        them. Then the schedules to start with and other known ones; those with a prune ratio and factors of their own
        keep them, as near as there are, the others get random ones. Last random ones, with random shares of the kinds,
        so that costs of all sizes occur.
        """
        rows = list(self._todo_alone())
        for digits in self.known:
            row = random.integers(0, self.largest + 1)
            row[: self.digits] = [int(digit) for digit in digits]
            if digits in self._own:
                self._adopt(row, self._own[digits])
            rows.append(row)
        for _ in range(max(self.plan.population - len(rows), self.plan.population // 4)):
            row = random.integers(0, self.largest + 1)
            row[: self.digits] = random.choice(len(schedule.KINDS), self.digits, p=random.dirichlet([1.0] * 3))
            rows.append(row)
        population = self.canonical(np.array(rows))
        _, first = np.unique(population, axis=0, return_index=True)
        return population[np.sort(first)]

    def _todo_alone(self) -> Iterator[np.ndarray]:
        row = np.zeros_like(self.largest)
        row[: self.digits] = int(FULL)
        row[self._ratios] = np.argmin(self.plan.prune_ratios)
        finest, levels = slice(self._factors.start, self._factors.start + 1), self._factors
        for factor in range(len(self.plan.todo_factors) if row[levels].size else 0):
            for coarse in (finest, levels):
                row[levels] = np.argmin(self.plan.todo_factors)
                row[coarse] = factor
                yield row.copy()

    def _adopt(self, row: np.ndarray, config: DaToConfig) -> None:
        """Set the ratios and factors of ``row`` to the choices nearest to those of ``config``."""
        todo = ToDoConfig(1) if config.todo is None else config.todo
        calls, levels = range(row[self._ratios].size), self.levels[: row[self._factors].size]
        row[self._ratios] = [_nearest(self.plan.prune_ratios, config.ratio_for(call)) for call in calls]
        row[self._factors] = [_nearest(self.plan.todo_factors, self._factor_at(todo, level)) for level in levels]

    def _factor_at(self, todo: ToDoConfig, level: int) -> float:
        """The factor at a level, 1 if it depends on the size of the image."""
        if isinstance(todo.factor, Mapping):
            finest = todo.factor.get(FINEST, 1) if level == self.levels[0] else 1
            return todo.factor.get(level, finest)
        return 1 if isinstance(todo.factor, str) else todo.factor

    def canonical(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` with one form for runs that are equal: a call that reuses the last output prunes nothing."""
        if not self.plan.prune_per_call:
            return rows
        rows = rows.copy()
        ratios = rows[:, self._ratios]
        ratios[:, 1:][rows[:, : self.digits] == int(REUSE)] = 0
        return rows

    def candidate(self, row: np.ndarray) -> Candidate:
        """Of one row in its canonical form."""
        digits = "".join(map(str, row[: self.digits]))
        plan = self.plan
        ratios = tuple(plan.prune_ratios[i] for i in row[self._ratios]) or plan.prune_ratios
        ratio = ratios if plan.prune_per_call else ratios[0]
        factors = tuple(plan.todo_factors[i] for i in row[self._factors]) or plan.todo_factors * len(self.levels)
        coarse = {level: factor for level, factor in zip(self.levels, factors, strict=True) if factor > 1}
        config = DaToConfig(ratio, cache_schedule=digits, todo=ToDoConfig(coarse) if coarse else None)
        parts = [digits]
        if len(plan.prune_ratios) > 1:
            parts.append("prune " + ",".join(map(repr, ratios)))
        if len(plan.todo_factors) > 1:
            parts.append("factors " + ",".join(map(str, factors)))
        return Candidate("; ".join(parts), config)


def _nearest(choices: Sequence[float], wanted: float) -> int:
    """The index of the choice nearest to ``wanted``."""
    return min(range(len(choices)), key=lambda i: abs(choices[i] - wanted))
