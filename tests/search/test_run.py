"""Searches end to end on a tiny pipeline: what they find, what they keep, and how they go on."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures import judges

from todo_attn.compare.bind import bind_dato
from todo_attn.compare.metrics import psnr
from todo_attn.compare.run import take_shot
from todo_attn.config import schedule
from todo_attn.config.checks import ArgumentError
from todo_attn.config.dato import DaToConfig
from todo_attn.config.todo import ToDoConfig
from todo_attn.predict.count import count_work
from todo_attn.search import fidelity, images, run
from todo_attn.search.fidelity import MOST_DB

pytest.importorskip("pymoo")
OUT = ("front.json", "search.json", "checkpoint.json", "schedules/front-01.json")


def calls_of(pipe, monkeypatch):
    """The prompts of all images that are made from now on."""
    made = []
    right = images.call_pipeline

    def call(pipe, settings, prompt, *more, **options):
        made.append(prompt)
        return right(pipe, settings, prompt, *more, **options)

    monkeypatch.setattr(images, "call_pipeline", call)
    return made


def figures(found):
    return [(point.key, point.fidelity, point.cost, point.generation) for point in found.points]


def test_the_files_are_what_was_measured(sd, searched, settings, tmp_path):
    before = [(name, list(m._forward_pre_hooks), list(m._forward_hooks)) for name, m in sd.unet.named_modules()]
    found = searched("found", metric="psnr", prune_ratios=(0.0, 0.5), todo_factors=(1, 2), generations=2)
    after = [(name, list(m._forward_pre_hooks), list(m._forward_hooks)) for name, m in sd.unet.named_modules()]
    assert before == after
    front = found.front
    assert len(front) >= 3 and found.generations == 2
    costs, fidelities = [p.cost for p in front], [p.fidelity for p in front]
    assert costs == sorted(costs) and fidelities == sorted(fidelities)
    assert not any(q.cost <= p.cost and q.fidelity > p.fidelity for p in front for q in found.points)
    assert {p.config.prune_ratio for p in found.points} == {0.0, 0.5}
    table = json.loads((tmp_path / "found" / "front.json").read_text())
    assert table["front"] == [f"front-{i:02}" for i in range(1, len(front) + 1)]
    assert sorted(os.listdir(tmp_path / "found" / "schedules")) == [f"{name}.json" for name in table["front"]]
    for i in (0, len(front) // 2, len(front) - 1):
        file = tmp_path / "found" / "schedules" / f"{table['front'][i]}.json"
        config = DaToConfig.from_file(file, calls=found.calls)
        assert config == front[i].config == DaToConfig.preset(str(file), steps=3)
        values = []
        for number, (prompt, seed) in enumerate(settings.images):
            dense = take_shot(sd, settings, prompt, seed, 4, label="", number=number)
            with bind_dato(sd, config).applied():
                values.append(psnr(dense.pixels, take_shot(sd, settings, prompt, seed, 4, label="", number=0).pixels))
        assert front[i].fidelity == pytest.approx(np.mean(values))
        dense, dato = count_work(sd.unet.config, 32, 32, [config], 2, sd.vae_scale_factor)
        assert front[i].cost == sum(dato.of(kind).operations for kind in "2" + config.cache_schedule)
        assert found.dense_cost == 4 * dense.full.operations
    kept = schedule.load(file)
    assert (kept.steps, kept.scheduler, kept.name) == (4, "DDIM", table["front"][-1])
    assert kept.provenance["search"]["metric"] == "psnr" and kept.provenance["search"]["versions"]["torch"]
    assert kept.provenance["figures"]["fidelity"] == front[-1].fidelity
    assert kept.provenance["search"]["model"] == table["about"]["model"]
    page = (tmp_path / "found" / "report.html").read_text()
    assert "front-01" in page and "<svg" in page


def test_nothing_is_made_twice(sd, whole, searched, monkeypatch, tmp_path):
    found, folder = whole
    assert len({point.key for point in found.points}) == len(found.points)
    shutil.copytree(folder, tmp_path / "again")
    kept = {name: (folder / name).read_bytes() for name in OUT}
    made = calls_of(sd, monkeypatch)
    assert figures(searched("again")) == figures(found) and not made
    assert kept == {name: (tmp_path / "again" / name).read_bytes() for name in OUT}
    more = searched("again", generations=4)
    assert figures(more)[: len(found.points)] == figures(found)
    assert 0 < len(made) == 2 * (len(more.points) - len(found.points))


def test_dense_is_no_candidate(whole):
    found, _ = whole
    assert not any(point.config.computes_everything for point in found.points)
    assert all(point.fidelity < MOST_DB for point in found.points)


def test_a_ratio_for_each_call(searched, tmp_path):
    found = searched("found", prune_ratios=(0.0, 0.5), prune_per_call=True, generations=1)
    assert all(len(point.config.prune_ratio) == 4 for point in found.points)
    assert any(len(set(point.config.prune_ratio)) > 1 for point in found.points)
    file = tmp_path / "found" / "schedules" / "front-01.json"
    assert DaToConfig.from_file(file) == found.front[0].config


def test_the_metric_gets_the_dense_image_of_its_own_prompt(sd, searched, settings, monkeypatch):
    monkeypatch.setattr(judges, "seen", [])
    searched("found", metric="fixtures.judges:noting", generations=1)
    dense = {p: take_shot(sd, settings, p, seed, 4, label="", number=0).pixels for p, seed in settings.images}
    assert len(judges.seen) > 15
    assert all(np.array_equal(given, dense[prompt]) for prompt, given in judges.seen)


def test_what_a_metric_does_to_generators_and_arrays_does_not_matter(searched):
    plain = searched("plain", metric="fixtures.judges:by_psnr", generations=2)
    for name in ("reseeding", "writing"):
        assert figures(searched(name, metric=f"fixtures.judges:{name}", generations=2)) == figures(plain)


def test_slower_is_worse(searched, monkeypatch):
    """Every image is as near to dense as every other, so only the fastest candidate is on the front."""
    monkeypatch.setattr(run.Fidelity, "of", lambda self, image, dense, prompt: 30.0)
    for cost in ("operations", "seconds"):
        found = searched(cost, cost=cost, generations=1)
        assert [p.cost for p in found.front] == [min(p.cost for p in found.points)]
        assert found.speedup(found.front[0]) > 1


def test_a_candidate_without_a_number_costs_that_candidate(whole, searched, monkeypatch, tmp_path):
    sound, folder = whole
    results = json.loads((folder / "checkpoint.json").read_text())["candidates"]
    first = [point for point in sound.points if point.generation == 1]  # others depend on what these are worth
    bad = [first[0].key, first[-1].key]
    answers = dict(zip([results[key]["1"][0] for key in bad], (np.nan, ZeroDivisionError("no")), strict=True))

    def measure(image, dense, prompt):
        answer = answers.get(value := latents(image, dense, prompt), value)
        if isinstance(answer, Exception):
            raise answer
        return answer

    latents = fidelity._MEASURES["latents"]
    monkeypatch.setitem(fidelity._MEASURES, "latents", measure)
    found = searched("failing")
    assert set(found.failures) == set(bad) and not {p.key for p in found.points} & set(bad)
    assert found.failures[bad[0]] == "image 2: latents gave nan"
    assert found.failures[bad[1]] == "image 2: latents raised ZeroDivisionError: no"
    assert found.generations == 3 and found.front
    assert "2 candidates have no figures" in (tmp_path / "failing" / "report.html").read_text()
    assert json.loads((tmp_path / "failing" / "front.json").read_text())["failures"] == dict(found.failures)


def test_a_metric_that_never_works(searched):
    with pytest.raises(ArgumentError, match=r"metric must give a number .*: image 1: .*never raised RuntimeError: out"):
        searched("found", metric="fixtures.judges:never")


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        ({"metric": "fixtures.judges:of_one_argument"}, r"metric must be a function of \(image, dense, prompt\)"),
        ({"metric": "fixtures.judges:absent"}, "metric must be MODULE:FUNCTION"),
        ({"metric": "perceptual"}, "features must be given"),
        ({"features": "fixtures.features:SmallNetwork"}, "features is for the metric perceptual"),
        ({"metric": "perceptual", "features": "fixtures.features:no_network"}, "features must return an object"),
        ({"start": (schedule.Schedule("01"),)}, "start must be schedules for the 4 calls"),
    ],
)
def test_what_is_refused_before_anything_is_made(searched, tmp_path, plan, problem):
    with pytest.raises(ArgumentError, match=problem):
        searched("found", **plan)
    assert not (tmp_path / "found").exists()


def test_the_metrics(searched):
    for metric, more in (("ssim", {}), ("perceptual", {"features": "fixtures.features:SmallNetwork"})):
        found = searched(metric, metric=metric, generations=1, **more)
        costs, values = [p.cost for p in found.front], [p.fidelity for p in found.front]
        assert costs == sorted(costs)
        assert values == sorted(values, reverse=metric == "perceptual")


def stop_after(images_made, error):
    left = iter(range(images_made))

    def watch(progress):
        if progress.generation and next(left, None) is None:
            raise error

    return watch


@pytest.mark.parametrize("made", [0, 21])
def test_an_interrupted_search_goes_on_to_the_same_front(whole, searched, monkeypatch, tmp_path, made, sd):
    found, folder = whole
    with pytest.raises(KeyboardInterrupt):
        searched("stopped", watch=stop_after(made, KeyboardInterrupt))
    table = json.loads((tmp_path / "stopped" / "front.json").read_text())
    assert bool(table["front"]) == (made > 0)
    for name in table["front"]:
        DaToConfig.from_file(tmp_path / "stopped" / "schedules" / f"{name}.json", calls=4)
    again = calls_of(sd, monkeypatch)
    assert figures(searched("stopped")) == figures(found)
    assert len(again) <= 2 * len(found.points) - made
    for name in ("front.json", "search.json"):
        assert (folder / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_another_search_is_refused_and_nothing_is_lost(sd, whole, searched, tmp_path):
    _, folder = whole
    shutil.copytree(folder, tmp_path / "found")
    before = {file: file.read_bytes() for file in (tmp_path / "found").rglob("*") if file.is_file()}
    with pytest.raises(ArgumentError, match=r"^folder must be of the same search, .*'latents' instead of 'psnr'"):
        searched("found", metric="psnr")
    with pytest.raises(ArgumentError, match="search_seed 0 instead of 1"):
        searched("found", search_seed=1)
    bias = sd.unet.conv_in.bias.detach().clone()
    sd.unet.conv_in.bias.data += 1
    with pytest.raises(ArgumentError, match=r"model '.*' instead of"):
        searched("found")
    sd.unet.conv_in.bias.data = bias
    assert before == {file: file.read_bytes() for file in (tmp_path / "found").rglob("*") if file.is_file()}
    checkpoint = tmp_path / "found" / "checkpoint.json"
    data = json.loads(checkpoint.read_text())
    checkpoint.write_text(json.dumps(data | {"search": "0123"}))
    with pytest.raises(ArgumentError, match=r"checkpoint\.json is of another: '0123'"):
        searched("found")
    for damaged in ('{"search": ', "[]", '{"search": "0123", "candidates": {"222": {"0": [1]}}}', "\xff"):
        checkpoint.write_bytes(damaged.encode("latin-1"))
        with pytest.raises(ArgumentError, match=r"folder must have a checkpoint that can be read, .*\.json cannot"):
            searched("found")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ArgumentError, match="folder must be new, empty or of an earlier search"):
        searched("mine")


@pytest.mark.parametrize(("written", "file"), [(1, "000000"), (4, "checkpoint"), (12, "checkpoint")])
def test_a_full_disk_loses_nothing(whole, searched, monkeypatch, tmp_path, written, file):
    right, left = Path.write_bytes, iter(range(written))

    def full(path, content):
        if next(left, None) is None:
            right(path, content[:5])
            raise OSError(28, "No space left on device")
        return right(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=rf"No space left on device.*{file}"):
        searched("full")
    monkeypatch.setattr(Path, "write_bytes", right)
    assert not list((tmp_path / "full").rglob("*.part"))
    assert figures(searched("full")) == figures(whole[0])


def test_a_pipeline_that_carries_a_method_is_refused(sd, searched, tmp_path):
    from todo_attn import apply_todo

    apply_todo(sd)
    with pytest.raises(ArgumentError, match="pipe must be as loaded, got one with ToDo on it"):
        searched("found")
    assert not (tmp_path / "found").exists()


def test_sdxl_and_a_scheduler_with_more_calls_than_steps(sdxl, searched, settings):
    import diffusers

    sdxl.scheduler = diffusers.PNDMScheduler.from_config(sdxl.scheduler.config, skip_prk_steps=True)
    found = searched("xl", pipe=sdxl, generations=1, todo_factors=(1, 2))
    assert found.calls == 5 and found.front
    assert all(len(point.config.cache_schedule) == 4 for point in found.points)


def test_images_that_the_safety_checker_blacks_out_are_not_compared(sd, searched, monkeypatch):
    """Two black images are equal, which says nothing."""
    right, black = sd.run_safety_checker, []

    def check(image, device, dtype):
        return right(image, device, dtype)[0], [bool(black)]

    monkeypatch.setattr(sd, "run_safety_checker", check)

    def watch(progress):
        black[:] = [True] if progress.generation and progress.done == 2 else []

    found = searched("found", metric="psnr", generations=1, watch=watch)
    assert set(found.failures.values()) == {"image 1: the pipeline's safety checker blacked it out"}
    black[:] = [True]
    with pytest.raises(ArgumentError, match=r"prompts must pass .* checker, .* 'a hill' with seed 0"):
        searched("other", metric="psnr")


def test_a_search_that_starts_from_a_schedule_with_todo_goes_on(searched):
    """The levels of its factors are integers, which JSON has as strings."""
    mine = schedule.Schedule("120", "mine", prune_ratio=0.0, todo=ToDoConfig({1: 2}))
    plan = {"start": (mine,), "todo_factors": (1, 2), "generations": 1}
    first = searched("found", **plan)
    assert first.points[0].config.todo and "mine" in {point.origin for point in first.points}
    assert figures(searched("found", **plan)) == figures(first)
