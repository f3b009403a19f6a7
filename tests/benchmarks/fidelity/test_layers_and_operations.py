"""Errors of single self-attentions against direct computation, and counted operations."""

from dataclasses import replace

import pytest
import torch
from diffusers import PNDMScheduler
from fixtures.unets import ReferenceSelfAttention

from benchmarks.fidelity import operations
from benchmarks.fidelity.attention_error import PREDICTION, LayerErrors, fits
from benchmarks.fidelity.cases import Case
from benchmarks.fidelity.operations import Operations, kinds_of
from benchmarks.fidelity.store import Images
from todo_attn import ToDoConfig
from todo_attn.options.settings import CompareSettings
from todo_attn.predict.count import count_work

SIZE = (64, 64)


@pytest.fixture
def errors_of(settings, cases_of):
    """errors_of(pipe, "tome:0.5", ...) -> {(case, timestep, level, layer): error} and the LayerErrors."""

    def errors_of(pipe, *patterns):
        errors = LayerErrors(pipe, settings, Images(settings.prompts[:1]), SIZE, moments=2)
        cases = [case for case in cases_of(pipe, *patterns) if fits(case)]
        return {
            (row["case"], row["timestep"], row["level"], row["layer"]): row["error"]["value"]
            for row in errors.rows(cases)
        }, errors

    return errors_of


def self_attentions_of(unet, blocks, args, kwargs):
    """Input and output of each block's self-attention in a call."""
    seen = {}

    def keep(attn, args, kwargs, output):
        seen[attn] = args[0] if args else kwargs["hidden_states"], output

    handles = [block.attn1.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        unet(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return {block: seen[block.attn1] for block in blocks}


def test_a_layer_is_measured_on_its_dense_input(sd, errors_of):
    found, errors = errors_of(sd, "todo:factor=2")
    calls = errors._dense_calls(0)
    assert len(calls) == 2
    for args, kwargs in calls:
        seen = self_attentions_of(sd.unet, errors.blocks, args, kwargs)
        for block, (level, layer) in errors.blocks.items():
            x, dense = seen[block]
            with torch.no_grad():
                coarse = ReferenceSelfAttention((8 // level, 8 // level), 2)(block.attn1, x)
            expected = ((coarse - dense).norm() / dense.norm()).item()
            assert found["todo:factor=2", float(args[1]), level, layer] == pytest.approx(expected, rel=1e-3)
            assert expected > 1e-3


@pytest.mark.parametrize("case", ["tome:0.5", "dato:none:prune=0.4", "todo:level1=2"])
def test_only_the_layers_that_a_case_changes_err(sd, errors_of, case):
    found, _ = errors_of(sd, case)
    for (name, _, level, layer), error in found.items():
        changed = name != "dense" and (level == 1 or layer == PREDICTION)
        assert error > 1e-4 if changed else error == pytest.approx(0, abs=1e-5), (name, level, layer)


def test_sdxl_has_layers_too(sdxl, sdxl_folder, cases_of):
    settings = CompareSettings(model=str(sdxl_folder), prompts=("a",), steps=2, device="cpu")
    rows = LayerErrors(sdxl, settings, Images(("a",)), SIZE, 1).rows(cases_of(sdxl, "todo:factor=2"))
    assert {row["level"] for row in rows} == {2, None}


def test_which_cases_stand_by_themselves(sd, cases_of):
    names = {case.name for case in cases_of(sd, "*") if fits(case)}
    assert {"dense", "todo:factor=2", "tome:0.5", "dato:none:prune=0.4"} <= names
    assert not {"dato:coco", "dato:coco:prune=0", "deepcache:2", "dense:steps=1", "dense:enlarged=2"} & names


def test_dense_operations_are_those_of_every_call(sd, settings, cases_of):
    counted = Operations(sd, settings, "a").of(cases_of(sd, "dense")[0], SIZE)
    (work,) = count_work(sd.unet, *SIZE, [])
    assert counted == 3 * work.full.operations


def test_one_call_of_each_kind_counts_as_all_calls(sd, settings, cases_of, monkeypatch):
    """With PNDM, which calls the UNet twice at one timestep."""
    sd.scheduler = PNDMScheduler.from_config(sd.scheduler.config, skip_prk_steps=True)
    cases = cases_of(sd, "todo:factor=2:t=500-1000", "deepcache:2", "dato:coco", steps=4)
    counter = Operations(sd, replace(settings, steps=4), "a")
    short = {case.name: counter.of(case, SIZE) for case in cases}
    assert len(set(short.values())) == len(cases)
    monkeypatch.setattr(operations, "kinds_of", lambda case, timesteps: list(range(len(timesteps))))
    assert {case.name: counter.of(case, SIZE) for case in cases} == short


def test_counting_leaves_the_pipeline_alone(sd, settings, cases_of):
    before = [(name, list(m._forward_pre_hooks)) for name, m in sd.unet.named_modules()]
    Operations(sd, settings, "a").of(cases_of(sd, "tome:0.5")[1], SIZE)
    assert before == [(name, list(m._forward_pre_hooks)) for name, m in sd.unet.named_modules()]
    assert kinds_of(cases_of(sd, "dense")[0], torch.arange(3)) == [False] * 3


def test_kinds_follow_the_timesteps_and_the_share_of_steps():
    case = Case("todo", "todo", ToDoConfig(2, timestep_range=(0, 700), steps=(0, 0.75)))
    assert kinds_of(case, torch.tensor([900, 600, 300, 0])) == [False, True, True, False]
