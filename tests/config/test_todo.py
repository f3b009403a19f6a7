"""ToDoConfig: validation, JSON, and the factor for a grid."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest

from todo_attn.config.modes import coarse_grid
from todo_attn.config.todo import ToDoConfig, in_steps


def test_defaults():
    config = ToDoConfig()
    assert (config.factor, config.max_kv_tokens, config.mode, config.timestep_range) == (
        "auto",
        4096,
        "nearest",
        (0, 1000),
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mode = "mean"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("factor", 0),
        ("factor", -1),
        ("factor", 0.5),
        ("factor", float("nan")),
        ("factor", float("inf")),
        ("factor", 10**400),
        ("factor", True),
        ("factor", None),
        ("factor", "Auto"),
        ("factor", "2"),
        ("factor", [2]),
        ("factor", {1: 0}),
        ("factor", {1: 0.5}),
        ("factor", {1: float("nan")}),
        ("factor", {1: float("inf")}),
        ("factor", {1: "auto"}),
        ("factor", {1: True}),
        ("factor", {0: 2}),
        ("factor", {True: 2}),
        ("factor", {"coarsest": 2}),
        ("factor", {"1": 2}),
        ("max_kv_tokens", 0),
        ("max_kv_tokens", 4096.0),
        ("max_kv_tokens", True),
        ("max_kv_tokens", None),
        ("mode", "bilinear"),
        ("mode", ""),
        ("mode", None),
        ("mode", ["mean"]),
        ("timestep_range", 500),
        ("timestep_range", (0,)),
        ("timestep_range", (0, 500, 1000)),
        ("timestep_range", (600, 500)),
        ("timestep_range", ("0", "1000")),
        ("timestep_range", (False, 1000)),
        ("timestep_range", (0, float("nan"))),
        ("timestep_range", (0, float("inf"))),
        ("timestep_range", None),
        ("timestep_range", (0.2, 1.0)),  # fractions of the run, as diffusers has them for guidance
        ("timestep_range", (0, 1)),
        ("timestep_range", (0.0, 0.0)),
        ("timestep_range", (2000, 3000)),
        ("timestep_range", (-200, -1)),
        ("steps", 0.7),
        ("steps", (0.7,)),
        ("steps", (0, 0.5, 1)),
        ("steps", ("0", "1")),
        ("steps", (False, True)),
        ("steps", (0.7, 0.3)),
        ("steps", (0.5, 0.5)),
        ("steps", (-0.1, 0.5)),
        ("steps", (0, 1.1)),
        ("steps", (0, 20)),  # a number of steps
        ("steps", (0, float("nan"))),
        ("steps", (float("-inf"), 1)),
        ("steps", None),
    ],
)
def test_a_wrong_argument_is_named_with_what_it_was(argument, value):
    with pytest.raises(ValueError, match=f"^{argument} ") as error:
        ToDoConfig(**{argument: value})
    shown = value if argument != "factor" or not isinstance(value, dict) else next(iter(value))
    assert repr(shown) in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        ToDoConfig(),
        ToDoConfig(factor=3, mode="mean"),
        ToDoConfig(factor={1: 4, 2: 2}, max_kv_tokens=77),
        ToDoConfig(factor={"finest": 2}, timestep_range=(200, 999.5)),
        ToDoConfig(factor={}),
        ToDoConfig(factor=1.5),
        ToDoConfig(factor={1: 1.5, "finest": 2}),
        ToDoConfig(steps=(0.25, 0.7)),
    ],
    ids=["default", "int", "levels", "finest", "no-levels", "fraction", "fractions", "steps"],
)
def test_json_round_trip(config):
    assert ToDoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ToDoConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_only_the_factor_may_come_without_its_name():
    assert ToDoConfig(4) == ToDoConfig(factor=4)
    with pytest.raises(TypeError, match="positional"):
        ToDoConfig("auto", 1024)


@pytest.mark.parametrize("timesteps", [(0, 1.5), (0, 2), (1000, 1000), (0.5, 1000), (-5, 0.5), (999.5, 2000)], ids=str)
def test_ranges_at_the_ends_of_the_timesteps(timesteps):
    assert ToDoConfig(timestep_range=timesteps).timestep_range == timesteps


def test_from_dict_names_what_it_does_not_know():
    assert ToDoConfig.from_dict({}) == ToDoConfig()
    with pytest.raises(ValueError, match="'ratio'"):
        ToDoConfig.from_dict({"factor": 2, "ratio": 0.5})
    with pytest.raises(ValueError, match="data must be a mapping"):
        ToDoConfig.from_dict([("factor", 2)])
    with pytest.raises(ValueError, match="factor"):
        ToDoConfig.from_dict({"factor": {"one": 2}})


def test_it_cannot_be_changed_and_can_be_hashed():
    config = ToDoConfig(factor={1: 4, "finest": 2})
    assert config.factor == {1: 4, "finest": 2}
    for change in (
        lambda factor: factor.__setitem__(1, 0),
        lambda factor: factor.__delitem__(1),
        lambda factor: factor.__ior__({1: 0}),
        lambda factor: factor.update({1: 0}),
        lambda factor: factor.setdefault(2, 0),
        lambda factor: factor.pop(1),
        lambda factor: factor.popitem(),
        lambda factor: factor.clear(),
    ):
        with pytest.raises(TypeError, match="ToDoConfig"):
            change(config.factor)
    assert config.factor == {1: 4, "finest": 2}

    same = ToDoConfig(factor={"finest": 2, 1: 4})
    assert {config, same, copy.deepcopy(config), pickle.loads(pickle.dumps(config))} == {config}
    assert len({ToDoConfig(), ToDoConfig(factor=2), ToDoConfig(factor={}), config}) == 4
    assert dataclasses.asdict(config)["factor"] == {1: 4, "finest": 2}
    assert dataclasses.replace(config, mode="mean").factor == config.factor
    assert type(config.to_dict()["factor"]) is dict
    config.to_dict()["factor"][1] = 0
    assert config.factor == {1: 4, "finest": 2}


def test_the_callers_mapping_is_copied():
    levels = {1: 2}
    config = ToDoConfig(factor=levels)
    levels[1] = 0
    assert config.factor == {1: 2}


@pytest.mark.parametrize("cap", [1, 7, 64, 4096])
def test_auto_is_the_smallest_factor_under_the_cap(cap):
    config = ToDoConfig(max_kv_tokens=cap)
    for grid in [(1, 1), (8, 8), (13, 9), (64, 64), (65, 63), (90, 160), (128, 128), (135, 240), (256, 256)]:

        def tokens(factor, grid=grid):
            return max(1, grid[0] // factor) * max(1, grid[1] // factor)

        factor = next(f for f in range(1, 1000) if tokens(f) <= cap)
        fh, fw = config.factor_for(grid)
        assert (fh, fw) == (min(factor, grid[0]), min(factor, grid[1])), grid
        assert (grid[0] // fh) * (grid[1] // fw) <= cap


@pytest.mark.parametrize(
    ("pixels", "factors"),
    [((1024, 1024), (2, 1)), ((1536, 1536), (3, 2)), ((2048, 2048), (4, 2)), ((720, 1280), (2, 1))],
    ids=str,
)
def test_auto_at_common_sizes(pixels, factors):
    """Levels 1 and 2 of Stable Diffusion 1.5 (8 pixels per latent pixel) under 4096 keys."""
    config = ToDoConfig()
    grids = [(pixels[0] // 8 // level, pixels[1] // 8 // level) for level in (1, 2)]
    assert tuple(config.factor_for(grid)[0] for grid in grids) == factors


def test_a_factor_is_cut_down_to_the_grid():
    assert ToDoConfig(factor=4).factor_for((3, 9)) == (3, 4)
    assert ToDoConfig(factor=4).factor_for((1, 1)) == (1, 1)
    assert ToDoConfig(factor={1: 100}).factor_for((8, 6), 1) == (8, 6)


@pytest.mark.parametrize(
    ("steps", "calls", "acts"),
    [
        ((0.0, 0.7), 10, "1111111..."),
        ((0.7, 1.0), 10, ".......111"),
        ((0.0, 0.7), 4, "111."),
        ((0.0, 0.7), 1, "1"),
        ((0.5, 1), 1, "."),
        ((0.25, 0.5), 8, "..11...."),
        ((0, 1), 3, "111"),
        ((0.3, 0.31), 7, "......."),  # between two calls
    ],
    ids=str,
)
def test_a_share_of_a_run(steps, calls, acts):
    assert "".join(".1"[in_steps(steps, call, calls)] for call in range(calls)) == acts


def test_the_whole_run_is_left_out_of_the_dictionary():
    """So a result that was kept before there was a choice is still that of the same configuration."""
    assert "steps" not in ToDoConfig().to_dict()
    assert ToDoConfig(steps=(0, 0.5)).to_dict()["steps"] == [0, 0.5]
    assert ToDoConfig().every_step and ToDoConfig(steps=(0, 1)).every_step and not ToDoConfig(steps=(0, 0.5)).every_step


def test_the_published_name_of_a_mode():
    assert ToDoConfig(mode="area") == ToDoConfig(mode="mean")
    assert ToDoConfig(mode="area").mode == "mean"
    assert ToDoConfig.from_dict({"mode": "area"}).to_dict()["mode"] == "mean"
    with pytest.raises(ValueError, match=r"mode must be one of .* got 'avg_pool' \('mean' is the same if the factor"):
        ToDoConfig(mode="avg_pool")
    with pytest.raises(ValueError, match=r"got 'max_pool'$"):
        ToDoConfig(mode="max_pool")


def test_fractions():
    assert ToDoConfig(1.5).factor_for((96, 64)) == (1.5, 1.5)
    assert ToDoConfig(1.5).factor_for((1, 9)) == (1, 1.5)
    assert ToDoConfig(2.75).factor_for((2, 9)) == (2, 2.75)
    assert ToDoConfig({1: 1.5, "finest": 2.5}).factor_for((9, 9), 1) == (1.5, 1.5)
    assert ToDoConfig({1: 1.5, "finest": 2.5}).factor_for((9, 9), 2, finest=True) == (2.5, 2.5)
    for whole in (ToDoConfig(2.0).factor, ToDoConfig({1: 2.0}).factor[1], ToDoConfig(1e300).factor):
        assert type(whole) is int
    assert ToDoConfig(2.0) == ToDoConfig(2) and hash(ToDoConfig({1: 2.0})) == hash(ToDoConfig({1: 2}))


@pytest.mark.parametrize(
    ("grid", "factor", "coarse"),
    [
        ((96, 96), (1.5, 1.5), (64, 64)),
        ((65, 37), (1.5, 2), (43, 18)),
        ((11, 11), (1.1, 1.0), (10, 11)),  # by floor division of floats it would be 9
        ((3, 5), (3, 5), (1, 1)),
    ],
)
def test_coarse_grid(grid, factor, coarse):
    assert coarse_grid(grid, factor) == coarse
    assert all(type(side) is int for side in coarse_grid(grid, factor))


def test_levels_that_are_not_named_are_dense():
    config = ToDoConfig(factor={1: 3, 4: 2})
    assert [config.factor_for((12, 12), level) for level in (1, 2, 4, None)] == [(3, 3), (1, 1), (2, 2), (1, 1)]
    config = ToDoConfig(factor={"finest": 3, 4: 2})
    assert config.factor_for((12, 12), 2, finest=True) == (3, 3)
    assert config.factor_for((12, 12), 4) == (2, 2)
    assert config.factor_for((12, 12), 8) == (1, 1)


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [
        *[(256, 256, 1), (512, 512, 1), (1024, 1024, 2), (1536, 1536, 3), (2048, 2048, 4), (720, 1280, 2), (64, 64, 1)],
        *[(768, 768, 2), (1280, 1280, 3), (1279, 1280, 2), (1792, 1792, 4), (2304, 2304, 5)],  # halves go up
    ],
)
def test_paper(height, width, factor):
    config = ToDoConfig.paper(height, width)
    assert config == ToDoConfig(factor={"finest": factor})


@pytest.mark.parametrize(("height", "width", "name"), [(0, 512, "height"), (512, -8, "width"), (512.0, 512, "height")])
def test_paper_wants_pixels(height, width, name):
    with pytest.raises(ValueError, match=f"^{name} must be a positive integer"):
        ToDoConfig.paper(height, width)


@pytest.mark.parametrize(
    ("timesteps", "every"), [((0, 1000), True), ((-1, 2000), True), ((1, 1000), False), ((0, 999), False)]
)
def test_which_ranges_need_no_timestep(timesteps, every):
    assert ToDoConfig(timestep_range=timesteps).every_timestep is every


def test_config_imports_neither_torch_nor_diffusers():
    """In a package of that name whose own ``__init__``, which imports the ops, is left out."""
    code = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('todo_attn')\n"
        "package.__path__ = list(importlib.util.find_spec('todo_attn').submodule_search_locations)\n"
        "sys.modules['todo_attn'] = package\n"
        "import todo_attn.config\n"
        "assert todo_attn.config.ToDoConfig().factor == 'auto'\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_beyond_floats_are_refused():
    with pytest.raises(ValueError, match="timestep_range must be a pair of finite numbers"):
        ToDoConfig(timestep_range=(0, 10**400))
