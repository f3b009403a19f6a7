"""Each method acts while it is on, and leaves the pipeline exactly as it was."""

import sys
from typing import Any

import pytest
import tomesd
import tomesd.patch
import torch

from todo_attn import apply_todo, remove_todo
from todo_attn.compare_settings import CompareSettings, Method, SettingError
from todo_attn.diffusers.methods import bind

METHODS = ["todo:2", "tome:0.5"]


def settings_for(folder, methods: str, **given: Any) -> CompareSettings:
    return CompareSettings(model=str(folder), methods=f"dense,{methods}", **({"height": 128, "width": 192} | given))


def bound(pipe, folder, methods: str, **given: Any):
    settings = settings_for(folder, methods, **given)
    return bind(settings.parsed_methods()[1], pipe, settings)


def call(unet, height: int = 16, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, height, width, generator=generator)
    words = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    conditions = {"text_embeds": torch.ones(2, 16), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return unet(sample, 500, words, added_cond_kwargs=conditions).sample


def census(unet) -> list[tuple[Any, ...]]:
    """All that a method could have touched: classes, processors, attributes, hooks."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [
        (
            name,
            type(module),
            id(module.__dict__.get("processor")),
            sorted(module.__dict__),
            *(list(module.__dict__[h]) for h in hooks),
        )
        for name, module in unet.named_modules()
    ]


@pytest.mark.parametrize("raises", [False, True], ids=["", "raising"])
@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_acts_and_leaves_no_trace(request, model, methods, raises):
    pipe, folder = request.getfixturevalue(model), request.getfixturevalue(f"{model}_folder")
    before, dense = census(pipe.unet), call(pipe.unet)
    method = bound(pipe, folder, methods)
    assert census(pipe.unet) == before
    try:
        with method.applied():
            within = call(pipe.unet)
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert within.isfinite().all()
    assert not torch.equal(within, dense)
    assert census(pipe.unet) == before
    assert torch.equal(call(pipe.unet), dense)


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
        call(pipe.unet)
    handle.remove()
    tokens = 16 * 24 // finest**2
    assert seen == [tokens - tokens // 4]


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (15, 23), (9, 31)])
def test_tome_works_at_any_size(sd, sd_folder, size):
    with bound(sd, sd_folder, "tome:0.75").applied():
        assert call(sd.unet, *size).isfinite().all()


def test_tome_missing_is_said(sd, sd_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomesd", None)
    before = census(sd.unet)
    method = bound(sd, sd_folder, "tome")
    assert "pip install tomesd" in method.unavailable
    assert census(sd.unet) == before


@pytest.mark.parametrize(("given", "name"), [(("todo", "64=2"), "factor"), (("todo:64=2", "auto"), "methods")])
def test_a_level_that_the_model_lacks(sd, sd_folder, given, name):
    before = census(sd.unet)
    with pytest.raises(SettingError, match=f"^{name} .*must name levels .*1, 2 or 'finest', got 64"):
        bound(sd, sd_folder, given[0], factor=given[1])
    assert census(sd.unet) == before


@pytest.mark.parametrize("methods", ["todo", "tome"])
def test_refuses_a_pipeline_that_is_not_as_loaded(sd, sd_folder, methods):
    apply_todo(sd)
    with pytest.raises(ValueError, match="remove_todo"):
        bound(sd, sd_folder, methods)
    remove_todo(sd)
    tomesd.apply_patch(sd.unet)
    with pytest.raises(ValueError, match="remove_patch"):
        bound(sd, sd_folder, methods)
