"""The benchmarks belong to a checkout and are not installed: make them importable wherever pytest was started.

At the end of the path: the checkout's ``kernels`` must not shadow the package of that name.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from todo_attn.bench import machine


@pytest.fixture(autouse=True)
def _this_process_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """How a benchmark sets its allocator lasts as long as its process, in which other tests measure memory."""
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: False)
