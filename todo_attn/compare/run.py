"""Makes the same images by each method, in turns, and times each."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..logs import logger
from ..models.pipelines import check_pipeline, sized
from ..options.settings import CompareSettings
from ..peak_memory import OUT_OF_MEMORY, is_out_of_memory, watch_peak
from .bind import BoundMethod, bind


@dataclass(frozen=True)
class Shot:
    """One image by one method.

    Args:
        number: of the image, among the pairs of prompt and seed, from 0.
        pixels: (height, width, 3) uint8.
        seconds: from the call of the pipeline to the pixels on the CPU, text encoder and VAE included.
        peak_bytes: peak memory, as :func:`~todo_attn.peak_memory.watch_peak` measures it; None if that is not
            known.
        finite: False if the pipeline gave NaN or infinity.
        blacked_out: whether its safety checker blacked it out.
    """

    label: str
    number: int
    prompt: str
    seed: int
    pixels: np.ndarray
    seconds: float
    peak_bytes: int | None
    finite: bool
    blacked_out: bool


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`: ``settings`` with everything filled in, and every shot in order.

    A method that ran out of memory is ``unavailable`` from then on; its earlier images are among the shots.
    """

    settings: CompareSettings
    pipeline: str
    scheduler: str
    device: torch.device
    dtype: torch.dtype
    methods: list[BoundMethod]
    shots: list[Shot]


@dataclass(frozen=True)
class Progress:
    """How far a comparison is, in scheduler steps (``done`` of ``total``), and ``what`` is running."""

    done: float
    total: int
    what: str


def compare(
    pipe: Any,
    settings: CompareSettings,
    watch: Callable[[Progress], None] | None = None,
    keep: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Make every prompt and seed of ``settings`` by each of its methods.

    Each method first has a short warm-up, which is not counted. Then the methods take turns at each image, in reverse
    order at every second image, so that a drift of the machine's speed affects all alike. Starting noise is drawn on
    the CPU, seeded per image, and is the same for every method. A method is put on the pipeline for one image and taken
    off again, even if something raises: the pipeline is left as it was found.

    Args:
        pipe: a text-to-image pipeline with a UNet, as :func:`~todo_attn.models.pipelines.load_pipeline` gives.
            Its own device, dtype and scheduler are used, not those of ``settings``.
        watch: called after every scheduler step.
        keep: called after every image with the comparison so far.

    Raises:
        SettingError: a setting that does not fit the pipeline.
        ArgumentError: one of the methods is on the pipeline already.
        torch.OutOfMemoryError: there is not enough memory for an image by any method.
    """
    check_pipeline(pipe, settings.source)
    settings = sized(settings, pipe)
    assert settings.steps is not None
    warmup_steps = min(settings.warmup_steps, settings.steps)
    methods = [bind(method, pipe, settings) for method in settings.parsed_methods()]
    able = [m for m in methods if m.unavailable is None]
    # Bound for its own number of steps, because a schedule is made for one.
    short = replace(settings, steps=warmup_steps)
    warm_ups = [b for b in (bind(method, pipe, short) for method in short.parsed_methods()) if b.unavailable is None]
    images = settings.images
    total = len(able) * (warmup_steps + len(images) * settings.steps)
    done = 0
    names = type(pipe).__name__, type(pipe.scheduler).__name__
    shots: list[Shot] = []
    out_of_memory: set[str] = set()

    def so_far() -> Comparison:
        now = [replace(m, unavailable=OUT_OF_MEMORY) if m.label in out_of_memory else m for m in methods]
        return Comparison(settings, *names, pipe.unet.device, pipe.unet.dtype, now, list(shots))

    def take(method: BoundMethod, number: int, steps: int, what: str) -> Shot | None:
        """The image, or None if memory runs out: the method is left out from then on."""
        nonlocal done
        if method.label in out_of_memory:
            return None
        prompt, seed = images[number]

        def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if watch is not None:
                # A scheduler that calls the UNet more than once a step has more timesteps than steps.
                watch(Progress(done + steps * min(1.0, (step + 1) / pipe.num_timesteps), total, what))
            return values

        try:
            with method.applied():
                shot = take_shot(pipe, settings, prompt, seed, steps, on_step, label=method.label, number=number)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory.add(method.label)
        else:
            done += steps
            return shot
        gc.collect()  # frees what the pipeline held when it failed
        if pipe.unet.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    with quiet(pipe), told_once():
        for method in warm_ups:
            take(method, 0, warmup_steps, f"warm-up: {method.label}")
        for number in range(len(images)):
            for method in able[:: -1 if number % 2 else 1]:
                what = f"image {number + 1} of {len(images)}: {method.label}"
                shot = take(method, number, settings.steps, what)
                if shot is None:
                    continue
                shots.append(shot)
                if keep is not None:
                    keep(so_far())
    if not shots:
        raise torch.OutOfMemoryError("not enough memory for an image by any method")
    return so_far()


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Switch the pipeline's own progress bar off."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


@contextmanager
def told_once() -> Iterator[None]:
    """Log each of this package's warnings once, not for every image."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message, before = record.getMessage(), len(told)
        told.add(message)
        return len(told) > before

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def take_shot(
    pipe: Any,
    settings: CompareSettings,
    prompt: str,
    seed: int,
    steps: int,
    on_step: Callable[..., Any] | None = None,
    **names: Any,
) -> Shot:
    """One image at the size and guidance of ``settings``, timed; ``names`` are the Shot's label and number.

    Args:
        on_step: the pipeline's ``callback_on_step_end``.
    """
    output, seconds, peak_bytes = call_pipeline(pipe, settings, prompt, seed, steps, on_step)
    return Shot(
        **names,
        prompt=prompt,
        seed=seed,
        pixels=pixels_of(output),
        seconds=seconds,
        peak_bytes=peak_bytes,
        finite=bool(np.isfinite(output.images[0]).all()),
        blacked_out=any(getattr(output, "nsfw_content_detected", None) or ()),
    )


def call_pipeline(
    pipe: Any,
    settings: CompareSettings,
    prompt: str,
    seed: int,
    steps: int,
    on_step: Callable[..., Any] | None = None,
    output_type: str = "np",
) -> tuple[Any, float, int | None]:
    """The pipeline's output for one image, its seconds and its peak memory, as in :class:`Shot`.

    Args:
        on_step: the pipeline's ``callback_on_step_end``.
        output_type: the pipeline's: "np" for pixels, "latent" for latents, without the VAE.
    """
    device = pipe.unet.device
    guidance = {} if settings.guidance is None else {"guidance_scale": settings.guidance}
    # tomesd draws from a copy of the global generator.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        peak = watch_peak(device)
        _wait_for(device)
        start = time.perf_counter()
        output = pipe(
            prompt,
            height=settings.height,
            width=settings.width,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type=output_type,
            callback_on_step_end=on_step,
            **guidance,
        )
        _wait_for(device)
        return output, time.perf_counter() - start, peak()


def pixels_of(output: Any) -> np.ndarray:
    """The image of a pipeline's output of type "np": (height, width, 3) uint8; NaN and infinity are black or white."""
    image = output.images[0]  # (height, width, 3) float in [0, 1]
    return (np.nan_to_num(image, posinf=1.0, neginf=0.0) * 255).round().astype(np.uint8)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
