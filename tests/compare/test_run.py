"""The measuring loop: who runs when, on what noise, and what is left behind."""

import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from todo_attn.compare import run as comparing
from todo_attn.compare.bind import BoundMethod
from todo_attn.compare.run import compare
from todo_attn.models.pipelines import load_pipeline, sized
from todo_attn.options.methods import SettingError
from todo_attn.options.settings import SCHEDULERS, CompareSettings
from todo_attn.peak_memory import watch_peak


@pytest.fixture
def settings(sd_folder) -> CompareSettings:
    return CompareSettings(
        model=str(sd_folder), prompts=("a red circle", "a blue star"), seeds=(3, 5), height=64, width=96, steps=3,
        methods="dense,todo:2,tome",
    )  # fmt: skip


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What was put on and taken off, in order."""
    log: list[str] = []
    applied = BoundMethod.applied

    @contextmanager
    def logged(self):
        log.append(f"+{self.label}")
        with applied(self):
            yield
        log.append(f"-{self.label}")

    monkeypatch.setattr(BoundMethod, "applied", logged)
    return log


def test_methods_take_turns(sd, settings, events):
    comparison = compare(sd, settings)
    dense, todo, tome = ("+dense", "-dense"), ("+todo:2", "-todo:2"), ("+tome", "-tome")
    there, back = (*dense, *todo, *tome), (*tome, *todo, *dense)
    tried_on = (*there, *there)  # at the steps of an image, and at those of a warm-up
    assert tuple(events) == (*tried_on, *there, *there, *back, *there, *back)
    assert Counter(s.label for s in comparison.shots) == {"dense": 4, "todo:2": 4, "tome": 4}
    images = [("a red circle", 3), ("a red circle", 5), ("a blue star", 3), ("a blue star", 5)]
    assert {(s.number, s.prompt, s.seed) for s in comparison.shots} == {(i, *p) for i, p in enumerate(images)}


def test_pictures_are_those_of_the_pipeline(sd, settings):
    comparison = compare(sd, settings)
    for shot in comparison.shots:
        assert shot.pixels.shape == (64, 96, 3) and shot.pixels.dtype == np.uint8
        assert shot.seconds > 0 and shot.finite and not shot.blacked_out
        if shot.label == "dense":
            alone = sd(
                shot.prompt,
                height=64,
                width=96,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(shot.seed),
            )
            assert np.array_equal(np.asarray(alone.images[0]), shot.pixels)
    first = {s.label: s.pixels for s in comparison.shots if s.number == 0}
    assert not np.array_equal(first["todo:2"], first["dense"])
    assert not np.array_equal(first["tome"], first["dense"])


def test_every_kind_of_method(sd, settings, caplog):
    """Each acts, does the same in a second run, says nothing, and leaves the model alone."""
    methods = "dense,todo,dato,dato:search,todo+dato,deepcache,deepcache:2,tome"
    settings = replace(settings, methods=methods, prompts=("a star",), seeds=(3,), steps=8, warmup_steps=1, factor="2")
    one, two = compare(sd, settings), compare(sd, settings)
    pixels = [{(s.label, s.number): s.pixels for s in c.shots} for c in (one, two)]
    assert pixels[0].keys() == {(m, 0) for m in methods.split(",")}
    assert all(np.array_equal(pixels[0][key], pixels[1][key]) for key in pixels[0])
    distinct = {p.tobytes() for p in pixels[0].values()}
    assert len(distinct) == len(pixels[0])
    assert not caplog.records


def test_warnings_come_once(sd, settings, caplog):
    settings = replace(settings, methods="dense,todo:1")
    for runs in (1, 2):
        compare(sd, settings)
        assert len([r for r in caplog.records if "changes nothing" in r.getMessage()]) == runs


def test_memory_is_measured(sd, settings):
    shots = compare(sd, replace(settings, prompts=("a star",))).shots
    known = watch_peak(torch.device("cpu"))() is not None
    assert all((s.peak_bytes is not None and s.peak_bytes > 0) if known else s.peak_bytes is None for s in shots)


def test_factor_1_is_dense_and_runs_repeat(sd, settings):
    settings = replace(settings, methods="dense,todo:1,tome", seeds=(3,))
    global_state = torch.get_rng_state()
    one = compare(sd, settings)
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.rand(7)
    two = compare(sd, settings)
    pixels = [{(s.label, s.number): s.pixels for s in c.shots} for c in (one, two)]
    assert all(np.array_equal(pixels[0][key], pixels[1][key]) for key in pixels[0])
    assert all(np.array_equal(pixels[0]["todo:1", i], pixels[0]["dense", i]) for i in range(2))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(sd_folder, scheduler):
    settings = CompareSettings(
        model=str(sd_folder),
        prompts=("a star",),
        height=64,
        width=64,
        steps=4,
        warmup_steps=1,
        scheduler=scheduler,
        device="cpu",
    )
    seen: list[comparing.Progress] = []
    comparison = compare(load_pipeline(settings), settings, seen.append)
    assert comparison.scheduler == SCHEDULERS[scheduler][0]
    assert all(s.finite for s in comparison.shots)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert {p.total for p in seen} == {2 * (1 + 4)}
    assert seen[-1].done == seen[-1].total


def test_warm_up_is_short_first_and_not_counted(sd, settings):
    seen: list[comparing.Progress] = []
    settings = replace(settings, warmup_steps=2, prompts=("a star",), seeds=(0,))
    comparison = compare(sd, settings, seen.append)
    warm = [f"warm-up: {m}" for m in ("dense", "todo:2", "tome") for _ in range(2)]
    assert [p.what for p in seen][: len(warm)] == warm
    assert len(seen) == len(warm) + 3 * 3 and len(comparison.shots) == 3


@pytest.mark.parametrize("failing_call", [2, 3, 5, 6])
def test_leaves_the_pipeline_as_found_when_it_fails(sd, settings, monkeypatch, failing_call):
    """Calls 1 to 3 are warm-ups; in 2 and 5 ToDo is on, in 3 and 6 ToMe."""
    classes = [type(m) for m in sd.unet.modules()]
    processors = dict(sd.unet.attn_processors)
    decode, calls = sd.vae.decode, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == failing_call:
            raise RuntimeError("on purpose")
        return decode(*args, **kwargs)

    monkeypatch.setattr(sd.vae, "decode", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        compare(sd, settings)
    assert [type(m) for m in sd.unet.modules()] == classes
    assert sd.unet.attn_processors == processors
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in sd.unet.modules())
    assert sd._progress_bar_config == {"disable": True}


CPU_FULL = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize("error", [RuntimeError(CPU_FULL), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
@pytest.mark.parametrize(("method", "after"), [("todo:2", 0), ("todo:2", 2), ("dense", 0), ("dense", 1)])
def test_a_method_without_memory_leaves_the_others(sd, settings, monkeypatch, method, after, error):
    """In its warm-up (0) or at a later image: what was made is kept, and the others go on."""
    running: list[str] = []
    applied, decode, decoded = BoundMethod.applied, sd.vae.decode, Counter()

    @contextmanager
    def watched(self):
        with applied(self):
            running.append(self.label)
            yield

    def filling_up(*args: Any, **kwargs: Any) -> Any:
        decoded[running[-1]] += 1
        if running[-1] == method and decoded[method] > after:
            raise error
        return decode(*args, **kwargs)

    monkeypatch.setattr(BoundMethod, "applied", watched)
    monkeypatch.setattr(sd.vae, "decode", filling_up)
    kept: list[comparing.Comparison] = []
    comparison = compare(sd, settings, keep=kept.append)
    made = Counter(s.label for s in comparison.shots)
    expected = dict.fromkeys(("dense", "todo:2", "tome"), 4) | {method: max(0, after - 1)}
    assert made == +Counter(expected)
    assert {m.label: m.unavailable for m in comparison.methods if m.unavailable} == {method: "out of memory"}
    assert decoded[method] == after + 1
    assert [len(c.shots) for c in kept] == list(range(1, len(comparison.shots) + 1))


def test_no_memory_for_any_method_is_an_error(sd, settings, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(CPU_FULL)

    monkeypatch.setattr(sd.vae, "decode", full)
    with pytest.raises(torch.OutOfMemoryError, match="by any method"):
        compare(sd, settings)


def test_sdxl_at_twice_its_size(sdxl, sdxl_folder):
    settings = CompareSettings(
        model=str(sdxl_folder), prompts=("a star",), steps=1, max_kv_tokens=100, methods="dense,todo,tome"
    )
    comparison = compare(sdxl, settings)
    assert comparison.pipeline == "StableDiffusionXLPipeline"
    assert (comparison.settings.height, comparison.settings.width) == (256, 256)
    pixels = [s.pixels for s in comparison.shots]
    assert pixels[0].shape == (256, 256, 3)
    assert not any(np.array_equal(pixels[0], other) for other in pixels[1:])


def test_not_finite_and_blacked_out_are_seen(sd, settings, monkeypatch):
    call = type(sd).__call__

    def broken(self, *args: Any, **kwargs: Any) -> Any:
        output = call(self, *args, **kwargs)
        output.images[0, 0, 0] = float("nan")
        return SimpleNamespace(images=output.images, nsfw_content_detected=[True])

    broken.__signature__ = __import__("inspect").signature(call)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(sd), "__call__", broken)
    comparison = compare(sd, replace(settings, prompts=("a star",), seeds=(0,)))
    assert all(not s.finite and s.blacked_out for s in comparison.shots)


def test_guidance_reaches_the_pipeline(sd, settings):
    settings = replace(settings, prompts=("a star",), seeds=(0,), methods="dense")
    pixels = [compare(sd, replace(settings, guidance=g)).shots[0].pixels for g in (None, 7.5, 1.0)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


class TestSized:
    """Height and width in pixels from what is given and what the model says."""

    def pipe(self, sample_size: Any, scale: int = 8) -> Any:
        unet = SimpleNamespace(config=FrozenDict(sample_size=sample_size))  # diffusers' own configurations are such
        return SimpleNamespace(unet=unet, vae_scale_factor=scale)

    @pytest.mark.parametrize(("sample", "size"), [(64, (1024, 1024)), ((64, 96), (1024, 1536)), ([32, 16], (512, 256))])
    def test_twice_the_normal(self, settings, sample, size):
        got = sized(replace(settings, height=None, width=None), self.pipe(sample))
        assert (got.height, got.width) == size

    def test_given_sizes_stay(self, settings):
        got = sized(replace(settings, height=64, width=None), self.pipe(64))
        assert (got.height, got.width) == (64, 1024)

    def test_a_coarser_vae_asks_for_more(self, settings):
        assert sized(settings, self.pipe(64, scale=32)).width == 96
        with pytest.raises(SettingError, match=r"height must be a multiple of 32 .*got 72"):
            sized(replace(settings, height=72), self.pipe(64, scale=32))

    def test_a_model_without_a_size(self, settings):
        with pytest.raises(SettingError, match="width must be given"):
            sized(replace(settings, width=None), self.pipe(None))
        assert sized(settings, self.pipe(None)).height == 64


def test_the_command_with_every_kind(run, sd_folder, tmp_path):
    small = [sd_folder, "--prompt", "a star", "--height", "64", "--width", "96", "--steps", "5", "--out", tmp_path]
    options = "--schedule search --prune-ratio 0.25 --cache-interval 2 --factor 2"
    ran = run("compare", *small, *options.split(), "--methods", "dense,todo,dato,dato:coco,todo+dato,deepcache")
    assert ran.code == 0, ran.err
    methods = {m["method"]: m for m in json.loads((tmp_path / "report.json").read_text())["methods"]}
    assert methods["dato"]["options"].items() >= {"schedule": "search", "prune_ratio": 0.25}.items()
    assert methods["dato:coco"]["options"]["schedule"] == "coco"
    assert methods["todo+dato"]["options"]["todo"]["factor"] == 2
    assert methods["deepcache"]["options"] == {"cache_interval": 2, "cache_branch_id": 0}
    for label, method in methods.items():
        assert label in ran.out
        assert method["speedup"] > 0 and len(method["images"]) == 1
    assert "DaTo:" not in ran.err


@pytest.mark.parametrize(
    ("option", "value"), [("--schedule", "nothing"), ("--prune-ratio", "0.9"), ("--cache-interval", "0")]
)
def test_the_command_refuses(run, sd_folder, tmp_path, option, value):
    ran = run("compare", sd_folder, option, value, "--out", tmp_path / "out")
    assert ran.code == 2 and ran.err.startswith(f"todo-attn: error: {option} must be")
    assert not (tmp_path / "out").exists()
