"""The kernel benchmark as a command, and that its shapes are those of the real UNets."""

import json

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import kernels as command
from benchmarks import models
from todo_attn import ops
from todo_attn.bench import cases, jsonl, kernels
from todo_attn.bench.cases import Case
from todo_attn.models import unets

TINY = Case("gather", "sd15", 64, 96, 1, 2, "fp32")


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Runs it on two tiny cases; the file of rows comes with the result."""
    plan = [TINY, Case("match_tokens", "sd15", 64, 64, 1, 1, "fp32")]
    monkeypatch.setattr(cases, "plan", lambda device: plan)
    app = typer.Typer()
    app.command()(command.main)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--rounds", "2", "--out", str(path)]
    return lambda *more: (CliRunner().invoke(app, [*arguments, *more]), path)


def test_rows_of_a_run(cli):
    result, path = cli()
    assert result.exit_code == 0, result.output
    rows = jsonl.read(path)
    assert [row["benchmark"] for row in rows] == ["gather"] * 2 + ["match_tokens"] * 2
    best, *others = (row["baseline"] for row in rows)
    assert best["name"] in best["best_of"] and set(best["best_of"]) == {"torch", "index_select"}
    assert [candidate["name"] for candidate in others] == ["copy", "published", "torch-pairs"]
    assert all(row["speedup"] and row["contender"]["name"] == "todo" for row in rows)
    assert all(len(row["contender"]["samples"]) == 2 for row in rows)
    assert rows[0]["case"] == TINY.describe()
    assert rows[0]["machine"]["cpu"]
    assert "torch-pairs" in result.stdout


def test_only_some_as_json(cli):
    result, path = cli("--only", "match_tokens", "--json")
    assert json.loads(result.stdout) == jsonl.read(path)
    assert {row["benchmark"] for row in jsonl.read(path)} == {"match_tokens"}


def test_no_case_is_started_after_its_time(cli):
    result, path = cli("--minutes", "0")
    assert result.exit_code == 0, result.output
    assert "no case was started in 0 minutes, nothing was written" in result.output
    assert "rows added" not in result.output
    assert not path.exists()


def test_a_wrong_result_of_ours_ends_in_a_failure(cli, monkeypatch):
    gather = ops.gather_tokens
    monkeypatch.setattr(ops, "gather_tokens", lambda x, index: gather(x, index) + 1)
    result, path = cli()
    assert result.exit_code == 1
    said = "gather, sd15 96x64 level 1, batch 2, fp32: todo was refused: ValueError: wrong result, not timed"
    assert result.stderr.splitlines()[-1].startswith(said)
    assert len(jsonl.read(path)) == 4


@pytest.mark.parametrize("out", ["", "file/rows.jsonl"])
def test_where_rows_cannot_go_is_refused_before_anything_is_timed(cli, monkeypatch, tmp_path, out):
    (tmp_path / "file").touch()
    monkeypatch.setattr(kernels, "run", None)
    result, _ = cli("--out", str(tmp_path / out))
    assert result.exit_code == 2
    assert "--out must be a file that can be written" in " ".join(result.output.replace("│", " ").split())


def test_what_was_measured_before_an_interrupt_stays(cli, monkeypatch):
    def stopped(*arguments):
        if arguments[0].benchmark != "gather":
            raise KeyboardInterrupt
        return measure(*arguments)

    measure = kernels.measure
    monkeypatch.setattr(kernels, "measure", stopped)
    result, path = cli()
    assert result.exit_code != 0
    assert len(jsonl.read(path)) == TINY.rows


@pytest.mark.parametrize("arguments", [["--only", "sorting"], ["--device", "tpu"], ["--rounds", "0"]])
def test_what_there_is_not_is_refused(cli, arguments):
    result, path = cli(*arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not path.exists()


@pytest.mark.parametrize("model", cases.MODELS)
def test_shapes_are_those_of_the_unet(model):
    layers = [module for name, module in unets.on_meta(models.CONFIGS[model]).named_modules() if name.endswith("attn1")]
    assert {(layer.heads, layer.inner_dim // layer.heads) for layer in layers} == set(cases.MODELS[model].values())
