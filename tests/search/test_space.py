"""The candidates: variables to configurations, and the first population."""

import numpy as np
import pytest

from todo_attn.config import schedule
from todo_attn.config.schedule import Schedule
from todo_attn.config.todo import ToDoConfig
from todo_attn.options.methods import SettingError
from todo_attn.search import Plan
from todo_attn.search.space import Space

FIXED = {"prune_ratios": (0.4,), "todo_factors": (1,)}


def test_a_schedule_alone():
    space = Space(5, [1, 2], Plan(**FIXED))
    assert space.largest.tolist() == [2, 2, 2, 2]
    found = space.candidate(np.array([2, 1, 0, 1])).config
    assert (found.cache_schedule, found.prune_ratio, found.todo) == ("2101", 0.4, None)


def test_a_ratio_for_all_and_a_factor_for_each_level():
    space = Space(3, [1, 2], Plan(prune_ratios=(0.0, 0.3), todo_factors=(1, 2, 4)))
    assert space.largest.tolist() == [2, 2, 1, 2, 2]
    found = space.candidate(np.array([1, 1, 1, 2, 0])).config
    assert (found.prune_ratio, found.todo) == (0.3, ToDoConfig({1: 4}))
    assert space.candidate(np.array([1, 1, 0, 0, 0])).config.todo is None
    keys = {space.candidate(np.array(row)).key for row in np.ndindex(3, 3, 2, 3, 3)}
    assert len(keys) == 3 * 3 * 2 * 3 * 3


def test_ratios_that_differ_little_are_two_candidates():
    space = Space(3, [1], Plan(prune_ratios=[0.1234561, 0.1234562]))
    assert space.candidate(np.array([1, 1, 0])).key != space.candidate(np.array([1, 1, 1])).key


def test_one_factor_is_fixed():
    space = Space(3, [1, 2], Plan(todo_factors=(2,)))
    assert space.candidate(np.array([1, 1])).config.todo == ToDoConfig({1: 2, 2: 2})


def test_a_call_that_reuses_the_last_output_has_no_ratio_of_its_own():
    space = Space(3, [1], Plan(prune_ratios=(0.1, 0.3), prune_per_call=True))
    rows = space.canonical(np.array([[0, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]))
    assert rows.tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]
    assert space.candidate(rows[0]).config.prune_ratio == (0.3, 0.1, 0.3)


def test_the_first_population_has_what_is_known_and_random_ones():
    space = Space(20, [1], Plan(prune_ratios=(0.0, 0.4), population=40))
    rows = space.first_population(np.random.default_rng(0))
    configs = [space.candidate(row).config for row in rows]
    digits = [config.cache_schedule for config in configs]
    assert schedule.resample(schedule.load("coco").digits, 19) in digits
    assert {schedule.resample(schedule.load(name).digits, 19) for name in schedule.named()} <= set(digits)
    for interval in (2, 3, 5):
        for between in "10":
            assert "".join("2" if call % interval == 0 else between for call in range(1, 20)) in digits
    assert "2" * 19 in digits
    assert {config.prune_ratio for config in configs} == {0.0, 0.4}
    drawn = [each for each in digits if each not in space.known]
    assert len(drawn) >= 10
    full = [each.count("2") for each in drawn]
    assert min(full) < 4 and max(full) > 10  # costs of all sizes
    again = space.first_population(np.random.default_rng(0))
    assert np.array_equal(rows, again)


def test_the_first_population_has_todo_alone():
    space = Space(4, [1, 2], Plan(prune_ratios=(0.4, 0.0), todo_factors=(4, 1, 2)))
    rows = space.first_population(np.random.default_rng(0)).tolist()
    for factors in ([0, 1], [0, 0], [2, 1], [2, 2]):  # indexes of 4 and 1, 4 and 4, 2 and 1, 2 and 2
        assert [2, 2, 2, 1, *factors] in rows


def test_a_schedule_to_start_with_keeps_its_ratio_and_factors():
    mine = Schedule("0012", "mine", prune_ratio=0.31, todo=ToDoConfig(4))
    space = Space(5, [1, 2], Plan(prune_ratios=(0.0, 0.3, 0.6), todo_factors=(1, 4), start=(mine,)))
    for seed in range(5):
        rows = space.first_population(np.random.default_rng(seed))
        assert [0, 0, 1, 2, 1, 1, 1] in rows.tolist()
    assert space.known["0012"] == "mine"


def test_a_shipped_schedule_keeps_its_ratio_and_factors():
    found = schedule.load("landscapes-25")
    space = Space(25, [2, 4], Plan(prune_ratios=(0.4, 0.0), todo_factors=(1, 2)))
    row = [*map(int, found.digits), 1 if found.prune_ratio == 0 else 0, 1, 0]
    for seed in range(3):
        assert row in space.first_population(np.random.default_rng(seed)).tolist()


def test_what_is_refused():
    with pytest.raises(SettingError, match="steps must give at least 2 calls of the UNet, got 1"):
        Space(1, [1], Plan())
    with pytest.raises(SettingError, match=r"start must be schedules for the 5 calls .*, got mine for 4 calls, 3"):
        Space(5, [1], Plan(start=(Schedule("012", "mine", steps=3, scheduler="PNDM"),)))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"metric": "beauty"},
            "metric must be one of latents, psnr, ssim, perceptual, or MODULE:FUNCTION, got 'beauty'",
        ),
        ({"cost": "joules"}, "cost must be one of operations, seconds, got 'joules'"),
        ({"prune_ratios": (0.4, 0.8)}, r"prune_ratios must be numbers from 0 to 0.75, each once, got 0.4, 0.8"),
        ({"prune_ratios": (0.4, 0.4)}, "prune_ratios must be"),
        ({"prune_ratios": ()}, "prune_ratios must be .* got none"),
        ({"prune_ratios": 0.4}, "prune_ratios must be a tuple of numbers .* got 0.4"),
        ({"todo_factors": (0,)}, "todo_factors must be integers of at least 1, each once, got 0"),
        ({"prune_per_call": True}, "prune_per_call must have several prune ratios"),
        ({"population": 3}, "population must be an integer of at least 4, got 3"),
        ({"generations": 0}, "generations must be an integer of at least 1, got 0"),
        ({"search_seed": -1}, "search_seed must be"),
    ],
)
def test_plans_that_are_refused(given, problem):
    with pytest.raises(SettingError, match=problem):
        Plan(**given)
