"""The fixtures of this folder."""

import diffusers
import pytest
from fixtures.pipelines import *  # noqa: F403

from todo_attn.options.settings import CompareSettings

# Schedules alone; 4 new candidates in each of 2 generations after the first.
PLAN = {"metric": "latents", "population": 4, "generations": 3, "prune_ratios": (0.0,)}


@pytest.fixture(scope="session")
def settings(sd_folder):
    """Two images of 32 x 32 pixels in 4 calls of the UNet."""
    prompts = ("a hill", "a lake by night")
    return CompareSettings(model=str(sd_folder), prompts=prompts, steps=4, height=32, width=32, device="cpu")


@pytest.fixture(scope="session")
def whole(sd_folder, settings, tmp_path_factory):
    """What a search finds that nothing disturbs, and its folder, which nothing may change."""
    pytest.importorskip("pymoo")
    from todo_attn.search import Plan, search

    folder = tmp_path_factory.mktemp("whole") / "search"
    return search(diffusers.StableDiffusionPipeline.from_pretrained(sd_folder), settings, Plan(**PLAN), folder), folder


@pytest.fixture
def searched(sd, settings, tmp_path):
    """searched("folder", **plan) -> what the same search finds in that folder, or another one."""
    pytest.importorskip("pymoo")
    from todo_attn.search import Plan, search

    def searched(name, pipe=sd, watch=None, workers=None, **plan):
        return search(pipe, settings, Plan(**{**PLAN, **plan}), tmp_path / name, workers, watch)

    return searched
