"""NSGA-II on figures that are known without images."""

import random

import numpy as np
import pytest

pytest.importorskip("pymoo")

from todo_attn.search import Plan
from todo_attn.search.evolution import Evolution
from todo_attn.search.space import Space

WEIGHTS = np.random.default_rng(5).random(12)


def figures(row):
    """Each call is worth something else; the first digits of a stretch are worth more."""
    cost = float(np.array([0, 1, 5])[row].sum())
    loss = float((WEIGHTS * np.array([1, 0.6, 0])[row]).sum())
    return loss, cost


def evolve(generations=15, population=16, worth=figures, meanwhile=lambda: None):
    evolution = Evolution(Space(13, [1], Plan(population=population, prune_ratios=(0.0,), search_seed=3)))
    asked = []
    for _ in range(generations):
        rows = evolution.ask()
        if not len(rows):
            break
        asked += rows.tolist()
        evolution.tell([worth(row) for row in rows])
        meanwhile()
    return asked


def area(rows):
    """What the front of ``rows`` dominates: loss up to the sum of the weights, cost up to 60."""
    total, least = 0.0, WEIGHTS.sum()
    for loss, cost in sorted(map(figures, np.array(rows)), key=lambda pair: pair[1]):
        if loss < least:
            total += (least - loss) * (60 - cost)
            least = loss
    return total


def test_it_finds_better_fronts_than_chance():
    asked = evolve()
    drawn = np.random.default_rng(0).integers(0, 3, (len(asked), 12)).tolist()
    assert area(asked) > 1.05 * area(drawn) and area(asked) > 1.03 * area(asked[:20])


def test_nothing_is_asked_twice():
    asked = evolve()
    assert len({tuple(row) for row in asked}) == len(asked) > 200


def test_global_generators_do_not_matter():
    def reseed():
        np.random.seed(42)
        random.seed(42)

    assert evolve(5) == evolve(5, meanwhile=reseed)


def test_candidates_without_figures_die_out():
    def worth(row):
        return None if row[0] == 1 else figures(row)

    asked = np.array(evolve(worth=worth))
    assert (asked[:16, 0] == 1).mean() > 0
    assert (asked[-64:, 0] == 1).mean() < 0.2


def test_a_small_space_ends_by_itself():
    evolution = Evolution(Space(3, [1], Plan(prune_ratios=(0.0,), population=4)))
    asked = []
    while len(rows := evolution.ask()):
        asked += rows.tolist()
        evolution.tell([(float(row.sum()), -float(row.sum())) for row in rows])
    assert 3 < len(asked) <= 9 and len({tuple(row) for row in asked}) == len(asked)


def test_a_single_variable():
    evolution = Evolution(Space(2, [1], Plan(prune_ratios=(0.0,), population=4)))
    assert sorted(evolution.ask().tolist()) == [[0], [1], [2]]
    evolution.tell([None, (1.0, 2.0), (2.0, 1.0)])
    assert not len(evolution.ask())
