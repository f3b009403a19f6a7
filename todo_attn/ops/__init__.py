"""Public functions on tensors. Each is (or is made of) torch ops with a fake kernel and autograd: no diffusers here."""

from .attention import downsampled_attention
from .downsample import downsample_tokens

__all__ = ["downsample_tokens", "downsampled_attention"]
