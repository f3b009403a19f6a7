"""NSGA-II by pymoo: proposes candidates, and learns what they are worth.

All randomness comes from one generator of its own. Whoever evaluates candidates may seed the global ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.evaluator import Evaluator
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.operators.crossover.pntx import TwoPointCrossover
from pymoo.problems.static import StaticProblem

from .space import Space

_MOVED = 0.3  # the share of new candidates of which two neighbouring calls are swapped


class Evolution:
    """A search in ``space``; the same one for the same seed and values, whatever the process."""

    def __init__(self, space: Space) -> None:
        plan = space.plan
        problem = Problem(
            n_var=len(space.largest), n_obj=2, n_ieq_constr=1, xl=0 * space.largest, xu=space.largest, vtype=int
        )
        self._first = space.first_population(np.random.default_rng(plan.search_seed))
        self._asked: Any = None
        self._algorithm = NSGA2(
            pop_size=plan.population,
            sampling=self._first,
            # A stretch of calls comes from one parent, because what a call may skip depends on its neighbours.
            crossover=TwoPointCrossover(prob=0.9),
            mutation=_Change(space.digits),
            repair=_Canonical(space),
            eliminate_duplicates=_New(),
        )
        # The caller decides when to stop.
        self._algorithm.setup(problem, seed=plan.search_seed, termination=("n_gen", np.inf))

    def ask(self) -> np.ndarray:
        """(candidates, variables): the next generation, none of it asked before; empty if there is nothing new."""
        self._asked = self._algorithm.ask()
        return np.empty((0, 0), int) if self._asked is None else self._asked.get("X").astype(int)

    def tell(self, values: Sequence[tuple[float, float] | None]) -> None:
        """What the candidates of :meth:`ask` are worth: two numbers each, both to be small; None if it has none."""
        known = StaticProblem(
            self._algorithm.problem,
            F=np.array([value or (0.0, 0.0) for value in values]),
            G=np.array([[float(value is None)] for value in values]),  # above 0 is infeasible
        )
        Evaluator().eval(known, self._asked)
        self._algorithm.tell(infills=self._asked)


class _Change(Mutation):
    """Gives about one variable another value, and sometimes swaps two neighbouring digits, which moves a full call."""

    def __init__(self, digits: int) -> None:
        super().__init__()
        self.digits = digits

    def _do(self, problem: Any, X: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        values = problem.xu + 1
        changed = random_state.random(X.shape) < 1 / X.shape[1]
        X = np.where(changed, (X + random_state.integers(1, values, X.shape)) % values, X)
        moved = random_state.random(len(X)) < _MOVED
        places = random_state.integers(0, max(1, self.digits - 1), len(X))
        for row, place in zip(X[moved] if self.digits > 1 else (), places[moved], strict=False):
            row[place : place + 2] = row[place : place + 2][::-1].copy()
        return X


class _Canonical(Repair):
    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def _do(self, problem: Any, X: np.ndarray, **kwargs: Any) -> np.ndarray:
        return self.space.canonical(X.astype(int))


class _New(DuplicateElimination):
    """Leaves out whatever an earlier generation had, even if it has died out since."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[bytes] = set()

    def do(self, pop: Population, *others: Population, **kwargs: Any) -> Population:
        new = []
        for each in pop:
            name = np.asarray(each.X, int).tobytes()
            if name not in self.seen:
                self.seen.add(name)
                new.append(each)
        return Population.create(*new)
