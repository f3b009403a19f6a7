"""A comparison as plain data: seconds with their spread, speed-up, PSNR, SSIM and memory."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine import commit, device_name, machine, versions
from .folder import IMAGES
from .fonts import without_font
from .metrics import psnr, ssim

if TYPE_CHECKING:
    from .bind import BoundMethod
    from .run import Comparison, Shot

_ABOUT = (
    "seconds: from prompt to pixels, text encoder and VAE included; the warm-up passes are not counted.",
    "speedup: dense's median seconds over the method's.",
    "psnr (dB) and ssim: the 8-bit image against dense's of the same prompt and seed; psnr is null if they are "
    "equal, and such images are not in its mean.",
    "peak_memory_bytes: on a CUDA device the most that torch held there, weights included; on a CPU under Linux the "
    "most resident memory of the process above what was resident before the image, so without the weights; null "
    "if neither is known. A method's is the most of its images.",
)


def file_name(number: int, seed: int, label: str) -> str:
    """The path of an image's file in the folder of its comparison."""
    return f"{IMAGES}/{number + 1:02d}-seed{seed}-{label.replace(':', '-').replace('=', '_')}.png"


def build_report(comparison: Comparison) -> dict[str, Any]:
    """All of ``comparison`` but the pixels, ready for ``json.dumps``.

    Keys: ``settings``, ``versions``, ``machine``, ``methods`` (in the given order, each with its ``images``),
    ``complete`` (whether all images are there), ``missing`` (the files of those that are not), ``notes`` (what did not
    go as asked) and ``about`` (what the numbers mean).
    """
    dense = {s.number: s for s in comparison.shots if s.label == "dense"}
    dense_median = statistics.median(s.seconds for s in dense.values()) if dense else None
    missing = _missing(comparison)
    methods = [
        _method_report(method, [s for s in comparison.shots if s.label == method.label], dense, dense_median)
        for method in comparison.methods
    ]
    device = comparison.device
    dtype = str(comparison.dtype).removeprefix("torch.")
    return {
        "settings": comparison.settings.to_dict()
        | {
            "model": comparison.settings.model or "todo_attn/landscapes",
            "pipeline": comparison.pipeline,
            "scheduler": comparison.scheduler,
            "device": str(device),
            "dtype": dtype,
        },
        "versions": versions() | {"commit": commit()},
        "machine": {"device": device_name(device), **machine()},
        "complete": not missing,
        "missing": missing,
        "methods": methods,
        "notes": _notes(comparison),
        "about": list(_ABOUT),
    }


def _method_report(
    method: BoundMethod, shots: list[Shot], dense: dict[int, Shot], dense_median: float | None
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "method": method.label,
        "options": method.options,
        "unavailable": method.unavailable,
        "seconds": None,
        "speedup": None,
        "psnr": None,
        "ssim": None,
        "peak_memory_bytes": None,
        "images": [],
    }
    if not shots:
        return report
    images = sorted((_image_report(s, dense.get(s.number)) for s in shots), key=lambda i: i["picture"])
    seconds = [s.seconds for s in shots]
    differing = [i["psnr"] for i in images if i["psnr"] is not None]
    similarities = [i["ssim"] for i in images if i["ssim"] is not None]
    return report | {
        "seconds": spread(seconds),
        "speedup": None if dense_median is None else dense_median / statistics.median(seconds),
        "psnr": statistics.fmean(differing) if differing else None,
        "ssim": statistics.fmean(similarities) if similarities else None,
        "peak_memory_bytes": max((s.peak_bytes for s in shots if s.peak_bytes is not None), default=None),
        "images": images,
    }


def _image_report(shot: Shot, dense: Shot | None) -> dict[str, Any]:
    decibels = similarity = None
    same = False
    if dense is not None and shot.label != "dense" and shot.finite and dense.finite:
        decibels, similarity = psnr(dense.pixels, shot.pixels), ssim(dense.pixels, shot.pixels)
        same = bool(np.array_equal(dense.pixels, shot.pixels))
    return {
        "file": file_name(shot.number, shot.seed, shot.label),
        "picture": shot.number,
        "prompt": shot.prompt,
        "seed": shot.seed,
        "seconds": shot.seconds,
        "speedup": None if dense is None else dense.seconds / shot.seconds,
        "psnr": None if decibels is None or math.isinf(decibels) else decibels,
        "ssim": similarity,
        "same_as_dense": same,
        "finite": shot.finite,
        "peak_memory_bytes": shot.peak_bytes,
    }


def spread(seconds: list[float]) -> dict[str, float | int]:
    """Median, quartiles, extremes and count of at least one time."""
    q1, median, q3 = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "min": min(seconds), "q1": q1, "q3": q3, "max": max(seconds), "count": len(seconds)}


def _missing(comparison: Comparison) -> list[str]:
    """The files of the images that were not made."""
    there = {(shot.number, shot.label) for shot in comparison.shots}
    return [
        file_name(number, seed, method.label)
        for number, (_, seed) in enumerate(comparison.settings.images)
        for method in comparison.methods
        if method.unavailable is None and (number, method.label) not in there
    ]


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    if missing := _missing(comparison):
        total = len(comparison.shots) + len(missing)
        notes.append(f"This is a part of the comparison: {len(missing)} of {total} images are missing.")
    for method in comparison.methods:
        if method.unavailable is not None:
            done = sum(shot.label == method.label for shot in comparison.shots)
            ended = "was left out" if not done else f"ended after {done} image{'s' if done > 1 else ''}"
            notes.append(f"{method.label} {ended}: {method.unavailable}.")
    broken = sorted({s.label for s in comparison.shots if not s.finite})
    if broken:
        notes.append(
            f"NaN or infinity in images by {', '.join(broken)}: they have no psnr and ssim. Another dtype may help."
        )
    if any(s.blacked_out for s in comparison.shots):
        notes.append("The model's safety checker blacked out images: their psnr and ssim say nothing.")
    if lacking := without_font("".join(comparison.settings.prompts)):
        some = ", ".join(f"U+{ord(character[0]):04X}" for character in lacking[:5])
        notes.append(
            f"No font was found for {len(lacking)} of the prompts' characters ({some}): the contact sheet has boxes "
            "for them. Noto's fonts, once installed, have most scripts."
        )
    return notes
