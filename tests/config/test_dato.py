"""DaToConfig: validation, JSON, presets, and what a run of another length gets."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from todo_attn.config import schedule
from todo_attn.config.checks import ArgumentError
from todo_attn.config.dato import DaToConfig
from todo_attn.config.todo import ToDoConfig

NAN, INFINITY = float("nan"), float("inf")


def test_defaults():
    config = DaToConfig()
    assert dataclasses.asdict(config) == {
        "prune_ratio": 0.4,
        "cache_schedule": None,
        "patch": (2, 2),
        "noise_weight": 0.1,
        "dynamics_weight": 0.1,
        "align_guidance": True,
        "prune_cross_attention": False,
        "prune_feed_forward": False,
        "todo": None,
        "seed": 0,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prune_ratio", -0.1),
        ("prune_ratio", 1),
        ("prune_ratio", 1.5),
        ("prune_ratio", NAN),
        ("prune_ratio", INFINITY),
        ("prune_ratio", True),
        ("prune_ratio", "0.4"),
        ("prune_ratio", None),
        ("prune_ratio", {0.4: 1}),
        ("cache_schedule", ""),
        ("cache_schedule", "0123"),
        ("cache_schedule", "11 0"),
        ("cache_schedule", "1१"),
        ("cache_schedule", 110),
        ("cache_schedule", ["1", "0"]),
        ("patch", 2),
        ("patch", (2,)),
        ("patch", (2, 2, 2)),
        ("patch", (0, 2)),
        ("patch", (2, 2.0)),
        ("patch", (2, True)),
        ("patch", "22"),
        ("noise_weight", -1),
        ("noise_weight", NAN),
        ("noise_weight", INFINITY),
        ("noise_weight", "0.1"),
        ("noise_weight", False),
        ("dynamics_weight", -0.1),
        ("dynamics_weight", NAN),
        ("dynamics_weight", None),
        ("align_guidance", 1),
        ("align_guidance", None),
        ("prune_cross_attention", "yes"),
        ("prune_feed_forward", 0),
        ("todo", 2),
        ("todo", {"factor": 2}),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("seed", True),
        ("seed", None),
    ],
)
def test_a_wrong_argument_is_named_with_what_it_was(argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must ") as error:
        DaToConfig(**{argument: value})
    bad_digit = (
        {"0123": "3", "11 0": " ", "1१": "१", "": "empty"}.get(value)
        if argument == "cache_schedule" and isinstance(value, str)
        else None
    )
    assert (bad_digit or repr(value)) in str(error.value)


@pytest.mark.parametrize(("ratios", "bad"), [((0.4, 1.0), "1.0"), ([0.4, NAN], "nan"), ((0.4, "0"), "'0'")])
def test_a_wrong_ratio_among_several_is_named(ratios, bad):
    with pytest.raises(ValueError, match=f"^prune_ratio must .*got {bad}$"):
        DaToConfig(prune_ratio=ratios)


# The most is on the grid with the largest edge past its only whole patch: (2 * height - 1) x (2 * width - 1) tokens.
@pytest.mark.parametrize(("patch", "most"), [((1, 1), 0), ((1, 2), 2 / 3), ((2, 2), 8 / 9), ((3, 2), 14 / 15)])
def test_a_ratio_that_no_grid_allows(patch, most):
    assert DaToConfig(prune_ratio=most, patch=patch).prune_ratio == most
    grids = [(h, w) for h in range(1, 9) for w in range(1, 9) if h >= patch[0] and w >= patch[1]]
    assert max(1 - (h // patch[0]) * (w // patch[1]) / (h * w) for h, w in grids) == pytest.approx(most)
    for ratio in (most + 0.01, (0.0, most + 0.01)):
        with pytest.raises(ValueError, match=rf"^prune_ratio must be at most {most:.6g}.*\({patch[0]}, {patch[1]}\)"):
            DaToConfig(prune_ratio=ratio, patch=patch)


def test_no_ratios_at_all():
    with pytest.raises(ValueError, match=r"^prune_ratio must have a number for each call, got none"):
        DaToConfig(prune_ratio=())


def test_ratios_and_schedule_are_of_one_run():
    assert DaToConfig(prune_ratio=(0.1, 0.2, 0.3), cache_schedule="10").ratio_for(2) == 0.3
    for ratios in ((0.1, 0.2), (0.1, 0.2, 0.3, 0.4)):
        with pytest.raises(ValueError, match=f"prune_ratio must have a ratio for each of the 3 calls.* {len(ratios)}$"):
            DaToConfig(prune_ratio=ratios, cache_schedule="10")


CONFIGS = {
    "default": DaToConfig(),
    "preset": DaToConfig.preset("coco"),
    "ratios": DaToConfig(prune_ratio=(0.25, 0, 0.5), cache_schedule="12", patch=(3, 2)),
    "todo": DaToConfig(todo=ToDoConfig(factor={1: 2, "finest": 3}, timestep_range=(10, 20))),
    "all": DaToConfig(
        0,
        cache_schedule="0",
        patch=(1, 4),
        noise_weight=0,
        dynamics_weight=2,
        align_guidance=False,
        prune_cross_attention=True,
        prune_feed_forward=True,
        todo=ToDoConfig(),
        seed=2**63 - 1,
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_json_round_trip(config):
    assert DaToConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert DaToConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(DaToConfig.from_dict(config.to_dict())) == hash(config)


def test_every_argument_counts_in_equality():
    others = [
        DaToConfig(prune_ratio=0.3),
        DaToConfig(prune_ratio=(0.4,)),
        DaToConfig(cache_schedule="2"),
        DaToConfig(patch=(2, 3)),
        DaToConfig(noise_weight=1),
        DaToConfig(dynamics_weight=1),
        DaToConfig(align_guidance=False),
        DaToConfig(prune_cross_attention=True),
        DaToConfig(prune_feed_forward=True),
        DaToConfig(todo=ToDoConfig()),
        DaToConfig(seed=1),
    ]
    assert len({DaToConfig(), *others}) == len(others) + 1


def test_lists_are_copied():
    ratios, patch = [0.1, 0.2], [2, 3]
    config = DaToConfig(prune_ratio=ratios, patch=patch)
    ratios[0], patch[0] = 2, 0
    assert config == DaToConfig(prune_ratio=(0.1, 0.2), patch=(2, 3))


def test_from_dict_names_what_it_does_not_know():
    assert DaToConfig.from_dict({}) == DaToConfig()
    with pytest.raises(ValueError, match=r"'ratio'"):
        DaToConfig.from_dict({"ratio": 0.5})
    with pytest.raises(ValueError, match=r"data must be a mapping"):
        DaToConfig.from_dict([("seed", 2)])
    with pytest.raises(ValueError, match=r"^factor must .*got 0$"):
        DaToConfig.from_dict({"todo": {"factor": 0}})
    with pytest.raises(ValueError, match=r"^todo must "):
        DaToConfig.from_dict({"todo": [1]})


def test_presets():
    digits = "11110110110112100011010200000010101200000010120101"
    assert DaToConfig.preset("coco") == DaToConfig(cache_schedule=digits)
    config = DaToConfig.preset("coco", 25, prune_ratio=0.3, seed=4)
    assert config == DaToConfig(prune_ratio=0.3, cache_schedule=schedule.resample(digits, 25), seed=4)
    for found in map(schedule.load, schedule.names()):
        config = DaToConfig.preset(found.name, found.calls - 1)
        assert (config.cache_schedule, config.todo) == (found.digits, found.todo)
        assert config.prune_ratio == (0.4 if found.prune_ratio is None else found.prune_ratio)


def test_a_preset_from_a_file(tmp_path):
    schedule.save(schedule.Schedule("1202"), tmp_path / "mine.json")
    assert DaToConfig.preset(str(tmp_path / "mine.json"), 4).cache_schedule == "1202"


MINE = schedule.Schedule("1202", "mine", steps=4, scheduler="PNDM", prune_ratio=0.25, todo=ToDoConfig({1: 2}))


def test_from_a_file(tmp_path):
    file = tmp_path / "mine.json"
    schedule.save(MINE, file)
    whole = DaToConfig(0.25, cache_schedule="1202", todo=ToDoConfig({1: 2}))
    assert DaToConfig.from_file(file) == DaToConfig.from_file(str(file), calls=5) == whole
    assert DaToConfig.from_file(file, prune_ratio=0.1, seed=3) == replace(whole, prune_ratio=0.1, seed=3)
    assert DaToConfig.preset(str(file), 4) == whole and DaToConfig.preset(str(file), 4, todo=None).todo is None
    assert DaToConfig.preset(str(file), 8) == whole.for_calls(9)
    schedule.save(schedule.Schedule("1202"), file)
    assert DaToConfig.from_file(file) == DaToConfig(cache_schedule="1202")
    schedule.save(schedule.Schedule("12", prune_ratio=(0.1, 0.2, 0.3)), file)
    assert DaToConfig.from_file(file).prune_ratio == (0.1, 0.2, 0.3)


def test_a_file_that_is_refused(tmp_path):
    file = tmp_path / "mine.json"
    schedule.save(MINE, file)
    with pytest.raises(ArgumentError, match=r"^path must be .* the 20 calls .*mine.json' is for 5 calls, 4 steps"):
        DaToConfig.from_file(file, calls=20)
    with pytest.raises(ArgumentError, match=r"^schedule must be a file or a name"):
        DaToConfig.from_file(str(tmp_path / "none.json"))
    file.write_text('{"version": 1, "digits": "12", "prune_ratio": [0.1, 0.2]}')
    with pytest.raises(
        ValueError, match=r"mine.json is not a schedule: prune_ratio must have .* the 3 calls of digits"
    ):
        DaToConfig.from_file(file)
    for part in ('"prune_ratio": 2', '"todo": {"factor": 0}', '"todo": 3', '"provenance": 3'):
        file.write_text('{"version": 1, "digits": "12", ' + part + "}")
        with pytest.raises(
            ValueError, match=r"mine.json is not a schedule: (prune_r|factor|todo|provenance)\w* must be"
        ):
            DaToConfig.from_file(file)


def test_a_configuration_for_another_number_of_calls():
    config = DaToConfig((0.1, 0.2, 0.3), cache_schedule="12", seed=5)
    assert config.for_calls(3) == config
    assert config.for_calls(5) == DaToConfig(
        (0.1, 0.2, 0.2, 0.3, 0.3), cache_schedule=schedule.resample("12", 4), seed=5
    )
    assert config.for_calls(1) == DaToConfig((0.1,), seed=5)  # one call has nothing to reuse
    assert DaToConfig(0.3).for_calls(7) == DaToConfig(0.3)


def test_a_preset_refuses():
    with pytest.raises(ValueError, match=r"schedule must be a file or a name such as 'coco'.*got 'cocoa'"):
        DaToConfig.preset("cocoa")
    for steps in (0, -1, 50.0, True, None):
        with pytest.raises(ValueError, match=r"^steps must be an integer of at least 1, got"):
            DaToConfig.preset("coco", steps)
    with pytest.raises(ValueError, match=r"^cache_schedule must not be given"):
        DaToConfig.preset("coco", cache_schedule="1")
    with pytest.raises(ValueError, match=r"^prune_ratio must be at least 0"):
        DaToConfig.preset("coco", prune_ratio=2)


def test_the_schedule_of_a_run():
    config = DaToConfig(cache_schedule="1202")
    assert config.schedule_for(5) == "1202"
    assert config.schedule_for(9) == schedule.resample("1202", 8)
    assert config.schedule_for(1) == ""
    assert DaToConfig().schedule_for(4) == "222"
    for calls in (0, 2.0, True, None):
        with pytest.raises(ValueError, match=r"^calls must be an integer of at least 1, got"):
            config.schedule_for(calls)


def test_the_ratio_of_a_call():
    assert {DaToConfig(prune_ratio=0.3).ratio_for(call, calls) for call in (0, 7) for calls in (None, 8)} == {0.3}
    config = DaToConfig(prune_ratio=(0.1, 0.2, 0.3))
    assert [config.ratio_for(call) for call in range(5)] == [0.1, 0.2, 0.3, 0.3, 0.3]
    assert [config.ratio_for(call, 3) for call in range(5)] == [0.1, 0.2, 0.3, 0.3, 0.3]
    # The nearest of the moments 0, 1/2 and 1.
    assert [config.ratio_for(call, 6) for call in range(6)] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert [config.ratio_for(call, 2) for call in range(2)] == [0.1, 0.3]
    assert config.ratio_for(0, 1) == 0.1
    assert DaToConfig(prune_ratio=(0.1,)).ratio_for(3, 4) == 0.1
    for call in (-1, 0.0, True):
        with pytest.raises(ValueError, match=r"^call must be an integer of at least 0, got"):
            config.ratio_for(call)
    with pytest.raises(ValueError, match=r"^calls must be an integer of at least 1, got 0"):
        config.ratio_for(0, 0)


def test_it_imports_neither_torch_nor_diffusers():
    """In a package of that name whose own ``__init__``, which imports the ops, is left out."""
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('todo_attn')\n"
        "package.__path__ = list(importlib.util.find_spec('todo_attn').submodule_search_locations)\n"
        "sys.modules['todo_attn'] = package\n"
        "import todo_attn.config.dato\n"
        "assert todo_attn.config.dato.DaToConfig.preset('coco').cache_schedule\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_beyond_floats_are_refused():
    with pytest.raises(ValueError, match="noise_weight must be a finite number"):
        DaToConfig(noise_weight=10**400)


@pytest.mark.parametrize("name", [None, 5])
def test_a_preset_is_a_name_or_a_file(name):
    with pytest.raises(ValueError, match="schedule must be a name or a file"):
        DaToConfig.preset(name)


def test_only_the_ratio_may_come_without_its_name():
    assert DaToConfig(0.3) == DaToConfig(prune_ratio=0.3)
    with pytest.raises(TypeError, match="positional"):
        DaToConfig(0.3, "12")
