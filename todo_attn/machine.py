"""Versions and hardware, without which no figure and no bug report can be compared with another."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "todo_attn",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "numpy",
    "tomesd",
    "DeepCache",
    "sageattention",
)
_ROOT = Path(__file__).resolve().parents[1]
_CPU_CACHE = 32 * 2**20  # assumed size of a processor's last cache, which no portable call tells
GPU_TICKS = 20_000_000  # about 10 ms of a GPU's clock, which torch.cuda._sleep waits for


def versions() -> dict[str, str | None]:
    """The versions of Python and of each package; None if it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    found["torch"] = torch.__version__  # with the build, which metadata may lack
    return found


def device_name(device: torch.device) -> str:
    """The hardware's own name, such as "NVIDIA H100 80GB HBM3" or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, str | int | None]:
    """System, processor, and the threads that torch uses."""
    return {
        "platform": platform.platform(),
        "cpu": device_name(torch.device("cpu")),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def describe(device: torch.device) -> dict[str, Any]:
    """Device and driver, :func:`machine`, :func:`versions` and commit, as plain data; None for what is missing."""
    info: dict[str, Any] = {"device": device_name(device), "driver": None, "cuda": None}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        info |= {
            "driver": driver(device.index or 0),
            "cuda": torch.version.cuda,
            "capability": f"{major}.{minor}",
            "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
            "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        }
    return info | machine() | versions() | {"commit": commit()}


def keep_freed_memory() -> bool:
    """Make this process keep freed memory, as torch's tuning guide advises for CPUs; returns whether it could.

    Otherwise glibc gives each large buffer back to the kernel and takes a new one, page by page, for the next layer,
    which costs 1.6 s of one forward of Stable Diffusion 1.5's UNet at 1024 px. By ``mallopt``, so on Linux only.
    """
    mmap_max, top_pad, trim_threshold = -4, -2, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(mmap_max, 0), mallopt(top_pad, 1 << 28), mallopt(trim_threshold, 2**31 - 1)])


def cache_bytes(device: torch.device) -> int:
    """The size of the cache that all of ``device`` shares, such as a GPU's L2."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE


def sm_mhz(device: torch.device, load: Callable[[], Any]) -> float | None:
    """The clock of a GPU's multiprocessors, in MHz, while ``load`` runs repeatedly; None on other devices.

    One thread on a stream of its own counts ticks, between two events, for about 10 ms.
    """
    if device.type != "cuda":
        return None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        start.record()
        torch.cuda._sleep(GPU_TICKS)
        end.record()
    while not end.query():
        load()
        torch.cuda.current_stream(device).synchronize()
    torch.cuda.synchronize(device)
    return GPU_TICKS / start.elapsed_time(end) / 1e3


def slug(device: torch.device) -> str:
    """:func:`device_name` as part of a file's name: "nvidia-h200", "cpu-amd-epyc-7763"."""
    return slug_of({"device": device_name(device), "cuda": device.type == "cuda"})


def slug_of(about: dict[str, Any]) -> str:
    """:func:`slug` of the CPU or GPU that :func:`describe` described."""
    name = about["device"] if about.get("cuda") else f"cpu {about['device']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str | None:
    """The checkout's commit, with "-dirty" if it has changes; a copy without git names it in $GIT_COMMIT."""
    if named := os.environ.get("GIT_COMMIT"):
        return named
    if not (_ROOT / ".git").exists():
        return None  # installed, perhaps inside another repository
    return _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12")


def driver(index: int = 0) -> str | None:
    """The version of the NVIDIA driver, by nvidia-smi; None if there is none to ask."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
