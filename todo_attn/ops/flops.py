"""What an attention costs, for ``torch.utils.flop_counter``. Importing this module registers it; nothing else does."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from . import attention  # noqa: F401  (defines the op)


@register_flop_formula(torch.ops.todo_attn.downsampled_attention)
def downsampled_attention_flops(  # type: ignore[no-untyped-def]
    query, key, value, grid, factor, *args, **kwargs
) -> int:
    """4 * B * H * N * M * D with M coarse keys, a multiply-add as two; shapes in, as the counter hands them over."""
    batch, tokens, heads, head_dim = query
    keys = (grid[0] // factor[0]) * (grid[1] // factor[1])
    return 4 * batch * heads * tokens * keys * head_dim
