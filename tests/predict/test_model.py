"""The model of time, on numbers made up by hand."""

import pytest

from todo_attn.predict.model import Rates, Work, gain, rates_from_share

WORK = Work(attention=400, other=600, launches=10)


def test_work_adds_up():
    assert WORK.operations == 1000
    assert WORK + Work(1, 2, 3) == Work(401, 602, 13)
    assert WORK - Work(1, 2, 3) == Work(399, 598, 7)


def test_seconds_are_those_of_both_parts():
    rates = Rates(attention=100, other=300)
    assert rates.computing(WORK) == rates.seconds(WORK) == 4 + 2


def test_launches_add_where_nothing_overlaps_and_hide_where_it_does():
    assert Rates(100, 300, launch=0.5).seconds(WORK) == 6 + 5
    assert Rates(100, 300, launch=0.5, overlaps=True).seconds(WORK) == 6
    assert Rates(100, 300, launch=0.7, overlaps=True).seconds(WORK) == pytest.approx(7)


def test_gain_is_of_whole_runs():
    assert gain([4, 4, 4], [4, 1, 1]) == 2
    with pytest.raises(ValueError, match=r"dense and other must sum to more than 0, got 3 and 0"):
        gain([3], [0])


def test_rates_from_a_share():
    inside, rates = Work(attention=390, other=100), Rates(attention=50, other=200)
    share = rates.seconds(inside) / rates.seconds(WORK)
    found = rates_from_share(WORK, inside, rates.seconds(WORK), share)
    assert (found.attention, found.other) == pytest.approx((50, 200))


def test_what_no_rates_explain():
    with pytest.raises(ValueError, match=r"self_attention must have more products"):
        rates_from_share(WORK, Work(attention=0, other=100), 1, 0.5)
    with pytest.raises(ValueError, match=r"share must be one that rates above 0 give, got 0.001"):
        rates_from_share(WORK, Work(attention=390, other=100), 1, 0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": 0, "other": 1}, "attention must be above 0 operations a second, got 0"),
        ({"attention": 1, "other": -1}, "other must be above 0"),
        ({"attention": 1, "other": 1, "launch": -1}, "launch must be at least 0 seconds, got -1"),
        ({"attention": float("nan"), "other": 1}, "attention must be above 0"),
    ],
)
def test_rates_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rates(**arguments)
