"""exp2 with one element in eight by polynomial, in Triton's interpreter (on a GPU where there is one)."""

import torch
import triton
import triton.language as tl

from todo_attn.kernels.exp2 import exp2_mixed, exp2_polynomial

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def apply(x, out, POLYNOMIAL: tl.constexpr):
    at = tl.arange(0, 64)[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(x + at)
    tl.store(out + at, exp2_polynomial(value) if POLYNOMIAL else exp2_mixed(value))


def run(x, polynomial):
    out = torch.empty(64, 128, device=DEVICE)
    apply[(1,)](x.float().expand(64, 128).contiguous().to(DEVICE), out, POLYNOMIAL=polynomial)
    return out.cpu()


def test_polynomial_is_within_its_bound():
    """7.5e-5 of the value, from the smallest normal number to what a shift's rounding leaves above 0, and beyond."""
    x = torch.linspace(-125, 100, 64 * 128, dtype=torch.float32).view(64, 128)
    exact = torch.exp2(x.double())
    error = ((run(x, True).double() - exact) / exact).abs()
    assert 7e-5 < error.max() < 7.6e-5


def test_mixed_takes_one_in_eight():
    x = torch.linspace(-20, 0, 64 * 128, dtype=torch.float32).view(64, 128)
    exact = torch.exp2(x.double())
    error = ((run(x, False).double() - exact) / exact).abs()
    assert error.max() < 7.6e-5
    assert 0.05 < (error > 1e-6).double().mean() <= 0.125


def test_far_below_is_nothing_and_nan_is_not_small():
    for far in (-127.0, -1e6, -3.4e38, float("-inf")):
        assert run(torch.full((64, 128), far), False).abs().max() <= 2.0**-126
    # As the attention stores it; the polynomial's NaN may be a number too large for fp16.
    assert not torch.isfinite(run(torch.full((64, 128), float("nan")), False).half()).any()
