"""The cases: their names, what they ask for, and that each leaves a pipeline as it was."""

import pytest
import torch

from benchmarks.fidelity.cases import Case, bind_checked, cases_for, chosen
from todo_attn import DaToConfig, ToDoConfig, apply_todo
from todo_attn.config.checks import ArgumentError
from todo_attn.config.schedule import Schedule, named, save


def census(unet):
    """All that a method could have touched."""
    hooks = ("_forward_pre_hooks", "_forward_hooks")
    return [
        (
            name,
            type(m),
            id(m.__dict__.get("processor")),
            sorted(m.__dict__.keys()),
            *(list(m.__dict__[h]) for h in hooks),
        )
        for name, m in unet.named_modules()
    ]


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_every_case_goes_on_and_off(request, model, cases_of):
    pipe = request.getfixturevalue(model)
    before = census(pipe.unet)
    for case in cases_of(pipe, "*"):
        bound = bind_checked(case, pipe, case.steps_of(3))
        assert bound.unavailable is None
        with bound.applied():
            assert case.todo or case.dato or case.tome_ratio or case.cache_interval or census(pipe.unet) == before
        assert census(pipe.unet) == before, case.name


def test_cases_follow_the_model_and_the_steps():
    names = [case.name for case in cases_for([2, 4], 10)]
    assert names[0] == "dense"
    assert len(names) == len(set(names))
    assert {"todo:level2=2", "todo:level4=2", "dense:steps=5", "tome:0.75", "deepcache:10"} <= set(names)
    (both,) = [case for case in cases_for([2, 4], 10) if case.name == "todo:factor=2:steps=5"]
    assert both.steps_of(10) == 5 and both.todo == ToDoConfig(2)
    assert not {"todo:level1=2", "dense:steps=10"} & set(names)
    assert {f"dato:{name}" for name in named()} <= set(names)
    assert [case.name for case in cases_for([1], 1) if case.name.startswith("dense:steps")] == []


def test_a_schedule_that_was_found_is_a_case(tmp_path):
    file = tmp_path / "front-03.json"
    save(Schedule("2101", prune_ratio=0.2, todo=ToDoConfig({1: 2})), file)
    case = cases_for([1], 5, [file])[-1]
    assert case.name.startswith("dato:front-03-") and (case.family, case.schedule) == ("found", "front-03")
    assert case.dato == DaToConfig(0.2, cache_schedule="2101", todo=ToDoConfig({1: 2}))
    save(Schedule("2101", prune_ratio=0.4), file)
    assert cases_for([1], 5, [file])[-1].name != case.name  # another one, whose images are others
    with pytest.raises(ArgumentError, match=r"^schedules must be given once each, got 'dato:front-03-.*' twice"):
        cases_for([1], 5, [file, file])
    with pytest.raises(ArgumentError, match=r"^schedules must be files of schedules: .*absent.json"):
        cases_for([1], 5, [tmp_path / "absent.json"])


def test_globs_pick_cases_and_dense():
    cases = cases_for([1], 10)
    assert [case.name for case in chosen(cases, ["tome:0.5", "deepcache:[23]"])] == [
        "dense", "tome:0.5", "deepcache:2", "deepcache:3",
    ]  # fmt: skip
    with pytest.raises(ArgumentError, match=r"^cases must be names or globs .* got 'todo:fast'"):
        chosen(cases, ["tome:0.5", "todo:fast"])


@pytest.mark.parametrize(
    ("smaller", "size", "made"), [(1, (520, 200), (520, 200)), (2, (512, 256), (256, 128)), (1.5, (64, 16), (40, 16))]
)
def test_a_smaller_size_is_one_that_pipelines_make(smaller, size, made):
    assert Case("x", "x", smaller=smaller).size_of(*size) == made


def test_a_schedule_fits_the_calls_of_the_run(sd):
    (case,) = [case for case in cases_for([1], 50) if case.name == "dato:coco"]
    assert len(case.bind(sd, 7).options["cache_schedule"]) == 6
    assert case.bind(sd, 1).options["cache_schedule"] is None


def test_what_a_pipeline_cannot_take(sd, cases_of):
    (case,) = chosen(cases_for([64], 3), ["todo:level64=2"])[1:]
    with pytest.raises(ArgumentError, match=r"^cases has 'todo:level64=2', which the pipeline cannot take"):
        bind_checked(case, sd, 3)
    apply_todo(sd)
    with pytest.raises(ArgumentError, match="remove_todo"):
        bind_checked(cases_of(sd, "tome:0.5")[1], sd, 3)


def test_a_missing_package_is_no_error(sd, cases_of, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "tomesd" in bind_checked(cases_of(sd, "tome:0.5")[1], sd, 3).unavailable


def test_dense_draws_nothing_from_the_generator(sd, cases_of):
    state = torch.get_rng_state()
    bind_checked(cases_of(sd, "dense")[0], sd, 3)
    assert torch.equal(torch.get_rng_state(), state)
