"""The UNet benchmark end to end on a tiny model, and what it would run by default."""

import json
import signal
import sys
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import models, unet
from benchmarks.unet_plan import CACHED, Choice, calls_of, kinds_of, parse_size, plan
from benchmarks.unet_stop import InterruptError, Stoppable, as_far_as_it_got, pairs
from todo_attn import DaToConfig, ToDoConfig, machine, ops
from todo_attn.bench import harness, jsonl
from todo_attn.bench.harness import Meter, Rounds
from todo_attn.models import unets

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
    rows = jsonl.read(path)
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
    rows = jsonl.read(path)
    candidates = {row["contender"]["name"]: row["contender"] for row in rows}
    assert list(candidates) == ["tome", "dato-coco", "dato-v0", "todo-2+dato-coco", "todo-2+dato-v0", "deepcache-2"]
    assert all(row["case"]["calls"] == 5 and row["speedup"] is not None for row in rows)
    for candidate in (rows[0]["baseline"], *candidates.values()):
        assert candidate["error"] is None
        assert sum(kind["calls"] for kind in candidate["by_kind"].values()) == 5
        assert all(kind["seconds"] > 0 for kind in candidate["by_kind"].values())
        assert 0 < candidate["self_attention_share"] < 1
    both = candidates["todo-2+dato-coco"]
    config = DaToConfig.from_dict(both["config"])
    assert (both["schedule"], config.todo) == ("coco", ToDoConfig(factor=2))
    assert config.cache_schedule == DaToConfig.preset("coco", steps=4).cache_schedule
    assert [candidates["deepcache-2"]["by_kind"][kind]["calls"] for kind in ("full", "shallow")] == [3, 2]
    assert "a call of deepcache-2: full" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "compiled"])
@pytest.mark.parametrize("methods", ["todo,tome", "dato,todo+dato,deepcache"])
def test_rows_of_a_run_on_a_gpu(cli, tmp_path, methods, compiled):
    path = tmp_path / "rows.jsonl"
    arguments = ["--size", "64", "--factor", "2", "--methods", methods, "--out", str(path), *compiled]
    result = cli("--device", "cuda", *arguments)
    assert result.exit_code == 0, result.output
    for row in jsonl.read(path):
        assert (row["case"]["dtype"], row["case"]["batch"]) == ("fp16", 2)
        assert row["case"]["calls"] == (1 if "tome" in methods else 50)
        for candidate in (row["baseline"], row["contender"]):
            assert candidate["error"] is None
            assert candidate["peak_gib"] > 0
            assert compiled or 0 < candidate["self_attention_share"] < 1


def test_json_goes_to_standard_output(cli, tmp_path):
    path = tmp_path / "rows.jsonl"
    result = cli("--height", "64", "--width", "32", "--json", "--out", str(path))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == jsonl.read(path)


def test_a_missing_peer_ends_only_its_row(cli, tmp_path, monkeypatch):
    for package in ("tomesd", "DeepCache"):
        monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "rows.jsonl"
    result = cli("--size", "64", "--calls", "2", "--methods", "tome,todo,deepcache", "--out", str(path))
    assert result.exit_code == 0, result.output
    todo, tome, *deepcache = jsonl.read(path)
    assert todo["speedup"] is not None
    for row, package in [(tome, "tomesd"), *((row, "DeepCache") for row in deepcache)]:
        assert package in row["contender"]["error"]
        assert row["speedup"] is None
        assert package in result.stdout
    assert [row["contender"]["name"] for row in deepcache] == ["deepcache-3", "deepcache-5"]


@pytest.mark.parametrize("methods", ["todo", "todo+dato"])
def test_a_wrong_attention_is_not_timed(cli, tmp_path, monkeypatch, methods):
    right = ops.downsampled_attention
    monkeypatch.setattr(ops, "downsampled_attention", lambda *args, **kwargs: torch.zeros_like(right(*args, **kwargs)))
    path = tmp_path / "rows.jsonl"
    result = cli("--size", "128", "--max-kv-tokens", "64", "--calls", "2", "--methods", methods, "--out", str(path))
    assert result.exit_code == 1, result.output
    (row,) = jsonl.read(path)
    assert "self-attention of 16 x 16 tokens with factor 2 x 2 must be within" in row["contender"]["error"]
    assert row["contender"]["samples"] == [] and row["speedup"] is None
    assert row["baseline"]["error"] is None


class Interrupting(harness.Meter):
    """Sends a signal in the midst of one of its samples, counted from 1."""

    at, kind = 0, signal.SIGINT

    def __call__(self, call):
        Interrupting.at -= 1

        def interrupted():
            output = call()
            if Interrupting.at == 0:
                signal.raise_signal(Interrupting.kind)
            return output

        return super().__call__(interrupted)


@pytest.fixture(scope="module")
def model():
    return unets.with_random_weights(models.CONFIGS["tiny"], CPU, torch.float32)


