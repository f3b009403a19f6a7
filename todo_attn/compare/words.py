"""Numbers and sentences as text, for the table, the contact sheet and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def seconds_text(seconds: float) -> str:
    """With three digits: "0.123 s", "4.56 s", "78.9 s", "123 s"."""
    digits = 3 if seconds < 1 else 2 if seconds < 10 else 1 if seconds < 100 else 0
    return f"{seconds:.{digits}f} s"


def steps_text(steps: int) -> str:
    """ "1 step", "2 steps"."""
    return f"{steps} step{'' if steps == 1 else 's'}"


def bytes_text(size: int) -> str:
    """In MiB below one GiB, else in GiB: "812 MiB", "1.25 GiB"."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


# Of a report of todo_attn.compare.report, or of one of its methods or images.


def subtitle(report: dict[str, Any], shipped: bool) -> str:
    """The model, the shipped one or one's own, and what it ran on."""
    settings = report["settings"]
    folder = Path(settings["model"])
    parts = (
        folder.name if not shipped and folder.exists() else settings["model"],
        settings["pipeline"],
        settings["scheduler"],
        settings["dtype"],
        report["machine"]["device"],
        f"torch {report['versions']['torch']}",
    )
    return "  ·  ".join(parts)


def psnr_text(method: dict[str, Any]) -> str:
    """ "41.2 dB", "the same" if every image is dense's, "-" if nothing is known."""
    same = bool(method["images"]) and all(image["same_as_dense"] for image in method["images"])
    return "the same" if same else "-" if method["psnr"] is None else f"{method['psnr']:.1f} dB"


def image_caption(method: dict[str, Any], image: dict[str, Any] | None) -> str:
    """What there is to say about one image of a method, or why there is none."""
    if image is None:
        return method["unavailable"] or ""
    if not image["finite"]:
        return "NaN or infinity in it"
    if image["same_as_dense"]:
        return f"{seconds_text(image['seconds'])}  ·  the same as dense"
    if image["psnr"] is None:
        return seconds_text(image["seconds"])
    return f"{seconds_text(image['seconds'])}  ·  PSNR {image['psnr']:.1f} dB  ·  SSIM {image['ssim']:.3f}"
