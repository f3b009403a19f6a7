"""The folder of images: what made it, and each image with its record, whole or not at all.

run.json                          what made every image in it
512x512/todo_factor=2/case.json   the options of a case
512x512/todo_factor=2/000012.png  an image, and 000012.json, its record, which is written last
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

import todo_attn
from todo_attn.config.checks import ArgumentError

Size = tuple[int, int]  # height, width in pixels
RUN, CASE = "run.json", "case.json"
# If these differ, the images of two runs cannot be compared.
_VERSIONS = {"torch": torch.__version__, "diffusers": diffusers.__version__, "todo_attn": todo_attn.__version__}


@dataclass(frozen=True)
class Images:
    """The images of a run: prompts in turns, each image with a seed of its own, so that all are independent.

    Args:
        prompts: at least one.
        per_prompt: images of each prompt.
        first_seed: of image 0; image i has seed ``first_seed + i``.
    """

    prompts: tuple[str, ...]
    per_prompt: int = 1
    first_seed: int = 0

    def __len__(self) -> int:
        return len(self.prompts) * self.per_prompt

    def __getitem__(self, index: int) -> tuple[str, int]:
        """Prompt and seed."""
        return self.prompts[index % len(self.prompts)], self.first_seed + index


@dataclass(frozen=True)
class Shard:
    """The part of one process: whole images, each by all cases, so that the parts cost alike."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """Its indexes among ``count``."""
        return range(self.rank, count, self.world)


def identity(pipe: Any, images: Images, steps: int, guidance: float | None) -> dict[str, Any]:
    """What decides every image of a run but its case and size, as plain data."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    device = pipe.unet.device.type
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
        "prompts": hashlib.sha256("\n".join(images.prompts).encode()).hexdigest()[:16],
        "first_seed": images.first_seed,
        "versions": _VERSIONS,
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


class Store:
    """The folder of one run. Opening it writes ``run.json``, or compares it with the one that is there.

    Args:
        folder: new, empty, or of the same run.
        about: the :func:`identity`.
        writes: whether this process may write ``run.json``; others only check.

    Raises:
        ArgumentError: the folder is of another run (and which entries differ), has other files, or cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], writes: bool = True) -> None:
        self.folder, self.about = folder, dict(about)
        file = folder / RUN
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
            if not file.exists() and any(p.name != RUN and not p.name.startswith(".") for p in folder.iterdir()):
                raise ArgumentError("folder", f"must be new, empty or of an earlier run, got {str(folder)!r}")
            if writes and not file.exists():
                _write(file, _json(self.about))
            there = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            problem = f"must be a folder that can be written, got {str(folder)!r}: {error.strerror}"
            raise ArgumentError("folder", problem) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArgumentError("folder", f"must be of an earlier run, and {file} is not JSON: {error}") from error
        _check_same("folder", file, there, self.about)

    @property
    def digest(self) -> str:
        """Of the identity: the same for the same run."""
        return hashlib.sha256(_json(self.about)).hexdigest()[:12]

    def case_folder(self, size: Size, case: str) -> Path:
        return self.folder / f"{size[1]}x{size[0]}" / re.sub(r"[^\w.+=-]", "_", case)

    def open_case(self, size: Size, case: str, about: Mapping[str, Any], writes: bool = True) -> None:
        """Remember what ``case`` does.

        Raises:
            ArgumentError: its images were made with other options.
        """
        file = self.case_folder(size, case) / CASE
        about = json.loads(_json(about))
        if writes and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, _json(about))
        if file.exists():
            _check_same("folder", file, json.loads(file.read_text(encoding="utf-8")), about)

    def has(self, size: Size, case: str, index: int) -> bool:
        return all(self._file(size, case, index, suffix).exists() for suffix in ("json", "png"))

    def record(self, size: Size, case: str, index: int) -> dict[str, Any]:
        return json.loads(self._file(size, case, index, "json").read_text(encoding="utf-8"))

    def pixels(self, size: Size, case: str, index: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        with Image.open(self._file(size, case, index, "png")) as image:
            return np.asarray(image.convert("RGB"))

    def save(self, size: Size, case: str, index: int, pixels: np.ndarray, record: Mapping[str, Any]) -> None:
        """Write an image and then its record."""
        file = self._file(size, case, index, "png")
        file.parent.mkdir(parents=True, exist_ok=True)
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        _write(file, png.getvalue())
        _write(file.with_suffix(".json"), _json(record))

    def _file(self, size: Size, case: str, index: int, suffix: str) -> Path:
        return self.case_folder(size, case) / f"{index:06d}.{suffix}"


def write_whole(file: Path, content: bytes) -> None:
    """Write ``file`` whole or not at all; missing folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, content)


def _write(file: Path, content: bytes) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}.part")  # no other process uses this name
    try:
        part.write_bytes(content)
        os.replace(part, file)
    except BaseException:  # an interrupt too
        part.unlink(missing_ok=True)
        raise


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _check_same(argument: str, file: Path, there: Any, wanted: Mapping[str, Any]) -> None:
    if there == wanted:
        return
    there = there if isinstance(there, dict) else {}
    keys = [key for key in sorted({*there, *wanted}) if there.get(key) != wanted.get(key)]
    told = ", ".join(f"{key} {there.get(key)!r} instead of {wanted.get(key)!r}" for key in keys)
    raise ArgumentError(
        argument, f"must be of the same run, and {file} has {told}: give another folder, or the options of that run"
    )