@pytest.mark.parametrize(
    ("kind", "at", "left"),
    [
        (signal.SIGTERM, 2, {}),  # in warm-up
        (signal.SIGINT, 5, {}),  # in the first contender's first sample
        (signal.SIGTERM, 6, {"todo-2": 1}),
        (signal.SIGINT, 8, {"todo-2": 1, "tome": 1}),  # rounds go forth and back
        (signal.SIGINT, 12, {"todo-2": 3, "tome": 2}),
    ],
)
def test_an_interruption_leaves_the_rows_of_what_was_timed(cli, tmp_path, monkeypatch, model, kind, at, left):
    monkeypatch.setattr(unet, "with_random_weights", lambda *_: model)
    monkeypatch.setattr(unet, "check_exact", lambda *_: None)
    monkeypatch.setattr(unet, "Meter", Interrupting)
    monkeypatch.setattr(Interrupting, "at", at)
    monkeypatch.setattr(Interrupting, "kind", kind)
    path = tmp_path / "rows.jsonl"
    sizes = ["--size", "64", "--size", "128"]
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    result = cli(*sizes, "--rounds", "4", "--factor", "2", "--methods", "todo,tome", "--calls", "2", "--out", str(path))
    assert result.exit_code == 130, result.output
    rows = jsonl.read(path) if path.exists() else []
    assert {row["contender"]["name"]: len(row["contender"]["samples"]) for row in rows} == left
    for row in rows:
        assert row["case"]["height"] == 64
        assert row["baseline"]["error"] is None and row["contender"]["error"] is None
        assert len(row["baseline"]["samples"]) == len(row["contender"]["samples"])
        assert row["speedup"]["p50"] > 0
        assert [candidate["by_kind"]["full"]["calls"] for candidate in (row["baseline"], row["contender"])] == [2, 2]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_an_interruption_between_samples_ends_at_the_next_one():
    meter = Stoppable(Meter(CPU))
    with meter.listening():
        meter(list)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(InterruptError):
            meter(pytest.fail)
    with meter.listening(), pytest.raises(KeyboardInterrupt):  # nothing to keep yet
        signal.raise_signal(signal.SIGINT)


def test_a_side_that_failed_before_an_interruption_still_says_so():
    def result(name, seconds, error=None):
        return harness.Measured(harness.Candidate(name, list), seconds=seconds, error=error)

    whole, failed = result("dense", [2.0, 2.0]), result("gone", [], "ImportError: no such package")
    stopped = as_far_as_it_got(result("todo", [1.0], "InterruptError"))
    assert stopped.error is None
    dense, todo = next(pairs([whole, stopped]))
    assert (dense.seconds, todo.seconds) == ([2.0], [1.0])
    assert list(pairs([whole, failed])) == [(whole, failed)]
    assert list(pairs([result("dense", []), failed, stopped])) == []
    broken = replace(whole, error="OutOfMemoryError")
    assert list(pairs([broken, stopped])) == [(broken, stopped)]


def test_one_round_of_many_calls_is_one_whole_run_of_each_side(cli, tmp_path, monkeypatch):
    calls = dict.fromkeys(("dense", "todo"), 0)

    def build(self, name, *args, **kwargs):
        candidate = made(self, name, *args, **kwargs)

        def counted():
            run = building()
            run.model.register_forward_pre_hook(lambda *_: calls.update({name: calls[name] + 1}))
            return run

        building, candidate.build = candidate.build, counted
        return candidate

    made = unet.Candidates._candidate
    monkeypatch.setattr(unet.Candidates, "_candidate", build)
    monkeypatch.setattr(unet, "check_exact", lambda *_: None)
    path = tmp_path / "rows.jsonl"
    result = cli("--size", "64", "--calls", "50", "--rounds", "1", "--methods", "todo", "--out", str(path))
    assert result.exit_code == 0, result.output
    assert calls == {"dense": 52, "todo": 52}
    (row,) = jsonl.read(path)
    assert len(row["baseline"]["samples"]) == len(row["contender"]["samples"]) == 1
    assert row["baseline"]["by_kind"]["full"]["calls"] == 50


@pytest.mark.parametrize("out", ["/proc/nope/rows.jsonl", "."])
def test_rows_that_could_not_be_written_are_not_measured(cli, monkeypatch, out):
    monkeypatch.setattr(unet, "with_random_weights", pytest.fail)
    result = cli("--out", out)
    assert result.exit_code == 2, result.output
    assert "--out must be a file" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "bogus"], "--device must be cpu or cuda, got bogus"),
        (["--device", "mps"], "--device must be cpu or cuda, got mps"),
        (["--seconds", "-1"], "--seconds"),
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
    monkeypatch.setattr(unet, "with_random_weights", pytest.fail)  # refused before any weight is drawn
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
    assert {"device", "driver", "cpu", "cpu_threads", "torch", "triton", "diffusers", "todo_attn", "commit"} <= set(
        about
    )
    assert machine.slug(CPU).startswith("cpu-")
    assert machine.slug(CPU) == machine.slug(CPU).lower()


def test_a_copy_without_git_can_name_its_commit(monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert machine.commit() == "abc"
