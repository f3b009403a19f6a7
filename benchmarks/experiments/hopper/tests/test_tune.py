"""The candidate timed against the shipped kernel, in Triton's interpreter if there is no GPU."""

from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import tune
from benchmarks.experiments.hopper import check, launch
from benchmarks.experiments.hopper.tune import main
from todo_attn import machine
from todo_attn.bench import jsonl, kernels
from todo_attn.bench.harness import Rounds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def cli(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1)
    tiny = {d: replace(case, batch=1, height=64, width=96, dtype="fp32") for d, case in tune.CASES.items()}
    monkeypatch.setattr(tune, "CASES", tiny)
    monkeypatch.setattr(kernels, "rounds_for", lambda device: Rounds(warmup=1, rounds=2))
    app = typer.Typer()
    app.command()(main)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", DEVICE, "--size", "64", "--out", str(path)]
    return lambda *more: (CliRunner().invoke(app, [*arguments, *more]), path)


def test_a_candidate_is_timed_where_it_is_right(monkeypatch, cli, capfd):
    """None is without a Hopper GPU, and the rest goes on."""

    def attend(query, key, value, grid, coarse, mode, scale, run):
        return torch.ops.todo_attn.downsampled_attention(query, key, value, grid, coarse, mode, scale, "torch")

    right = launch.RUNS[80][0]
    monkeypatch.setattr(launch, "attention", attend)
    monkeypatch.setattr(
        check, "row", lambda head_dim, run, seconds: {"error": None if run == right else "no end after 1 s"}
    )
    result, path = cli("--head-dim", "80")
    assert result.exit_code == 0, result.output
    (row,) = jsonl.read(path)
    assert row["contender"]["name"].startswith("hopper 2x64x64, 4 slots") and row["speedup"]
    assert result.stderr.count("no end after 1 s") == len(launch.RUNS[80]) - 1
    monkeypatch.setattr(check, "row", lambda head_dim, run, seconds: {"error": "needs a Hopper GPU"})
    result, path = cli("--head-dim", "40")
    assert "no candidate is right on this device" in jsonl.read(path)[-1]["contender"]["error"]
