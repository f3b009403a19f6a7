"""The compiled token operations: loading them, and why they are not in use where they are not.

Each library adds kernels to the ops of :mod:`todo_attn.ops.tokens` for one kind of device. They are found by path, not
imported: there is no Python in them. Without one, the ops run on their torch kernels and give the same results.

Environment: TODO_ATTN_LIBRARIES=0 loads none of them, to compare or to work around one.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

_FOLDER = Path(__file__).parents[1]
_NAMES = {"cpu": "_C_cpu", "cuda": "_C_cuda"}
_NOT_BUILT = (
    "{name} was not built (torch and a C++ compiler{more} must be there at build time: "
    "pip install --no-build-isolation todo_attn)"
)
_reasons: dict[str, str | None] = {}


def why_not(device_type: str) -> str | None:
    """None where the compiled token operations serve tensors on such devices, else the reason, as half a sentence.

    Args:
        device_type: "cpu", "cuda", or another of torch's device types, for which there is no library. For "cuda" on a
            machine with a GPU this initialises CUDA, since only then it is known.
    """
    if device_type not in _NAMES:
        return f"there is no compiled library for {device_type!r}"
    if device_type == "cuda" and device_type not in _reasons:
        if not torch.cuda.is_available():
            return "torch sees no GPU that it can use"
        torch.cuda.init()
        if device_type not in _reasons:  # nothing had been asked to load it
            _load_cuda()
    return _reasons.get(device_type, "it has not been loaded")


def load() -> None:
    """Loads what can run here and keeps the reason for what cannot; never raises.

    The CUDA library waits until CUDA is initialised: which GPUs there are is only known then, and importing a package
    must not be what initialises it (a process that has cannot fork).
    """
    if os.environ.get("TODO_ATTN_LIBRARIES", "1") == "0":
        _reasons.update(dict.fromkeys(_NAMES, "TODO_ATTN_LIBRARIES=0 is set"))
        return
    _reasons["cpu"] = _why_not_processor() or _attempt("cpu")
    if torch.version.cuda is None:
        _reasons["cuda"] = "this torch is built without CUDA"
    elif torch.cuda.is_initialized() or not hasattr(torch.cuda, "_lazy_call"):
        _load_cuda()
    else:
        torch.cuda._lazy_call(_load_cuda)


def _load_cuda() -> None:
    _reasons["cuda"] = _attempt("cuda")


def _why_not_processor() -> str | None:
    """The CPU library is compiled for AVX2 on x86 (setup.py); torch knows what this processor has."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() in ("x86_64", "AMD64") and not capability.startswith("AVX"):
        return f"the processor has no AVX2 (torch uses {capability})"
    return None


def _attempt(device_type: str) -> str | None:
    """Loads one library; the reason where it cannot be used."""
    name = _NAMES[device_type]
    path = next(iter(sorted(_FOLDER.glob(f"{name}.*"))), None)
    if path is None:
        return _NOT_BUILT.format(name=name, more=" and nvcc" if device_type == "cuda" else "")
    try:
        torch.ops.load_library(str(path))
        # A library that finds that it cannot run here has registered nothing, and says why.
        ask = getattr(ctypes.CDLL(str(path)), f"todo_attn_{device_type}_why_not", None)
    except Exception as error:  # whatever it is, torch's own kernels do the work
        return f"{path.name} does not load: {' '.join(str(error.__cause__ or error).split())}"
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    return ask().decode() or None
