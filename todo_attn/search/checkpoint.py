"""The checkpoint of a search: what every candidate gave on every image, in one file that is written whole.

It holds no state of the algorithm. A resumed search runs the algorithm from the start again, with the same seed, and
takes from here whatever is known already. So it is bound to end at the same front.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..compare.files import json_bytes, write_whole
from ..config.checks import ArgumentError

CHECKPOINT = "checkpoint.json"
# Of one image: its fidelity and seconds; or why it has none.
Result = tuple[float, float] | str


class Checkpoint:
    """What is known, by candidate and image.

    Args:
        folder: of the search.
        about: what decides all figures, whose digest is in the file.
        images: how many each candidate is tried on.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], images: int) -> None:
        self.file, self.images = folder / CHECKPOINT, images
        self.results: dict[str, dict[int, Result]] = {}
        self._digest = hashlib.sha256(json_bytes(about)).hexdigest()[:16]

    def read(self) -> None:
        """Add what the file knows, if there is one.

        Raises:
            ArgumentError: of "folder": the file is of another search, or damaged.
        """
        if not self.file.exists():
            return
        try:
            data = json.loads(self.file.read_text(encoding="utf-8"))
            digest, candidates = data["search"], data["candidates"]
            for key, by_image in candidates.items():
                for index, result in by_image.items():
                    known = result if isinstance(result, str) else (float(result[0]), float(result[1]))
                    self.results.setdefault(key, {})[int(index)] = known
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            problem = (
                f"must have a checkpoint that can be read, and {self.file} cannot: {type(error).__name__}: {error}"
            )
            raise ArgumentError("folder", f"{problem}. Without that file, the search begins again") from error
        if digest != self._digest:
            raise ArgumentError("folder", f"must be of the same search, and {self.file} is of another: {digest!r}")

    def missing(self, keys: Iterable[str]) -> list[tuple[str, int]]:
        """The candidates and images without a result; a candidate that has failed needs no more."""
        return [
            (key, index)
            for key in keys
            if self.failure(key) is None
            for index in range(self.images)
            if index not in self.results.get(key, {})
        ]

    def all(self) -> list[tuple[str, int, Result]]:
        """Everything that is known."""
        return [(key, index, result) for key, found in self.results.items() for index, result in found.items()]

    def add(self, results: Iterable[tuple[str, int, Result]]) -> None:
        for key, index, result in results:
            self.results.setdefault(key, {})[index] = result

    def save(self) -> None:
        """Write the file whole, or leave the one that is there.

        Raises:
            OSError: it cannot be written.
        """
        candidates = {key: {str(i): found[i] for i in sorted(found)} for key, found in self.results.items()}
        write_whole(self.file, json_bytes({"search": self._digest, "candidates": candidates}))

    def failure(self, key: str) -> str | None:
        """Why a candidate has no figures: the reason on the first image that has one."""
        found = self.results.get(key, {})
        return next((f"image {i + 1}: {r}" for i, r in sorted(found.items()) if isinstance(r, str)), None)

    def figures(self, key: str) -> list[tuple[float, float]] | None:
        """Fidelity and seconds on every image; None if one is missing or has failed."""
        found = self.results.get(key, {})
        figures = [r for _, r in sorted(found.items()) if not isinstance(r, str)]
        return figures if len(figures) == self.images else None
