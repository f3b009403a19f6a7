"""True images, which the generated ones are compared with as a set: a folder, or a function that draws them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from todo_attn.compare.features import load_object
from todo_attn.config.checks import ArgumentError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Reference:
    """``count`` true images, each at any size.

    Args:
        draw: ``draw(index, height, width)`` gives (height, width, 3), uint8 or float in [0, 1].
        name: for rows and messages.
    """

    def __init__(self, draw: Callable[[int, int, int], np.ndarray], count: int, name: str) -> None:
        self._draw, self.count, self.name = draw, count, name

    @classmethod
    def load(cls, text: str, count: int) -> Reference:
        """The images of a folder, at most ``count`` of them, or ``count`` images of the function ``module:function``.

        An image of a folder is cut to the proportions of the size in the middle, and resized.

        Raises:
            ArgumentError: there is neither, or the folder has no images.
        """
        folder = Path(text).expanduser()
        if not folder.is_dir() and ":" in text:
            return cls(load_object("reference", text), count, text)
        if not folder.is_dir():
            raise ArgumentError("reference", f"must be a folder of images or MODULE:FUNCTION, got {text!r}")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)[:count]
        if not files:
            raise ArgumentError("reference", f"must be a folder with images ({', '.join(SUFFIXES)}), got {text!r}")

        def read(index: int, height: int, width: int) -> np.ndarray:
            with Image.open(files[index]) as image:
                return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))

        return cls(read, len(files), text)

    def pixels(self, index: int, height: int, width: int) -> np.ndarray:
        """(height, width, 3) uint8.

        Raises:
            ArgumentError: the image cannot be read, or has another shape.
        """
        try:
            image: Any = np.asarray(self._draw(index, height, width))
        except Exception as error:  # of any kind: a file that is no image, the user's function
            raise ArgumentError(
                "reference", f"must have images, and image {index} of {self.name} failed: {error}"
            ) from error
        if image.shape != (height, width, 3):
            got = f"and image {index} of {self.name} has {image.shape}"
            raise ArgumentError("reference", f"must give images of shape {(height, width, 3)}, {got}")
        if image.dtype == np.uint8:
            return image
        return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
