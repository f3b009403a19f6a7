"""The page of a comparison, whole or in part."""

import shlex
from dataclasses import replace

import pytest

from todo_attn.compare.bind import BoundMethod
from todo_attn.compare.comparison_page import page_of
from todo_attn.compare.curve import Estimate
from todo_attn.compare.page import Page, build_page
from todo_attn.compare.report import build_report
from todo_attn.compare.run import Comparison


def page(comparison: Comparison) -> Page:
    made = page_of(comparison, build_report(comparison))
    assert made.title in build_page(made)
    return made


def test_examples(comparison):
    examples = page(comparison).examples
    assert [(e.prompt, e.detail) for e in examples] == [(f"prompt {i}", "seed 0") for i in range(3)]
    assert [list(e.images) for e in examples] == [["dense", "todo:2"]] * 3
    for s in comparison.shots:
        assert examples[s.number].images[s.label] is s.pixels
    assert examples[0].captions["todo:2"] == "2.00 s  ·  the same as dense"
    assert examples[1].captions["todo:2"].startswith("3.00 s  ·  PSNR 34")
    assert examples[1].captions["tome"] == "tomesd is not installed"


def test_table_and_curve(comparison):
    made = page(comparison)
    dense, todo, tome = made.tables[0].rows
    assert todo.values["seconds"] == Estimate(3.0, 2.0, 4.0) and todo.values["speed-up"] == Estimate(2.0)
    assert dense.values["PSNR"] == "-" and str(todo.values["PSNR"]).endswith(" dB")
    assert tome.note == "tomesd is not installed" and not tome.values
    (curve,) = made.curves
    (point,) = curve.points
    assert (point.method, point.family, point.x) == ("todo:2", "todo", Estimate(3.0, 2.0, 4.0))
    assert curve.lines == [("dense", 6.0)] and curve.note == "Whiskers go from the least to the most seconds."
    assert made.notes == build_report(comparison)["notes"] and "tome was left out" in made.notes[0]


def test_a_method_whose_images_are_denses_is_not_in_the_curve(comparison):
    of_dense = {s.number: s.pixels for s in comparison.shots if s.label == "dense"}
    same = [replace(s, label="todo:1", pixels=of_dense[s.number]) for s in comparison.shots if s.label == "todo:2"]
    methods = [*comparison.methods, BoundMethod("todo:1", {"factor": 1})]
    made = page(replace(comparison, shots=comparison.shots + same, methods=methods))
    assert [p.method for p in made.curves[0].points] == ["todo:2"]
    assert "the same as dense's: todo:1." in made.curves[0].note
    assert made.tables[0].rows[-1].values["PSNR"] == "the same"


def test_memory_is_there_if_it_is_known(comparison):
    assert "peak memory" not in [c.heading for c in page(comparison).tables[0].columns]
    made = page(replace(comparison, shots=[replace(s, peak_bytes=2**30) for s in comparison.shots]))
    assert "1.00 GiB" in build_page(made) and any("Peak memory" in line for line in made.about)


def test_a_part_of_a_comparison(comparison):
    """Interrupted after one image by both methods, and one by ToDo alone."""
    made = page(replace(comparison, shots=comparison.shots[:3]))
    assert [list(e.images) for e in made.examples] == [["dense", "todo:2"], ["todo:2"]]
    assert made.curves == []  # the only pair of images is equal
    assert "3 of 6 images are missing" in made.notes[0]


def test_one_image_has_no_interval(comparison):
    made = page(replace(comparison, shots=comparison.shots[:2]))
    assert made.tables[0].rows[0].values["seconds"] == Estimate(4.0)


def test_dense_alone(comparison):
    shots = [s for s in comparison.shots if s.label == "dense"]
    made = page(replace(comparison, shots=shots, methods=comparison.methods[:1]))
    assert made.curves == [] and [s.method for s in made.settings] == ["this comparison"]


def test_without_dense(comparison):
    shots = [s for s in comparison.shots if s.label != "dense"]
    methods = [replace(m, unavailable="out of memory") if m.label == "dense" else m for m in comparison.methods]
    made = page(replace(comparison, shots=shots, methods=methods))
    assert made.curves == [] and made.tables[0].rows[0].note == "out of memory"


def test_images_with_nan_say_so(comparison):
    made = page(replace(comparison, shots=[replace(s, finite=s.label == "dense") for s in comparison.shots]))
    assert {e.captions["todo:2"] for e in made.examples} == {"NaN or infinity in it"}
    assert any("NaN" in note for note in made.notes) and made.curves == []


@pytest.mark.parametrize("prompt", ["<script>alert(1)</script>", "a 🚀", "שלום עולם", "one\ud800", "a\nb"])
def test_any_prompt(comparison, prompt):
    settings = replace(comparison.settings, prompts=(prompt, "b", "c"))
    html = build_page(page(replace(comparison, settings=settings)))
    assert "<script>alert" not in html
    assert html.encode("utf-8", "replace")


def test_settings_to_copy(comparison):
    made = page(comparison)
    todo, tome, all_of_it = made.settings
    assert todo.code == {
        "Python": "from todo_attn import ToDoConfig, apply_todo\n\napply_todo(pipe, ToDoConfig(factor=2))"
    }
    assert tome.code == {"Python": "import tomesd\n\ntomesd.apply_patch(pipe, ratio=0.5)"}
    words = shlex.split(all_of_it.code["Command"])
    assert words[:2] == ["todo-attn", "compare"] and words[-1] == "--report"
