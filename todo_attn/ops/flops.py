"""Operation counts for ``torch.utils.flop_counter``. Only importing this module registers them, because torch's counter
imports Triton."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from . import attention, matching  # noqa: F401  (they define the ops)


@register_flop_formula([torch.ops.todo_attn.downsampled_attention, torch.ops.todo_attn.downsampled_attention_lse])
def downsampled_attention_flops(  # type: ignore[no-untyped-def]
    query, key, value, grid, coarse, *args, **kwargs
) -> int:
    """4 * B * H * N * M * D for M coarse keys; a multiply-add counts as two. The counter passes shapes, not tensors."""
    batch, tokens, heads, head_dim = query
    keys = coarse[0] * coarse[1]
    return 4 * batch * heads * tokens * keys * head_dim


@register_flop_formula(torch.ops.todo_attn.downsampled_attention_backward)
def downsampled_attention_backward_flops(  # type: ignore[no-untyped-def]
    grad, query, key, value, out, grid, coarse, *args, **kwargs
) -> int:
    """Five products where the forward has two, as torch counts its own attention: one recomputes the scores."""
    return downsampled_attention_flops(query, key, value, grid, coarse) * 5 // 2


@register_flop_formula(torch.ops.todo_attn.downsampled_attention_lse_backward)
def downsampled_attention_lse_backward_flops(  # type: ignore[no-untyped-def]
    grad, query, key, value, out, lse, grid, coarse, *args, **kwargs
) -> int:
    """As above. The Triton kernels compute the scores and their gradients twice, which is not counted."""
    return downsampled_attention_flops(query, key, value, grid, coarse) * 5 // 2


@register_flop_formula(torch.ops.todo_attn.match_tokens)
def match_tokens_flops(x, query_index, key_index, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """One product of every query with every key: 2 * B * Q * K * C."""
    return 2 * query_index[0] * query_index[1] * key_index[1] * x[2]
