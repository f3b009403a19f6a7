"""Checkpoints in ComfyUI's single-file format with random weights, and the same UNets' configurations for diffusers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Structure:
    """One family of checkpoints: ComfyUI's configuration of its UNet, and diffusers' of the same."""

    name: str
    text: str  # what it is, for the results
    comfy: dict[str, Any]
    diffusers: dict[str, Any]

    @property
    def xl(self) -> bool:
        return self.comfy["adm_in_channels"] is not None


_SAME: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_checkpoint": False,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SD15 = Structure(
    "sd15",
    "Stable Diffusion 1.5's UNet and text encoder",
    {
        **_SAME,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
    {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "layers_per_block": 2,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
)
SDXL = Structure(
    "sdxl",
    "SDXL's UNet and text encoders, with 1 and 2 transformer blocks (Segmind-Vega's) in place of 2 and 10",
    {
        **_SAME,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "transformer_depth_middle": 2,
        "context_dim": 2048,
        "use_linear_in_transformer": True,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
    {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "layers_per_block": 2,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 1, 2],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)
# Small enough for a CPU: half as many blocks a level, and SDXL's coarser level at the width of its finer one.
SD15_SMALL = Structure(
    "sd15-small",
    "Stable Diffusion 1.5's UNet and text encoder, with one block a level in place of two",
    SD15.comfy
    | {
        "num_res_blocks": [1, 1, 1, 1],
        "transformer_depth": [1, 1, 1, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0],
    },
    SD15.diffusers | {"layers_per_block": 1},
)
SDXL_SMALL = Structure(
    "sdxl-small",
    "SDXL's UNet and text encoders, with one block a level (2 and 5 transformer blocks), 640 channels at both levels",
    SDXL.comfy
    | {
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 2],
        "transformer_depth": [0, 2, 5],
        "transformer_depth_output": [0, 0, 2, 2, 5, 5],
        "transformer_depth_middle": 5,
    },
    SDXL.diffusers
    | {
        "layers_per_block": 1,
        "block_out_channels": [320, 640, 640],
        "attention_head_dim": [5, 10, 10],
        "transformer_layers_per_block": [1, 2, 5],
    },
)
STRUCTURES = {structure.name: structure for structure in (SD15, SDXL, SD15_SMALL, SDXL_SMALL)}


def write_checkpoint(structure: Structure, path: Path) -> None:
    """Write ``path`` in fp16: the UNet, its text encoders, and a tiny autoencoder (TAESD), all with random weights.

    ComfyUI itself says how the tensors are called and shaped; it must be importable.
    """
    import comfy.model_detection
    import comfy.taesd.taesd

    config = comfy.model_detection.model_config_from_unet_config(structure.comfy)
    config.set_inference_dtype(torch.float16, None)
    with torch.device("meta"):
        model = config.get_model({}, "", device="meta")
        target = config.clip_target()
        clip = target.clip(device="meta", dtype=torch.float16)
        autoencoder = comfy.taesd.taesd.TAESD()
    tensors = model.state_dict_for_saving(
        model.diffusion_model.state_dict(), clip.state_dict(), autoencoder.state_dict()
    )
    generator = torch.Generator().manual_seed(0)
    save_file({name: _filled(name, tensor, generator) for name, tensor in tensors.items()}, path)


def write_config(structure: Structure, folder: Path) -> Path:
    """Write diffusers' configuration of the UNet where ``from_single_file`` looks for it; returns ``folder``."""
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "UNet2DConditionModel", **structure.diffusers}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return folder


def _filled(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Norms that change nothing, no biases, and weights that keep the variance of what they are given."""
    if name.endswith("position_ids"):
        return torch.arange(like.shape[-1]).expand(like.shape).contiguous()
    if name.endswith("vae_shift") or name.endswith("bias"):
        filled = torch.zeros(like.shape)
    elif like.ndim < 2:
        filled = torch.ones(like.shape)
    else:
        fan_in = like[0].numel() if "embedding" not in name else 2500
        filled = torch.randn(like.shape, generator=generator).div_(fan_in**0.5)
    if name.endswith("taesd_decoder.18.bias"):  # the last layer: images around grey
        filled += 0.5
    return filled.half()
