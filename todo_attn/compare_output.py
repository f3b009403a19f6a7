"""What a comparison leaves in its folder: the pictures, the contact sheet and report.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .compare_report import file_name
from .contact_sheet import Column, Row, draw_sheet
from .printing import seconds_text

if TYPE_CHECKING:
    from .diffusers.compare import Comparison

IMAGES, SHEET, REPORT = "images", "contact_sheet.png", "report.json"


def write_output(comparison: Comparison, report: dict[str, Any], folder: Path) -> None:
    """Write all of it into ``folder``, which is made where it does not exist; files of the same names are replaced.

    Raises:
        OSError: something cannot be written.
    """
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    for shot in comparison.shots:
        Image.fromarray(shot.pixels).save(folder / IMAGES / file_name(shot))
    sheet_of(comparison, report).save(folder / SHEET)
    (folder / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def sheet_of(comparison: Comparison, report: dict[str, Any]) -> Image.Image:
    """The contact sheet of a comparison and its report."""
    settings = report["settings"]
    pixels = {(s.label, s.picture): s.pixels for s in comparison.shots}
    images = {(m["method"], i["picture"]): i for m in report["methods"] for i in m["images"]}
    rows = [
        Row(
            f"{image['prompt']}   (seed {image['seed']})",
            [
                (pixels.get((m["method"], number)), _caption(m, images.get((m["method"], number))))
                for m in report["methods"]
            ],
        )
        for (label, number), image in images.items()
        if label == "dense"
    ]
    title = f"{settings['width']} x {settings['height']} pixels, {settings['steps']} steps"
    folder = Path(settings["model"])
    parts = (
        folder.name if comparison.settings.model and folder.exists() else settings["model"],
        settings["pipeline"],
        settings["scheduler"],
        settings["dtype"],
        report["machine"]["device"],
        f"torch {report['versions']['torch']}",
    )
    columns = [
        Column(m["method"], _badge(m), _detail(m), good=m["speedup"] is not None and m["speedup"] >= 1)
        for m in report["methods"]
    ]
    return draw_sheet(title, "  ·  ".join(parts), columns, rows)


def _badge(method: dict[str, Any]) -> str:
    return "" if method["method"] == "dense" or method["seconds"] is None else f"{method['speedup']:.2f}x"


def _detail(method: dict[str, Any]) -> str:
    if method["seconds"] is None:
        return "left out"
    text = f"{seconds_text(method['seconds']['median'])} per picture"
    return text if method["psnr"] is None else f"{text}  ·  PSNR {method['psnr']:.1f} dB"


def _caption(method: dict[str, Any], image: dict[str, Any] | None) -> str:
    if image is None:
        return method["unavailable"] or ""
    if not image["finite"]:
        return "NaN or infinity in it"
    if image["same_as_dense"]:
        return f"{seconds_text(image['seconds'])}  ·  the same as dense"
    if image["psnr"] is None:
        return seconds_text(image["seconds"])
    return f"{seconds_text(image['seconds'])}  ·  PSNR {image['psnr']:.1f} dB  ·  SSIM {image['ssim']:.3f}"
