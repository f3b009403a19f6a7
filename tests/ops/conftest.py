"""Shared by the tests of the ops."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from todo_attn.ops import backends


class _WatchTensors(TorchDispatchMode):
    """Within, ``largest`` is the number of elements of the largest tensor that an op has returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture
def watch_tensors():
    return _WatchTensors


@pytest.fixture
def bf16_in_the_interpreter(monkeypatch):
    """Triton's interpreter keeps bf16 as its bits and computes with those; here it computes with the numbers.

    Products and arithmetic in fp32, results rounded to nearest even, as on a GPU. Nothing to do where there is one.
    """
    if torch.cuda.is_available():
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(np.array(handle.data, dtype=np.uint16))
        return TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)

    def rounded(handle):
        values = torch.from_numpy(np.array(handle.data, dtype=np.float32))
        return TensorHandle(values.to(torch.bfloat16).view(torch.uint16).numpy(), tl.bfloat16)

    cast, binary, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return rounded(cast(self, numbers(src), tl.float32))
        return cast(self, numbers(src), dst_type)

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        result = binary(self, numbers(lhs), numbers(rhs), op)
        return result if result.data.dtype == np.bool_ else rounded(result)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(self, numbers(a), numbers(b), d, input_precision, max_num_imprecise_acc)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "binary_op", binary_op)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    refuses = backends.why_not_triton

    def why_not_triton(device, dtype, head_dim=None):
        return refuses(device, torch.float16 if dtype == torch.bfloat16 else dtype, head_dim)

    monkeypatch.setattr(backends, "why_not_triton", why_not_triton)
