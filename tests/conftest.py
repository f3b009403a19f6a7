"""Shared by all tests. Without a GPU the kernels run in Triton's interpreter, which must be chosen before import."""

import os
import re
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

torch.set_num_threads(1)  # the suite runs in several processes


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): of pytest-xdist, which may not be here")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def needs_memory():
    """needs_memory(gib) skips the test where less is available; psutil, which knows, is not on every GPU machine."""

    def needs_memory(gib: float) -> None:
        table = Path("/proc/meminfo")
        found = re.search(r"MemAvailable:\s*(\d+) kB", table.read_text()) if table.exists() else None
        if found is None or int(found[1]) < gib * 2**20:
            pytest.skip(f"needs {gib} GiB of memory that is known to be available")

    return needs_memory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
