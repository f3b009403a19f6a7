"""UNets made from a configuration alone: their shapes, or random weights on which time does not depend."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel

# As small as a UNet with self-attention can be.
SMALLEST: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def on_meta(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The UNet of ``config`` without memory for its weights."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    return unet.eval()


def with_random_weights(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> UNet2DConditionModel:
    """The UNet of ``config`` with weights drawn so that every layer keeps its input's scale (about 1).

    Attention logits then spread by about 1, and nothing overflows in fp16. Seconds, not minutes: each weight is drawn
    once, where it stays.
    """
    unet = on_meta(config)
    torch.nn.Module.to(unet, dtype)  # diffusers' own warns of weights that must stay in float32, though there are none
    unet.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for key, parameter in unet.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(float(key.endswith("weight")), 0.02, generator=generator)
    return unet


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Another module tree over the same weights, so that what is done to one (processors, hooks) leaves the other."""
    shared = {id(tensor): tensor for tensors in (unet.parameters(), unet.buffers()) for tensor in tensors}
    return copy.deepcopy(unet, shared)
