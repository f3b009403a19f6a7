"""Who may import whom: the contract of the layers, read from the source."""

import ast
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
    "doctor": {"config", "ops", "models", "diffusers", "kernels"},
}
THE_COMMAND = {"cli", "__main__", "__init__"}  # may import everything


def modules():
    for folder, package in ((ROOT / "todo_attn", ["todo_attn"]), (ROOT / "kernels", ["todo_attn", "kernels"])):
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder)
            if inside.parts[0] not in ("kernels", "tiny_sd"):  # links to folders elsewhere
                yield path, [*package, *inside.with_suffix("").parts]


def imported(path, name):
    """The absolute names of what the module ``name`` imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name[: len(name) - node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            yield from ([*module, alias.name] for alias in node.names)


CASES = list(modules())


@pytest.mark.parametrize(("path", "name"), CASES, ids=[".".join(name) for _, name in CASES])
def test_imports_go_down(path, name):
    layer = name[1]
    if layer in THE_COMMAND:
        return
    allowed = EVERYWHERE | MAY_IMPORT.get(layer, set()) | ({layer} if layer in MAY_IMPORT else set())
    public = {"ToDoConfig", "DaToConfig", "apply_todo", "remove_todo", "ops"}  # of the package itself, for doctor
    for target in imported(path, name):
        if target[0] == "todo_attn" and not (layer == "doctor" and target[1] in public):
            assert target[1] in allowed, f"{'.'.join(name)} must not import {'.'.join(target)}"
        assert "experiments" not in target


def test_every_file_of_the_package_has_a_layer():
    flat = {name[1] for path, name in CASES if path.parent == ROOT / "todo_attn"}
    folders = {name[1] for path, name in CASES if path.parent != ROOT / "todo_attn"}
    assert flat <= EVERYWHERE | THE_COMMAND | set(MAY_IMPORT)
    assert folders <= THE_COMMAND | set(MAY_IMPORT)
    assert len(flat) <= 8
