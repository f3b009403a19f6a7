"""What runs if no model is named: the landscapes, if they are trained, with their judge and true scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from todo_attn.options.settings import SHIPPED_GUIDANCE

LANDSCAPES = Path(__file__).parents[2] / "examples" / "landscapes"
# Of scenes that no training has seen. Prompts and true images are drawn alike, so that their distances mean something.
PROMPT_SEED, TRUE_SEED = 20_240_221, 20_250_101
PROMPTS = 16


@dataclass(frozen=True)
class Defaults:
    """Of the options; None and empty if there are none."""

    model: str | None = None
    steps: int | None = None
    guidance: float | None = None
    prompts: tuple[str, ...] = ()
    features: str | None = None
    reference: str | None = None


def defaults() -> Defaults:
    """Of this checkout."""
    if not (LANDSCAPES / "pipeline" / "model_index.json").is_file():
        return Defaults()
    from examples.landscapes.scenes import scene_of_index

    judged = (LANDSCAPES / "judge.py").is_file()
    return Defaults(
        str(LANDSCAPES / "pipeline"),
        25,
        SHIPPED_GUIDANCE,
        tuple(scene_of_index(PROMPT_SEED, index).caption() for index in range(PROMPTS)),
        "examples.landscapes.judge:load_judge" if judged else None,
        f"{__name__}:true_scene",
    )


def true_scene(index: int, height: int, width: int) -> np.ndarray:
    """A landscape by the renderer that the pipeline was trained on: (height, width, 3) float32 in [0, 1]."""
    from examples.landscapes.scenes import render, scene_of_index

    return render(scene_of_index(TRUE_SEED, index), height, width)
