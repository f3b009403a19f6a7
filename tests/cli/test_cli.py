"""The command from its arguments to its exit code: what it prints where, and what it refuses."""

import importlib.metadata
import json
import subprocess
import sys

import diffusers
import pytest
from PIL import Image

import todo_attn.diffusers.pipelines


@pytest.fixture
def small(sd_folder) -> list[str]:
    return [str(sd_folder), "--prompt", "a red circle", "--steps", "1", "--height", "64", "--width", "96"]


def test_compare_writes_and_tells(run, small, tmp_path):
    out = tmp_path / "out"
    ran = run("compare", *small, "--methods", "dense,todo:2,tome:0.25", "--seed", 1, "--seed", 2, "--out", out)
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    assert [m["method"] for m in report["methods"]] == ["dense", "todo:2", "tome:0.25"]
    assert report["settings"]["seeds"] == [1, 2] and report["settings"]["prompts"] == ["a red circle"]
    for method in report["methods"]:
        assert len(method["images"]) == 2
        for image in method["images"]:
            with Image.open(out / image["file"]) as picture:
                assert picture.size == (96, 64)
    assert all(m["psnr"] > 0 and 0 < m["ssim"] <= 1 for m in report["methods"][1:])
    for word in ("dense", "todo:2", "tome:0.25", "speed-up", "PSNR", "SSIM", str(out / "contact_sheet.png")):
        assert word in ran.out
    assert "picture 2 of 2: dense" in ran.err


def test_options_reach_the_report(run, small, tmp_path):
    options = "--guidance 3 --scheduler euler --dtype bf16 --factor 1=2 --max-kv-tokens 9 --mode mean --tome-ratio 0.3"
    ran = run("compare", *small, *options.split(), "--methods", "todo,dense,tome", "--out", tmp_path, "--device", "cpu")
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "report.json").read_text())
    expected = {
        "guidance": 3.0,
        "scheduler": "EulerDiscreteScheduler",
        "dtype": "bfloat16",
        "device": "cpu",
        "steps": 1,
    }
    assert report["settings"].items() >= expected.items()
    options = {m["method"]: m["options"] for m in report["methods"]}
    assert options["todo"].items() >= {"factor": {"1": 2}, "max_kv_tokens": 9, "mode": "mean"}.items()
    assert options["tome"]["ratio"] == 0.3


