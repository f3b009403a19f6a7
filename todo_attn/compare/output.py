"""Writes the files of a comparison: images, contact sheet, report.json and, if asked for, report.html."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .comparison_page import page_of
from .folder import IMAGES, NOTHING_MADE, PAGE, REPORT, SHEET, remove_comparison
from .page import build_page
from .report import build_report, file_name
from .sheet import Column, Row, draw_sheet
from .words import image_caption, seconds_text, steps_text, subtitle

if TYPE_CHECKING:
    from .run import Comparison


class Output:
    """Fills the folder of one comparison, each image as soon as it is made.

    With the first image it writes a report that names all images to come, so that the folder is known to hold a
    comparison, however that ends. The files of an older comparison are removed just before. A file that cannot be
    written does not stop the comparison: it is listed in ``failures``.

    Args:
        folder: as :func:`~todo_attn.compare.folder.choose_folder` gives it; it is created with the first image.
        page: whether to write report.html too.
    """

    def __init__(self, folder: Path, page: bool = False) -> None:
        self.folder = folder
        self.page = page
        self.failures: list[OSError] = []
        self._comparison: Comparison | None = None  # the latest
        self._seen = 0  # shots handed over for writing
        self._usable = True

    def add(self, comparison: Comparison) -> None:
        """Write the new images of ``comparison``."""
        if not comparison.shots:
            return
        if self._comparison is None:
            self._open(comparison)
        self._comparison = comparison
        for shot in comparison.shots[self._seen :]:
            self._seen += 1
            self._save(file_name(shot.number, shot.seed, shot.label), Image.fromarray(shot.pixels))

    def finish(self, comparison: Comparison, report: dict[str, Any]) -> None:
        """Write the report, and then what is large: the contact sheet, and the page."""
        self.add(comparison)
        self._save_report(report)
        self._save(SHEET, sheet_of(comparison, report), replace=True)
        self._save_page(comparison, report)

    def stop(self) -> str:
        """Write a comparison that ended early, with a sheet if two methods made images; returns what is where."""
        if self._comparison is None:
            return NOTHING_MADE
        self.add(self._comparison)
        report = build_report(self._comparison)
        self._save_report(report)
        if len({shot.label for shot in self._comparison.shots}) > 1:
            self._save(SHEET, sheet_of(self._comparison, report), replace=True)
        self._save_page(self._comparison, report)
        if problem := self.problem():
            return problem
        done = len(self._comparison.shots)
        total = done + len(report["missing"])
        return f"{done} of {total} images are in {self.folder / IMAGES}, with a partial report, {self.folder / REPORT}"

    def problem(self) -> str | None:
        """One sentence about the files that could not be written; None if there are none."""
        if not self.failures:
            return None
        first, more = self.failures[0], len(self.failures) - 1
        return f"cannot write {first.filename}: {first.strerror}" + (f" (and {more} files more)" if more else "")

    def _open(self, comparison: Comparison) -> None:
        try:
            remove_comparison(self.folder)
            (self.folder / IMAGES).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.failures.append(error)
            self._usable = False  # an older comparison may be there, in part
            return
        self._save_report(build_report(dataclasses.replace(comparison, shots=[])))

    def _save_report(self, report: dict[str, Any]) -> None:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        self._write(REPORT, text.encode(), replace=True)

    def _save_page(self, comparison: Comparison, report: dict[str, Any]) -> None:
        if self.page:
            self._write(PAGE, build_page(page_of(comparison, report)).encode("utf-8", "replace"), replace=True)

    def _save(self, name: str, image: Image.Image, replace: bool = False) -> None:
        png = io.BytesIO()
        image.save(png, "png")
        self._write(name, png.getvalue(), replace)

    def _write(self, name: str, content: bytes, replace: bool) -> None:
        """Write the whole file or nothing; without ``replace`` an existing file is not touched."""
        if not self._usable:
            return
        file = self.folder / name
        part = file.with_name(f".{file.name}.part") if replace else file
        try:
            with open(part, "wb" if replace else "xb") as opened, _removed_if_not_whole(part):
                opened.write(content)
                opened.flush()
            if replace:
                os.replace(part, file)
        except OSError as error:
            self.failures.append(OSError(error.errno, error.strerror or str(error), str(file)))


@contextmanager
def _removed_if_not_whole(file: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # an interrupt too
        file.unlink(missing_ok=True)
        raise


def sheet_of(comparison: Comparison, report: dict[str, Any]) -> Image.Image:
    """The contact sheet of a comparison and its report."""
    settings = report["settings"]
    pixels = {(s.label, s.number): s.pixels for s in comparison.shots}
    images = {(m["method"], i["picture"]): i for m in report["methods"] for i in m["images"]}
    rows = [
        Row(
            f"{prompt}   (seed {seed})",
            [
                (pixels.get((m["method"], number)), image_caption(m, images.get((m["method"], number))))
                for m in report["methods"]
            ],
        )
        for number, (prompt, seed) in enumerate(comparison.settings.images)
        if any(there == number for _, there in images)
    ]
    title = f"{settings['width']} x {settings['height']} pixels, {steps_text(settings['steps'])}"
    columns = [
        Column(m["method"], _badge(m), _detail(m), good=m["speedup"] is not None and m["speedup"] >= 1)
        for m in report["methods"]
    ]
    return draw_sheet(title, subtitle(report, comparison.settings.model is None), columns, rows)


def _badge(method: dict[str, Any]) -> str:
    return "" if method["method"] == "dense" or method["speedup"] is None else f"{method['speedup']:.2f}x"


def _detail(method: dict[str, Any]) -> str:
    if method["seconds"] is None:
        return "left out" if method["unavailable"] else "not made yet"
    text = f"{seconds_text(method['seconds']['median'])} per image"
    return text if method["psnr"] is None else f"{text}  ·  PSNR {method['psnr']:.1f} dB"
