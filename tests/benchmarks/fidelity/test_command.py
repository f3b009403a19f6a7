"""The command: what it prints and writes, and what it refuses before anything is made."""

import html
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.fidelity import __main__ as command
from benchmarks.fidelity.options import parse_sizes
from todo_attn.bench import jsonl
from todo_attn.config.checks import ArgumentError
from todo_attn.options.prompts import read_prompts


@pytest.fixture
def cli(sd_folder, tmp_path, monkeypatch):
    """cli(*arguments) -> the result of a run of 2 steps at 64 x 64 in the folder ``images``."""
    monkeypatch.setenv("COLUMNS", "250")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ein Hügel\n\na lake\n", encoding="utf-8")
    common = ["--model", sd_folder, "--prompts", prompts, "--steps", 2, "--size", 64, "--device", "cpu"]

    def cli(*arguments, name=()):
        folder = [] if name else ["--folder", tmp_path / "images"]
        return CliRunner().invoke(command.app, [str(x) for x in (*name, *common, *folder, *arguments)])

    return cli


def refused(result, *words):
    assert result.exit_code == 2, result.output
    told = " ".join(result.output.replace("│", " ").split())
    for word in words:
        assert word in told, told


def test_a_table_and_its_rows(cli, tmp_path):
    arguments = ["--cases", "todo:factor=2", "--features", "fixtures.features:SmallNetwork", "--size", "80x64"]
    result = cli(*arguments, "--markdown", "--out", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.output
    assert "| todo:factor=2" in result.stdout
    assert "note: no fid: it needs --reference" in result.stderr
    rows = jsonl.read(tmp_path / "rows.jsonl")
    assert [(row["case"], row["width"], row["height"]) for row in rows] == [
        (case, width, 64) for width in (64, 80) for case in ("dense", "todo:factor=2")
    ]
    assert json.loads((tmp_path / "images/64x64/dense/000000.json").read_text())["prompt"] == "ein Hügel"
    again = cli(*arguments, "--out", tmp_path / "rows.jsonl")
    assert again.exit_code == 0
    assert "todo:factor=2" in again.stdout
    assert jsonl.read(tmp_path / "rows.jsonl") == rows


def test_the_page_has_every_case_and_the_images_of_the_best(cli, tmp_path):
    arguments = ["--cases", "todo:factor=*,dense:steps=1,dato:coco", "--size", "80x64", "--report-images", 1]
    result = cli(*arguments, "--report", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for words in ("ein Hügel", "todo:factor=4", "dense:steps=1", "PSNR, dB against seconds, 80 x 64 pixels"):
        assert words in page
    assert "apply_todo(pipe, ToDoConfig(factor=4))" in html.unescape(page)
    assert page.count('<article class="example') == 2
    assert "a lake" not in page


def test_the_cases_are_listed(cli, tmp_path):
    result = cli("--list")
    assert result.exit_code == 0
    assert result.stdout.startswith("dense ") and "todo:level2=4" in result.stdout
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--report", "/dev/null/page.html"], ["--report must be a file that can be written"]),
        (["--cases", "todo:fast"], ["--cases must be", "'todo:fast'"]),
        (["--cases", "dense", "--versus", "tome:0.5"], ["--versus must be among the chosen cases"]),
        (["--metrics", "sharpness"], ["--metrics must be among psnr", "sharpness"]),
        (["--metrics", "perceptual"], ["--metrics", "perceptual needs --features"]),
        (["--features", "fixtures.features:NaN"], ["--features must return finite numbers", "NaN"]),
        (["--features", "fixtures.features:WrongShape"], ["--features must have features of shape (1, F)", "(4,)"]),
        (["--features", "fixtures.features:WrongMaps"], ["--features must have maps", "list of tensors"]),
        (["--features", "fixtures.features:Failing"], ["--features", "out of order"]),
        (["--features", "fixtures.features:no_network"], ["--features must return an object with features and maps"]),
        (["--features", "fixtures.features:absent"], ["--features must be MODULE:FUNCTION", "absent"]),
        (["--features", "no_such_module:x"], ["--features must be MODULE:FUNCTION", "no_such_module"]),
        (["--features", "nonsense"], ["--features must be MODULE:FUNCTION, got 'nonsense'"]),
        (["--reference", "nowhere"], ["--reference must be a folder of images or MODULE:FUNCTION"]),
        (["--reference", "fixtures.features:draw_wrongly"], ["--reference must give images of shape (64, 64, 3)"]),
        (["--size", "60"], ["--size must be a multiple of 8", "60"]),
        (["--size", "big"], ["--size must be a side or WIDTHxHEIGHT", "'big'"]),
        (["--steps", "0"], ["--steps must be from 1"]),
        (["--device", "abacus"], ["--device must be"]),
        (["--scheduler", "fast"], ["--scheduler must be one of"]),
        (["--model", "nowhere/at/all"], ["--model must be"]),
    ],
)
def test_what_is_refused_before_anything_is_made(cli, tmp_path, arguments, words):
    refused(cli("--cases", "dense", *arguments), *words)
    assert not (tmp_path / "images").exists()


