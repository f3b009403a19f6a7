"""The public API, written down: what "works as before" means. Additions are free; a removal or a change fails.

A signature is without annotations. ``ops`` and the others are modules of ``todo_attn``.
"""

import importlib
import inspect
from pathlib import Path

import pytest

PYTHON = """
todo_attn
    ToDoConfig(factor='auto', *, max_kv_tokens=4096, mode='nearest', timestep_range=(0, 1000), steps=(0.0, 1.0))
    ToDoConfig.paper(height, width)
    ToDoConfig.every_timestep
    ToDoConfig.every_step
    ToDoConfig.factor_for(grid, level=None, *, finest=False)
    ToDoConfig.to_dict()
    ToDoConfig.from_dict(data)
    DaToConfig(prune_ratio=0.4, *, cache_schedule=None, patch=(2, 2), noise_weight=0.1, dynamics_weight=0.1, \
align_guidance=True, prune_cross_attention=False, prune_feed_forward=False, todo=None, seed=0)
    DaToConfig.preset(name, steps=50, **overrides)
    DaToConfig.from_file(path, calls=None, **overrides)
    DaToConfig.from_schedule(found)
    DaToConfig.computes_everything
    DaToConfig.schedule_for(calls)
    DaToConfig.for_calls(calls)
    DaToConfig.ratio_for(call, calls=None)
    DaToConfig.to_dict()
    DaToConfig.from_dict(data)
    ToDoProcessor(config=None)
    apply_todo(pipe_or_model, config=None)
    remove_todo(pipe_or_model)
    apply_dato(pipe_or_unet, config=None)
    remove_dato(pipe_or_unet)
    reset_dato(pipe_or_unet)
    ArgumentError(argument, problem)
    status(pipe_or_model)
    example_pipeline()
    ops
todo_attn.ops
    downsampled_attention(query, key, value, grid, factor=1, *, mode='nearest', scale=None, backend='auto')
    downsample_tokens(x, grid, factor=1, *, mode='nearest')
    gather_tokens(x, index)
    scatter_tokens(x, index, source)
    scatter_tokens_(x, index, source)
    recover_tokens(y, source, residual=None)
    select_base_tokens(score, grid, patch=(2, 2))
    match_tokens(x, query_index, key_index)
    plan_pruning(x, score, grid, ratio, patch=(2, 2))
todo_attn.config
    ArgumentError
    ToDoConfig
    DaToConfig
todo_attn.config.schedule
    Schedule(digits, name='', source='', steps=None, scheduler=None, published_speedup=None, prune_ratio=None, \
todo=None, provenance=<factory>)
    Schedule.calls
    Schedule.full
    Schedule.shallow
    Schedule.reuse
    Schedule.to_dict()
    Schedule.from_dict(data)
    check_digits(value, name='digits')
    dumps(schedule)
    loads(text)
    save(schedule, path)
    load(source)
    names()
    named()
    resample(digits, length)
todo_attn.search
    Plan(*, metric='psnr', features=None, cost='operations', prune_ratios=(0.4,), prune_per_call=False, \
todo_factors=(1,), population=24, generations=20, minutes=None, search_seed=0, start=())
    Found
    Found.front
    Found.speedup(point)
    Point
    Progress
    search(pipe, settings, plan=None, folder='search', workers=None, watch=None)
todo_attn.diffusers
    ToDoProcessor
    apply_todo
    remove_todo
    apply_dato
    remove_dato
    reset_dato
    status
"""

