"""Settings for a wish: the choice, the comparison and the lines of Python; and a search that ends by the clock."""

import dataclasses
import itertools
import json

import pytest

from todo_attn.compare.page import build_page
from todo_attn.config import schedule
from todo_attn.config.checks import ArgumentError
from todo_attn.config.dato import DaToConfig
from todo_attn.config.todo import ToDoConfig
from todo_attn.search import code_of, comparison_of, recommended, run, short_plan
from todo_attn.search.fidelity import METRICS
from todo_attn.search.found import Found, Point
from todo_attn.search.output import page_of

pytest.importorskip("pymoo")

# Speed-ups 10, 4 and 2.
POINTS = [
    Point("a", DaToConfig(0.4, cache_schedule="0001"), 15.0, 10.0, 1),
    Point("b", DaToConfig(0.0, cache_schedule="2121", todo=ToDoConfig({1: 2})), 25.0, 25.0, 1),
    Point("c", DaToConfig(0.0, cache_schedule="2222", todo=ToDoConfig({1: 4, 2: 2})), 40.0, 50.0, 1),
]


@pytest.fixture
def found(settings):
    about = {"scheduler": "DDIMScheduler", "model": "0123"}
    return Found(settings, short_plan("operations"), 5, METRICS["psnr"], 100.0, 1, POINTS, {}, about)


@pytest.mark.parametrize(
    ("wish", "key"),
    [({"speedup": 1.5}, "c"), ({"speedup": 2}, "c"), ({"speedup": 2.1}, "b"), ({"speedup": 10}, "a"),
     ({"psnr": 1}, "a"), ({"psnr": 20}, "b"), ({"psnr": 40}, "c")],
)  # fmt: skip
def test_the_best_that_fulfils_the_wish(found, wish, key):
    assert recommended(found, **wish).key == key


def test_a_metric_of_which_less_is_better(found):
    points = [dataclasses.replace(point, fidelity=1 / point.fidelity) for point in POINTS]
    found = dataclasses.replace(found, points=points, metric=METRICS["perceptual"])
    assert found.choose(fidelity=1 / 25).key == "b" and found.choose(fidelity=1 / 50) is None
    assert found.choose(speedup=3).key == "b"


@pytest.mark.parametrize(
    ("wish", "problem"),
    [
        ({"speedup": 11}, "speedup must be in reach: the fastest is 10.00x at 15.00 dB, got 11x"),
        ({"psnr": 41}, "psnr must be in reach: the nearest to dense is 2.00x at 40.00 dB, got 41 dB"),
        ({}, "speedup or psnr must be given, and only one, got None and None"),
        ({"speedup": 2, "psnr": 20}, "speedup or psnr must be given, and only one, got 2 and 20"),
    ],
)
def test_what_is_out_of_reach(found, wish, problem):
    with pytest.raises(ArgumentError, match=problem):
        recommended(found, **wish)


def test_nothing_is_faster_than_dense(found):
    with pytest.raises(ArgumentError, match="speedup must be in reach, and nothing that was found is faster"):
        recommended(dataclasses.replace(found, points=[]), speedup=2)


def test_the_comparison_makes_what_was_found_with_other_seeds(found, tmp_path):
    file = tmp_path / "speedup-4.json"
    settings = comparison_of(found, POINTS[1], file)
    (_, dato) = settings.parsed_methods()
    assert settings.dato_config(dato, 5, 32, 32) == POINTS[1].config
    assert settings.schedule == str(file) and schedule.load(file).name == "speedup-4"
    assert settings.prompts == found.settings.prompts and not set(settings.seeds) & set(found.settings.seeds)
    settings = comparison_of(found, POINTS[2], tmp_path / "other.json")
    (_, todo) = settings.parsed_methods()
    assert settings.todo_config(todo, 32, 32) == POINTS[2].config.todo


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.key)
def test_the_code_puts_it_on(found, point, monkeypatch):
    import todo_attn

    given = []
    for name in ("apply_todo", "apply_dato"):
        monkeypatch.setattr(todo_attn, name, lambda pipe, config: given.append(config))
    exec(code_of(found, point), {"pipe": None})
    assert given == [point.config.todo if point.key == "c" else point.config]


def test_the_page_if_one_schedule_is_there_with_several_settings(found, tmp_path):
    """Off the front, and with the names of the front's own files."""
    off = [
        Point(
            f"{origin} {i}", DaToConfig(0.4 * i, cache_schedule=digits, todo=ToDoConfig({1: 2})), 1.0, 90.0, 1, origin
        )
        for origin, digits in (("uniform 3", "1211"), ("no cache", "2222"), ("front-01", "0101"), ("coco", "0201"))
        for i in range(2)
    ]
    page = build_page(page_of(dataclasses.replace(found, points=[*POINTS, *off]), tmp_path))
    for name in ("uniform 3 (2)", "ToDo 1=2, pruned 0.4", "front-01 (3)", "coco (2)"):
        assert name in page


def test_a_search_ends_by_the_clock_and_goes_on(searched, whole, monkeypatch, tmp_path):
    sound, _ = whole
    minutes = itertools.count()
    monkeypatch.setattr(run.time, "monotonic", lambda: 60.0 * next(minutes))
    first = searched("timed", minutes=4)
    assert 0 < len(first.points) < len(sound.points)
    assert (tmp_path / "timed" / "report.html").exists()
    again = searched("timed", minutes=4)
    assert len(again.points) > len(first.points)
    last = searched("timed")
    assert [(p.key, p.fidelity) for p in last.points] == [(p.key, p.fidelity) for p in sound.points]
    assert json.loads((tmp_path / "timed" / "front.json").read_text())["generations"] == sound.generations
