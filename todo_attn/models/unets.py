"""UNets made from a configuration alone (shapes, or random weights: the time does not depend on them) and inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel

from ..config.checks import ArgumentError

TEXT_TOKENS = 77
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

    Attention logits then spread by about 1, and nothing overflows in fp16. Takes seconds, not minutes: each weight is
    drawn once, in place.
    """
    unet = on_meta(config)
    torch.nn.Module.to(unet, dtype)  # diffusers' own would warn of float32 weights, though there are none
    unet.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for key, parameter in unet.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(float(key.endswith("weight")), 0.02, generator=generator)
    return unet


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A second module tree over the same weights: processors and hooks set on one do not affect the other."""
    shared = {id(tensor): tensor for tensors in (unet.parameters(), unet.buffers()) for tensor in tensors}
    return copy.deepcopy(unet, shared)


def empty_inputs(unet: UNet2DConditionModel, batch: int, height: int, width: int) -> dict[str, Any]:
    """Uninitialized arguments of a call, all but the timestep, on torch's default device.

    Args:
        batch: of the call, twice the images under guidance.
        height, width: in latents.

    Raises:
        ArgumentError: ``unet`` needs inputs other than text, sizes and class labels.
    """
    config: Any = unet.config
    text = config.encoder_hid_dim or config.cross_attention_dim
    text = text if isinstance(text, int) else text[0]
    inputs: dict[str, Any] = {
        "sample": torch.empty(batch, config.in_channels, height, width),
        "encoder_hidden_states": torch.empty(batch, TEXT_TOKENS, text),
    }
    if config.addition_embed_type == "text_time":
        sizes = 6
        pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch, pooled),
            "time_ids": torch.empty(batch, sizes),
        }
    elif config.addition_embed_type not in (None, "text"):  # "text" is computed from encoder_hidden_states
        raise ArgumentError(
            "unet", f"must have no addition_embed_type but 'text' and 'text_time', got {config.addition_embed_type!r}"
        )
    if config.num_class_embeds is not None and config.class_embed_type is None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    elif config.class_embed_type is not None:
        raise ArgumentError("unet", f"must have no class_embed_type, got {config.class_embed_type!r}")
    return inputs


def random_inputs(unet: UNet2DConditionModel, batch: int, height: int, width: int, seed: int = 1) -> dict[str, Any]:
    """:func:`empty_inputs` filled with normal noise, on the device of ``unet`` and in its dtype; class labels are 0."""
    generator = torch.Generator(unet.device).manual_seed(seed)

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: filled(value) for name, value in part.items()}
        if not part.is_floating_point():
            return part
        return torch.randn(part.shape, generator=generator, device=unet.device, dtype=unet.dtype)

    with torch.device(unet.device):
        inputs: dict[str, Any] = filled(empty_inputs(unet, batch, height, width))
    return inputs