def test_json_is_all_there_is_on_stdout(run, small, tmp_path):
    ran = run("compare", *small, "--json", "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == json.loads((tmp_path / "report.json").read_text())
    assert "speed-up" in ran.err and str(tmp_path / "contact_sheet.png") in ran.err


def test_tome_missing_is_a_row_and_a_note(run, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    ran = run("compare", *small, "--methods", "dense,tome", "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert "tomesd is not installed" in ran.out
    assert "tomesd" in json.loads((tmp_path / "report.json").read_text())["methods"][1]["unavailable"]


def test_defaults_are_twice_the_normal_size_and_two_prompts(run, sd_folder, tmp_path):
    ran = run("compare", sd_folder, "--steps", 1, "--out", tmp_path)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["settings"]["height"], report["settings"]["width"]) == (256, 256)
    assert [m["method"] for m in report["methods"]] == ["dense", "todo"]
    assert len(report["methods"][0]["images"]) == len(set(report["settings"]["prompts"])) == 2


def one_line(ran) -> str:
    assert ran.code == 2, ran
    assert ran.out == ""
    line, end = ran.err.split("\n")
    assert end == "" and line.startswith("todo-attn: error: ")
    return line.removeprefix("todo-attn: error: ")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--height", "100"),
        ("--width", "-8"),
        ("--height", "tall"),
        ("--steps", "0"),
        ("--warmup-steps", "0"),
        ("--prompt", ""),
        ("--seed", "-1"),
        ("--seed", "x"),
        ("--guidance", "-1"),
        ("--scheduler", "nope"),
        ("--device", "nope"),
        ("--device", "cuda:99"),
        ("--dtype", "int8"),
        ("--methods", "dense,nope"),
        ("--methods", "dense,todo:x"),
        ("--factor", "0"),
        ("--max-kv-tokens", "0"),
        ("--mode", "nope"),
        ("--tome-ratio", "0.9"),
        ("--nope", "1"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_loaded(run, small, tmp_path, monkeypatch, option, value):
    monkeypatch.setattr(todo_attn.diffusers.pipelines, "load_pipeline", None)
    out = tmp_path / "out"
    assert option in one_line(run("compare", *small, option, value, "--out", out))
    assert not out.exists()


@pytest.mark.parametrize("model", ["./nothing", "/nothing/at/all", "nothing"])
def test_no_such_model(run, tmp_path, model):
    assert one_line(run("compare", model, "--out", tmp_path / "out")).startswith("MODEL must be a folder")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_load(run, tmp_path):
    (tmp_path / "model").mkdir()
    parts = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(parts))
    assert one_line(run("compare", tmp_path / "model", "--out", tmp_path / "out")).startswith("MODEL ")
    assert not (tmp_path / "out").exists()


def test_a_hub_id_that_is_not_there(run, tmp_path, monkeypatch):
    def absent(*args, **kwargs):
        raise OSError("404\nno such repository")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", absent)
    line = one_line(run("compare", "owner/name", "--out", tmp_path / "out"))
    assert line.startswith("MODEL 'owner/name' cannot be loaded") and "404 no such repository" in line


def test_a_pipeline_that_is_not_text_to_image(run, sd, tmp_path):
    diffusers.StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False).save_pretrained(
        tmp_path / "model"
    )
    line = one_line(run("compare", tmp_path / "model", "--out", tmp_path / "out"))
    assert "StableDiffusionImg2ImgPipeline" in line


def test_a_level_that_the_model_lacks(run, small, tmp_path):
    ran = run("compare", *small, "--factor", "64=2", "--out", tmp_path / "out")
    assert "--factor must name levels" in one_line(ran)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_out_that_cannot_be_written(run, small, tmp_path, monkeypatch, where):
    monkeypatch.setattr(todo_attn.diffusers.pipelines, "load_pipeline", None)
    (tmp_path / "file").write_text("")
    assert one_line(run("compare", *small, "--out", tmp_path / where)).startswith("--out must be a folder")


def test_out_of_memory_is_one_line(run, small, tmp_path, monkeypatch):
    def full(settings):
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(todo_attn.diffusers.pipelines, "load_pipeline", full)
    ran = run("compare", *small, "--out", tmp_path)
    assert ran.code == 1 and "out of memory" in ran.err and ran.err.count("\n") == 1


def test_help(run):
    assert run("--help").code == 0
    ran = run("compare", "--help")
    assert ran.code == 0
    for word in ("Examples", "--max-kv-tokens", "--methods", "--tome-ratio", "todo:2"):
        assert word in ran.out
    assert "compare" in run().out


def test_unknown_command(run):
    assert "nope" in one_line(run("nope"))


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_help_and_refusals_do_not_import_diffusers():
    program = """
import sys
from todo_attn.cli import main
for arguments in (["--help"], ["compare", "--steps", "0"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print(sorted({"diffusers", "transformers", "skimage"} & sys.modules.keys()))
"""
    assert python(program).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("missing", ["typer", "rich", "diffusers", "skimage"])
def test_a_missing_package_is_one_line(small, missing, tmp_path):
    arguments = ["compare", *small, "--out", str(tmp_path)]
    ran = python(f"import sys; sys.modules[{missing!r}] = None; from todo_attn.cli import main; main({arguments!r})")
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert last == f"todo-attn: error: {missing} is not installed: pip install 'todo_attn[cli]'"
    assert "Traceback" not in ran.stderr


def test_console_script():
    (script,) = (e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "todo-attn")
    assert script.value == "todo_attn.cli:main"


def test_the_shipped_pipeline(run, tmp_path):
    """The one test that needs it: it loads, draws by each method, and says what it is."""
    ran = run("compare", "--steps", 1, "--height", 256, "--width", 256, "--methods", "dense,todo:2", "--out", tmp_path)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["model"] == "todo_attn/tiny_sd"
    assert all(i["finite"] for m in report["methods"] for i in m["images"])
