"""The doctor says what is there, runs it, and is not fooled by an op that is wrong."""

import importlib
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from todo_attn import ToDoConfig, doctor, ops
from todo_attn.bench import jsonl
from todo_attn.config import schedule
from todo_attn.ops import backends, libraries

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ATTENTION, DOWNSAMPLE = "downsampled_attention", "downsample_tokens"
MOVES = ("gather_tokens", "scatter_tokens", "recover_tokens", "select_base_tokens")


def test_a_sound_install(run):
    ran = run("doctor")
    assert ran.code == 0, ran.out + ran.err
    for word in ("torch", "triton", "diffusers", "CUDA", ATTENTION, DOWNSAMPLE, "works"):
        assert word in ran.out
    assert "broken" not in ran.out


def test_json(run):
    ran = run("doctor", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["ok"] and found["problems"] == []
    assert found["versions"]["torch"] == torch.__version__
    assert found["diffusers"] == {"installed": True, "why_not": None, "problem": None}
    rows = {(r["op"], r["device"], r["dtype"]): r for r in found["ops"]}
    assert {
        (op, "cpu", dtype) for op in (ATTENTION, DOWNSAMPLE) for dtype in ("float32", "float16", "bfloat16")
    } <= set(rows)
    for row in rows.values():
        assert row["backend"] in [c["backend"] for c in row["checks"]]
        assert all(c["max_error"] < 0.05 and c["problem"] is None for c in row["checks"])


def test_backends_are_those_of_the_ops(monkeypatch):
    monkeypatch.setattr(backends, "triton_unavailable_reason", lambda device, dtype, *_: f"a reason for {dtype}")
    for row in doctor.examine()["ops"]:
        if row["op"] in MOVES:
            continue
        assert (row["backend"], [c["backend"] for c in row["checks"]]) == ("torch", ["torch"])
        reason = f"a reason for torch.{row['dtype']}" if row["op"] in (ATTENTION, "match_tokens") else None
        assert row["why_not_triton"] == reason


@pytest.mark.parametrize("op", [ATTENTION, DOWNSAMPLE])
@pytest.mark.parametrize("how", ["wrong", "nan", "raising"])
def test_a_broken_op(run, monkeypatch, op, how):
    right = getattr(ops, op)

    def broken(x, *args, **kwargs):
        if how == "raising":
            raise RuntimeError("no kernel\nimage")
        return right(x, *args, **kwargs) + (float("nan") if how == "nan" else 0.1)

    monkeypatch.setattr(ops, op, broken)
    ran = run("doctor")
    assert ran.code == 1
    assert f"broken {op} on cpu in float32 by torch" in ran.out
    assert ("no kernel image" in ran.out) == (how == "raising")
    found = json.loads(run("doctor", "--json").out)
    assert not found["ok"] and len(found["problems"]) >= 3


@pytest.mark.parametrize("op", MOVES)
def test_a_broken_move(run, monkeypatch, op):
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args: right(*args) + 1)
    ran = run("doctor")
    assert ran.code == 1
    assert f"broken {op} on cpu" in ran.out


def test_compiled_libraries_that_are_not_there_are_explained(run, monkeypatch):
    monkeypatch.setattr(libraries, "unavailable_reason", lambda *device: "it was forgotten")
    ran = run("doctor")
    assert ran.code == 0
    assert "no compiled token ops on cpu: it was forgotten" in ran.out
    rows = {row["op"]: row for row in json.loads(run("doctor", "--json").out)["ops"]}
    assert all(rows[op]["backend"] == "torch" and rows[op]["why_not_compiled"] for op in MOVES)


