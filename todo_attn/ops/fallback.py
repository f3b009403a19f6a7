"""If Triton cannot compile or launch here, torch serves: which failures count as that, and what is known of them.

A failure belongs to the machine (no C compiler, a cache folder that is not writable) or to one kind of call (a kernel
that does not fit the GPU). It is logged once, and :func:`reason` has it from then on.
"""

from __future__ import annotations

import subprocess
import textwrap
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from ..config.checks import ArgumentError
from ..logs import logger, one_line

_Result = TypeVar("_Result")

# By device, or by device, dtype and head_dim (None: the match kernel, which takes any number of channels); those of the
# backward, which leave the forward alone, also by "backward".
_failures: dict[tuple[object, ...], str] = {}
_lock = threading.Lock()

# Of the CUDA driver's errors, those of a kernel that does not fit the GPU or its driver. Any other may come from an
# earlier kernel of the caller's, and torch would not run either.
_OF_THE_KERNEL = (
    "no kernel image",
    "kernel image is invalid",
    "ptx",
    "invalid device function",
    "named symbol not found",
    "too many resources requested for launch",
    "invalid argument",
)


def reason(device: torch.device, dtype: torch.dtype, head_dim: int | None = None, backward: bool = False) -> str | None:
    """Why Triton failed on such tensors before, as half a sentence; None if it did not.

    ``backward``: of attention, which fails if its forward does.
    """
    if not _failures:
        return None
    found = _failures.get((device,)) or _failures.get((device, dtype, head_dim))
    return found or (_failures.get((device, dtype, head_dim, "backward")) if backward else None)


def attempt(
    launch: Callable[[], _Result],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int | None,
    required: bool,
    backward: bool = False,
    again: bool = False,
) -> _Result | None:
    """The result of ``launch``, which compiles and launches Triton kernels; None if Triton cannot on such tensors.

    Nothing is launched if it failed on such tensors before, unless it is ``required``. If a configuration that
    ``todo-attn tune`` chose fails, the shipped one is tried.

    Raises:
        ArgumentError: Triton cannot, and is ``required``.
        Exception: whatever else ``launch`` raised: out of memory, a failure of the GPU.
    """
    if not required and reason(device, dtype, head_dim, backward) is not None:
        return None
    try:
        return launch()
    except Exception as error:
        if not _is_of_triton(error):
            raise
        if not again and not backward and not _is_of_the_machine(error):
            from ..kernels import tuned

            if tuned.give_up(device, dtype, head_dim, error):
                return attempt(launch, device, dtype, head_dim, required, again=True)
        why = _remember(error, device, dtype, head_dim, backward)
        if required:
            raise ArgumentError("backend", f"must be 'auto' or 'torch' here, got 'triton': {why}") from error
        return None


def _is_of_triton(error: Exception) -> bool:
    """Whether Triton could not compile or launch, and torch's own kernels may still run."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, getattr(torch, "AcceleratorError", MemoryError))):
        return False
    message = str(error)
    if "[CUDA]" in message or "CUDA error" in message:  # of Triton, and of torch before AcceleratorError
        return any(words in message.lower() for words in _OF_THE_KERNEL)
    return True


def _is_of_the_machine(error: Exception) -> bool:
    """Whether every kernel would fail likewise."""
    return isinstance(error, (OSError, subprocess.SubprocessError, ImportError)) or "C compiler" in str(error)


def _remember(error: Exception, device: torch.device, dtype: torch.dtype, head_dim: int | None, backward: bool) -> str:
    """Keep why Triton failed, and log it if it is new; returns it as half a sentence."""
    text = one_line(error)
    if isinstance(error, subprocess.CalledProcessError):
        text = f"the C compiler failed, perhaps for want of Python's headers (python3-dev): {text}"
    text = textwrap.shorten(f"Triton failed: {text}", 400, placeholder=" ...")
    whole = _is_of_the_machine(error)
    with _lock:
        known = reason(device, dtype, head_dim, backward)
        if known is not None:
            return known
        of_kernel = (device, dtype, head_dim, *(["backward"] if backward else []))
        _failures[(device,) if whole else of_kernel] = text
    kernel = "matching" if head_dim is None else "the backward of " * backward + f"head_dim {head_dim}"
    of = "" if whole else f" for {kernel} in {str(dtype).removeprefix('torch.')}"
    logger.warning("on %s%s torch's own operations serve from now on: %s", device, of, text)
    return text
