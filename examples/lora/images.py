"""A folder of images with their captions, as diffusers' training scripts take it ("imagefolder").

my-images/metadata.jsonl    {"file_name": "first.png", "text": "a caption"}, one object a line
my-images/first.png         of any size; larger ones are scaled down and cut to a square
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageOps

from todo_attn.config.checks import ArgumentError

CAPTIONS = "metadata.jsonl"


def read_captions(folder: Path) -> list[tuple[Path, str]]:
    """The images of a folder with their captions, in the order of the captions file.

    Raises:
        ArgumentError: of ``images``: there is no such folder or captions file, a line of it is not what it must be, or
            an image is missing or is none.
    """
    if not folder.is_dir():
        raise ArgumentError("images", f"must be a folder of images, got {str(folder)!r}")
    path = folder / CAPTIONS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ArgumentError("images", f"must hold captions in {CAPTIONS}: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError("images", f"must hold captions in UTF-8: {path}: {error}") from error
    found = [_read_line(path, i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ArgumentError("images", f"must hold at least one image, got none in {path}")
    return found


def _read_line(path: Path, number: int, line: str) -> tuple[Path, str]:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
        image, caption = row["file_name"], row["text"]
    except (ValueError, KeyError, TypeError):
        image = caption = None
    if not (isinstance(image, str) and isinstance(caption, str)):
        raise ArgumentError("images", f'{where} must be {{"file_name": "...", "text": "..."}}, got {line[:80]!r}')
    try:
        with Image.open(path.parent / image) as opened:
            opened.verify()
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: a broken PNG
        raise ArgumentError("images", f"{where} must name an image, got {image!r}: {error}") from error
    return path.parent / image, caption


def read_image(path: Path, size: int) -> Image.Image:
    """The image, cut and scaled to ``size`` x ``size``."""
    with Image.open(path) as image:
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
