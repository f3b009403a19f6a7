"""The UNet benchmark end to end on a tiny model, and what it would run by default."""

import json
import sys

import pytest
import torch
import typer
from diffusers.models.attention_processor import AttnProcessor2_0
from typer.testing import CliRunner

from benchmarks import models, unet
from todo_attn import ToDoConfig
from todo_attn.bench import harness, machine

CPU = torch.device("cpu")
RUN = ["--device", "cpu", "--model", "tiny", "--rounds", "2"]


@pytest.fixture
def cli():
    app = typer.Typer()
    app.command()(unet.main)
    return lambda *arguments: CliRunner().invoke(app, [*RUN, *arguments])


def test_rows_of_a_run(cli, tmp_path):
    path = tmp_path / "rows.jsonl"
    result = cli("--size", "64", "--size", "96x64", "--max-kv-tokens", "16", "--factor", "2", "--out", str(path))
    assert result.exit_code == 0, result.output
    rows = harness.read(path)
    cases = [(row["case"]["height"], row["case"]["width"], row["contender"]["name"]) for row in rows]
    assert cases == [(64, 64, "todo-kv16"), (64, 64, "todo-2"), (64, 96, "todo-kv16"), (64, 96, "todo-2")]
    for row in rows:
        assert row["case"] | {"model": "tiny", "dtype": "fp32", "batch": 1, "compile": False} == row["case"]
        assert row["baseline"]["name"] == "dense"
        assert row["baseline"]["error"] is None and row["contender"]["error"] is None
        assert len(row["baseline"]["samples"]) == len(row["contender"]["samples"]) == 2
        assert row["speedup"]["p20"] <= row["speedup"]["p50"] <= row["speedup"]["p80"]
        assert 0 < row["baseline"]["self_attention_share"] < 1
        assert row["machine"]["torch"] == torch.__version__
    assert ToDoConfig.from_dict(rows[0]["contender"]["config"]) == ToDoConfig(max_kv_tokens=16)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
def test_rows_of_a_run_on_a_gpu(cli, tmp_path, compiled):
    path = tmp_path / "rows.jsonl"
    result = cli("--device", "cuda", "--size", "64", "--factor", "2", "--out", str(path), *compiled)
    assert result.exit_code == 0, result.output
    (row,) = harness.read(path)
    assert (row["case"]["dtype"], row["case"]["batch"]) == ("fp16", 2)
    for side in (row["baseline"], row["contender"]):
        assert side["error"] is None
        assert side["peak_gib"] > 0
        assert compiled or 0 < side["self_attention_share"] < 1


def test_json_goes_to_standard_output(cli, tmp_path):
    path = tmp_path / "rows.jsonl"
    result = cli("--height", "64", "--width", "32", "--json", "--out", str(path))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == harness.read(path)


def test_a_missing_peer_ends_only_its_row(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    path = tmp_path / "rows.jsonl"
    result = cli("--size", "64", "--methods", "tome,todo", "--out", str(path))
    assert result.exit_code == 0, result.output
    todo, tome = harness.read(path)
    assert todo["speedup"] is not None
    assert "tomesd" in tome["contender"]["error"]
    assert "tomesd" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "60"], "multiples of 8"),
        (["--size", "big"], "--size must be"),
        (["--factor", "0"], "--factor must be"),
        (["--methods", "dense"], "--methods must have"),
        (["--methods", "tomes"], "--methods must be among"),
        (["--model", "sd3"], "--model must be among"),
        (["--dtype", "fp8"], "--dtype must be among"),
        (["--height", "64"], "--height and --width"),
    ],
)
def test_arguments_that_do_not_fit_are_named(cli, arguments, message):
    result = cli(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_the_default_plans():
    cpu = unet.plan(CPU, [], [], [])
    assert [(size, list(configs)) for size, configs in cpu] == [
        ((1024, 1024), ["todo", "todo-kv1024"]),
        ((2048, 2048), ["todo"]),
    ]
    assert cpu[0][1] == {"todo": ToDoConfig(), "todo-kv1024": ToDoConfig(max_kv_tokens=1024)}
    gpu = unet.plan(torch.device("cuda"), [], [], ["paper"])
    assert gpu[2] == ((2048, 2048), {"todo-paper": ToDoConfig(factor={"finest": 4})})
    assert [size for size, _ in gpu] == [(1024, 1024), (1536, 1536), (2048, 2048)]


def test_a_size_is_width_by_height():
    assert unet.parse_size("1280x720") == (720, 1280)
    assert unet.parse_size("512") == (512, 512)


def test_the_baseline_is_diffusers_own_processor_and_stays_so():
    model = models.build("tiny", CPU, torch.float32)
    inputs = models.inputs(model, 64, 64, batch=1)
    dense, todo = unet.sides(model, inputs, ["dense", "todo"], {"todo": ToDoConfig(factor=2)}, observed=1)
    dense_call, todo_call = dense.build(), todo.build()
    assert not torch.equal(dense_call(), todo_call())
    assert {type(processor) for processor in dense_call.model.attn_processors.values()} == {AttnProcessor2_0}
    with torch.inference_mode():
        assert torch.equal(model(**inputs).sample, dense_call())


def test_the_share_is_taken_once_and_leaves_no_hook():
    model = models.build("tiny", CPU, torch.float32)
    with unet.self_attention(model) as spans, torch.inference_mode():
        model(**models.inputs(model, 64, 64, batch=1))
    assert len(spans) == sum(name.endswith("attn1") for name, _ in model.named_modules())
    assert all(harness.between(*span) > 0 for span in spans)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_wrong_outputs_are_not_timed():
    good = torch.zeros(1, 4, 8, 8)
    unet.check_output(good, good + 1)
    with pytest.raises(ValueError, match="shape"):
        unet.check_output(good, good[..., 1:])
    with pytest.raises(ValueError, match="finite"):
        unet.check_output(good, good / 0)


def test_inexact_factor_one_stops_the_run(monkeypatch):
    def nudge(module, inputs, output):
        return output + 1e-3

    model = models.build("tiny", CPU, torch.float32)
    unet.check_exact(model)
    monkeypatch.setattr(unet.todo_attn, "apply_todo", lambda model, config: model.conv_in.register_forward_hook(nudge))
    with pytest.raises(RuntimeError, match="differs from dense"):
        unet.check_exact(model)


def test_the_machine_is_described_in_plain_data():
    about = machine.describe(CPU)
    assert json.loads(json.dumps(about)) == about
    assert {"device", "driver", "cpu", "threads", "torch", "triton", "diffusers", "todo_attn", "commit"} <= set(about)
    assert machine.slug(CPU).startswith("cpu-")
    assert machine.slug(CPU) == machine.slug(CPU).lower()


def test_a_copy_without_git_can_name_its_commit(monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert machine.commit() == "abc"
