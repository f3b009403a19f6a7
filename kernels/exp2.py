"""exp2 of a tile with one element in eight by polynomial, for loops that exp2 limits.

A Hopper SM computes 16 exp2 and 128 multiply-adds per clock, so at small head dims exp2 takes longer than the matrix
products. A polynomial for some elements moves work from the busy unit to an idle one (as FlashAttention-4 does).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Registers 0 to 7 hold the results, 8 to 15 the first operand, 16 to 23 the second. The assembler drops the
# instructions that compute what is not picked.
_PICK: tl.constexpr = tl.constexpr("mov.b32 $0, $8;" + "".join(f" mov.b32 ${i}, ${16 + i};" for i in range(1, 8)))
_REGISTERS: tl.constexpr = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 16))
_INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _one_in_eight(rare, often):
    """One element in eight from ``rare``, the others from ``often``, (M, N) fp32 each; the layout decides which."""
    if _INTERPRETED:
        return tl.where(tl.arange(0, rare.shape[1])[None, :] % 8 == 0, rare, often)
    return tl.inline_asm_elementwise(_PICK, _REGISTERS, [rare, often], dtype=tl.float32, is_pure=True, pack=8)


@triton.jit
def exp2_polynomial(x):
    """2^x for x below 127, at least about 2^-126, with a relative error of 7.5e-5 (fp16's step is 13 times that)."""
    # Below -126 the exponent would wrap. NaN must not become a small number: it gives one too large for fp16 and bf16.
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    whole = x + 12582912.0  # 1.5 * 2^23: rounds to an integer and leaves it in the lowest bits
    x -= whole - 12582912.0  # in [-1/2, 1/2]; a minimax cubic follows
    y = ((0.055171624 * x + 0.242611119) * x + 0.693260994) * x + 0.999928074
    return (y.to(tl.int32, bitcast=True) + (whole.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp2_mixed(x):
    """2^x of an (M, N) fp32 tile, one element in eight by polynomial."""
    return _one_in_eight(exp2_polynomial(x), tl.exp2(x))
