"""Each method acts while it is on, and leaves the pipeline exactly as it was."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tomesd
import tomesd.patch
import torch
from DeepCache import DeepCacheSDHelper

from todo_attn import ToDoConfig, apply_todo, remove_todo
from todo_attn.compare.bind import bind, calls_of
from todo_attn.config import schedule
from todo_attn.diffusers.dato import apply_dato, remove_dato
from todo_attn.models.pipelines import load_pipeline
from todo_attn.options.methods import Method, SettingError
from todo_attn.options.settings import CompareSettings

METHODS = ["todo:2", "tome:0.5", "dato", "dato:search", "todo+dato", "deepcache", "deepcache:2"]


def settings_for(folder, methods: str, **given: Any) -> CompareSettings:
    return CompareSettings(model=str(folder), methods=f"dense,{methods}", **({"height": 128, "width": 192} | given))


def bound(pipe, folder, methods: str, **given: Any):
    settings = settings_for(folder, methods, **given)
    return bind(settings.parsed_methods()[1], pipe, settings)


def call(pipe, height: int = 16, width: int = 24) -> torch.Tensor:
    """The outputs of the first two calls of a run: caches act from the second."""
    unet = pipe.unet
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, height, width, generator=generator)
    words = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    conditions = {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)}
    pipe.scheduler.set_timesteps(30)
    with torch.no_grad():
        outputs = [unet(sample, t, words, added_cond_kwargs=conditions).sample for t in pipe.scheduler.timesteps[:2]]
    return torch.cat(outputs)


def census(unet) -> list[tuple[Any, ...]]:
    """All that a method could have touched: classes, processors, attributes, hooks.

    A module's own forward set on the module is as none: diffusers' hooks leave that behind.
    """
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [
        (
            name,
            type(module),
            id(module.__dict__.get("processor")),
            sorted(module.__dict__.keys() - {"forward"}),
            module.forward,
            *(list(module.__dict__[h]) for h in hooks),
        )
        for name, module in unet.named_modules()
    ]


@pytest.mark.parametrize("raises", [False, True], ids=["", "raising"])
@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_acts_and_leaves_no_trace(request, model, methods, raises):
    pipe, folder = request.getfixturevalue(model), request.getfixturevalue(f"{model}_folder")
    before, dense = census(pipe.unet), call(pipe)
    method = bound(pipe, folder, methods, factor="2")
    assert census(pipe.unet) == before
    try:
        with method.applied():
            within = call(pipe)
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert within.isfinite().all()
    assert not torch.equal(within, dense)
    assert census(pipe.unet) == before
    assert torch.equal(call(pipe), dense)


def test_leaves_no_trace_where_applying_fails_halfway(sd, sd_folder, monkeypatch):
    method = bound(sd, sd_folder, "tome")
    before = census(sd.unet)

    def fail(block_class):
        raise RuntimeError("halfway")

    monkeypatch.setattr(tomesd.patch, "make_diffusers_tome_block", fail)
    with pytest.raises(RuntimeError, match="halfway"), method.applied():
        pass
    assert census(sd.unet) == before


def test_dense_is_the_pipeline_itself(sd, sd_folder):
    before = census(sd.unet)
    settings = settings_for(sd_folder, "todo")
    with bind(Method("dense"), sd, settings).applied():
        assert census(sd.unet) == before


def test_todo_takes_the_configuration(sd, sd_folder):
    given = {"factor": "3", "max_kv_tokens": 7, "mode": "mean"}
    assert (
        bound(sd, sd_folder, "todo", **given).options.items()
        >= {"factor": 3, "max_kv_tokens": 7, "mode": "mean"}.items()
    )
    assert bound(sd, sd_folder, "todo:1=4+2=2", **given).options["factor"] == {1: 4, 2: 2}
    # 1024 x 2304: sqrt(1024 * 2304) / 512 = 3
    assert bound(sd, sd_folder, "todo:paper", height=1024, width=2304).options["factor"] == {"finest": 3}


@pytest.mark.parametrize(("model", "finest"), [("sd", 1), ("sdxl", 2)])
def test_tome_merges_on_the_finest_level_that_attends(request, model, finest):
    pipe, folder = request.getfixturevalue(model), request.getfixturevalue(f"{model}_folder")
    options = bound(pipe, folder, "tome:0.25").options
    assert options == {"ratio": 0.25, "max_downsample": finest}
    seen = []
    handle = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn1")).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    with bound(pipe, folder, "tome:0.25").applied():
        call(pipe)
    handle.remove()
    tokens = 16 * 24 // finest**2
    assert seen == [tokens - tokens // 4] * 2


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (15, 23), (9, 31)])
def test_tome_works_at_any_size(sd, sd_folder, size):
    with bound(sd, sd_folder, "tome:0.75").applied():
        assert call(sd, *size).isfinite().all()


@pytest.mark.parametrize(("methods", "package"), [("tome", "tomesd"), ("deepcache", "DeepCache")])
def test_a_missing_package_is_said(sd, sd_folder, monkeypatch, methods, package):
    monkeypatch.setitem(sys.modules, package, None)
    before = census(sd.unet)
    method = bound(sd, sd_folder, methods)
    assert f"pip install {package}" in method.unavailable
    assert census(sd.unet) == before


def draw(pipe, steps: int) -> None:
    pipe("a star", height=64, width=64, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))


def counter(module: torch.nn.Module) -> Callable[[], int]:
    """How often ``module`` has been computed since."""
    calls: list[None] = []
    module.register_forward_hook(lambda module, args, output: calls.append(None))
    return lambda: len(calls)


@pytest.mark.parametrize("methods", ["dato", "dato:search", "todo+dato:run7-fast"])
def test_dato_computes_what_the_schedule_says(sd, sd_folder, methods):
    method = bound(sd, sd_folder, methods, steps=20, factor="2", height=64, width=64)
    full = counter(sd.unet.mid_block.resnets[0])
    last = counter(sd.unet.up_blocks[-1].resnets[-1])
    with method.applied():
        draw(sd, 20)
    digits = schedule.resample(schedule.load(methods.partition(":")[2] or "coco").digits, 19)
    assert method.options["cache_schedule"] == digits
    assert full() == 1 + digits.count("2") and last() == 20 - digits.count("0")
    assert 0 < digits.count("2") < 19 and digits.count("0")


def test_dato_without_a_schedule_only_prunes():
    settings = CompareSettings(methods="dense,dato:none,todo+dato", schedule="none", steps=4)
    _, alone, both = settings.parsed_methods()
    for method in (alone, both):
        config = settings.dato_config(method, 5, 512, 512)
        assert (config.cache_schedule, config.prune_ratio) == (None, 0.4)


@pytest.mark.parametrize(("scheduler", "calls"), [("ddim", 6), ("pndm", 7), ("heun", 11), ("euler", 6)])
def test_dato_is_made_for_the_calls_of_a_picture(sd_folder, caplog, scheduler, calls):
    settings = settings_for(sd_folder, "dato", scheduler=scheduler, steps=6, device="cpu")
    pipe = load_pipeline(settings)
    pipe.set_progress_bar_config(disable=True)
    timesteps = pipe.scheduler.timesteps
    assert calls_of(pipe.scheduler, 6) == calls
    method = bind(settings.parsed_methods()[1], pipe, settings)
    assert pipe.scheduler.timesteps is timesteps
    assert len(method.options["cache_schedule"]) == calls - 1
    seen = counter(pipe.unet)
    with method.applied():
        draw(pipe, 6)
    assert seen() == calls
    assert not caplog.records


def test_dato_takes_its_options(sd, sd_folder, tmp_path):
    file = tmp_path / "mine.json"
    schedule.save(schedule.Schedule("1020"), file)
    given = {"schedule": str(file), "prune_ratio": 0.25, "steps": 5, "factor": "2", "max_kv_tokens": 9}
    dato, both, other = (bound(sd, sd_folder, m, **given).options for m in ("dato", "todo+dato", "dato:search"))
    assert dato.items() >= {"schedule": str(file), "cache_schedule": "1020", "prune_ratio": 0.25, "todo": None}.items()
    assert both["todo"].items() >= {"factor": 2, "max_kv_tokens": 9}.items()
    assert (both["cache_schedule"], other["schedule"]) == ("1020", "search")


def test_dato_of_one_call_has_nothing_to_reuse(sd, sd_folder):
    method = bound(sd, sd_folder, "dato", steps=1)
    assert method.options["cache_schedule"] is None
    with method.applied():
        draw(sd, 1)


@pytest.mark.parametrize(("methods", "full"), [("deepcache", 2), ("deepcache:2", 3), ("deepcache:1", 6)])
def test_deepcache_computes_in_full_at_its_interval(sd, sd_folder, methods, full):
    seen = counter(sd.unet.mid_block.resnets[0])
    with bound(sd, sd_folder, methods).applied():
        draw(sd, 6)
    assert seen() == full


def test_deepcache_leaves_what_offloading_has_put_there(sd, sd_folder):
    block = sd.unet.mid_block
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs)
    offloaded = block.forward
    with bound(sd, sd_folder, "deepcache").applied():
        assert block.forward is not offloaded
    assert block.forward is offloaded


def test_deepcache_leaves_no_trace_where_enabling_fails_halfway(sd, sd_folder, monkeypatch):
    method = bound(sd, sd_folder, "deepcache")
    before = census(sd.unet)
    wrap = DeepCacheSDHelper.wrap_block_forward

    def failing(self, block, name, *args, **kwargs):
        if name == "mid_block":
            raise RuntimeError("halfway")
        wrap(self, block, name, *args, **kwargs)

    monkeypatch.setattr(DeepCacheSDHelper, "wrap_block_forward", failing)
    with pytest.raises(RuntimeError, match="halfway"), method.applied():
        pass
    assert census(sd.unet) == before


@pytest.mark.parametrize(("given", "name"), [
    (("todo", "64=2"), "factor"), (("todo:64=2", "auto"), "methods"), (("todo+dato", "64=2"), "factor"),
    (("todo+dato:search", "64=2"), "factor"),
])  # fmt: skip
def test_a_level_that_the_model_lacks(sd, sd_folder, given, name):
    before = census(sd.unet)
    with pytest.raises(SettingError, match=f"^{name} .*must name levels .*1, 2 or 'finest', got 64"):
        bound(sd, sd_folder, given[0], factor=given[1])
    assert census(sd.unet) == before


@pytest.mark.parametrize(("methods", "name"), [
    ("dato", "schedule"), ("todo+dato", "schedule"), ("dato:landscapes-8", "methods")
])  # fmt: skip
def test_a_schedule_with_a_level_that_the_model_lacks(sd, sd_folder, tmp_path, monkeypatch, methods, name):
    found = schedule.load("landscapes-8")
    lacking = replace(found, todo=ToDoConfig({64: 2}))
    (tmp_path / "found.json").write_text(schedule.dumps(lacking))
    monkeypatch.setattr(schedule, "_shipped", lambda: {found.name: lacking})
    before = census(sd.unet)
    message = rf"^{name} .*must fit the model: factor must name levels .*1, 2 or 'finest', got 64"
    with pytest.raises(SettingError, match=message):
        bound(sd, sd_folder, methods, schedule=str(tmp_path / "found.json"))
    assert census(sd.unet) == before


def test_a_unet_that_dato_cannot_take(sd, sd_folder):
    sd.unet.up_blocks[-1].resnets = sd.unet.up_blocks[-1].resnets[:1]
    with pytest.raises(SettingError, match=r"^methods has 'dato', which the pipeline cannot take: .*2 layers"):
        bound(sd, sd_folder, "dato")


@pytest.mark.parametrize("methods", ["dense", "todo", "tome", "dato", "deepcache"])
def test_refuses_a_pipeline_that_is_not_as_loaded(sd, sd_folder, methods):
    def refused(advice: str) -> None:
        settings = settings_for(sd_folder, "todo")
        with pytest.raises(ValueError, match=advice):
            bind(Method(methods), sd, settings)

    apply_todo(sd)
    refused("remove_todo")
    remove_todo(sd)
    apply_dato(sd)
    refused("remove_dato")
    remove_dato(sd)
    tomesd.apply_patch(sd.unet)
    refused("remove_patch")
    tomesd.remove_patch(sd.unet)
    for module in sd.unet.modules():
        module.__dict__.pop("_tome_info", None)
    helper = DeepCacheSDHelper(sd)
    helper.set_params()
    helper.enable()
    refused("helper.disable")
    helper.disable()
    bind(Method(methods), sd, settings_for(sd_folder, "todo"))
