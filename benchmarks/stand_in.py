"""Triton's own launcher without a GPU: a driver that takes every launch and computes nothing (``stand_in.c``).

Kernels are compiled for the architecture and "launched" on tensors of the CPU. So host time can be measured, launches
counted and Triton's errors met; outputs are whatever lay in memory.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

from todo_attn.ops import backends, fallback

_SOURCE = Path(__file__).with_suffix(".c")


def unavailable_reason() -> str | None:
    """Why there can be no stand-in here; None if there can."""
    if torch.cuda.is_available():
        return "there is a GPU"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return None if shutil.which("gcc") else "gcc is not installed"


def build(folder: Path) -> Path:
    """Compile the driver into ``folder``, as libcuda.so.1; returns ``folder``."""
    include = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include"  # type: ignore[union-attr, arg-type]
    flags = ("-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-I", str(include))
    subprocess.run(["gcc", *flags, str(_SOURCE), "-o", str(folder / "libcuda.so.1")], check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    return folder


class StandIn:
    """A GPU of compute capability ``arch`` (as 90) in this process from now on; ``folder``: from :func:`build`.

    Ops on tensors of the CPU choose Triton as they would on that GPU. Make it before Triton is first used.
    """

    def __init__(self, folder: Path, arch: int, name: str = "stand-in") -> None:
        os.environ["STAND_IN_CAPABILITY"] = str(arch)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self._library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        capability = divmod(arch, 10)
        torch.cuda.get_device_capability = lambda device=None: capability
        torch.cuda.current_device = lambda: 0
        torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]

        from todo_attn.kernels import configs, tuned

        configs.CPU_CAPABILITY = capability
        tuned.gpu_of = lambda device: tuned.Gpu(name, capability, self._shared_memory())
        backends.choose = choose

    def use(self) -> None:
        """Have Triton launch by it. Apart, because Triton compiles a module of C for this, which may fail."""
        import triton
        from triton.backends.nvidia import driver

        driver.CudaDriver.is_active = staticmethod(lambda: True)
        active = driver.CudaDriver()
        active.get_device_capability = torch.cuda.get_device_capability
        active.get_current_device = torch.cuda.current_device
        active.get_current_stream = lambda device: 0
        triton.runtime.driver.set_active(active)

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return self._count("launches")

    @property
    def modules(self) -> int:
        """Compiled kernels loaded so far."""
        return self._count("modules")

    @property
    def descriptors(self) -> int:
        """TMA descriptors made so far."""
        return self._count("descriptors")

    def clock(self) -> float:
        """Seconds on a clock of its own, which only launches move: a nanosecond for each thread of every program, and
        one for each KiB of the programs' shared memory."""
        return self._count("nanoseconds") / 1e9

    def _shared_memory(self) -> int:
        value = ctypes.c_int()
        self._library.cuDeviceGetAttribute(ctypes.byref(value), 97, 0)  # the most of a program, in bytes
        return value.value

    def _count(self, name: str) -> int:
        return ctypes.c_ulonglong.in_dll(self._library, f"stand_in_{name}").value


def choose(backend: object, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """``backends.choose`` as if the CPU were the GPU; by name Triton is tried again, and raises what it raised."""
    half = dtype in (torch.float16, torch.bfloat16)
    useless = not half or fallback.reason(device, dtype, head_dim) is not None
    return "torch" if backend == "torch" or (backend == "auto" and useless) else "triton"
