"""What doctor says: whether it helps, and why not."""

import pytest

from todo_attn.config.dato import DaToConfig
from todo_attn.config.todo import ToDoConfig
from todo_attn.predict.model import Rates, Work
from todo_attn.predict.verdict import Gains, Verdict, compare_runs, kinds_of

TODO, DATO = ToDoConfig(factor=2), DaToConfig(cache_schedule="10")
BOTH = DaToConfig(cache_schedule="10", todo=ToDoConfig(max_kv_tokens=64))
NO = "this will not help here: "


def verdict(config=TODO, gains=None, downsamples=True, share=0.5, **more):
    return Verdict(config, gains or Gains(1.4, 1.4), downsamples=downsamples, share=share, **more)


@pytest.mark.parametrize(
    ("gains", "helps", "text"),
    [
        (Gains(1.39, 1.61), True, "1.61x predicted (1.39 times fewer operations)"),
        (Gains(1.39, 1.61, 1.58), True, "1.61x predicted, 1.58x measured (1.39 times fewer operations)"),
        (Gains(1.4, 1.05), True, "1.05x predicted (1.40 times fewer operations)"),
        (Gains(1.4, 1.0499), False, None),
        (Gains(1.4, 1.01), False, None),  # the prediction counts for more
        (Gains(1.4, 1.3, 1.01), False, None),  # and the clock most
        (Gains(1.04, 1.2), True, "1.20x predicted (1.04 times fewer operations)"),
        (Gains(1.0, 1.0, 1.2), False, None),  # a clock that runs fast
    ],
)
def test_what_helps(gains, helps, text):
    found = verdict(gains=gains)
    assert found.gains.helps == helps
    assert (str(found) == text) if helps else str(found).startswith(NO)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (
            verdict(ToDoConfig(factor=1), Gains(1.0, 1.0), False),
            "the factor is 1 at every level, so nothing is downsampled",
        ),
        (
            verdict(ToDoConfig(max_kv_tokens=99), Gains(1.0, 1.0), False),
            "nothing is downsampled, no level having more than max_kv_tokens=99 tokens at this size",
        ),
        (verdict(gains=Gains(1.1, 1.02), share=0.03), "self-attention takes only 3% of the time at this size"),
        (verdict(gains=Gains(1.4, 1.2, 1.0)), "timed, it does not gain what the operations promise"),
        (verdict(gains=Gains(1.4, 1.0), starts_slowly=True), "starting the operations one by one takes longer than"),
        (verdict(DATO, Gains(1.04, 1.04), False), "what it leaves out is only 4% of the operations"),
        (verdict(DATO, Gains(0.8, 0.8), False), "choosing tokens takes more operations than it saves at this size"),
        (verdict(DATO, Gains(1.0, 1.0), False), "it leaves nothing out at this size"),
        (
            verdict(
                DaToConfig(prune_ratio=0, todo=ToDoConfig(factor=1)),
                Gains(1.0, 1.0),
                False,
                beside_dato=Gains(1.0, 1.0),
            ),
            "prune_ratio is 0 and cache_schedule has every call computed in full, and of ToDo the factor is 1",
        ),
    ],
)
def test_why_it_does_not(found, reason):
    assert str(found).startswith(NO + reason)


@pytest.mark.parametrize(
    ("downsamples", "beside", "todo_helps", "text"),
    [
        (True, Gains(1.3, 1.3), True, ""),
        (True, Gains(1.02, 1.02), False, ", to which ToDo adds only 2.0%"),
        (True, Gains(1.02, 0.9), False, ", to which ToDo adds only 0.0%"),
        (
            False,
            Gains(1.0, 1.0),
            False,
            ", to which ToDo adds nothing: nothing is downsampled, no level having more than max_kv_tokens=64 tokens "
            "at this size",
        ),
    ],
)
def test_what_todo_adds_to_dato(downsamples, beside, todo_helps, text):
    found = verdict(BOTH, Gains(4.0, 4.0), downsamples, beside_dato=beside)
    assert found.todo_helps == todo_helps
    assert str(found) == "4.00x predicted (4.00 times fewer operations)" + text


@pytest.mark.parametrize(
    ("beside_todo", "dato_helps", "text"),
    [
        (Gains(1.3, 1.3), True, ""),
        (Gains(1.02, 1.02), False, ", of which DaTo adds only 2.0% to ToDo alone"),
        (Gains(0.5, 0.4), False, ", less than ToDo alone: at this size choosing tokens takes more than it saves"),
    ],
)
def test_what_dato_adds_to_todo(beside_todo, dato_helps, text):
    found = verdict(BOTH, Gains(40.0, 40.0), beside_dato=Gains(4.0, 4.0), beside_todo=beside_todo)
    assert found.dato_helps == dato_helps
    assert str(found) == "40.00x predicted (40.00 times fewer operations)" + text


def test_of_one_alone_there_is_nothing_to_add():
    assert verdict(TODO).todo_helps is None and verdict(DATO, downsamples=False).todo_helps is None


def test_runs_are_compared():
    dense, shallow = Work(6, 4), Work(1, 1)
    before, after = ([dense, dense], None), ([dense, shallow], None)
    assert compare_runs(before, after, Rates(1, 4)) == Gains(20 / 12, 14 / (7 + 1.25))
    clocks = ([dense, dense], [3.0, 3.0]), ([dense, shallow], [3.0, 1.0])
    assert compare_runs(*clocks, Rates(1, 1)) == Gains(20 / 12, 20 / 12, 1.5)
    assert compare_runs(clocks[0], after, Rates(1, 1)).measured is None  # one was not timed


@pytest.mark.parametrize(
    ("config", "kinds", "everything"),
    [
        (DaToConfig(), "2", False),
        (DaToConfig(prune_ratio=0), "2", True),
        (DaToConfig(prune_ratio=0, cache_schedule="22"), "222", True),
        (DaToConfig(prune_ratio=(0, 0, 0.1), cache_schedule="22"), "222", False),
        (DaToConfig(prune_ratio=0, cache_schedule="20"), "220", False),
    ],
)
def test_what_a_configuration_computes(config, kinds, everything):
    assert kinds_of(config) == kinds and config.computes_everything == everything
    assert kinds_of(ToDoConfig()) == "2"
