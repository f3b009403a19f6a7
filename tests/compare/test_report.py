"""The numbers of a report, from shots of known times and pixels."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from todo_attn.cli.printing import bytes_text, compare_table
from todo_attn.compare.bind import BoundMethod
from todo_attn.compare.metrics import psnr, ssim
from todo_attn.compare.output import Output, sheet_of
from todo_attn.compare.report import build_report, spread
from todo_attn.compare.run import Comparison


def rows(comparison: Comparison) -> dict:
    return {m["method"]: m for m in build_report(comparison)["methods"]}


def test_seconds_and_speedup(comparison):
    dense, todo = rows(comparison)["dense"], rows(comparison)["todo:2"]
    assert (dense["seconds"]["median"], dense["speedup"]) == (6.0, 1.0)
    assert todo["seconds"] == {"median": 3.0, "min": 2.0, "q1": 2.5, "q3": 3.5, "max": 4.0, "count": 3}
    assert todo["speedup"] == 2.0
    assert [i["speedup"] for i in todo["images"]] == [2.0, 8 / 3, 1.5]


def test_quality_is_against_dense_of_the_same_picture(comparison):
    todo = rows(comparison)["todo:2"]
    pixels = {(s.label, s.number): s.pixels for s in comparison.shots}
    pairs = [(pixels["dense", i], pixels["todo:2", i]) for i in range(3)]
    assert [i["psnr"] for i in todo["images"]] == [None, *(pytest.approx(psnr(*p)) for p in pairs[1:])]
    assert [i["ssim"] for i in todo["images"]] == [pytest.approx(ssim(*p)) for p in pairs]
    assert [i["same_as_dense"] for i in todo["images"]] == [True, False, False]
    assert todo["psnr"] == pytest.approx((psnr(*pairs[1]) + psnr(*pairs[2])) / 2)
    assert todo["ssim"] == pytest.approx(sum(ssim(*p) for p in pairs) / 3)
    dense = rows(comparison)["dense"]
    assert (dense["psnr"], dense["ssim"]) == (None, None)


def test_a_method_that_is_missing_has_a_row(comparison):
    report = build_report(comparison)
    tome = report["methods"][2]
    assert tome["unavailable"] == "tomesd is not installed"
    assert (tome["seconds"], tome["speedup"], tome["psnr"], tome["images"]) == (None, None, None, [])
    assert any("tome was left out: tomesd is not installed" in note for note in report["notes"])


def test_broken_pictures_have_no_quality_and_a_note(comparison):
    shots = [replace(s, finite=not (s.label == "dense" and s.number == 1)) for s in comparison.shots]
    report = build_report(replace(comparison, shots=shots))
    images = report["methods"][1]["images"]
    assert [i["ssim"] is None for i in images] == [False, True, False]
    assert any("NaN" in note and "dense" in note for note in report["notes"])
    shots = [replace(s, blacked_out=True) for s in comparison.shots]
    assert any("safety checker" in n for n in build_report(replace(comparison, shots=shots))["notes"])


def test_letters_without_a_font_have_a_note(comparison, monkeypatch):
    monkeypatch.setattr(
        "todo_attn.compare.report.without_font", lambda text: ["中", "🚀"] if "prompt 0" in text else []
    )
    (note,) = (n for n in build_report(comparison)["notes"] if "font" in n)
    assert "2 of the prompts' characters (U+4E2D, U+1F680)" in note and note.isascii()


def test_steps_are_counted_as_one_says_it(comparison):
    assert "30 steps" in table(comparison)
    one = replace(comparison, settings=replace(comparison.settings, steps=1))
    assert "1 step," in table(one)


def test_memory_is_the_peak_of_all_pictures(comparison):
    shots = [replace(s, peak_bytes=1000 * s.number + (s.label == "dense")) for s in comparison.shots]
    methods = build_report(replace(comparison, shots=shots))["methods"]
    assert [m["peak_memory_bytes"] for m in methods] == [2001, 2000, None]
    assert [m["peak_memory_bytes"] for m in build_report(comparison)["methods"]] == [None] * 3


def table(comparison: Comparison, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(compare_table(build_report(comparison)))
    return captured.get()


def test_memory_is_in_the_table_where_it_is_known(comparison):
    assert "memory" not in table(comparison)
    shots = [replace(s, peak_bytes=(5 if s.label == "dense" else 2) * 2**28) for s in comparison.shots]
    text = table(replace(comparison, shots=shots))
    assert "peak memory" in text and "1.25 GiB" in text and "512 MiB" in text


def test_names_are_whole_in_a_narrow_table(comparison):
    shots = [replace(s, peak_bytes=2**30) for s in comparison.shots]
    shots += [replace(s, label="todo+dato:search") for s in shots if s.label == "todo:2"]
    methods = [*comparison.methods, BoundMethod("todo+dato:search")]
    assert "todo+dato:search" in table(replace(comparison, shots=shots, methods=methods), width=80)


def test_bytes_text():
    assert [bytes_text(n) for n in (0, 3 << 20, (1 << 30) - (1 << 20), 1 << 30)] == [
        "0 MiB", "3 MiB", "1023 MiB", "1.00 GiB",
    ]  # fmt: skip


def test_settings_versions_and_machine(comparison):
    report = build_report(comparison)
    settings = report["settings"]
    assert settings["model"] == comparison.settings.model
    assert (settings["height"], settings["width"], settings["steps"]) == (32, 48, 30)
    assert (settings["pipeline"], settings["scheduler"]) == ("StableDiffusionPipeline", "DDIMScheduler")
    assert (settings["device"], settings["dtype"]) == ("cpu", "float32")
    assert report["versions"]["torch"] == torch.__version__
    assert {"python", "todo_attn", "triton", "diffusers", "tomesd", "commit"} <= report["versions"].keys()
    assert report["machine"]["cpu_threads"] == torch.get_num_threads()
    assert report["machine"]["device"]


def written(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_what_is_written(comparison, tmp_path):
    report = build_report(comparison)
    folder = tmp_path / "new" / "folder"
    output = Output(folder)
    output.finish(comparison, report)
    assert output.problem() is None
    assert report["complete"] and report["missing"] == []
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 48 and sheet.height > 3 * 32
    files = {i["file"] for m in report["methods"] for i in m["images"]}
    assert len(files) == 6
    assert written(folder) == files | {"report.json", "contact_sheet.png"}
    for s in comparison.shots:
        row = next(i for i in rows(comparison)[s.label]["images"] if i["picture"] == s.number)
        with Image.open(folder / row["file"]) as image:
            assert np.array_equal(np.asarray(image), s.pixels)


def test_the_page_is_written_if_it_is_asked_for(comparison, tmp_path):
    Output(tmp_path, page=True).finish(comparison, build_report(comparison))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert html.count("data:image/webp") == 3 + 2 * 3  # each image, and the difference of each pair


def so_far(comparison: Comparison, count: int) -> Comparison:
    return replace(comparison, shots=comparison.shots[:count])


def test_pictures_are_written_as_they_are_made(comparison, tmp_path):
    """And whatever comes then, as a power cut: the report names all that may lie there."""
    output = Output(tmp_path)
    output.add(so_far(comparison, 0))
    assert written(tmp_path) == set()
    for count in range(1, 4):
        output.add(so_far(comparison, count))
        assert len(list((tmp_path / "images").iterdir())) == count
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert not report["complete"]
    everything = {i["file"] for m in build_report(comparison)["methods"] for i in m["images"]}
    assert set(report["missing"]) == everything


def test_what_is_kept_of_an_interrupted_comparison(comparison, tmp_path):
    output = Output(tmp_path)
    assert "no image was finished" in output.stop()
    for count in range(1, 4):  # dense and ToDo of the first image, ToDo of the second
        output.add(so_far(comparison, count))
    said = output.stop()
    assert "3 of 6 images" in said and str(tmp_path / "report.json") in said
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    images = {i["file"]: i for m in report["methods"] for i in m["images"]}
    assert written(tmp_path) == {*images, "report.json", "contact_sheet.png"}
    assert not report["complete"] and len(report["missing"]) == 3
    assert any("3 of 6 images are missing" in note for note in report["notes"])
    alone = images["images/02-seed0-todo-2.png"]
    assert (alone["psnr"], alone["ssim"], alone["speedup"], alone["same_as_dense"]) == (None, None, None, False)


@pytest.mark.parametrize("count", [1, 3])
def test_an_interrupted_comparison_has_a_page(comparison, tmp_path, count):
    output = Output(tmp_path, page=True)
    output.add(so_far(comparison, count))
    output.stop()
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{6 - count} of 6 images are missing" in html and "prompt 0" in html


def test_pictures_that_could_not_be_written_are_not_claimed_after_an_interrupt(comparison, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("builtins.open", full)
    output = Output(tmp_path)
    output.add(so_far(comparison, 2))
    said = output.stop()
    monkeypatch.undo()
    assert "images are in" not in said
    assert said.startswith(f"cannot write {tmp_path / 'report.json'}: File too large (and ")


def test_one_method_is_no_sheet(comparison, tmp_path):
    output = Output(tmp_path)
    output.add(so_far(comparison, 1))
    output.stop()
    assert written(tmp_path) == {"images/01-seed0-dense.png", "report.json"}


def test_without_dense_there_is_no_speedup(comparison):
    shots = [s for s in comparison.shots if s.label != "dense"]
    methods = [replace(m, unavailable="out of memory") if m.label == "dense" else m for m in comparison.methods]
    alone = replace(comparison, shots=shots, methods=methods)
    todo = rows(alone)["todo:2"]
    assert (todo["speedup"], todo["psnr"], todo["ssim"]) == (None, None, None)
    assert todo["seconds"]["median"] == 3.0
    assert "todo:2" in table(alone)
    assert sheet_of(alone, build_report(alone)).height > 3 * 32


def test_a_method_that_ended_early_keeps_its_numbers(comparison):
    methods = [replace(m, unavailable="out of memory") if m.label == "todo:2" else m for m in comparison.methods]
    shots = [s for s in comparison.shots if (s.label, s.number) != ("todo:2", 2)]
    report = build_report(replace(comparison, shots=shots, methods=methods))
    assert report["complete"]
    assert report["methods"][1]["seconds"]["count"] == 2
    assert "todo:2 ended after 2 images: out of memory." in report["notes"]


@pytest.mark.parametrize("full", ["report.json", "01-seed0-dense.png", "contact_sheet.png", "report.html"])
def test_a_full_disk_names_the_file_and_keeps_the_rest(comparison, tmp_path, monkeypatch, full):
    really_open = open

    def opened(file, mode="r", *rest, **named):
        if ("w" in mode or "x" in mode) and full in str(file):
            really_open(file, mode).close()
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return really_open(file, mode, *rest, **named)

    monkeypatch.setattr("builtins.open", opened)
    output = Output(tmp_path, page=True)
    output.finish(comparison, build_report(comparison))
    name = next(p for p in ("images/" + full, full) if p in output.problem())
    assert output.problem().startswith(f"cannot write {tmp_path / name}: No space left on device")
    assert len(written(tmp_path) - {name}) >= 8
    assert not any(p.endswith(".part") for p in written(tmp_path) if full not in p)


def test_spread_of_one():
    assert spread([2.5]) == {"median": 2.5, "min": 2.5, "q1": 2.5, "q3": 2.5, "max": 2.5, "count": 1}
