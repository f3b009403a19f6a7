"""What diffusers makes of the same checkpoint, text, noise and steps: dense, or under ``apply_todo``.

The text encoders and the sampler's noise levels are ComfyUI's, so that only the UNets differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from todo_attn import ToDoConfig, apply_todo, remove_todo

from .workflow import Task


class Reference:
    """diffusers' UNet from a single file, and what ComfyUI gives its own."""

    def __init__(self, checkpoint: Path, config: Path, prompt: str) -> None:
        """``config``: a folder with diffusers' configuration of the UNet."""
        import comfy.sd
        from diffusers import UNet2DConditionModel

        patcher, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)
        self.text, self.pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
        self.sampling = patcher.get_model_object("model_sampling")
        self.scale = patcher.model.latent_format.scale_factor
        del patcher, clip  # the memory is needed
        self.unet = UNet2DConditionModel.from_single_file(
            str(checkpoint), config=str(config), subfolder="unet", local_files_only=True, torch_dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def latent(self, task: Task, config: ToDoConfig | None) -> torch.Tensor:
        """The latent that Euler's method ends at, as ComfyUI saves it: (1, 4, height / 8, width / 8)."""
        import comfy.sample
        import comfy.samplers

        shape = (1, 4, task.height // 8, task.width // 8)
        noise = comfy.sample.prepare_noise(torch.zeros(shape), task.seed)
        sigmas = comfy.samplers.calculate_sigmas(self.sampling, "normal", task.steps).tolist()
        extra = self._extra(task)
        if config is not None:
            apply_todo(self.unet, config)
        try:
            x = noise * (1 + sigmas[0] ** 2) ** 0.5
            for sigma, following in pairwise(sigmas):
                timestep = self.sampling.timestep(torch.tensor([sigma])).float()
                scaled = x / (sigma**2 + 1) ** 0.5
                change = self.unet(scaled, timestep, self.text.float(), **extra).sample
                x = x + change * (following - sigma)
        finally:
            if config is not None:
                remove_todo(self.unet)
        return x / self.scale

    def _extra(self, task: Task) -> Mapping[str, Any]:
        if self.unet.config["addition_embed_type"] is None:
            return {}
        size = (task.height, task.width)
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
        return {"added_cond_kwargs": {"text_embeds": self.pooled.float(), "time_ids": ids}}
