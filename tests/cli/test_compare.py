"""The command from its arguments to its exit code: what it prints where, and what it refuses."""

import errno
import importlib.metadata
import json
import logging
import os
import subprocess
import sys

import diffusers
import pytest
from PIL import Image

import todo_attn.models.pipelines
from todo_attn.cli import main


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
        for row in method["images"]:
            with Image.open(out / row["file"]) as image:
                assert image.size == (96, 64)
    assert all(m["psnr"] > 0 and 0 < m["ssim"] <= 1 for m in report["methods"][1:])
    for word in ("dense", "todo:2", "tome:0.25", "speed-up", "PSNR", "SSIM", str(out / "contact_sheet.png")):
        assert word in ran.out
    assert "image 2 of 2: dense" in ran.err


def test_a_page_if_it_is_asked_for(run, small, tmp_path):
    out = tmp_path / "out"
    ran = run(
        "compare", *small, "--prompt", "a <b>blue</b> star", "--methods", "dense,todo:2", "--report", "--out", out
    )
    assert ran.code == 0, ran.err
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "a red circle" in html and "a &lt;b&gt;blue&lt;/b&gt; star" in html and "<b>blue" not in html
    assert html.count("data:image/webp") == 2 * 3
    assert f"a page of all  {out / 'report.html'}" in ran.out
    ran = run("compare", *small, "--methods", "dense", "--no-report", "--out", out, "--overwrite")
    assert ran.code == 0 and "report.html" not in ran.out
    assert files(out) == {"images/01-seed0-dense.png", "report.json", "contact_sheet.png"}


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
    monkeypatch.setattr(todo_attn.models.pipelines, "load_pipeline", None)
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
    monkeypatch.setattr(todo_attn.models.pipelines, "load_pipeline", None)
    (tmp_path / "file").write_text("")
    assert one_line(run("compare", *small, "--out", tmp_path / where)).startswith("--out must be a folder")


def test_out_of_memory_is_one_line(run, small, tmp_path, monkeypatch):
    def full(settings):
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(todo_attn.models.pipelines, "load_pipeline", full)
    ran = run("compare", *small, "--out", tmp_path)
    assert ran.code == 1 and "out of memory" in ran.err and ran.err.count("\n") == 1


@pytest.fixture
def breaking(monkeypatch):
    """breaking(error, after): the pipeline raises once it has made ``after`` images, warm-ups included."""

    def breaking(error: BaseException, after: int) -> None:
        decode, calls = diffusers.AutoencoderKL.decode, []

        def breaks(self, *args, **kwargs):
            calls.append(None)
            if len(calls) > after:
                raise error
            return decode(self, *args, **kwargs)

        monkeypatch.setattr(diffusers.AutoencoderKL, "decode", breaks)

    return breaking


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_interrupt_keeps_what_was_made(run, small, tmp_path, breaking):
    breaking(KeyboardInterrupt(), 2 + 3)  # two warm-ups, the first image by both methods, the second by one
    out = tmp_path / "out"
    ran = run("compare", *small, "--seed", 1, "--seed", 2, "--methods", "dense,todo:2", "--report", "--out", out)
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.splitlines()[-1] == (
        f"todo-attn: error: interrupted: 3 of 4 images are in {out / 'images'}, with a partial report, "
        f"{out / 'report.json'}"
    )
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert not report["complete"] and report["missing"] == ["images/02-seed2-dense.png"]
    images = {image["file"] for method in report["methods"] for image in method["images"]}
    assert files(out) == {*images, "report.json", "contact_sheet.png", "report.html"} and len(images) == 3


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupt_before_the_first_picture_leaves_nothing(run, small, tmp_path, breaking, after):
    breaking(KeyboardInterrupt(), after)
    ran = run("compare", *small, "--out", tmp_path / "out")
    assert ran.code == 130
    assert ran.err.splitlines()[-1] == ("todo-attn: error: interrupted: no image was finished, and nothing is written")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_while_the_pipeline_loads(run, small, tmp_path, monkeypatch):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(todo_attn.models.pipelines, "load_pipeline", interrupted)
    ran = run("compare", *small, "--out", tmp_path / "out")
    assert ran.code == 130
    assert ran.err.splitlines()[-1] == "todo-attn: error: interrupted: no image was finished, and nothing is written"


