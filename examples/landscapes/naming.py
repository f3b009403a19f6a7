"""A second task for the text encoder: the pooled caption must name what the scene shows.

From noise alone, left and right look the same to the loss until the UNet has learned where it stands, and the encoder
gives both words one embedding. Then nothing is left to tell them apart: 6,400 steps did not. Linear heads that read
each attribute from the pooled embedding keep the words apart, and the UNet follows within a hundred steps.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from . import processes
from .model import tokenize
from .scenes import GROUNDS, MOUNTAINS, PLACES, SKIES, TIMES, random_scene

ATTRIBUTES = {
    "time": list(TIMES),
    "mountains": list(MOUNTAINS),
    "ground": list(GROUNDS),
    "sky": list(SKIES),
    "place": list(PLACES),
}
WEIGHT = 0.05  # beside the UNet's loss of about 0.1
CAPTIONS = 64  # of random scenes, in each step


def build_heads(width: int) -> torch.nn.ModuleDict:
    """One linear head an attribute, on the pooled embedding of ``width`` channels."""
    return torch.nn.ModuleDict({name: torch.nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})


def naming_loss(model: torch.nn.ModuleDict, heads: torch.nn.ModuleDict, tokenizer, rng: np.random.Generator):
    """The cross-entropy of all attributes over full captions, and the share of right answers for the place."""
    scenes = processes.part([random_scene(rng) for _ in range(CAPTIONS)])
    words = model["text_encoder"](tokenize(tokenizer, [scene.caption() for scene in scenes]))[0]
    pooled = model["unet"].add_embedding(words)
    loss = 0.0
    for name, values in ATTRIBUTES.items():
        answers = torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
        logits = heads[name](pooled)
        loss = loss + F.cross_entropy(logits, answers)
    right = (logits.argmax(1) == answers).float().mean()  # of the last, the place
    return loss, right.item()
