"""The folder of images: what made it, and each image with its record, whole or not at all.

run.json                          what made every image in it
512x512/todo_factor=2/case.json   the options of a case
512x512/todo_factor=2/000012.png  an image, and 000012.json, its record, which is written last
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from todo_attn.compare.files import json_bytes, write_whole
from todo_attn.compare.identity import identity as identity_of
from todo_attn.compare.identity import open_folder, read_same

Size = tuple[int, int]  # height, width in pixels
RUN, CASE = "run.json", "case.json"


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


def identity(pipe: Any, images: Images, steps: int, guidance: float | None) -> dict[str, Any]:
    """What decides every image of a run but its case and size, as plain data."""
    return identity_of(pipe, steps, guidance, images.prompts) | {"first_seed": images.first_seed}


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
        open_folder(folder, RUN, self.about, writes)

    @property
    def digest(self) -> str:
        """Of the identity: the same for the same run."""
        return hashlib.sha256(json_bytes(self.about)).hexdigest()[:12]

    def case_folder(self, size: Size, case: str) -> Path:
        return self.folder / f"{size[1]}x{size[0]}" / re.sub(r"[^\w.+=-]", "_", case)

    def open_case(self, size: Size, case: str, about: Mapping[str, Any], writes: bool = True) -> None:
        """Remember what ``case`` does.

        Raises:
            ArgumentError: its images were made with other options.
        """
        file = self.case_folder(size, case) / CASE
        about = json.loads(json_bytes(about))
        if writes and not file.exists():
            write_whole(file, json_bytes(about))
        if file.exists():
            read_same("folder", file, about)

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
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        write_whole(file, png.getvalue())
        write_whole(file.with_suffix(".json"), json_bytes(record))

    def _file(self, size: Size, case: str, index: int, suffix: str) -> Path:
        return self.case_folder(size, case) / f"{index:06d}.{suffix}"
