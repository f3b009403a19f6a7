"""``todo-attn bench``: what it times, prints and writes, and what it refuses."""

import json

import pytest
from diffusers import UNet2DConditionModel

from todo_attn import machine, ops
from todo_attn.bench import cases, harness, jsonl, kernels
from todo_attn.bench.harness import Candidate, Measured, Rounds
from todo_attn.cli import bench as bench_command


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
    assert timed["rows"] == jsonl.read(path)
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


def test_an_image_of_which_only_one_side_is_given_is_square(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "run", lambda cases, device, rounds: asked.extend(cases) or [])
    bench_command.bench("cpu", "float32", "sdxl", None, 1536, lambda rows: None)
    assert {(case.height, case.width, case.dtype) for case in asked} == {(1536, 1536, "fp32")}
    assert [case.benchmark for case in asked] == ["attention", "gather", "recover", "match_tokens"]


def test_the_models_are_those_of_doctor(run, sd_folder, sdxl_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "run", lambda cases, device, rounds: asked.extend(cases) or [])
    assert run("bench", "--device", "cpu", "--model", sd_folder, "--height", 1024).code == 0
    assert run("bench", "--device", "cpu", "--model", sdxl_folder, "--height", 2048).code == 0
    shapes = [(case.benchmark, case.model, case.level, case.heads, case.head_dim, case.tokens) for case in asked]
    of_sd, of_sdxl = (str(sd_folder), 1, 4, 8, 128**2), (str(sdxl_folder), 2, 4, 16, 128**2)
    ops = ("attention", "gather", "recover", "match_tokens")
    assert shapes == [*((name, *of_sd) for name in ops), *((name, *of_sdxl) for name in ops)]


def test_a_model_with_nothing_to_time_is_refused(run, tmp_path):
    UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
    ).save_pretrained(tmp_path / "unet")
    ran = run("bench", "--device", "cpu", "--model", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("todo-attn: error: --model must have a UNet with self-attention")


def rows_of(monkeypatch, *speedups, error=None):
    """Have bench measure rows of these speed-ups, each of its rounds."""

    def row(ratios):
        case = cases.Case("gather", "sd15", 64, 64, 1, 1, "fp32")
        sides = [Measured(Candidate(name, lambda: lambda: None), error=error) for name in ("torch", "todo")]
        for side, seconds in zip(sides, (ratios, [1.0] * len(ratios)), strict=True):
            side.seconds = [] if error else [0.004 * s for s in seconds]
        return harness.compare("gather", case.describe(), {}, sides)

    monkeypatch.setattr(kernels, "run", lambda *args: map(row, speedups))


def test_the_table_says_what_its_numbers_are(run, monkeypatch):
    rows_of(monkeypatch, [1.5, 1.5, 1.5])
    ran = run("bench", "--device", "cpu", "--height", 64)
    assert (
        "ms: the median of a candidate's rounds. speed-up: the median (20th to 80th percentile) of the ratios"
        in ran.out
    )
    assert "noisy" not in ran.out


def test_a_noisy_machine_is_said(run, monkeypatch):
    rows_of(monkeypatch, [1.5, 1.5, 1.5], [0.5, 1.0, 1.5], [1.0, 1.2, 1.6])
    ran = run("bench", "--device", "cpu", "--height", 64)
    assert ran.code == 0
    assert (
        "note: this machine is noisy: in 2 of 3 rows the speed-up changes by more than 25% between rounds, most in "
        "gather, sd15 64x64 level 1, batch 1, fp32, against torch: 0.70x to 1.30x."
    ) in ran.out


NO_MEMORY = "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "


def test_nothing_but_lack_of_memory_is_a_failure_in_one_line(run, monkeypatch):
    rows_of(monkeypatch, [], error=f"no inputs: {NO_MEMORY}you tried to allocate 4398046511104 bytes.")
    ran = run("bench", "--device", "cpu", "--height", 64)
    assert ran.code == 1 and "torch, todo: out of memory" in ran.out
    assert ran.err.splitlines()[-1].startswith("todo-attn: error: out of memory: a smaller --height and --width")


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
        (["--model", "sd3"], "--model must be sd15, sdxl, or a folder or Hub id of a pipeline with a UNet, got 'sd3'"),
        (["--height", 65536, "--width", 8192], "--height times the width must be at most as many pixels as 16384"),
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
