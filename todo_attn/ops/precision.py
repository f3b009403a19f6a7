"""The precision of products, whatever the caller has set for their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def as_given(x: torch.Tensor) -> AbstractContextManager[object]:
    """Turn autocast off within: the fake kernels promise the dtypes of the arguments."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@contextmanager
def exact(x: torch.Tensor) -> Iterator[None]:
    """Compute products within in the dtype of their operands: no autocast, and no TF32 or bf16 for fp32."""
    products: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [p.fp32_precision for p in products]
    for p in products:
        p.fp32_precision = "ieee"
    try:
        with as_given(x):
            yield
    finally:
        for p, precision in zip(products, before, strict=True):
            p.fp32_precision = precision
