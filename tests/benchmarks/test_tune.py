"""Other configurations of the attention kernel against the shipped: run in Triton's interpreter if there is no GPU."""

from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import tune
from todo_attn import machine, ops
from todo_attn.bench import jsonl, kernels
from todo_attn.bench.harness import Rounds
from todo_attn.kernels import configs
from todo_attn.kernels.configs import KernelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two heads: the interpreter runs one program after the other.
TINY = {
    d: replace(case, batch=1, height=64, width=96, dtype="fp32", levels={case.level: (2, d)})
    for d, case in tune.CASES.items()
}
ALTERNATIVES = tune.ALTERNATIVES
OTHERS = [KernelConfig(32, 16, 4, 1), KernelConfig(16, 32, 4, 1, polynomial=True)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(tune, "CASES", TINY)
    monkeypatch.setattr(tune, "ALTERNATIVES", dict.fromkeys(TINY, OTHERS[:1]))
    monkeypatch.setattr(kernels, "rounds_for", lambda device: Rounds(warmup=1, rounds=2))


@pytest.fixture
def cli(tmp_path):
    app = typer.Typer()
    app.command()(tune.main)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", DEVICE, "--size", "64", "--out", str(path)]
    return lambda *more: (CliRunner().invoke(app, [*arguments, *more]), path)


def test_every_setting_against_the_shipped(cli):
    result, path = cli("--head-dim", "40", "--head-dim", "80")
    assert result.exit_code == 0, result.output
    rows = jsonl.read(path)
    assert [(row["case"]["head_dim"], row["contender"]["name"]) for row in rows] == [
        (40, "32x16, 4 warps, 1 stages"),
        (40, "P V as Q K"),  # 32 + 16 columns in place of 64
        (80, "32x16, 4 warps, 1 stages"),
    ]
    assert all(row["speedup"] and row["baseline"]["name"] == "todo" for row in rows)
    assert all(row["baseline"]["relative_error"] < 1e-5 for row in rows)
    assert "P V as Q K" in result.stdout


def test_a_setting_whose_result_is_wrong_is_not_timed_and_no_failure(cli, monkeypatch):
    """exp2 by polynomial is too coarse for fp32."""
    monkeypatch.setattr(tune, "ALTERNATIVES", {80: OTHERS})
    result, path = cli("--head-dim", "80")
    assert result.exit_code == 0, result.output
    good, bad = jsonl.read(path)
    assert good["speedup"]
    assert bad["speedup"] is None
    assert bad["contender"]["samples"] == []
    assert "wrong result, not timed: off by" in bad["contender"]["error"]


def test_the_shipped_one_being_wrong_is_a_failure(cli, monkeypatch):
    attend = ops.downsampled_attention
    monkeypatch.setattr(ops, "downsampled_attention", lambda *inputs: attend(*inputs) + 1)
    monkeypatch.setattr(tune, "downsampled_attention", lambda q, k, v, grid, *_, **how: attend(q, k, v, grid))
    wrong, _ = cli("--head-dim", "80")
    assert wrong.exit_code == 1
    assert "todo was refused: ValueError: wrong result" in wrong.stderr.splitlines()[-1]


def test_where_rows_cannot_go_is_refused_before_anything_is_timed(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "run", None)
    result, _ = cli("--out", str(tmp_path))
    assert result.exit_code == 2
    assert "--out must be a file that can be written" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("arguments", [["--head-dim", "48"], ["--size", "100"], ["--device", "tpu"]])
def test_what_there_is_not_is_refused(cli, arguments):
    result, path = cli(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not path.exists()


def test_the_configurations_tried_are_others_than_the_shipped(monkeypatch):
    monkeypatch.setattr(tune, "ALTERNATIVES", ALTERNATIVES)
    for head_dim, case in TINY.items():
        shipped = configs.attention_config((9, 0), head_dim, half=True)
        assert shipped not in ALTERNATIVES[head_dim]
        names = list(tune.variants(case))
        assert len(names) == len(ALTERNATIVES[head_dim]) + (head_dim == 40)
