"""What a user's own type checker says of the public names."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

# Without following into torch and diffusers, which takes a minute and tells nothing about this package.
SETTINGS = """
[mypy]
strict = true
python_version = 3.10
follow_imports = silent
[mypy-torch.*,diffusers.*,numpy.*]
follow_imports = skip
"""
# With variables, whose types are found without a look at what they are given to.
RIGHT = """
from todo_attn import DaToConfig, ToDoConfig, __version__

by_level, finest, ratios = {1: 4, 2: 2}, {"finest": 2}, [0.4, 0.3]
ToDoConfig(factor=by_level)
ToDoConfig(factor=finest)
ToDoConfig(factor={"finest": 4, 2: 2})
ToDoConfig(4)
ToDoConfig(1.5, mode="area")
ToDoConfig({1: 1.5, 2: 2})
ToDoConfig(factor="auto", max_kv_tokens=1024, mode="mean", timestep_range=(200, 1000), steps=(0, 0.7))
ToDoConfig.paper(1024, 1024).factor_for((128, 128), 1, finest=True)[0].is_integer()
DaToConfig(ratios, cache_schedule="1")
DaToConfig(0.4, patch=(2, 2), todo=ToDoConfig())
DaToConfig.preset("coco", 25, prune_ratio=0.3).ratio_for(0).hex()
__version__.upper()
"""
WRONG = [
    "ToDoConfig(factor='Auto')",
    "ToDoConfig(mode='bilinear')",
    "ToDoConfig('auto', 4096)",
    "ToDoConfig(factor={1: '2'})",
    "DaToConfig(0.4, 'coco')",
    "DaToConfig(['0.4'])",
]


@pytest.fixture
def mypy(tmp_path):
    """mypy(code) -> the lines with an error, each its number and text."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")

    def mypy(code):
        file, settings = tmp_path / "user.py", tmp_path / "mypy.ini"
        file.write_text(code)
        settings.write_text(SETTINGS)
        command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path / "cache")]
        root = Path(__file__).parents[1]
        done = subprocess.run([*command, str(file)], cwd=root, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if ": error: " in line]

    return mypy


def test_strict_types_take_what_the_configurations_take(mypy):
    assert mypy(RIGHT) == []


def test_strict_types_refuse_what_the_configurations_refuse(mypy):
    code = "from todo_attn import DaToConfig, ToDoConfig\n" + "\n".join(WRONG)
    lines = {int(error.split(":")[1]) for error in mypy(code)}
    assert lines == {i + 2 for i in range(len(WRONG))}
