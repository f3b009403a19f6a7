"""Text in any script for which there is a font: Pillow's own, matplotlib's, or one of the machine's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_FOLDERS = (
    "~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts",
    "~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts",
    os.path.join(os.environ.get("WINDIR", r"C:\Windows"), "Fonts"),
)  # fmt: skip
_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_SELECTORS = "\ufe0e\ufe0f"  # of text or colour emoji
_NOWHERE = "\U0010ffff"  # not a character: fonts draw their "missing" glyph for it


@dataclass(frozen=True)
class _Face:
    """A font file, and the index of the font in it."""

    file: str
    index: int = 0


_OWN = _Face("")  # comes with Pillow, so that the sheet looks the same everywhere


@lru_cache
def _load(face: _Face, size: int) -> Font:
    if face == _OWN:
        return ImageFont.load_default(size)
    return ImageFont.truetype(face.file, size, index=face.index)


@lru_cache(maxsize=4096)
def _has(face: _Face, character: str) -> bool:
    try:
        font = _load(face, 24)
        mask, none = font.getmask(character), font.getmask(_NOWHERE)
    except OSError:  # no font, or one of colour bitmaps in a single size
        return False
    if mask.getbbox() is None:  # blank
        return character.isspace()
    return mask.size != none.size or bytes(mask) != bytes(none)


@lru_cache(maxsize=4096)
def _covers(face: _Face, cluster: str) -> bool:
    return all(_has(face, c) for c in cluster if c not in _SELECTORS and unicodedata.category(c) != "Cf")


def _matplotlib_face() -> Iterator[_Face]:
    """DejaVu Sans, which comes with matplotlib; found without importing it."""
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            yield _Face(str(file))


def _installed_faces(cluster: str) -> Iterator[_Face]:
    """The machine's fonts that may have ``cluster``, as fontconfig sorts them; all without fontconfig."""
    if program := shutil.which("fc-match"):
        wanted = " ".join(f"{ord(character):x}" for character in cluster)
        command = [program, "--sort", "--format=%{index} %{file}\n", f"sans:charset={wanted}"]
        try:
            said = subprocess.run(command, capture_output=True, encoding="utf-8", errors="surrogateescape", timeout=10)
            found = [line.partition(" ") for line in said.stdout.splitlines()]
            # The high bits of the index name an instance of a variable font.
            faces = [_Face(file, int(index) & 0xFFFF) for index, _, file in found]
        except (OSError, ValueError, subprocess.TimeoutExpired):
            faces = []
        yield from faces
    else:
        yield from _faces_in_folders()


@lru_cache
def _faces_in_folders() -> tuple[_Face, ...]:
    files = [p for folder in _FOLDERS for p in Path(folder).expanduser().rglob("*") if p.suffix.lower() in _SUFFIXES]
    return tuple(_Face(str(file)) for file in sorted(files))


@lru_cache(maxsize=4096)
def _face_of(cluster: str) -> _Face | None:
    """The first font that has ``cluster``."""
    for faces in ((_OWN,), _matplotlib_face(), _installed_faces(cluster)):
        for face in faces:
            # A last-resort font has a placeholder for every character.
            if "LastResort" not in face.file and _covers(face, cluster):
                return face
    return None


def _clusters(text: str) -> list[str]:
    """``text`` split into characters, each with its accents, joiners and variation selectors."""
    clusters: list[str] = []
    for character in text:
        if clusters and unicodedata.category(character) in ("Mn", "Me", "Mc", "Cf"):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def one_line(text: str) -> str:
    """``text`` without line breaks and control characters, accents composed (NFC)."""
    kinds = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd"}
    text = "".join(kinds.get(unicodedata.category(character), character) for character in text)
    return unicodedata.normalize("NFC", text)


def without_font(text: str) -> list[str]:
    """The characters of ``text`` without a font, each once, in order."""
    return [cluster for cluster in dict.fromkeys(_clusters(one_line(text))) if _face_of(cluster) is None]


@lru_cache(maxsize=1024)
def _runs(text: str) -> tuple[tuple[str, _Face], ...]:
    """``text`` in pieces of one font each; a single piece if one font has all of it."""
    pairs = [(cluster, _face_of(cluster) or _OWN) for cluster in _clusters(text)]
    for face in dict.fromkeys(face for _, face in pairs):
        if all(_covers(face, cluster) for cluster, _ in pairs):
            return ((text, face),)
    groups = groupby(pairs, key=lambda pair: pair[1])
    return tuple(("".join(cluster for cluster, _ in group), face) for face, group in groups)


def length(text: str, size: int) -> float:
    """The width of ``text``, in pixels."""
    return sum(_load(face, size).getlength(piece) for piece, face in _runs(text))


def draw_text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int, ink: str) -> None:
    """``text`` in one line, all its fonts on one baseline; ``y`` is the top of Pillow's own font."""
    own = _load(_OWN, size)
    baseline = y + (own.getmetrics()[0] if isinstance(own, ImageFont.FreeTypeFont) else size)
    for piece, face in _runs(text):
        font = _load(face, size)
        draw.text((x, baseline), piece, font=font, fill=ink, anchor="ls")
        x += font.getlength(piece)