def test_without_diffusers(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    ran = run("doctor")
    assert ran.code == 0, ran.out
    assert "diffusers is not installed: pip install 'todo_attn[diffusers]'" in ran.out


def test_without_triton(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    ran = run("doctor")
    assert ran.code == 0, ran.out
    assert "Triton is not installed" in ran.out


def test_a_processor_that_does_not_import(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "todo_attn.diffusers", None)
    ran = run("doctor")
    assert ran.code == 1
    assert "broken ToDo in diffusers: ModuleNotFoundError" in ran.out


@pytest.mark.parametrize("name", ["apply_todo", "remove_todo"])
def test_a_processor_that_does_nothing(monkeypatch, name):
    monkeypatch.setattr(importlib.import_module("todo_attn.diffusers"), name, lambda *args: None)
    assert doctor.examine()["problems"][0].startswith("ToDo in diffusers: ")


def test_leaves_the_loggers_and_the_generator_alone():
    logger, state = logging.getLogger("todo_attn"), torch.get_rng_state()
    assert doctor.examine()["ok"]
    assert not logger.disabled
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gpu_that_is_not_there_is_explained():
    cuda = doctor.examine()["cuda"]
    assert (cuda["why_not"] is None) == torch.cuda.is_available() == bool(cuda["gpus"])


# doctor --model


def test_advice_as_json(run, sd_folder):
    ran = run("doctor", "--model", sd_folder, "--height", 256, "--width", 128, "--max-kv-tokens", 64, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found.items() >= {"model": str(sd_folder), "height": 256, "width": 128, "batch": 1, "calls": 51}.items()
    assert found["rates"]["attention"] > 0 and found["rates"]["other"] > 0
    assert found["dense"]["operations"] > 0 and 0 < found["dense"]["self_attention_share"] < 1
    rows = {row["method"]: row for row in found["methods"]}
    assert list(rows) == ["todo", "dato", "todo+dato"]
    assert rows["todo"]["config"]["max_kv_tokens"] == 64
    assert rows["todo"]["operations_gain"] > 1 and rows["dato"]["operations_gain"] > 2
    assert all(row["measured_gain"] is None and isinstance(row["helps"], bool) for row in rows.values())


def test_advice_as_text(run, sd_folder):
    ran = run("doctor", "--model", sd_folder, "--measure")
    assert ran.code == 0, ran.err
    lines = dict(line.split(": ", 1) for line in ran.out.splitlines() if ": " in line)
    assert f"{sd_folder} at 128 x 128, batch 1, float32, on " in ran.out
    assert "self-attention takes" in lines["dense"] and "s measured" in lines["dense"]
    assert lines["todo"].startswith(("this will not help here: nothing is downsampled", "1."))
    assert "x predicted" in lines["dato"] and "x measured" in lines["dato"]
    assert "operations counted on this UNet" in lines["predicted"]


def notes_of(ran) -> str:
    assert ran.code == 0, ran.err
    return "\n".join(line for line in ran.out.splitlines() if line.startswith("note: "))


def test_what_dato_does_to_pictures_is_said_with_the_figures_there_are(run, sd_folder):
    rows = {row["case"]: row for row in jsonl.read(RESULTS / "fidelity-256-cpu-amd-epyc.jsonl")}
    said = notes_of(run("doctor", "--model", sd_folder))
    assert "DaTo's schedules change the image visibly" in said
    assert all(row["height"] == row["width"] == 256 and row["made"]["steps"] == 25 for row in rows.values())
    for case in ("dato:coco", "todo:level1=2"):
        columns = rows[case]["columns"]
        assert f"{columns['psnr']['value']:.1f} dB" in said and f"{columns['ssim']['value']:.3f}" in said
    assert "A published schedule pays from about 12 calls of the UNet on" in said


@pytest.mark.parametrize(("steps", "few"), [(4, True), (10, True), (11, False)])
def test_few_steps_are_counted_without_a_schedule(run, sd_folder, steps, few):
    found = json.loads(run("doctor", "--model", sd_folder, "--steps", steps, "--json").out)
    configs = [row["config"] for row in found["methods"] if row["method"] != "todo"]
    assert [config["cache_schedule"] is None for config in configs] == [few] * 2
    assert any("1.0 to 1.3x" in note for note in found["notes"])
    assert any("change the image" in note for note in found["notes"]) != few
    assert any(f"With {steps + 1} calls DaTo is without one here" in note for note in found["notes"]) == few


def test_a_schedule_that_is_asked_for_is_counted_at_few_steps(run, sd_folder):
    ran = run("doctor", "--model", sd_folder, "--steps", 4, "--schedule", "coco")
    said = notes_of(ran)
    assert "\ndato: " in ran.out
    assert "With 5 calls try --schedule none too, which only prunes" in said and "change the image" in said


def test_a_schedule_with_a_level_that_the_model_lacks(run, sd_folder, tmp_path):
    schedule.save(schedule.Schedule("2012", todo=ToDoConfig({64: 2})), tmp_path / "mine.json")
    ran = run("doctor", "--model", sd_folder, "--steps", 4, "--schedule", tmp_path / "mine.json")
    assert ran.code == 2
    assert "--schedule must fit the model: factor must name levels" in " ".join(ran.err.split())


def test_without_a_schedule_at_many_steps(run, sd_folder):
    ran = run("doctor", "--model", sd_folder, "--schedule", "none")
    assert "\ndato without a schedule: " in ran.out and notes_of(ran) == ""


def test_both_methods_where_todo_adds_nothing(run, sd_folder):
    """At its normal size the pipeline's levels have fewer tokens than ToDo would leave."""
    ran = run("doctor", "--model", sd_folder)
    assert ran.code == 0, ran.err
    lines = dict(line.split(": ", 1) for line in ran.out.splitlines() if ": " in line)
    assert lines["todo"].startswith("this will not help here: nothing is downsampled")
    assert "to which ToDo adds nothing: nothing is downsampled" in lines["todo+dato"]
    assert "ToDo" not in lines["dato"]


@pytest.mark.parametrize("command", ["doctor", "schedules"])
@pytest.mark.parametrize("model", ["/nothing/there", "./nothing", "nothing/at/all", "~/nothing", "sd3", "here/nothing"])
def test_the_hub_is_not_asked_for_a_path(run, monkeypatch, tmp_path, command, model):
    """Nor for owner/name where there is a folder of the owner's name, which makes it a path."""

    def ask(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(UNet2DConditionModel, "load_config", ask)
    ran = run(command, "--model", model)
    assert ran.code == 2 and ran.out == ""
    assert ran.err == (
        "todo-attn: error: --model must be sd15, sdxl, or a folder or Hub id of a pipeline with a UNet, got "
        f"{model!r}: there is no such folder, and a Hub id is owner/name\n"
    )


def test_the_hub_is_asked_for_an_owner_and_name(run, monkeypatch, tmp_path):
    def ask(source, **kwargs):
        raise OSError(f"nothing on the Hub by the name of {source}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(UNet2DConditionModel, "load_config", ask)
    ran = run("doctor", "--model", "owner/name")
    assert ran.code == 2 and ran.err.endswith("got 'owner/name': nothing on the Hub by the name of owner/name\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--height", "100"), "--height must be a multiple of 8 and at least 16, got 100"),
        (("--height", "65536", "--width", "8192"), "--height times the width must be at most as many pixels as 16384"),
        (("--max-kv-tokens", "0"), "--max-kv-tokens must be an integer of at least 1, got 0"),
        (("--schedule", "nothing"), "--schedule "),
        (("--steps", "0"), "--steps must be from 1 to 1000, got 0"),
        (("--device", "tpu"), "--device must be auto, cpu"),
        (("--model", "./nothing"), "--model must be sd15, sdxl, or a folder or Hub id of a pipeline with a UNet"),
    ],
)
def test_bad_input_is_one_line(run, sd_folder, arguments, message):
    model = () if "--model" in arguments else ("--model", sd_folder)
    ran = run("doctor", *model, *arguments)
    assert ran.code == 2 and ran.out == ""
    line, end = ran.err.split("\n")
    assert end == "" and line.startswith(f"todo-attn: error: {message}")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "--steps must be from 1 to 1000, got 0"),
        ("--device", "tpu", "--device must be auto, cpu"),
        ("--prune-ratio", "2", "--prune-ratio "),
    ],
)
def test_no_option_is_passed_over(run, option, value, message):
    """Each is about the gain, so it asks for that, of the shipped pipeline."""
    ran = run("doctor", option, value)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith(f"todo-attn: error: {message}")
