"""From which kept token each token is recovered: what is left of a pruning plan after its searches, in one launch.

A kept token's source is its own place among the kept ones. A pruned token has two candidates, its best base token and
its best match among the other kept tokens; which of them wins is a rule of ``todo_attn.ops.pruning``, whose torch
operations this kernel repeats exactly. One program serves BLOCK tokens::

    token = a kept token, or else a pruned one
    if it is pruned:
        winner = its base token, or its rival if that is more similar; of a tie the lower token
        place = how many kept tokens lie before the winner        # a binary search: kept tokens ascend
    source[token] = place
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import COMPILER
from .plan import Launch, layout, planned

BLOCK = 128
OPTIONS: dict[str, object] = {"num_warps": 4, **COMPILER}


@triton.jit
def sources_kernel(
    kept,  # (B, K) int64, contiguous, ascending
    gone,  # (B, G) int64, contiguous: the pruned tokens
    first,  # (B, G) int64: each pruned token's number among those that are no base tokens
    base,  # (B, M) int64, contiguous: the position of each one's best base token in ``bases``
    similarity,  # (B, M) fp32, contiguous: its similarity
    bases,  # (B, Nb) int64
    place,  # (B, G) int64, contiguous: the position of each pruned token's best match in ``stays``
    rival_similarity,  # (B, G) fp32, contiguous: its similarity
    stays,  # (B, S) int64: the other kept tokens
    source,  # (B, N) int64, contiguous
    stride_first,
    stride_bases,
    stride_stays,
    kept_count,
    gone_count,
    others,  # M
    halvings,  # of the binary search: 2**halvings > K
    step,  # similarities closer than this tie
    RIVALS: tl.constexpr,  # whether there is any other kept token
    BLOCK: tl.constexpr,
):
    tokens = kept_count + gone_count
    blocks = tl.cdiv(tokens, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    entry = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    is_kept = entry < kept_count
    is_gone = (entry >= kept_count) & (entry < tokens)
    own = tl.load(kept + b * kept_count + entry, mask=is_kept, other=0)
    pruned = b * gone_count + entry - kept_count
    number = b * others + tl.load(first + b * stride_first + entry - kept_count, mask=is_gone, other=0)
    winner = tl.load(bases + b * stride_bases + tl.load(base + number, mask=is_gone, other=0), mask=is_gone, other=0)
    if RIVALS:
        at = tl.load(place + pruned, mask=is_gone, other=0)
        rival = tl.load(stays + b * stride_stays + at, mask=is_gone, other=0)
        ahead = tl.load(rival_similarity + pruned, mask=is_gone, other=0.0)
        ahead = ahead - tl.load(similarity + number, mask=is_gone, other=0.0)
        better = tl.where(ahead > step, rival, tl.minimum(winner, rival))
        winner = tl.where(ahead >= -step, better, winner)
    before = tl.zeros([BLOCK], tl.int32)
    for i in range(0, halvings):
        further = before + (1 << (halvings - 1 - i))
        inside = is_gone & (further < kept_count)
        reached = tl.load(kept + b * kept_count + further, mask=inside, other=0) <= winner
        before = tl.where(inside & reached, further, before)
    token = tl.where(is_kept, own, tl.load(gone + pruned, mask=is_gone, other=0))
    tl.store(source + b * tokens + token, tl.where(is_kept, entry, before).to(tl.int64), mask=is_kept | is_gone)


def sources(
    kept: torch.Tensor,
    gone: torch.Tensor,
    first: torch.Tensor,
    base: torch.Tensor,
    similarity: torch.Tensor,
    bases: torch.Tensor,
    place: torch.Tensor | None,
    rival_similarity: torch.Tensor | None,
    stays: torch.Tensor,
    step: float,
) -> torch.Tensor:
    """Launch the kernel: source (B, N) int64. The arguments are those of the kernel, each with a last stride of 1.

    Contiguous arguments must start at a multiple of 16 bytes, as all memory that torch allocates does. ``place`` and
    ``rival_similarity`` are None if there is no other kept token.
    """
    (batch, kept_count), gone_count = kept.shape, gone.shape[1]
    tokens = kept_count + gone_count
    source = kept.new_empty((batch, tokens))

    def launch() -> Launch:
        return Launch(
            sources_kernel,
            batch * triton.cdiv(tokens, BLOCK),
            [
                *(x.stride(0) for x in (first, bases, stays)),
                kept_count,
                gone_count,
                base.shape[1],
                kept_count.bit_length(),
                step,
            ],
            {"RIVALS": place is not None, "BLOCK": BLOCK},
            OPTIONS,
        )

    with torch.cuda.device_of(kept):
        key = "sources", kept_count, base.shape, layout(first), layout(bases), layout(stays), place is None, step
        plan = planned(key, launch)
        plan(kept, gone, first, base, similarity, bases, place, rival_similarity, stays, source)
    return source
