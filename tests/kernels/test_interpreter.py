"""The tests' own mending of Triton's interpreter: a product is the same on every host, and at every place."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here"),
    pytest.mark.usefixtures("bf16_in_the_interpreter"),
]


@triton.jit
def product_kernel(a, b, c, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    start = tl.load(c + m * N + n)
    rows, columns = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    tl.store(c + m * N + n, tl.dot(rows, columns, start, input_precision="ieee"))


def refuses(*_, **__):
    raise AssertionError("numpy's matmul is its BLAS, which differs by host")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(16, 16, 16), (32, 64, 128), (128, 32, 64)], ids=str)
def test_equal_columns_have_equal_products_wherever_they_stand(monkeypatch, dtype, size):
    m, k, n = size
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, 1).to(dtype).repeat(1, n)
    b[:, 1::3] = torch.randn(k, 1).to(dtype)
    start = torch.randn(m, 1).repeat(1, n)
    c = start.clone()
    monkeypatch.setattr(np, "matmul", refuses)
    product_kernel[(1,)](a, b, c, m, k, n)
    assert torch.equal(c[:, 1::3], c[:, 1:2].expand_as(c[:, 1::3]))
    assert torch.equal(c[:, 2::3], c[:, :1].expand_as(c[:, 2::3]))
    exact = a.double() @ b.double() + start.double()
    torch.testing.assert_close(c.double(), exact, rtol=2.0**-23, atol=1e-12)  # rounded once
