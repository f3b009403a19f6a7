"""What makes two runs the same: everything that decides their images, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from ..config.checks import ArgumentError
from ..machine import versions
from .files import json_bytes, write_whole

# If these differ, the images of two runs cannot be compared.
_PACKAGES = ("torch", "diffusers", "todo_attn")


def identity(pipe: Any, steps: int, guidance: float | None, prompts: Sequence[str]) -> dict[str, Any]:
    """What decides the images that ``pipe`` makes of ``prompts``, but for their seeds and size."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    device = pipe.unet.device.type
    found = versions()
    return {
        "version": 1,
        "model": _digest_of(pipe),
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": json.loads(json.dumps(scheduler, default=str)),
        "steps": steps,
        "guidance": guidance,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "device": device,
        # On a CPU the number of threads decides the order of sums, and so the last bits of an image.
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        "versions": {name: found[name] for name in _PACKAGES},
    }


def _digest_of(pipe: Any) -> str:
    """Of all weights of a pipeline, wherever it was loaded from."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            for key, tensor in part.state_dict().items():
                digest.update(f"{name}.{key} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def read_same(argument: str, file: Path, wanted: Mapping[str, Any], what: str = "run") -> None:
    """Check that the JSON in ``file`` is ``wanted``.

    Raises:
        ArgumentError: of ``argument``: it is not, and which entries differ.
        OSError: it cannot be read.
    """
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or not UTF-8
        raise ArgumentError(argument, f"must be of an earlier {what}, and {file} is not JSON: {error}") from error
    wanted = json.loads(json_bytes(wanted))  # in which keys are strings
    if there == wanted:
        return
    there = there if isinstance(there, dict) else {}
    keys = [key for key in sorted({*there, *wanted}) if there.get(key) != wanted.get(key)]
    told = ", ".join(f"{key} {there.get(key)!r} instead of {wanted.get(key)!r}" for key in keys)
    another = f"give another folder, or the options of that {what}"
    raise ArgumentError(argument, f"must be of the same {what}, and {file} has {told}: {another}")


def open_folder(folder: Path, name: str, about: Mapping[str, Any], writes: bool = True, what: str = "run") -> None:
    """Open the folder of a run: write ``about`` into its file ``name``, or compare it with what is there.

    Args:
        folder: new, empty, or of the same run.
        writes: whether this process may write the file; others only check.

    Raises:
        ArgumentError: of "folder": it is of another run (and which entries differ), has other files, or cannot be
            written.
    """
    file = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        if not file.exists() and any(p.name != name and not p.name.startswith(".") for p in folder.iterdir()):
            raise ArgumentError("folder", f"must be new, empty or of an earlier {what}, got {str(folder)!r}")
        if writes and not file.exists():
            write_whole(file, json_bytes(about))
        read_same("folder", file, about, what)
    except OSError as error:
        problem = f"must be a folder that can be written, got {str(folder)!r}: {error.strerror}"
        raise ArgumentError("folder", problem) from error
