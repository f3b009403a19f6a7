"""The UNet benchmark end to end on a tiny model, and what it would run by default."""

import json
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import unet
from benchmarks.unet_plan import CACHED, Choice, calls_of, kinds_of, parse_size, plan
from todo_attn import DaToConfig, ToDoConfig
from todo_attn.bench import harness, machine
from todo_attn.bench.harness import Rounds

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RUN = ["--device", "cpu", "--model", "tiny", "--rounds", "2"]


@pytest.fixture
def cli():
    app = typer.Typer()
    app.command()(unet.main)
    return lambda *arguments: CliRunner().invoke(app, [*RUN, *arguments])


def test_rows_of_single_calls(cli, tmp_path):
    path = tmp_path / "rows.jsonl"
    result = cli("--size", "64", "--size", "96x64", "--max-kv-tokens", "16", "--factor", "2", "--out", str(path))
    assert result.exit_code == 0, result.output
    rows = harness.read(path)
    cases = [(row["case"]["height"], row["case"]["width"], row["contender"]["name"]) for row in rows]
    assert cases == [(64, 64, "todo-kv16"), (64, 64, "todo-2"), (64, 96, "todo-kv16"), (64, 96, "todo-2")]
    for row in rows:
        told = {"model": "tiny", "dtype": "fp32", "batch": 1, "calls": 1, "compile": False}
        assert row["case"] | told == row["case"]
        assert row["baseline"]["name"] == "dense"
        assert row["baseline"]["error"] is None and row["contender"]["error"] is None
        assert len(row["baseline"]["samples"]) == len(row["contender"]["samples"]) == 2
        assert row["speedup"]["p20"] <= row["speedup"]["p50"] <= row["speedup"]["p80"]
        assert 0 < row["baseline"]["self_attention_share"] < 1
        assert "by_kind" not in row["baseline"]
        assert row["machine"]["torch"] == torch.__version__
    assert ToDoConfig.from_dict(rows[0]["contender"]["config"]) == ToDoConfig(max_kv_tokens=16)
    assert "self-attention takes" in result.stderr


def test_rows_of_whole_runs(cli, tmp_path):
    path = tmp_path / "rows.jsonl"
    methods = ["--methods", "tome,deepcache,todo+dato,dato", "--schedule", "coco", "--schedule", "v0", "--factor", "2"]
    result = cli("--size", "64", "--calls", "5", *methods, "--cache-interval", "2", "--out", str(path))
    assert result.exit_code == 0, result.output
    rows = harness.read(path)
    sides = {row["contender"]["name"]: row["contender"] for row in rows}
    assert list(sides) == ["tome", "dato-coco", "dato-v0", "todo-2+dato-coco", "todo-2+dato-v0", "deepcache-2"]
    assert all(row["case"]["calls"] == 5 and row["speedup"] is not None for row in rows)
    for side in (rows[0]["baseline"], *sides.values()):
        assert side["error"] is None
        assert sum(kind["calls"] for kind in side["by_kind"].values()) == 5
        assert all(kind["seconds"] > 0 for kind in side["by_kind"].values())
        assert 0 < side["self_attention_share"] < 1
    both = sides["todo-2+dato-coco"]
    config = DaToConfig.from_dict(both["config"])
    assert (both["schedule"], config.todo) == ("coco", ToDoConfig(factor=2))
    assert config.cache_schedule == DaToConfig.preset("coco", steps=4).cache_schedule
    assert [sides["deepcache-2"]["by_kind"][kind]["calls"] for kind in ("full", "shallow")] == [3, 2]
    assert "a call of deepcache-2: full" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
