"""Who may import whom: the contract of the layers, read from the source."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYWHERE = {"logs", "machine", "peak_memory", "example", "interrupt"}  # single files that import nothing of ours
# Each layer, and the layers that it may import beside those files.
MAY_IMPORT = {
    "config": set(),
    "kernels": set(),
    "ops": {"config", "kernels"},
    "diffusers": {"config", "ops"},
    "options": {"config"},
    "models": {"config", "options", "diffusers"},
    "bench": {"config", "ops", "kernels"},
    "predict": {"config", "ops", "options", "models", "diffusers", "bench"},
    "compare": {"config", "options", "models", "diffusers"},
    "search": {"config", "options", "models", "diffusers", "predict", "compare"},
    "doctor": {"config", "ops", "models", "diffusers", "kernels"},
    "__init__": {"config", "ops", "diffusers"},
    "__main__": {"cli"},
}
MAY_IMPORT["cli"] = {*MAY_IMPORT, "__version__"} - {"__main__"}
WITHOUT = {  # packages of others that a layer must not import
    "config": {"torch", "triton", "diffusers"},
    **{layer: {"diffusers"} for layer in ("kernels", "ops", "options", "bench", *EVERYWHERE)},
}
# The layers of the names that todo_attn itself exports.
EXPORTED = {"ToDoConfig": "config", "DaToConfig": "config", "ArgumentError": "config", "example_pipeline": "example"}
IN_DIFFUSERS = ("ToDoProcessor", "apply_todo", "remove_todo", "apply_dato", "remove_dato", "reset_dato", "status")
EXPORTED |= dict.fromkeys(IN_DIFFUSERS, "diffusers")


def imported(tree, name):
    """The absolute names of what the module ``name`` imports, also inside of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = [*name[: len(name) - node.level]] if node.level else []
            module += node.module.split(".") if node.module else []
            yield from ([*module, alias.name] for alias in node.names)
        elif called(node) in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            target = node.args[0].value
            level = len(target) - len(target.lstrip("."))
            yield [*(name[: len(name) - level] if level else ()), *target[level:].split(".")]


def called(node):
    """The name of the function or method that ``node`` calls, or None."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", getattr(function, "attr", None))


def problems(source, dotted):
    """What in the source of the module ``dotted`` is against the contract; a package is ``folder.__init__``."""
    name, tree = dotted.split("."), ast.parse(source)
    targets = list(imported(tree, name))
    if "experiments" not in name:
        yield from (target for target in targets if target[0] == "benchmarks" and "experiments" in target)
    if name[0] != "todo_attn":
        return
    layer = name[1]
    allowed = set() if layer in EVERYWHERE else EVERYWHERE | MAY_IMPORT[layer] | {layer} - {"__init__", "__main__"}
    for target in targets:
        first, second = [*target, ""][:2]
        ours = first == "todo_attn" and EXPORTED.get(second, second)
        if first in {"benchmarks", *WITHOUT.get(layer, ())} or (ours is not False and ours not in allowed):
            yield target
    if layer != "cli" and any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree)):
        yield "print"


def modules():
    for folder, package in (("todo_attn", "todo_attn"), ("kernels", "todo_attn.kernels"), ("benchmarks", "benchmarks")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if folder != "todo_attn" or inside.parts[0] not in ("kernels", "landscapes"):  # links to folders elsewhere
                yield path, ".".join([package, *inside.with_suffix("").parts])


CASES = list(modules())


@pytest.mark.parametrize(("path", "name"), CASES, ids=[name for _, name in CASES])
def test_module(path, name):
    assert not list(problems(path.read_text(encoding="utf-8"), name))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        *((f"todo_attn.{layer}.x", "import diffusers") for layer in ("config", "ops", "kernels", "options", "bench")),
        ("todo_attn.bench.unet", "def f():\n    from diffusers.models import UNet2DConditionModel"),
        ("todo_attn.config.x", "from torch import nn"),
        ("todo_attn.logs", "import diffusers"),
        ("todo_attn.logs", "from .config import ToDoConfig"),
        ("todo_attn.logs", "from . import machine"),
        ("todo_attn.ops.x", "from .. import diffusers"),
        ("todo_attn.ops.x", "from .. import apply_todo"),
        ("todo_attn.ops.x", "from todo_attn import *"),
        ("todo_attn.ops.x", "import todo_attn"),
        ("todo_attn.ops.x", "import todo_attn.models.unets as unets"),
        ("todo_attn.ops.x", "import importlib\nimportlib.import_module('todo_attn.predict.gains')"),
        ("todo_attn.ops.x", "from importlib import import_module\nimport_module('..cli', __package__)"),
        ("todo_attn.ops.__init__", "from ..diffusers import apply_todo"),
        ("todo_attn.__init__", "from .cli import main"),
        ("todo_attn.__init__", "from . import predict"),
        ("todo_attn.__main__", "from .doctor import examine"),
        ("todo_attn.predict.x", "from ..compare import bind"),
        ("todo_attn.compare.x", "from ..predict import gains"),
        ("todo_attn.compare.x", "from ..cli import app"),
        ("todo_attn.compare.x", "from ..search import Plan"),
        ("todo_attn.diffusers.x", "from ..search import Plan"),
        ("todo_attn.search.x", "from ..cli import app"),
        ("todo_attn.kernels.x", "from ..ops import checks"),
        ("todo_attn.cli.x", "from benchmarks import options"),
        ("todo_attn.doctor", "import benchmarks.sass"),
        ("todo_attn.doctor", "print('right')"),
        ("benchmarks.tune", "from benchmarks.experiments.hopper import launch"),
        ("benchmarks.tune", "from .experiments import hopper"),
    ],
)
def test_a_violation_is_found(name, source):
    assert list(problems(source, name))


def test_what_is_allowed_passes():
    assert not list(problems("from .. import __version__\nfrom ..predict import gains\nprint(1)", "todo_attn.cli.x"))
    assert not list(problems("from . import ToDoConfig, apply_todo, logs\nconsole.print(1)", "todo_attn.doctor"))
    assert not list(problems("from . import checks\nfrom ..machine import driver", "todo_attn.ops.__init__"))
    assert not list(problems("from benchmarks.experiments import hopper", "benchmarks.experiments.hopper.x"))


def test_every_file_of_the_package_has_a_layer():
    names = [name.split(".") for path, name in CASES if name.startswith("todo_attn.")]
    assert {name[1] for name in names} <= EVERYWHERE | set(MAY_IMPORT)
    assert len([name for name in names if len(name) == 2]) <= 8


def test_the_library_loads_no_upper_layer():
    pytest.importorskip("diffusers")
    code = "import json, sys, todo_attn, todo_attn.diffusers; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[1] for name in json.loads(done.stdout) if name.startswith("todo_attn.")}
    assert "diffusers" in loaded
    assert not loaded & {"predict", "compare", "bench", "cli", "models", "options", "doctor", "search"}
