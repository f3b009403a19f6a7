"""The lines to copy do what was measured."""

import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import todo_attn
from todo_attn import DaToConfig, ToDoConfig
from todo_attn.cli import compare as command
from todo_attn.cli.app import app
from todo_attn.compare.bind import bind
from todo_attn.compare.lines import command_line, expression, python_lines
from todo_attn.options.settings import CompareSettings

CONFIGS = [
    ToDoConfig(),
    ToDoConfig(factor=3),
    ToDoConfig(factor={"finest": 2, 2: 1}, mode="mean", timestep_range=(100, 900)),
    ToDoConfig(factor=1.5, steps=(0.25, 1)),
    DaToConfig(),
    DaToConfig(prune_ratio=(0.5, 0.25), cache_schedule="1", patch=(2, 3), align_guidance=False, seed=7),
    DaToConfig(todo=ToDoConfig(max_kv_tokens=1024)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_an_expression_makes_the_same_configuration(config):
    assert eval(expression(config), {"ToDoConfig": ToDoConfig, "DaToConfig": DaToConfig}) == config


def test_an_expression_has_no_defaults():
    assert expression(ToDoConfig(factor=2)) == "ToDoConfig(factor=2)"
    assert expression(DaToConfig(todo=ToDoConfig())) == "DaToConfig(todo=ToDoConfig())"


@pytest.fixture
def settings(sd_folder) -> CompareSettings:
    return CompareSettings(model=str(sd_folder), height=64, width=64, steps=4, factor="1=2", prune_ratio=0.5)


@pytest.mark.parametrize("label", ["todo", "todo:2", "todo:paper", "dato", "dato:none", "todo+dato:search"])
def test_lines_apply_what_was_measured(sd, settings, monkeypatch, label):
    """Run as Python, they call apply_todo or apply_dato with the configuration of the comparison."""
    given: list[Any] = []
    for name in ("apply_todo", "apply_dato"):
        monkeypatch.setitem(todo_attn.__dict__, name, lambda pipe, config: given.append(config))
    (method,) = (m for m in replace(settings, methods=f"dense,{label}").parsed_methods() if m.kind != "dense")
    bound = bind(method, sd, settings)
    exec(python_lines(method.kind, bound.options), {"pipe": sd})
    given_to = settings.todo_config if method.kind == "todo" else lambda m, *size: settings.dato_config(m, 4, *size)
    assert given == [given_to(method, 64, 64)]


def test_lines_of_other_packages(sd, settings, monkeypatch):
    calls: list[Any] = []
    helper = SimpleNamespace(set_params=lambda **options: calls.append(options), enable=lambda: calls.append("on"))
    fakes = {
        "tomesd": SimpleNamespace(apply_patch=lambda pipe, **options: calls.append(options)),
        "DeepCache": SimpleNamespace(DeepCacheSDHelper=lambda pipe: helper),
    }
    options: dict[str, Any] = {"ratio": 0.25, "max_downsample": 1}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    exec(python_lines("tome", options), {"pipe": sd})
    exec(python_lines("deepcache", {"cache_interval": 5, "cache_branch_id": 0}), {"pipe": sd})
    assert calls == [options, {"cache_interval": 5, "cache_branch_id": 0}, "on"]
    assert python_lines("dense", {}) is None


def test_the_command_makes_the_same_comparison(settings, monkeypatch):
    settings = replace(
        settings,
        prompts=('it\'s "a" $star', "--two", "🚀"),
        seeds=(3, 4),
        guidance=2.5,
        methods="dense,todo,tome:0.3",
        scheduler="euler",
        cache_interval=5,
    )
    given: list[Any] = []
    monkeypatch.setattr(command, "_compare", lambda settings, folder, page, as_json: given.append((settings, page)))
    monkeypatch.setattr(command, "choose_folder", lambda out, overwrite: None)
    words = shlex.split(command_line(settings))
    assert words[0] == "todo-attn"
    app(words[1:], standalone_mode=False)
    assert given == [(settings, True)]


def test_the_command_names_only_what_is_not_the_default():
    line = command_line(CompareSettings(prompts=("a",), height=512, width=512))
    assert "--factor" not in line and "--methods" not in line and "--warmup-steps" not in line
    assert line.startswith("todo-attn compare --prompt a --seed 0 --height 512 --width 512")