# Flags that are off by default as --flag, options as --name=default, those that can be repeated as --name=...,
# arguments in capitals.
COMMANDS = """
todo-attn
    --version
doctor
    --model= --height= --width= --steps=50 --max-kv-tokens=4096 --schedule= --prune-ratio= --device=auto
    --dtype=auto --measure --json
compare
    MODEL --prompt=... --seed=... --height= --width= --steps= --guidance= --scheduler= --device=auto --dtype=auto
    --methods=dense,todo --factor=auto --max-kv-tokens=4096 --mode=nearest --tome-ratio=0.5 --schedule=coco
    --prune-ratio= --cache-interval=3 --warmup-steps=2 --variant= --config= --out= --overwrite --json
search
    MODEL --prompts= --prompt=... --seed=... --height= --width= --steps= --guidance= --scheduler= --device=auto
    --dtype=auto --threads= --metric=psnr --features= --cost=operations --prune-ratios=0.4 --prune-per-call
    --todo-factors=1 --population=24 --generations=20 --minutes= --search-seed=0 --start-from=... --variant= --config=
    --folder=search --json
recommend
    MODEL --speedup= --psnr= --prompts= --prompt=... --seed=... --height= --width= --steps= --guidance= --scheduler=
    --device=auto --dtype=auto --threads= --cost=seconds --minutes=6.0 --variant= --config= --folder=recommend --json
schedules
    --model= --height= --width= --steps=50 --name= --all --json
bench
    --model=sd15 --height= --width= --device=auto --dtype=auto --out= --json
tune
    --model=sd15 --height= --width= --device=auto --reset --json
"""


def sections(table):
    """The indented lines of ``table`` by the line above them."""
    heading, found = "", {}
    for line in table.strip().splitlines():
        if line.startswith(" "):
            found[heading].append(line.strip())
        else:
            heading = line
            found[heading] = []
    return found


ROWS = [(module, row) for module, rows in sections(PYTHON).items() for row in rows]
OPTIONS = {command: " ".join(rows).split() for command, rows in sections(COMMANDS).items()}


def signature_text(function):
    """As in the table; of a class that of its ``__init__``, because ``ToDoProcessor.__new__`` takes anything."""
    signature = inspect.signature(function.__init__ if inspect.isclass(function) else function)
    parameters = [p.replace(annotation=p.empty) for name, p in signature.parameters.items() if name != "self"]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def public_names(module):
    """``__all__``, or the functions and classes that the module defines, as in the API reference."""
    defined = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return getattr(module, "__all__", None) or [name for name in defined if not name.startswith("_")]


@pytest.mark.parametrize(("module", "row"), ROWS, ids=[f"{module}.{row.partition('(')[0]}" for module, row in ROWS])
def test_public_name(module, row):
    name, bracket, rest = row.partition("(")
    first, *attributes = name.split(".")
    module = importlib.import_module(module)
    assert first in public_names(module)
    found = getattr(module, first)
    for attribute in attributes:
        found = getattr(found, attribute)
    if bracket:
        assert signature_text(found) == bracket + rest


def test_every_module_gives_the_same_objects():
    import todo_attn

    for module in ("todo_attn.config", "todo_attn.diffusers"):
        for name in importlib.import_module(module).__all__:
            assert getattr(importlib.import_module(module), name) is getattr(todo_attn, name)


def test_every_public_name_is_in_the_api_reference():
    page = (Path(__file__).parents[1] / "docs/api.md").read_text(encoding="utf-8")
    whole = {"todo_attn.ops", "todo_attn.config.schedule"}  # automodule lists the public names
    for module in sections(PYTHON):
        names = () if module in whole else public_names(importlib.import_module(module))
        missing = [name for name in names if f"{module}.{name}" not in page]
        assert not missing, f"docs/api.md lacks {missing} of {module}"
        assert f"automodule:: {module}" in page or module not in whole


@pytest.mark.parametrize("command", OPTIONS)
def test_command(command):
    typer = pytest.importorskip("typer")
    from todo_attn.cli.commands import app

    group = typer.main.get_command(app)
    found = group if command == "todo-attn" else group.commands[command]
    missing = [option for option in OPTIONS[command] if option not in {o for p in found.params for o in texts(p)}]
    assert not missing


def texts(parameter):
    """As in the table, one for each name of ``parameter``."""
    if parameter.param_type_name == "argument":
        return [parameter.name.upper()]
    default = "" if parameter.default is None else parameter.default
    if parameter.is_flag:
        value = f"={default}" if default else ""
    else:
        value = "=..." if parameter.multiple else f"={default}"
    return [name + value for name in parameter.opts]
