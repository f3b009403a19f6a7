"""Shared by the experiment's tests, beside what the suite's own ``tests/conftest.py`` shares.

Importable wherever pytest was started, from the end of the path, because the checkout's ``kernels`` must not shadow the
package of that name.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
sys.path.append(str(ROOT))

from tests.conftest import (  # noqa: E402, F401
    _products_in_the_interpreter,
    _seed,
    _this_process_gives_memory_back,
    bf16_in_the_interpreter,
    pytest_collection_modifyitems,
    pytest_configure,
)


def _static(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.experiments.hopper.static", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def static():
    """static(*arguments) runs this experiment's ``static`` in a process of its own, where nothing is interpreted."""
    return _static


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """By head dim, what the Hopper candidate is compiled to for fp16: its row and its cubin, PTX beside it."""
    folder = tmp_path_factory.mktemp("cubins")
    run = _static("--json", "--head-dim", "40", "--head-dim", "80", "--dump", str(folder))
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)
    return {row["head_dim"]: (row, *folder.glob(f"*-d{row['head_dim']}-*.cubin")) for row in rows}