@pytest.mark.parametrize("methods", ["todo,tome", "dato,todo+dato,deepcache"])
def test_rows_of_a_run_on_a_gpu(cli, tmp_path, methods, compiled):
    path = tmp_path / "rows.jsonl"
    arguments = ["--size", "64", "--factor", "2", "--methods", methods, "--out", str(path), *compiled]
    result = cli("--device", "cuda", *arguments)
    assert result.exit_code == 0, result.output
    for row in harness.read(path):
        assert (row["case"]["dtype"], row["case"]["batch"]) == ("fp16", 2)
        assert row["case"]["calls"] == (1 if "tome" in methods else 50)
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
    for package in ("tomesd", "DeepCache"):
        monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "rows.jsonl"
    result = cli("--size", "64", "--calls", "2", "--methods", "tome,todo,deepcache", "--out", str(path))
    assert result.exit_code == 0, result.output
    todo, tome, *deepcache = harness.read(path)
    assert todo["speedup"] is not None
    for row, package in [(tome, "tomesd"), *((row, "DeepCache") for row in deepcache)]:
        assert package in row["contender"]["error"]
        assert row["speedup"] is None
        assert package in result.stdout
    assert [row["contender"]["name"] for row in deepcache] == ["deepcache-3", "deepcache-5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "60"], "multiples of 8"),
        (["--size", "big"], "--size must be"),
        (["--factor", "0"], "--factor must be"),
        (["--max-kv-tokens", "0"], "--max-kv-tokens must be"),
        (["--methods", "dense"], "--methods must have"),
        (["--methods", "tomes"], "--methods must be among"),
        (["--methods", "dato", "--schedule", "cocoa"], "--schedule must be"),
        (["--methods", "dato", "--prune-ratio", "0.9"], "--prune-ratio must be"),
        (["--methods", "deepcache", "--cache-interval", "0"], "--cache-interval must be"),
        (["--methods", "todo,dato", "--calls", "1"], "--calls must be at least 2 for dato, got 1"),
        (["--calls", "0"], "--calls"),
        (["--model", "sd3"], "--model must be among"),
        (["--dtype", "fp8"], "--dtype must be among"),
        (["--height", "64"], "--height and --width"),
    ],
)
def test_arguments_that_do_not_fit_are_named(cli, monkeypatch, arguments, message):
    monkeypatch.setattr(unet.models, "build", pytest.fail)  # refused before any weight is drawn
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_the_default_plans():
    todo, dato = Choice(kinds_of("todo")), Choice(kinds_of("dato,todo"))
    cpu = plan(CPU, 1, [], todo)
    assert [(size, [contender.name for contender in contenders]) for size, contenders in cpu] == [
        ((1024, 1024), ["todo", "todo-kv1024"]),
        ((2048, 2048), ["todo"]),
    ]
    assert [contender.options.max_kv_tokens for contender in cpu[0][1]] == [4096, 1024]
    gpu = plan(GPU, 1, [], Choice(kinds_of("todo"), factors=["paper"]))
    assert [size for size, _ in gpu] == [(1024, 1024), (1536, 1536), (2048, 2048)]
    (paper,) = gpu[2][1]
    assert (paper.name, paper.options.factor) == ("todo-paper", "paper")
    assert [size for size, _ in plan(CPU, 10, [], dato)] == [(512, 512)]
    assert [size for size, _ in plan(GPU, 50, [], dato)] == [(512, 512), (1024, 1024), (2048, 2048)]
    assert [c.name for c in plan(GPU, 50, [(512, 512)], dato)[0][1]] == ["todo", "dato-coco"]


def test_dato_is_named_after_its_schedule_and_an_unusual_ratio(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"version": 1, "digits": "102"}')
    (dato,) = Choice(["dato"], schedules=[str(path)]).contenders()
    assert (dato.name, dato.options.schedule) == ("dato-mine", str(path))
    (dato,) = Choice(["dato"], schedules=["coco"], prune_ratio=0.25).contenders()
    assert (dato.name, dato.options.prune_ratio) == ("dato-coco-0.25", 0.25)


def test_calls_are_those_that_the_methods_need():
    assert calls_of(None, kinds_of("todo,tome"), GPU) == 1
    assert [[calls_of(None, [kind], device) for kind in CACHED] for device in (CPU, GPU)] == [[10] * 3, [50] * 3]
    assert calls_of(3, kinds_of("todo"), GPU) == calls_of(3, kinds_of("dato"), CPU) == 3


def test_samples_that_take_long_are_taken_less_often():
    often = [unet.rounds_of(device, calls, False, None, None, 9) for device in (CPU, GPU) for calls in (1, 50)]
    assert often == [Rounds(1, 3, 9), Rounds(1, 3, 9), Rounds(3, 20, 9), Rounds(1, 5, 9)]
    assert unet.rounds_of(CPU, 50, True, None, None, 9).warmup == 2
    assert unet.rounds_of(GPU, 50, True, 4, 6, 9) == Rounds(4, 6, 9)


def test_a_size_is_width_by_height():
    assert parse_size("1280x720") == (720, 1280)
    assert parse_size("512") == (512, 512)


def test_what_torch_gives_up_compiling_is_an_error():
    def add(x, number):
        return x + number

    compiled, x = torch.compile(add, backend="eager", dynamic=False), torch.zeros(1)
    limit = torch._dynamo.config.recompile_limit
    with unet.room_to_compile(2):
        for number in range(2 * limit):
            compiled(x, number)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled(x, 2 * limit)
    assert torch._dynamo.config.recompile_limit == limit


def test_the_machine_is_described_in_plain_data():
    about = machine.describe(CPU)
    assert json.loads(json.dumps(about)) == about
    assert {"device", "driver", "cpu", "threads", "torch", "triton", "diffusers", "todo_attn", "commit"} <= set(about)
    assert machine.slug(CPU).startswith("cpu-")
    assert machine.slug(CPU) == machine.slug(CPU).lower()


def test_a_copy_without_git_can_name_its_commit(monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert machine.commit() == "abc"
