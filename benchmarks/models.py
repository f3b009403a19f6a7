"""The UNets that the benchmarks know by name, and the timesteps of a run."""

from __future__ import annotations

from typing import Any

import torch

from todo_attn.models import architectures

TRAINING_STEPS = 1000
_TINY = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
# "tiny" is for the benchmarks' own tests.
CONFIGS: dict[str, dict[str, Any]] = {**architectures.CONFIGS, "tiny": _TINY}


def timesteps(device: torch.device, calls: int) -> torch.Tensor:
    """The timesteps of a run of ``calls`` calls, evenly down from 999: (calls,) int64.

    Raises:
        ValueError: fewer than 1 or more than the 1000 that there are.
    """
    if not 1 <= calls <= TRAINING_STEPS:
        raise ValueError(f"calls must be from 1 to {TRAINING_STEPS}, got {calls}")
    return torch.arange(calls, 0, -1, device=device) * TRAINING_STEPS // calls - 1
