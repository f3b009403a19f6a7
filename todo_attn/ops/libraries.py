"""Load the compiled libraries, and say why one is not available.

Each library registers kernels for the ops of :mod:`todo_attn.ops.tokens` on one device type. Libraries contain no
Python, so they are loaded by path, not imported. Without them the ops use their torch kernels, with the same results.

Environment: TODO_ATTN_LIBRARIES=0 loads none, to compare or to work around a problem.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parents[1]
_NAMES = {"cpu": "_C_cpu", "cuda": "_C_cuda"}
_NOT_BUILT = (
    "{name} was not built (torch and a C++ compiler{more} must be there at build time: "
    "pip install --no-build-isolation todo_attn)"
)
_OPS = ("gather_tokens", "scatter_tokens", "scatter_tokens_", "recover_tokens", "select_base_tokens")
_reasons: dict[str, str | None] = {}
# GPUs that a loaded library has no code for.
_foreign: dict[int | None, str] = {}
_registrations: list[torch.library.Library] = []  # they last as long as these objects


def unavailable_reason(device_type: str, index: int | None = None) -> str | None:
    """Why the compiled ops cannot run on a device type, as half a sentence; None if they can.

    Args:
        index: of one GPU; None asks whether there is any that they can run on.
        device_type: "cpu", "cuda", or another of torch's device types, for which there is no library. On a machine with
            a GPU "cuda" initialises CUDA, because the answer is not known before.
    """
    if device_type not in _NAMES:
        return f"there is no compiled library for {device_type!r}"
    if device_type == "cuda" and device_type not in _reasons:
        if not torch.cuda.is_available():
            return "torch sees no GPU that it can use"
        torch.cuda.init()
        if device_type not in _reasons:  # load() was not called
            _load_cuda()
    reason = _reasons.get(device_type, "it has not been loaded")
    return reason if reason is not None or device_type != "cuda" else _foreign.get(index)


def load() -> None:
    """Load the libraries that can run here, and remember why the others cannot. Never raises.

    The CUDA library is loaded when CUDA is initialised. The GPUs are known only then, and an import must not initialise
    CUDA, because a process that has done so cannot fork.
    """
    if os.environ.get("TODO_ATTN_LIBRARIES", "1") == "0":
        _reasons.update(dict.fromkeys(_NAMES, "TODO_ATTN_LIBRARIES=0 is set"))
        return
    _reasons["cpu"] = _processor_unavailable_reason() or _attempt("cpu")
    if torch.version.cuda is None:
        _reasons["cuda"] = "this torch is built without CUDA"
    elif torch.cuda.is_initialized() or not hasattr(torch.cuda, "_lazy_call"):
        _load_cuda()
    else:
        torch.cuda._lazy_call(_load_cuda)


def _load_cuda() -> None:
    torch_kernels = (
        _kernels("CUDA") if hasattr(torch.library, "get_kernel") else []
    )  # before torch 2.10 no library loads
    _reasons["cuda"] = _attempt("cuda")
    if _reasons["cuda"] is None and _foreign:
        _divide("CUDA", torch_kernels)


def _kernels(key: str) -> list[Any]:
    """The kernels that the ops run on a device type now."""
    return [torch.library.get_kernel(f"todo_attn::{op}", key) for op in _OPS]


def _divide(key: str, torch_kernels: list[Any]) -> None:
    """Give the GPUs that a library has no code for back to torch's kernels, op by op; the others keep the library."""

    def kernel_of(compiled: Any, torchs: Any) -> Callable[..., Any]:
        def kernel(keys: Any, x: torch.Tensor, *rest: Any) -> Any:
            return (torchs if x.device.index in _foreign else compiled).call_boxed(keys, x, *rest)

        return kernel

    registration = torch.library.Library("todo_attn", "IMPL")
    _registrations.append(registration)
    for op, compiled, torchs in zip(_OPS, _kernels(key), torch_kernels, strict=True):
        registration.impl(op, kernel_of(compiled, torchs), key, with_keyset=True, allow_override=True)


def _processor_unavailable_reason() -> str | None:
    """On x86 the CPU library needs AVX2 (setup.py); torch knows what this processor supports."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() in ("x86_64", "AMD64") and not capability.startswith("AVX"):
        return f"the processor has no AVX2 (torch uses {capability})"
    return None


def _attempt(device_type: str) -> str | None:
    """Load one library; returns why it cannot be used, or None."""
    name = _NAMES[device_type]
    path = next(iter(sorted(_FOLDER.glob(f"{name}.*"))), None)
    if path is None:
        return _NOT_BUILT.format(name=name, more=" and nvcc" if device_type == "cuda" else "")
    try:
        torch.ops.load_library(str(path))
        # A library that cannot run here registers nothing and says why.
        library = ctypes.CDLL(str(path))
        ask = getattr(library, f"todo_attn_{device_type}_unavailable_reason", None)
    except Exception as error:  # of any kind: the torch kernels serve
        return f"{path.name} does not load: {' '.join(str(error.__cause__ or error).split())}"
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    reason = ask().decode() or None
    ask_of = getattr(library, f"todo_attn_{device_type}_unavailable_reason_on", None)
    if reason is None and ask_of is not None:
        ask_of.restype = ctypes.c_char_p
        for index in range(torch.cuda.device_count()):
            if why := ask_of(index).decode():
                _foreign[index] = why
    return reason
