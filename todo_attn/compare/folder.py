"""The folder of a comparison: whether it may be written, and what an older comparison left there."""

from __future__ import annotations

import json
import re
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from ..options.methods import SettingError

IMAGES, SHEET, REPORT, PAGE = "images", "contact_sheet.png", "report.json", "report.html"
NOTHING_MADE = "no image was finished, and nothing is written"
DEFAULT = Path("compare")
_IMAGE = re.compile(rf"{IMAGES}/[^/\\]+\.png")


def choose_folder(out: str | None, overwrite: bool) -> Path:
    """The folder that ``out`` names; for None "compare", or without ``overwrite`` the first free of "compare-2", ...

    Raises:
        SettingError: it cannot be written, or has files already; with ``overwrite`` it may have an older comparison.
    """
    if out is not None and not out.strip():
        raise SettingError("out", f"must name a folder, got {out!r}")
    if out is None and not overwrite:
        names = (DEFAULT if i == 1 else DEFAULT.with_name(f"{DEFAULT.name}-{i}") for i in count(1))
        folder = next(name for name in names if not name.exists() or (name.is_dir() and not _entries(name)))
    else:
        folder = DEFAULT if out is None else Path(out).expanduser()
    _check_writable(folder)
    _check_free(folder, overwrite)
    return folder


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be created or written; leaves nothing behind."""
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        problem = f"must be a folder that can be written, got {str(folder)!r}: {error.strerror}"
        raise SettingError("out", problem) from error


def _check_free(folder: Path, overwrite: bool) -> None:
    entries = _entries(folder)
    if not entries:
        return
    if _files_of_comparison(folder) is not None:
        if not overwrite:
            found = "an older comparison, which --overwrite removes"
            raise SettingError("out", f"must be a new or an empty folder, got {str(folder)!r} with {found}")
    elif not overwrite or entries & {IMAGES, SHEET, REPORT, PAGE}:
        known = " that no comparison's report names" if overwrite else ""
        raise SettingError("out", f"must be a new or an empty folder, got {str(folder)!r} with files{known}")


def _entries(folder: Path) -> set[str]:
    """The names in a folder, without hidden files."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()


def _files_of_comparison(folder: Path) -> list[Path] | None:
    """Every file that the report in ``folder`` names, the report last; None if there is no such report."""
    try:
        report: Any = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        files = [image["file"] for method in report["methods"] for image in method["images"]]
        files += report.get("missing", [])
        if all(_IMAGE.fullmatch(file) for file in files):
            return [folder / name for name in (*files, SHEET, PAGE, REPORT)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    return None


def remove_comparison(folder: Path) -> None:
    """Remove the files of the comparison in ``folder``, if any, and nothing else.

    Raises:
        OSError: one cannot be removed.
    """
    for file in _files_of_comparison(folder) or ():
        file.unlink(missing_ok=True)
    images = folder / IMAGES
    if images.is_dir() and not any(images.iterdir()):
        images.rmdir()
