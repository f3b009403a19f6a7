"""Makes the images of a search: dense ones once, kept on disk, and those of candidates, which are measured and gone."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..compare.bind import bind_dato
from ..compare.files import wait_for, write_whole
from ..compare.run import call_pipeline, pixels_of
from ..config.checks import ArgumentError
from ..config.dato import DaToConfig
from ..options.settings import CompareSettings
from .fidelity import Made


class Calls(NamedTuple):
    """How an image called the UNet: how often, and with how many rows of latents, 2 under guidance."""

    calls: int
    batch: int


class Images:
    """The images of one search on one pipeline, which is left as it was found.

    Args:
        pipe: a text-to-image pipeline with a UNet.
        settings: prompts, seeds, size, steps and guidance.
        folder: that gets dense's images.
        with_pixels: whether to decode them.
    """

    def __init__(self, pipe: Any, settings: CompareSettings, folder: Path, with_pixels: bool) -> None:
        self.pipe, self.settings, self.folder, self.with_pixels = pipe, settings, folder, with_pixels

    def __len__(self) -> int:
        return len(self.settings.images)

    def prompt(self, index: int) -> str:
        return self.settings.images[index][0]

    def make(self, config: DaToConfig, index: int) -> Made:
        """Image ``index`` under ``config``."""
        with bind_dato(self.pipe, config).applied():
            return self._call(index)

    def has_dense(self, index: int) -> bool:
        return self._file(index).exists()

    def make_dense(self, index: int) -> None:
        """Make dense's image ``index``, and keep it.

        Raises:
            ArgumentError: the pipeline's safety checker blacked it out.
            OSError: it cannot be written.
        """
        with _watched(self.pipe.unet) as seen:
            made = self._call(index)
        if made.blacked_out:
            prompt, seed = self.settings.images[index]
            which = f"{prompt!r} with seed {seed}"
            raise ArgumentError("prompts", f"must pass the pipeline's safety checker, which blacked out {which}")
        arrays = {"latents": made.latents, "seconds": np.array(made.seconds), "calls": np.array([len(seen), max(seen)])}
        if made.pixels is not None:
            arrays["pixels"] = made.pixels
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_whole(self._file(index), content.getvalue())

    def dense(self, index: int) -> Made:
        with np.load(self._file(index)) as kept:
            pixels = kept["pixels"] if self.with_pixels else None
            return Made(kept["latents"], pixels, float(kept["seconds"]))

    def dense_calls(self, index: int) -> Calls:
        with np.load(self._file(index)) as kept:
            return Calls(*map(int, kept["calls"]))

    def wait_for_dense(self) -> None:
        """Until this process sees all of dense's images, which others have made."""
        for index in range(len(self)):
            wait_for(self._file(index))

    def warm_up(self) -> None:
        """One image that nobody measures."""
        self._call(0)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npz"

    def _call(self, index: int) -> Made:
        prompt, seed = self.settings.images[index]
        steps = self.settings.steps
        assert steps is not None
        if not self.with_pixels:
            output, seconds, _ = call_pipeline(self.pipe, self.settings, prompt, seed, steps, output_type="latent")
            return Made(_array(output.images), None, seconds)
        latents: list[torch.Tensor] = []

        def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            latents[:] = [values["latents"]]
            return values

        output, seconds, _ = call_pipeline(self.pipe, self.settings, prompt, seed, steps, keep)
        blacked_out = any(getattr(output, "nsfw_content_detected", None) or ())
        return Made(_array(latents[0]), pixels_of(output), seconds, blacked_out)


def _array(latents: torch.Tensor) -> np.ndarray:
    return latents[0].detach().float().cpu().numpy()


@contextmanager
def _watched(unet: torch.nn.Module) -> Iterator[list[int]]:
    """The rows of latents of each call of ``unet``."""
    seen: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(len(args[0] if args else kwargs["sample"]))

    handle = unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
