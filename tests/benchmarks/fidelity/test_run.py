"""Runs end to end on a tiny pipeline: resumed, in shards, and their rows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.fidelity import generate, table
from benchmarks.fidelity.generate import Generator, enlarged
from benchmarks.fidelity.metrics import measure
from benchmarks.fidelity.store import Images
from todo_attn.bench import jsonl
from todo_attn.compare.metrics import psnr
from todo_attn.compare.workers import Shard
from todo_attn.config.checks import ArgumentError

CASES = ["todo:factor=2", "tome:0.5", "dato:coco", "deepcache:2", "dense:enlarged=2", "dense:steps=1"]
SIZE = (64, 64)
METRICS = ["psnr", "ssim", "perceptual", "highpass", "agreement", "kid"]


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def pngs(store):
    return {path.relative_to(store.folder): path.read_bytes() for path in sorted(store.folder.rglob("*.png"))}


def test_a_table(sd, make_run, open_store, true_images, tmp_path):
    pytest.importorskip("torchmetrics")
    before = [(name, m.training, list(m._forward_pre_hooks)) for name, m in sd.unet.named_modules()]
    run = make_run(sd, CASES, reference=true_images, subset=3, metrics=METRICS, versus="tome:0.5")
    store = open_store(sd)
    rows = run.rows(store)
    assert before == [(name, m.training, list(m._forward_pre_hooks)) for name, m in sd.unet.named_modules()]
    assert rows[0]["case"] == "dense"
    assert {row["case"] for row in rows} == {"dense", *CASES}
    by_case = {row["case"]: row for row in rows}
    dense, todo = by_case["dense"], by_case["todo:factor=2"]
    assert dense["columns"]["psnr"] is None and dense["same_as_dense"] == 4
    assert dense["columns"]["ssim"]["value"] == dense["columns"]["highpass"]["value"] == 1
    assert dense["operations_saved"] == 0
    expected = [psnr(store.pixels(SIZE, "dense", i), store.pixels(SIZE, "todo:factor=2", i)) for i in range(4)]
    assert todo["columns"]["psnr"]["value"] == pytest.approx(np.mean(expected))
    assert todo["columns"]["psnr"]["low"] < np.mean(expected) < todo["columns"]["psnr"]["high"]
    assert [by_case[case]["calls"] for case in ("dense", "dense:steps=1")] == [3, 1]
    assert by_case["dense:steps=1"]["operations_saved"] == pytest.approx(2 / 3)
    assert by_case["dense:enlarged=2"]["operations_saved"] > 0.7
    assert all(0 < by_case[case]["operations_saved"] < 1 for case in CASES if case != "tome:0.5")
    assert by_case["tome:0.5"]["differences"]["psnr"]["value"] == 0
    assert set(todo["differences"]) == set(todo["columns"])
    assert todo["about"]["options"]["factor"] == 2
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    text = table.markdown(rows)
    assert "| todo:factor=2" in text and "64 x 64 pixels, 4 images" in text and "than tome:0.5" in text
    assert len(table.rich_tables(rows)) == 1


def test_a_killed_run_goes_on_and_makes_nothing_twice(sd, make_run, open_store, settings, cases_of):
    cases = ["todo:factor=2", "dato:coco"]
    whole = make_run(sd, cases).rows(open_store(sd, "whole"))
    store, run = open_store(sd, "killed"), make_run(sd, cases)
    left = iter(range(5))

    def killed():
        if next(left, None) is None:
            raise KeyboardInterrupt

    generator = Generator(sd, settings, Images(settings.prompts, 2), store)
    with pytest.raises(KeyboardInterrupt):
        generator.make(run.cases, SIZE, Shard(), made=killed)
    made = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.png")}
    assert len(made) == 6
    assert not list(store.folder.rglob("*.part"))
    assert timeless(run.rows(open_store(sd, "killed"))) == timeless(whole)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert generator.make(run.cases, SIZE, Shard()) == 0
    assert run.rows(store) == run.rows(store)


def test_an_image_without_a_record_is_made_again(sd, make_run, open_store, settings):
    store, run = open_store(sd), make_run(sd, ["dense"])
    run.rows(store)
    images = pngs(store)
    (store.case_folder(SIZE, "dense") / "000002.json").unlink()
    (store.case_folder(SIZE, "dense") / "000002.png").write_bytes(b"half an ima")
    assert Generator(sd, settings, Images(settings.prompts, 2), store).make(run.cases, SIZE, Shard()) == 1
    assert pngs(store) == images


def test_out_of_memory_keeps_what_was_made(sd, make_run, open_store, monkeypatch):
    right = generate.take_shot

    def short_of_memory(*arguments, label, **names):
        if label == "tome:0.5" and names["number"] == 1:
            raise torch.OutOfMemoryError
        return right(*arguments, label=label, **names)

    monkeypatch.setattr(generate, "take_shot", short_of_memory)
    store = open_store(sd)
    with pytest.raises(ArgumentError, match=r"^cases must fit in memory, and tome:0.5 at 64x64"):
        make_run(sd, ["tome:0.5"]).rows(store)
    assert store.has(SIZE, "tome:0.5", 0) and not store.has(SIZE, "tome:0.5", 1)


def test_a_full_disk_leaves_no_half_image(sd, make_run, open_store, monkeypatch):
    store = open_store(sd)
    right = Path.write_bytes
    left = iter(range(8))

    def full(path, content):
        if next(left, None) is None:
            right(path, content[:5])
            raise OSError(28, "No space left on device")
        return right(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        make_run(sd, ["tome:0.5"]).rows(store)
    monkeypatch.setattr(Path, "write_bytes", right)
    assert not list(store.folder.rglob("*.part"))
    assert len(make_run(sd, ["tome:0.5"]).rows(store)) == 2


def test_two_shards_make_what_one_makes(sd, make_run, open_store, settings):
    run, images = make_run(sd, ["tome:0.5", "dato:coco", "dense:enlarged=2"]), Images(settings.prompts, 2)
    one, two = open_store(sd, "one"), open_store(sd, "two")
    rows = run.rows(one)
    assert [Generator(sd, settings, images, two).make(run.cases, SIZE, Shard(r, 2), 2) for r in (1, 0)] == [8, 8]
    assert pngs(one) == pngs(two)
    merged = run.rows(two)
    assert {row.pop("processes") for row in rows} == {1} and {row.pop("processes") for row in merged} == {2}
    assert timeless(rows) == timeless(merged)
    network = run.plan.network

    def parts(shard):
        return measure(two, images, SIZE, "tome:0.5", "dense", run.metrics, network, shard.of(len(images)))

    shards = sorted([*parts(Shard(0, 2)), *parts(Shard(1, 2))], key=lambda part: part.index)
    assert [part.values for part in shards] == [part.values for part in parts(Shard())]


def test_a_rectangular_size_and_more_images_of_the_same_run(sd, make_run, open_store, settings):
    run = make_run(sd, ["todo:level1=2"], sizes=[(64, 96)], images=Images(settings.prompts, 1))
    rows = run.rows(open_store(sd, per_prompt=1))
    assert [(row["height"], row["width"], row["images"]) for row in rows] == [(64, 96, 2)] * 2
    store = open_store(sd, per_prompt=2)  # the same folder: images 0 and 1 stay
    assert store.pixels((64, 96), "dense", 0).shape == (64, 96, 3)
    assert make_run(sd, ["todo:level1=2"], sizes=[(64, 96)]).rows(store)[0]["images"] == 4


def test_a_folder_of_another_run_is_refused_and_stays(sd, open_store, tmp_path):
    open_store(sd)
    before = (tmp_path / "images" / "run.json").read_bytes()
    with pytest.raises(ArgumentError, match=r"^folder must be of the same run, .* steps 3 instead of 5"):
        open_store(sd, steps=5)
    sd.unet.conv_in.bias.data += 1
    with pytest.raises(ArgumentError, match=r"model '.*' instead of"):
        open_store(sd)
    assert (tmp_path / "images" / "run.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ArgumentError, match=r"^folder must be new, empty or of an earlier run"):
        open_store(sd, "mine")
    (tmp_path / "images" / "run.json").write_text("{")
    with pytest.raises(ArgumentError, match="is not JSON"):
        open_store(sd)


def test_a_case_with_other_options_is_refused(sd, open_store):
    store = open_store(sd)
    store.open_case(SIZE, "todo", {"factor": 2})
    store.open_case(SIZE, "todo", {"factor": 2})
    with pytest.raises(ArgumentError, match="factor 2 instead of 3"):
        store.open_case(SIZE, "todo", {"factor": 3})


def test_rows_replace_their_own_and_no_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    mine = {"benchmark": "fidelity", "run": "a", "case": "dense", "height": 64, "width": 64, "seconds": 1}
    table.write(path, [mine, mine | {"run": "b"}])
    table.write(path, [mine | {"seconds": 2}, mine | {"case": "todo"}])
    assert jsonl.read(path) == [mine | {"run": "b"}, mine | {"seconds": 2}, mine | {"case": "todo"}]


def test_enlarging():
    small = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    assert np.array_equal(enlarged(small, (16, 24)), np.asarray(Image.fromarray(small).resize((24, 16), Image.LANCZOS)))
    assert enlarged(small, (8, 12)) is small


def test_each_image_has_a_seed_of_its_own():
    images = Images(("a", "b"), 2, first_seed=7)
    assert [images[i] for i in range(len(images))] == [("a", 7), ("b", 8), ("a", 9), ("b", 10)]


def test_shards_are_disjoint_and_whole():
    for world in (1, 2, 3, 7):
        assert sorted(i for rank in range(world) for i in Shard(rank, world).of(5)) == list(range(5))
