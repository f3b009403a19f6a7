"""The fixtures of this folder."""

import pytest
import torch
from fixtures.features import SmallNetwork, draw
from fixtures.pipelines import *  # noqa: F403

from benchmarks.fidelity.cases import cases_for, chosen
from benchmarks.fidelity.reference import Reference
from benchmarks.fidelity.run import Plan, Run
from benchmarks.fidelity.store import Images, Store, identity
from todo_attn.compare.features import Network
from todo_attn.compare.workers import Workers
from todo_attn.diffusers.levels import transformers_by_level
from todo_attn.options.settings import CompareSettings

CPU = torch.device("cpu")


@pytest.fixture
def settings(sd_folder):
    return CompareSettings(
        model=str(sd_folder), prompts=("a hill", "a lake by night"), steps=3, warmup_steps=1, device="cpu"
    )


@pytest.fixture
def cases_of():
    """cases_of(pipe, "todo:*", ...) -> the cases that match, dense first."""

    def cases_of(pipe, *patterns, steps=3):
        return chosen(cases_for(sorted({level for level, _ in transformers_by_level(pipe.unet)}), steps), patterns)

    return cases_of


@pytest.fixture
def make_run(settings, cases_of):
    """make_run(pipe, patterns, **plan) -> a run of these cases at 64 x 64, with a network."""

    def make_run(pipe, patterns, *, tell=lambda line: None, **plan):
        plan = {
            "images": Images(settings.prompts, 2),
            "sizes": [(64, 64)],
            "network": Network(SmallNetwork(), "small", CPU),
            **plan,
        }
        return Run(pipe, Plan(settings, cases=cases_of(pipe, *patterns), **plan), Workers(CPU), tell)

    return make_run


@pytest.fixture
def open_store(tmp_path, settings):
    """open_store(pipe, name) -> the folder ``name`` for runs of ``pipe``."""

    def open_store(pipe, name="images", per_prompt=2, **given):
        about = {"steps": settings.steps, "guidance": settings.guidance, **given}
        return Store(tmp_path / name, identity(pipe, Images(settings.prompts, per_prompt), **about))

    return open_store


@pytest.fixture
def true_images():
    return Reference(draw, 12, "drawn")
