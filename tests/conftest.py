"""Shared by all tests. Without a GPU the kernels run in Triton's interpreter, which must be chosen before import."""

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

torch.set_num_threads(1)  # the suite runs in several processes


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): of pytest-xdist, which may not be here")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _this_process_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """How a benchmark sets its allocator lasts as long as its process, in which other tests measure memory."""
    monkeypatch.setattr("todo_attn.machine.keep_freed_memory", lambda: False)


@pytest.fixture
def needs_memory():
    """needs_memory(gib) skips the test where less is available; psutil, which knows, is not on every GPU machine."""

    def needs_memory(gib: float) -> None:
        table = Path("/proc/meminfo")
        found = re.search(r"MemAvailable:\s*(\d+) kB", table.read_text()) if table.exists() else None
        if found is None or int(found[1]) < gib * 2**20:
            pytest.skip(f"needs {gib} GiB of memory that is known to be available")

    return needs_memory


@pytest.fixture(scope="session", autouse=True)
def _products_in_the_interpreter() -> Iterator[None]:
    """Triton's interpreter multiplies by numpy's BLAS, which rounds equal columns differently by their place on some
    processors; here every element is summed in the same order, in fp64, and rounded once to the accumulator's dtype.

    einsum on its own (``optimize=False``) is a plain loop. A product of numbers of at most 32 bits is exact in fp64, so
    fusing it with the sum changes nothing.
    """
    if torch.cuda.is_available() or find_spec("triton") is None:
        yield
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *how):
        if a.dtype.primitive_bitwidth == 8:  # integers, which numpy multiplies without BLAS
            return dot(self, a, b, d, *how)
        product = np.einsum("...ik,...kj->...ij", a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


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

    from todo_attn.ops import backends

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

    def get_bf16(self, value):
        return rounded(TensorHandle(np.array([value], dtype=np.float32), tl.float32))

    if not hasattr(InterpreterBuilder, "get_bf16"):  # Triton 3.6
        monkeypatch.setattr(InterpreterBuilder, "get_bf16", get_bf16, raising=False)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "binary_op", binary_op)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    refuses = backends.triton_unavailable_reason

    def triton_unavailable_reason(device, dtype, head_dim=None):
        return refuses(device, torch.float16 if dtype == torch.bfloat16 else dtype, head_dim)

    monkeypatch.setattr(backends, "triton_unavailable_reason", triton_unavailable_reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
