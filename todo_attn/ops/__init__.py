"""Public functions on tensors. Each is (or is made of) torch ops with a fake kernel and autograd: no diffusers here."""

from . import libraries
from .attention import downsampled_attention
from .downsample import downsample_tokens
from .matching import match_tokens, register_fake_of_library
from .pruning import plan_pruning
from .tokens import gather_tokens, recover_tokens, scatter_tokens, scatter_tokens_, select_base_tokens

# The ops are defined by now; the compiled libraries add kernels to them.
libraries.load()
register_fake_of_library()

__all__ = [
    "downsample_tokens",
    "downsampled_attention",
    "gather_tokens",
    "match_tokens",
    "plan_pruning",
    "recover_tokens",
    "scatter_tokens",
    "scatter_tokens_",
    "select_base_tokens",
]