def test_a_fault_keeps_what_was_made(small, tmp_path, breaking):
    breaking(ZeroDivisionError("a fault"), 2 + 1)
    with pytest.raises(ZeroDivisionError):
        main(["compare", *small, "--out", str(tmp_path / "out")])
    assert files(tmp_path / "out") == {"images/01-seed0-dense.png", "report.json"}


def test_a_method_out_of_memory_is_one_line_and_the_others_are_kept(run, small, tmp_path, breaking):
    breaking(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."), 2 + 1)
    ran = run("compare", *small, "--methods", "dense,todo:2", "--out", tmp_path / "out")
    assert ran.code == 1 and "Traceback" not in ran.err
    assert ran.err.splitlines()[-1] == (
        "todo-attn: error: out of memory by todo:2: a smaller --height and --width, or --dtype float16, may fit"
    )
    assert "todo:2 was left out: out of memory." in ran.out and "dense" in ran.out
    assert files(tmp_path / "out") == {"images/01-seed0-dense.png", "report.json", "contact_sheet.png"}


def test_a_cpu_out_of_memory_from_the_start_is_one_line(run, small, tmp_path, breaking):
    breaking(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."), 0)
    ran = run("compare", *small, "--out", tmp_path / "out")
    assert ran.code == 1 and "Traceback" not in ran.err
    assert ran.err.splitlines()[-1].startswith("todo-attn: error: out of memory: a smaller --height")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("full", ["report.json", "contact_sheet.png", "report.html"])
def test_a_full_disk_is_one_line_after_the_table(run, small, tmp_path, monkeypatch, full):
    replace = os.replace

    def fills(source, target):
        if str(target).endswith(full):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fills)
    out = tmp_path / "out"
    ran = run("compare", *small, "--report", "--out", out)
    assert ran.code == 1 and "speed-up" in ran.out
    last = ran.err.splitlines()[-1]
    assert last.startswith(f"todo-attn: error: cannot write {out / full}: No space left on device")


# The folder that is written into.


def test_an_older_comparison_is_not_mixed_with_a_new_one(run, small, tmp_path):
    out = tmp_path / "out"
    first = ["compare", *small, "--seed", 1, "--methods", "dense", "--out", out]
    assert run(*first).code == 0
    before = {name: (out / name).read_bytes() for name in files(out)}
    line = one_line(run("compare", *small, "--seed", 2, "--out", out))
    found = "an older comparison, which --overwrite removes"
    assert line == f"--out must be a new or an empty folder, got {str(out)!r} with {found}"
    assert {name: (out / name).read_bytes() for name in files(out)} == before


def test_overwrite_removes_the_older_comparison_and_nothing_else(run, small, tmp_path):
    out = tmp_path / "out"
    assert run("compare", *small, "--seed", 1, "--methods", "dense", "--out", out).code == 0
    (out / "mine.txt").write_text("notes", encoding="utf-8")
    (out / "images" / "mine.png").write_bytes(b"an image")
    ran = run("compare", *small, "--seed", 2, "--methods", "dense", "--out", out, "--overwrite")
    assert ran.code == 0, ran.err
    assert files(out) == {
        "images/01-seed2-dense.png", "images/mine.png", "mine.txt", "report.json", "contact_sheet.png"
    }  # fmt: skip
    assert (out / "images" / "mine.png").read_bytes() == b"an image"


def test_overwrite_keeps_the_older_comparison_until_there_is_a_new_picture(run, small, tmp_path, breaking):
    out = tmp_path / "out"
    assert run("compare", *small, "--seed", 1, "--methods", "dense", "--out", out).code == 0
    before = {name: (out / name).read_bytes() for name in files(out)}
    breaking(KeyboardInterrupt(), 1)
    assert run("compare", *small, "--seed", 2, "--methods", "dense", "--out", out, "--overwrite").code == 130
    assert {name: (out / name).read_bytes() for name in files(out)} == before


def test_overwrite_of_a_partial_comparison_removes_what_its_report_may_lack(run, small, tmp_path):
    out = tmp_path / "out"
    assert run("compare", *small, "--seed", 1, "--methods", "dense", "--out", out).code == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    report["missing"] = [report["methods"][0]["images"].pop()["file"]]  # as killed after its first image
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert run("compare", *small, "--seed", 2, "--methods", "dense", "--out", out, "--overwrite").code == 0
    assert files(out) == {"images/01-seed2-dense.png", "report.json", "contact_sheet.png"}


@pytest.mark.parametrize("file", ["../../precious.png", "/precious.png", "images/../precious.png", "precious.png"])
def test_a_report_cannot_name_files_elsewhere(run, small, tmp_path, monkeypatch, file):
    monkeypatch.setattr(todo_attn.models.pipelines, "load_pipeline", None)
    report = {"methods": [{"images": [{"file": file}]}]}
    (tmp_path / "report.json").write_text(json.dumps(report), encoding="utf-8")
    line = one_line(run("compare", *small, "--out", tmp_path, "--overwrite"))
    assert line.startswith("--out must be a new or an empty folder") and "that no comparison's report names" in line


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("file", ["report.json", "images/01.png", "contact_sheet.png", "report.html", "other.txt"])
def test_a_folder_with_other_files_is_refused(run, small, tmp_path, overwrite, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}", encoding="utf-8")
    ran = run("compare", *small, "--methods", "dense", "--out", tmp_path, *overwrite)
    if overwrite and file == "other.txt":  # which is in nobody's way
        assert ran.code == 0 and (tmp_path / file).read_text(encoding="utf-8") == "{}"
    else:
        assert one_line(ran).startswith("--out must be a new or an empty folder")
        assert files(tmp_path) == {file}


def test_repeated_runs_get_a_folder_each(run, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("compare", "compare-2", "compare-3"):
        ran = run("compare", *small, "--methods", "dense")
        assert ran.code == 0 and f"{name}/report.json" in ran.out
    assert run("compare", *small, "--methods", "dense", "--overwrite").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare", "compare-2", "compare-3"]


@pytest.mark.parametrize("out", ["", " "])
def test_a_folder_without_a_name_is_refused(run, small, monkeypatch, tmp_path, out):
    monkeypatch.chdir(tmp_path)
    assert one_line(run("compare", *small, "--out", out)) == f"--out must name a folder, got {out!r}"
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_beyond_ascii_in_the_c_locale(small, tmp_path):
    """Python then reads the argument's bytes as surrogates, which no tokenizer takes."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [*small, "--methods", "dense", "--prompt", "un café à la crème", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "todo_attn.cli", "compare", *arguments]
    ran = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["prompts"][-1] == "un café à la crème"


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


@pytest.mark.parametrize("missing", ["typer", "rich", "diffusers", "skimage", "jinja2"])
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


def test_the_shipped_pipeline(run, tmp_path, monkeypatch, caplog):
    """The one test that needs it: it loads, draws by each method, and says what it is."""
    log = logging.getLogger("diffusers.pipelines.pipeline_utils")
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    ran = run("compare", "--steps", 1, "--height", 256, "--width", 256, "--methods", "dense,todo:2", "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert "Expected types" not in caplog.text  # diffusers' words about its AutoencoderTiny
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["model"] == "todo_attn/landscapes"
    assert all(i["finite"] for m in report["methods"] for i in m["images"])
