"""``todo-attn bench``: what it times, prints and writes, and what it refuses."""

import json

import pytest

from todo_attn import bench_command, ops
from todo_attn.bench import harness, kernels, machine
from todo_attn.bench.harness import Rounds


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Two sets of inputs and two rounds."""
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(kernels, "rounds_for", lambda device: Rounds(warmup=1, rounds=2))


def test_as_json_and_into_a_file(run, tmp_path):
    path = tmp_path / "rows.jsonl"
    ran = run("bench", "--device", "cpu", "--height", 64, "--width", 128, "--out", path, "--json")
    assert ran.code == 0, ran.err
    timed = json.loads(ran.out)
    assert timed["rows"] == harness.read(path)
    assert [row["benchmark"] for row in timed["rows"]] == [*["gather"] * 2, *["recover"] * 2, *["match_tokens"] * 2]
    assert all(row["speedup"] for row in timed["rows"])
    assert timed["notes"][0] == (
        "ToDo changes nothing at 128x64: no self-attention of sd15 has more than 4096 keys there"
    )
    assert timed["notes"][0] in ran.err
    assert timed["machine"]["cpu"]


def test_the_table_says_where_todo_is_not_faster(run, monkeypatch):
    measure = kernels.measure

    def slow(case, *arguments):
        rows = measure(case, *arguments)
        for row in rows:
            row["speedup"] = row["speedup"] and dict.fromkeys(row["speedup"], 0.5)
        return rows

    monkeypatch.setattr(kernels, "measure", slow)
    ran = run("bench", "--device", "cpu", "--height", 64, "--width", 64)
    assert ran.code == 0, ran.err
    assert "torch-pairs" in ran.out
    assert "note: gather, sd15 64x64 level 1, batch 1, fp32: todo is not faster here, it takes 2.00x" in ran.out


def test_a_wrong_result_of_ours_ends_in_a_failure(run, monkeypatch):
    gather = ops.gather_tokens
    monkeypatch.setattr(ops, "gather_tokens", lambda x, index: gather(x, index) + 1)
    ran = run("bench", "--device", "cpu", "--height", 64, "--width", 64, "--json")
    assert ran.code == 1
    assert len(json.loads(ran.out)["rows"]) == 6
    said = "todo-attn: error: gather, sd15 64x64 level 1, batch 1, fp32: todo was refused: ValueError: wrong result"
    assert ran.err.splitlines()[-1].startswith(said)


def test_a_picture_of_which_only_one_side_is_given_is_square(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "run", lambda cases, device, rounds: asked.extend(cases) or [])
    bench_command.bench("cpu", "float32", "sdxl", None, 1536, lambda rows: None)
    assert {(case.height, case.width, case.dtype) for case in asked} == {(1536, 1536, "fp32")}
    assert [case.benchmark for case in asked] == ["attention", "gather", "recover", "match_tokens"]


def test_on_a_cpu_it_keeps_freed_memory_as_the_benchmarks_do(monkeypatch):
    told = []
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: told.append("keeps"))
    monkeypatch.setattr(kernels, "run", lambda cases, device, rounds: told.append("runs") or [])
    bench_command.bench("cpu", "auto", "sd15", 64, 64, lambda rows: None)
    assert told == ["keeps", "runs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", 100], "--height must be a multiple of 8 pixels, at least 64, got 100"),
        (["--width", 0], "--height must be a multiple of 8 pixels, at least 64, got 0"),
        (["--model", "sd3"], "--model must be one of sd15, sdxl, got sd3"),
        (["--dtype", "int8"], "--dtype must be one of fp32, fp16, bf16, got int8"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "mps"], "--device must be auto, cpu, cuda or cuda:N, and present, got 'mps'"),
        (["--device", "cuda:99"], "--device must be one that torch sees, which has"),
    ],
)
def test_what_there_is_not_is_refused_in_one_line(run, arguments, message):
    ran = run("bench", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"todo-attn: error: {message}")
    assert ran.err.count("\n") == 1


def test_a_file_that_cannot_be_added_to_is_refused_before_anything_is_timed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "run", None)
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path, "--out must be a file that can be written"),
        (tmp_path / "file" / "rows", "--out must be a file that can be written"),
    ):
        ran = run("bench", "--device", "cpu", "--height", 64, "--out", out)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith(f"todo-attn: error: {message}") and ran.err.count("\n") == 1
    assert (tmp_path / "file").read_bytes() == b""
