"""The peak memory of a part of a program."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")
OUT_OF_MEMORY = "out of memory"
MAY_FIT = "a smaller --height and --width, or --dtype float16, may fit"  # a command's advice
# What torch says on a CPU and on MPS, in a plain RuntimeError.
_MESSAGES = "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", OUT_OF_MEMORY


def watch_peak(device: torch.device) -> Callable[[], int | None]:
    """Start watching; the returned function gives the peak since then, in bytes, or None if it is not known.

    On CUDA: the most that torch held there. On the CPU, under Linux: the most resident memory of the process above what
    was resident at the start, by the kernel's high-water mark, which is reset. Freed memory is given back to the kernel
    first, so that what ran before makes no difference.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return lambda: None
    _give_back_freed_memory()
    try:
        # "5" resets the mark to what is resident now (proc_pid_clear_refs(5)); some sandboxes do not allow it.
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
        before = _status_bytes("VmRSS")
    except (OSError, LookupError):
        return lambda: None
    return lambda: max(0, _status_bytes("VmHWM") - before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory, of a GPU or of the machine, ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MESSAGES)


def _status_bytes(key: str) -> int:
    for line in (_PROCESS / "status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024  # "1234 kB"
    raise LookupError(key)


def _give_back_freed_memory() -> None:
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's
