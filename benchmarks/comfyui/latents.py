"""Latents that ComfyUI saved, and how far two lie apart."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def read_latent(path: Path) -> torch.Tensor:
    """The latent in a file of ComfyUI's ``SaveLatent``, in fp32."""
    return load_file(path)["latent_tensor"].float()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, over the standard deviation of ``b``."""
    return float(((a - b).abs().max() / b.std()).item())
