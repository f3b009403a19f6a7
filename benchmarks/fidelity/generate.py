"""Makes the images that are not on disk yet: every case at each image, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.fidelity.cases import Case, bind_checked
from benchmarks.fidelity.store import Images, Size, Store
from todo_attn.compare.run import Shot, quiet, take_shot, told_once
from todo_attn.compare.workers import Shard
from todo_attn.config.checks import ArgumentError
from todo_attn.options.settings import CompareSettings
from todo_attn.peak_memory import is_out_of_memory


class Generator:
    """Makes images of one run on one pipeline, which is left as it was found.

    Args:
        pipe: a text-to-image pipeline with a UNet.
        settings: steps and guidance; sizes and prompts are given with each image.
        images: prompts and seeds.
        store: the folder that gets the images.
    """

    def __init__(self, pipe: Any, settings: CompareSettings, images: Images, store: Store) -> None:
        assert settings.steps is not None
        self.pipe, self.settings, self.steps, self.images, self.store = pipe, settings, settings.steps, images, store

    def about(self, case: Case, size: Size) -> dict[str, Any]:
        """What ``case`` does, as plain data."""
        steps = case.steps_of(self.steps)
        options = case.bind(self.pipe, steps).options
        return {"name": case.name, "steps": steps, "made_at": list(case.size_of(*size)), "options": options}

    def make(
        self, cases: Sequence[Case], size: Size, shard: Shard, processes: int = 1, made: Callable[[], object] = int
    ) -> int:
        """Make what the store lacks of the shard's images at ``size``; returns how many that were.

        The cases take turns at each image, in reverse order at every second one, so that a drift of the machine's
        speed affects all alike. Before its first image in this process, each case has a short warm-up, which is not
        counted.

        Args:
            processes: that share the machine, for the records.
            made: called after each image.

        Raises:
            ArgumentError: there is not enough memory for a case.
        """
        count, warm = 0, set[str]()
        with quiet(self.pipe), told_once():
            for index in shard.of(len(self.images)):
                for case in cases[:: -1 if index % 2 else 1]:
                    if not self.store.has(size, case.name, index):
                        if case.name not in warm:
                            warm.add(case.name)
                            self._take(case, size, index, min(self.settings.warmup_steps, self.steps))
                        self._make(case, size, index, processes)
                        count += 1
                    made()
        return count

    def _make(self, case: Case, size: Size, index: int, processes: int) -> None:
        shot, calls = self._take(case, size, index, case.steps_of(self.steps))
        record = {
            "prompt": shot.prompt,
            "seed": shot.seed,
            "seconds": shot.seconds,
            "calls": calls,
            "processes": processes,
            "finite": shot.finite,
            "blacked_out": shot.blacked_out,
        }
        self.store.save(size, case.name, index, enlarged(shot.pixels, size), record)

    def _take(self, case: Case, size: Size, index: int, steps: int) -> tuple[Shot, int]:
        """The image, and the calls of the UNet."""
        height, width = case.size_of(*size)
        settings = replace(self.settings, height=height, width=width)
        prompt, seed = self.images[index]
        bound = bind_checked(case, self.pipe, steps)
        try:
            with bound.applied(), _counted(self.pipe.unet) as calls:
                shot = take_shot(self.pipe, settings, prompt, seed, steps, label=case.name, number=index)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = f"must fit in memory, and {case.name} at {width}x{height} does not: the images so far are kept"
            raise ArgumentError("cases", problem) from error
        return shot, calls[0]


def enlarged(pixels: np.ndarray, size: Size) -> np.ndarray:
    """``pixels`` (h, w, 3) uint8 at ``size``, by Lanczos; unchanged if they have it."""
    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


@contextmanager
def _counted(unet: Any) -> Iterator[list[int]]:
    """Count the calls of ``unet``."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = unet.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()
