"""A comparison as a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .curve import Curve, Estimate, Point
from .lines import command_line, python_lines
from .page import Column, Example, Page, Setting, Table, TableRow
from .words import bytes_text, image_caption, psnr_text, seconds_text, steps_text, subtitle

if TYPE_CHECKING:
    from .run import Comparison


_ABOUT = (
    "Seconds: from prompt to pixels, text encoder and VAE included; the warm-up is not counted. The median of all "
    "images, with the least and the most below it.",
    "Speed-up: dense's median seconds over the method's.",
    "PSNR and SSIM: the 8-bit image against dense's of the same prompt and seed, the mean of all images. Equal images "
    "have no PSNR.",
)
_MEMORY = (
    "Peak memory, the most of all images: on a CUDA device what torch held there, weights included; on a CPU what the "
    "process held above what it held before the image, so without the weights."
)


def page_of(comparison: Comparison, report: dict[str, Any]) -> Page:
    """The page of a comparison and its report, which may be those of a part of it."""
    settings, methods = report["settings"], report["methods"]
    code = {m["method"]: python_lines(_kind(m), m["options"]) for m in methods}
    return Page(
        title=f"Comparison at {settings['width']} x {settings['height']}, {steps_text(settings['steps'])}",
        subtitle=subtitle(report, comparison.settings.model is None),
        notes=report["notes"],
        examples=_examples(comparison, methods),
        curves=[curve] if (curve := _curve(methods)) else [],
        tables=[_table(methods)],
        settings=[
            *(Setting(method, {"Python": lines}) for method, lines in code.items() if lines is not None),
            Setting("this comparison", {"Command": command_line(comparison.settings)}),
        ],
        about=[*_ABOUT, *([_MEMORY] if _knows_memory(methods) else [])],
    )


def _kind(method: dict[str, Any]) -> str:
    return str(method["method"]).partition(":")[0]


def _examples(comparison: Comparison, methods: list[dict[str, Any]]) -> list[Example]:
    images = {(m["method"], i["picture"]): i for m in methods for i in m["images"]}
    examples = []
    for number, (prompt, seed) in enumerate(comparison.settings.images):
        pixels = {shot.label: shot.pixels for shot in comparison.shots if shot.number == number}
        if pixels:
            ordered = {m["method"]: pixels[m["method"]] for m in methods if m["method"] in pixels}
            captions = {m["method"]: image_caption(m, images.get((m["method"], number))) for m in methods}
            examples.append(Example(prompt, f"seed {seed}", ordered, captions))
    return examples


def _table(methods: list[dict[str, Any]]) -> Table:
    columns = [
        Column("seconds", seconds_text),
        Column("speed-up", "{:.2f}x".format),
        Column("PSNR"),
        Column("SSIM", "{:.3f}".format),
    ]
    if _knows_memory(methods):
        columns.append(Column("peak memory", lambda size: bytes_text(round(size))))

    def row(method: dict[str, Any]) -> TableRow:
        if method["seconds"] is None:
            return TableRow(method["method"], note=method["unavailable"] or "not made yet")
        values = {
            "speed-up": _estimate(method["speedup"]),
            "seconds": _seconds(method),
            "PSNR": psnr_text(method),
            "SSIM": _estimate(method["ssim"]),
        }
        if _knows_memory(methods):
            values["peak memory"] = _estimate(method["peak_memory_bytes"])
        return TableRow(method["method"], values)

    return Table("Of all images", columns, [row(m) for m in methods])


def _curve(methods: list[dict[str, Any]]) -> Curve | None:
    made = [m for m in methods if m["seconds"] is not None]
    points = [Point(m["method"], _kind(m), _seconds(m), Estimate(m["psnr"])) for m in made if m["psnr"] is not None]
    if not points:
        return None
    notes = ["Whiskers go from the least to the most seconds."] if any(p.x.low is not None for p in points) else []
    if same := [m["method"] for m in made if psnr_text(m) == "the same"]:
        notes.append(f"Not in it, because their images are the same as dense's: {', '.join(same)}.")
    return Curve(
        "PSNR to dense against seconds of an image",
        "seconds",
        "PSNR, dB",
        points,
        lines=[(m["method"], m["seconds"]["median"]) for m in made if m["method"] == "dense"],
        note=" ".join(notes),
    )


def _knows_memory(methods: list[dict[str, Any]]) -> bool:
    return any(m["peak_memory_bytes"] is not None for m in methods)


def _estimate(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value)


def _seconds(method: dict[str, Any]) -> Estimate:
    spread = method["seconds"]
    if spread["count"] == 1:
        return Estimate(spread["median"])
    return Estimate(spread["median"], spread["min"], spread["max"])
