"""What is installed and what it runs on: the rows that make a measurement or a bug report mean something."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

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
)


def versions() -> dict[str, str | None]:
    """Python's version and each package's; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with the build, which the metadata may lack
    return found


def device_name(device: torch.device) -> str:
    """What the hardware calls itself, such as "NVIDIA H100 80GB HBM3" or the processor's name."""
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
    """System, processor and the threads torch uses on it."""
    return {
        "platform": platform.platform(),
        "cpu": device_name(torch.device("cpu")),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
    }
