"""Choose the backend of an op, and say why Triton cannot run."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

from ..config.checks import ArgumentError
from . import fallback
from .tracing import constant_in_graphs

BACKENDS = ("auto", "triton", "torch")
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_CAPABILITY = (8, 0)


# torch.compile cannot trace these (up to torch 2.11), so they are called while tracing.
@constant_in_graphs
def _installed() -> bool:
    if "triton" in sys.modules:  # None there forbids the import
        return sys.modules["triton"] is not None
    return importlib.util.find_spec("triton") is not None


@constant_in_graphs
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@constant_in_graphs
def _gpu_unavailable_reason(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are not tuned or tested on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


@constant_in_graphs
def _failure(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    return fallback.reason(device, dtype, head_dim)


def triton_unavailable_reason(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on such tensors, as half a sentence; None if they can, as far as is known.

    Whether Triton compiles and launches is known after the first call. ``head_dim``: of attention; None for a kernel
    that takes any number of channels.
    """
    if not _installed():
        return "Triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"dtype {dtype} is not one of fp16, bf16, fp32"
    if head_dim is not None and (head_dim % 8 or not 8 <= head_dim <= 256):
        return f"head_dim {head_dim} is not a multiple of 8 from 8 to 256"
    if device.type == "cpu" and _interpreting():
        # Triton's interpreter computes bf16 dot products wrongly (seen with 3.9).
        return "Triton's interpreter does not compute bf16 products" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"device {device.type!r} is not an NVIDIA GPU"
    return _gpu_unavailable_reason(device) or _failure(device, dtype, head_dim)


def choose(backend: object, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """Resolve ``backend`` to "triton" or "torch"; ``head_dim`` as in :func:`triton_unavailable_reason`.

    An op that was asked for "auto" and gets "triton" runs it by :func:`todo_attn.ops.fallback.attempt`.

    "auto" chooses Triton for fp16 and bf16 on a GPU that can run it. In fp32 its exact products do not use the tensor
    cores, and the interpreter is slow.

    Raises:
        ArgumentError: an unknown backend, or "triton" if it cannot run here, with the reason.
    """
    if backend not in BACKENDS:
        raise ArgumentError("backend", f"must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "torch":
        return "torch"
    if backend == "auto" and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16)):
        return "torch"
    reason = triton_unavailable_reason(device, dtype, head_dim)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ArgumentError("backend", f"must be 'auto' or 'torch' here, got 'triton': {reason}")
    return "torch"
