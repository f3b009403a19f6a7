"""``todo-attn tune`` from the command to a second process's launch, with Triton's own launcher and compiler.

The GPU is benchmarks/stand_in.py, with a clock of its own: a launch takes as long as its programs have threads and
shared memory. Outputs are torch's, except those of one configuration, which are wrong.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import stand_in

pytest.importorskip("platformdirs")
ROOT = Path(__file__).parents[2]

# Common to both processes. Arguments: the driver's folder, and more of each.
_GPU = """
import sys
from pathlib import Path
from benchmarks.stand_in import StandIn
gpu = StandIn(Path(sys.argv[1]), 90, "Stand-in 9000")
gpu.use()
"""

# The fastest by the clock is wrong: its 4 warps have the fewest threads. Of the others the one with less shared memory
# is faster than the shipped.
TUNE = (
    _GPU
    + """
import torch
from todo_attn import cli, machine, ops
from todo_attn.bench import candidates, harness
from todo_attn.kernels import launch
from todo_attn.kernels.configs import KernelConfig, attention_config, match_config

wrong = KernelConfig(128, 64, 4, 3)
candidates.of_attention = lambda *gpu: [attention_config(*gpu, half=True), wrong, KernelConfig(128, 64, 8, 2)]
candidates.of_match = lambda gpu: [match_config(gpu, half=True)]  # alone, it is not timed
machine.cache_bytes = lambda device: 1
harness.stamp = lambda device: gpu.clock()
launched = launch.attention

def attention(query, key, value, grid, coarse, mode, scale, config=None, tile=None):
    launched(query, key, value, grid, coarse, mode, scale, config, tile)
    factor = grid[0] // coarse[0], grid[1] // coarse[1]
    out = ops.downsampled_attention(query, key, value, grid, factor, mode=mode, scale=scale, backend="torch")
    return out + (config == wrong)

launch.attention = attention
cli.main(sys.argv[2:])
"""
)

# The configurations that are compiled: at first, and then with a file of another Triton. At last the file is forgotten.
USE = (
    _GPU
    + """
import json
import torch
from todo_attn import cli, doctor, ops
from todo_attn.kernels import attention, tuned

def compiled():
    q = torch.zeros(2, 64, 8, 40, dtype=torch.float16)
    before = set(attention.attention_kernel.device_caches[0][0])
    ops.downsampled_attention(q, q, q, (8, 8))
    new = [k for name, k in attention.attention_kernel.device_caches[0][0].items() if name not in before]
    return [(k.metadata.num_warps, k.metadata.num_stages) for k in new]

device = torch.device("cpu")
path = tuned.path_of(device)
found = [compiled(), doctor._tuning()]
data = json.loads(path.read_text())
data["made_for"]["triton"] = "1.0"
path.write_text(json.dumps(data))
tuned.forget()
found += [compiled(), doctor._tuning()]
print(json.dumps(found))
cli.main(["tune", "--reset"])
"""
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if reason := stand_in.unavailable_reason():
        pytest.skip(reason)
    return stand_in.build(tmp_path_factory.mktemp("driver"))


def test_a_whole_run_and_the_process_after_it(driver, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TRITON_INTERPRET": "0",
    }

    def start(code, *arguments):
        command = [sys.executable, "-W", "ignore", "-c", code, str(driver), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        if "Python.h" in done.stderr:
            pytest.skip("no Python headers, which Triton's launcher is compiled with")
        assert done.returncode == 0, done.stderr[-2000:]
        return done

    done = start(TUNE, "tune", "--height", "64", "--model", str(of_head_dim_40(tmp_path / "model")), "--json")
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert (row["before"], row["kept"]) == ("128x256x8x3:poly", "128x64x8x2") and row["ratio"] > 1.1
    assert [bool(each["error"]) for each in row["tried"]] == [False, True, False]
    assert found["notes"] == [f"head dim 40, 128x64x4x3: {row['tried'][1]['error']}"]
    assert "wrong result, not timed: off by" in found["notes"][0]
    path = Path(found["file"])
    assert path == tmp_path / "cache" / "todo_attn" / "tuned" / "stand-in-9000-sm90.json"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text())["attention"]["40"]["num_warps"] == 8

    done = start(USE)
    first, last = done.stdout.splitlines()
    tuned, was_tuned, shipped, is_tuned = json.loads(first)
    assert (tuned, shipped) == ([[8, 2]], [[8, 3]])
    assert [row["head_dims"] for row in was_tuned] == [[40]] and was_tuned[0]["file"] == str(path)
    assert is_tuned[0]["file"] is None
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{path} is ignored: it was made for triton 1.0, and here is ")
    assert last == f"forgotten: {path}" and not path.exists()


def of_head_dim_40(folder):
    """The configuration of a UNet whose only self-attention has 8 heads of 40."""
    config = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [320],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "mid_block_type": None,
        "up_block_types": ["CrossAttnUpBlock2D"],
        "attention_head_dim": 8,
    }
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return folder
