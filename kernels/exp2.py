"""exp2 of a tile, one element in eight by polynomial: for a loop that exp2 holds back.

A Hopper SM computes 16 exp2 a clock and 128 multiply-adds, so at small head dims exp2 takes longer than the matrix
products. A polynomial for some of the elements moves work from the busy unit to one with time to spare.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Registers 0 to 7 are the results, 8 to 15 the first operand, 16 to 23 the second. What is not picked is dead code: the
# assembler drops the instructions that computed it.
_PICK: tl.constexpr = tl.constexpr("mov.b32 $0, $8;" + "".join(f" mov.b32 ${i}, ${16 + i};" for i in range(1, 8)))
_REGISTERS: tl.constexpr = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 16))
_INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _one_in_eight(rare, often):
    """Every eighth element of ``rare``, the others of ``often``: (M, N) fp32 each. Which ones is up to the layout."""
    if _INTERPRETED:
        return tl.where(tl.arange(0, rare.shape[1])[None, :] % 8 == 0, rare, often)
    return tl.inline_asm_elementwise(_PICK, _REGISTERS, [rare, often], dtype=tl.float32, is_pure=True, pack=8)


@triton.jit
def exp2_polynomial(x):
    """2^x for x below 127, to 7.5e-5 of its value (fp16's rounding step is 13 times that); at least about 2^-126."""
    # Below -126 the exponent would wrap. NaN must not pass for a small score: it ends up too large for fp16 and bf16.
    x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
    whole = x + 12582912.0  # 1.5 * 2^23: rounds to a whole number, which then stands in the lowest bits
    x -= whole - 12582912.0  # in [-1/2, 1/2]; below its minimax cubic
    y = ((0.055171624 * x + 0.242611119) * x + 0.693260994) * x + 0.999928074
    return (y.to(tl.int32, bitcast=True) + (whole.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp2_mixed(x):
    """2^x of a (M, N) fp32 tile, one element in eight by polynomial."""
    return _one_in_eight(exp2_polynomial(x), tl.exp2(x))