def test_prompts_that_cannot_be_read(cli, tmp_path):
    file = tmp_path / "other.txt"
    for content, problem in ((b"\n \n", "has none"), (b"caf\xe9", "must be a UTF-8 file")):
        file.write_bytes(content)
        refused(cli("--prompts", file), "--prompts must be", problem)
    refused(cli("--prompts", tmp_path / "none.txt"), "--prompts must be a file that can be read")
    file.write_bytes("﻿one\r\ntwo".encode())
    assert read_prompts(file) == ("one", "two")


def test_a_folder_that_cannot_be_written(cli, tmp_path):
    (tmp_path / "file").write_text("")
    refused(cli("--folder", tmp_path / "file" / "x"), "--out must be a file that can be written")
    rows = tmp_path / "rows.jsonl"
    refused(cli("--folder", tmp_path / "file" / "x", "--out", rows), "--folder must be a folder that can be written")
    refused(cli("--out", tmp_path / "file" / "x"), "--out must be a file that can be written")


def test_a_folder_of_another_run(cli, tmp_path):
    assert cli("--cases", "dense").exit_code == 0
    rows = (tmp_path / "images" / "rows.jsonl").read_bytes()
    refused(cli("--cases", "dense", "--steps", 3), "--folder must be of the same run", "steps 2 instead of 3")
    assert (tmp_path / "images" / "rows.jsonl").read_bytes() == rows


def test_a_reference_with_too_few_images(cli, tmp_path):
    pytest.importorskip("torchmetrics")
    folder = tmp_path / "true"
    folder.mkdir()
    arguments = ["--features", "fixtures.features:SmallNetwork", "--reference", folder, "--cases", "dense"]
    refused(cli(*arguments), "--reference must be a folder with images")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    refused(cli(*arguments, "--kid-subset", 8), "--reference must have at least 8 images for kid", "has 3")
    refused(cli(*arguments, "--kid-subset", 2), "--reference must have at least 5 images for fid", "has 3")
    result = cli(*arguments, "--kid-subset", 2, "--metrics", "kid")
    assert result.exit_code == 0, result.output
    (row,) = jsonl.read(tmp_path / "images" / "rows.jsonl")
    assert row["reference"] == {"name": str(folder), "images": 3} and row["columns"]["kid"]["value"] > 0
    (folder / "0.png").write_bytes(b"no image")
    refused(cli(*arguments, "--kid-subset", 2, "--metrics", "kid"), "--reference must have images", "image 0")


def test_a_network_that_fails_late_loses_no_image(cli, tmp_path):
    result = cli("--cases", "tome:0.5", "--features", "fixtures.features:NaNLater")
    refused(result, "--features must return finite numbers")
    assert len(list((tmp_path / "images").rglob("*.png"))) == 4
    assert cli("--cases", "tome:0.5", "--features", "fixtures.features:SmallNetwork").exit_code == 0


def test_layers(cli, tmp_path):
    out = tmp_path / "layers.jsonl"
    cases = ["--cases", "todo:level1=2", "--cases", "deepcache:2"]
    result = cli(*cases, "--moments", 1, "--images", 1, "--out", out, name=["layers"])
    assert result.exit_code == 0, result.output
    assert "prediction" in result.stdout and "deepcache" not in result.stdout
    assert {row["case"] for row in jsonl.read(out)} == {"todo:level1=2"}
    refused(cli("--cases", "deepcache:2", name=["layers"]), "--cases must have one that reuses no earlier call")


def test_sizes():
    assert parse_sizes(["512", "768x512", "512x512"]) == [(512, 512), (512, 768)]
    with pytest.raises(ArgumentError, match="times the width"):
        parse_sizes(["65536"])
