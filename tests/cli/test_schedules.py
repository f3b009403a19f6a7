"""``todo-attn schedules``: what it lists, for which model and size, and what it refuses."""

import json

import pytest

from todo_attn.config import schedule
from todo_attn.config.dato import DaToConfig
from todo_attn.config.todo import ToDoConfig
from todo_attn.models.architectures import read_architecture
from todo_attn.predict.count import count_work


def one_line(ran) -> str:
    assert ran.code == 2 and ran.out == "", ran
    line, end = ran.err.split("\n")
    assert end == "" and line.startswith("todo-attn: error: ")
    return line.removeprefix("todo-attn: error: ")


def test_the_list_as_json(run, sd_folder):
    ran = run("schedules", "--model", sd_folder, "--height", 64, "--width", 128, "--json")
    assert ran.code == 0, ran.err
    listing = json.loads(ran.out)
    head = {"model": str(sd_folder), "height": 64, "width": 128, "steps": 50, "calls": 51, "batch": 2}
    assert listing.items() >= head.items()
    assert [row["name"] for row in listing["schedules"]] == schedule.names()
    dense, dato = count_work(read_architecture(str(sd_folder)).config, 64, 128, [DaToConfig()])
    for row in listing["schedules"][:2]:
        published = schedule.load(row["name"])
        run = [dato.of(kind).operations for kind in "2" + published.digits]
        saved = 51 * dense.full.operations / sum(run)
        assert (row["digits"], row["source"]) == (published.digits, published.source)
        assert (row["full"], row["shallow"], row["reuse"]) == (published.full, published.shallow, published.reuse)
        assert (row["operations"], row["speedup"]) == (sum(run), saved)
        assert row["saving"] == pytest.approx(1 - 1 / saved)
        assert row["published"] == {
            "digits": published.digits,
            "steps": 50,
            "scheduler": "PNDM",
            "speedup": published.published_speedup,
        }
        assert listing["operations_per_call"]["dense"] == dense.full.operations


def test_the_list_as_a_table(run, sd_folder):
    ran = run("schedules", "--model", sd_folder)
    assert ran.code == 0, ran.err
    assert "128 x 128, 50 steps, 51 calls" in ran.out
    coco = next(line for line in ran.out.splitlines() if line.split()[:1] == ["coco"])
    assert coco.split()[1:5] == ["5", "21", "25", "7.31x"]
    assert coco.split()[5].endswith("x") and coco.split()[6].endswith("%")
    assert "COCO-30k" not in ran.out and "run7-05" not in ran.out
    assert "104 more" in ran.out and "--all" in ran.out and "--name" in ran.out
    for word in ("dense", "full", "shallow", "reuse", str(sd_folder)):
        assert word in ran.out


@pytest.mark.parametrize("more", [(), ("--all",), ("--name", "coco")])
def test_it_is_read_at_80_columns(run, monkeypatch, sd_folder, more):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(sd_folder.parent)
    ran = run("schedules", "--model", "tiny-sd", *more)
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    rows = [line.split()[0] for line in ran.out.splitlines() if line.endswith("%  ")]
    assert rows == ([] if "--name" in more else schedule.names() if more else schedule.named())
    assert "coco" in schedule.named() and "run0-02" not in schedule.named()


def test_too_few_calls_for_a_schedule_are_said(run, sd_folder):
    said = "a published schedule pays from about 12 calls on, and here there are 5"
    assert said in run("schedules", "--model", sd_folder, "--steps", 4).out
    assert said in run("schedules", "--model", sd_folder, "--steps", 4, "--name", "coco").out
    assert "a published schedule pays" not in run("schedules", "--model", sd_folder, "--steps", 11).out


def test_one_whole(run, sd_folder):
    published = schedule.load("search")
    ran = run("schedules", "--model", sd_folder, "--name", "search")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert f"digits:    {published.digits}" in lines and f"source:    {published.source}" in lines
    assert "made for:  50 steps of PNDM, 51 calls" in lines and "calls:     6 full, 38 shallow, 7 reused" in lines
    assert "2 full, 1 shallow, 0 reuse" in ran.out
    listing = json.loads(run("schedules", "--model", sd_folder, "--name", "search", "--json").out)
    assert [row["name"] for row in listing["schedules"]] == ["search"]


def test_one_with_a_level_that_the_model_lacks(run, sd_folder, tmp_path):
    schedule.save(schedule.Schedule("2012", todo=ToDoConfig({64: 2})), tmp_path / "mine.json")
    ran = run("schedules", "--model", sd_folder, "--steps", 4, "--name", tmp_path / "mine.json")
    assert ran.code == 2
    assert "--name must fit the model: factor must name levels" in " ".join(ran.err.split())


def test_one_from_a_file(run, sd_folder, tmp_path):
    schedule.save(schedule.Schedule("0120"), tmp_path / "mine.json")
    ran = run("schedules", "--model", sd_folder, "--name", tmp_path / "mine.json", "--steps", 4)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("without a name, 128 x 128, 4 steps, 5 calls of the UNet\nsource:    not known\n")
    assert "made for:  not known, 5 calls\ndigits:    0120\n" in ran.out


def test_other_steps_are_resampled(run, sd_folder):
    ran = run("schedules", "--model", sd_folder, "--steps", 20, "--json")
    assert ran.code == 0, ran.err
    for row in json.loads(ran.out)["schedules"]:
        assert row["digits"] == schedule.resample(schedule.load(row["name"]).digits, 20)
        assert row["full"] + row["shallow"] + row["reuse"] == 21


def test_sdxl(run, sdxl_folder):
    ran = run("schedules", "--model", sdxl_folder, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["schedules"][0]["speedup"] > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "--steps must be from 1 to 1000, got 0"),
        (("--steps", "100000000"), "--steps must be from 1 to 1000, got 100000000"),
        (("--steps", "x"), "--steps"),
        (("--height", "100"), "--height must be a multiple of 8 and at least 16, got 100"),
        (("--name", "coc"), "--name must be a file or a name such as 'coco', got 'coc'"),
        (("--name", "coco", "--all"), "--name and --all cannot both be given"),
        (("--height", "65536", "--width", "8192"), "--height times the width must be at most as many pixels as 16384"),
        (("--width", "-8"), "--width must be a multiple of 8"),
        (("--model", "./nothing"), "--model must be sd15, sdxl, or a folder or Hub id of a pipeline with a UNet"),
    ],
)
def test_bad_input_is_one_line(run, sd_folder, arguments, message):
    model = () if "--model" in arguments else ("--model", sd_folder)
    assert message in one_line(run("schedules", *model, *arguments))


def test_a_model_without_self_attention_is_one_line(run, tmp_path):
    (tmp_path / "unet").mkdir()
    config = {
        "sample_size": 16,
        "block_out_channels": [32, 32],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "mid_block_type": None,
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    }
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    assert one_line(run("schedules", "--model", tmp_path)).startswith("--model cannot be counted: ")


def test_a_model_that_does_not_say_its_size(run, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    assert one_line(run("schedules", "--model", tmp_path)).startswith("--height must be given")


def test_help(run):
    ran = run("schedules", "--help")
    assert ran.code == 0
    for word in ("--model", "--height", "--width", "--steps", "--json", "sd15"):
        assert word in ran.out
    assert "schedules" in run("--help").out


def test_by_default_the_shipped_pipeline(run):
    ran = run("schedules", "--json")
    assert ran.code == 0, ran.err
    assert all(row["speedup"] > 1 for row in json.loads(ran.out)["schedules"])
