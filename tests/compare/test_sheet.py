"""The contact sheet shows every image whole, and words only where there is room."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from todo_attn.compare import fonts
from todo_attn.compare.sheet import Column, Row, draw_sheet


def image(colour: tuple[int, int, int], height: int = 40, width: int = 60) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3)).copy()


def area(sheet, colour) -> int:
    return int((np.asarray(sheet) == colour).all(-1).sum())


COLUMNS = [Column("dense", "", "2 s per image"), Column("todo", "2.00x", "1 s per image")]


def test_shows_every_picture_whole():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    a, b, c, d = map(image, colours)
    sheet = draw_sheet("title", "subtitle", COLUMNS, [Row("one", [(a, ""), (b, "")]), Row("two", [(c, ""), (d, "")])])
    assert [area(sheet, colour) for colour in colours] == [40 * 60] * 4


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (512, 1024), (1024, 512)])
def test_large_pictures_are_scaled_to_512(height, width):
    red = image((255, 0, 0), height, width)
    sheet = draw_sheet("title", "subtitle", COLUMNS, [Row("one", [(red, "a caption"), (None, "left out")])])
    assert area(sheet, (255, 0, 0)) == height * width // 4
    assert sheet.width < 2 * 512 + 200


def test_words_do_not_reach_the_next_column():
    long = "words " * 200

    def sheet(caption: str) -> np.ndarray:
        cells = [(image((255, 0, 0)), caption), (image((0, 255, 0)), "")]
        return np.asarray(draw_sheet("", "", COLUMNS, [Row("", cells)]))

    with_words, without = sheet(long), sheet("")
    assert with_words.shape == without.shape
    columns = np.flatnonzero((with_words != without).any((0, 2)))
    green = np.flatnonzero((without == (0, 255, 0)).all(-1).any(0))
    assert 0 < columns.max() < green.min()


def test_a_long_title_stays_inside():
    cells = [(image((255, 0, 0)), ""), (image((0, 255, 0)), "")]
    sheet = np.asarray(draw_sheet("title " * 100, "subtitle " * 100, COLUMNS, [Row("prompt " * 100, cells)]))
    assert (sheet[:, -16:] == 255).all()


# Words of any script.


def font_of(characters: str, file: Path) -> None:
    """A font whose every character is a block as wide as high; what it lacks is nothing to see."""
    names = [".notdef", *(f"u{ord(c):x}" for c in characters)]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 800), (1000, 800), (1000, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"u{ord(c):x}" for c in characters})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()) | {".notdef": TTGlyphPen(None).glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupOS2()
    builder.setupPost()
    builder.setupNameTable({"familyName": file.stem, "styleName": "Regular"})
    builder.save(file)


@pytest.fixture
def only_fonts_in(monkeypatch, tmp_path):
    """A machine whose only fonts are in the folder that is returned, without fontconfig and matplotlib."""

    def forget() -> None:
        for cached in (fonts._load, fonts._has, fonts._covers, fonts._face_of, fonts._faces_in_folders, fonts._runs):
            cached.cache_clear()

    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr(fonts.importlib.util, "find_spec", lambda name: None)
    forget()
    yield tmp_path
    forget()


def words(text: str) -> np.ndarray:
    """Where there is ink in a sheet with ``text`` as the prompt that is not there with none."""
    sheets = [np.asarray(draw_sheet("", "", COLUMNS, [Row(t, [(image((255, 0, 0)), "")] * 2)])) for t in (text, "")]
    return (sheets[0] != sheets[1]).any(-1)


def test_a_line_break_in_a_prompt_is_a_space():
    assert np.array_equal(words("one\ntwo\u2028three\tfour\x1b"), words("one two three four "))
    assert np.array_equal(words("one\ud800"), words("one\ufffd"))


def test_every_character_has_a_font_of_its_own(only_fonts_in):
    """Latin by Pillow's font, two scripts by two others, in one line."""
    assert fonts.without_font("a中ж") == ["中", "ж"]
    (only_fonts_in / "broken.ttf").write_bytes(b"no font")
    font_of("中文", only_fonts_in / "chinese.ttf")
    font_of("жя", only_fonts_in / "LastResort.ttf")  # has a box for everything
    fonts._faces_in_folders.cache_clear()
    fonts._face_of.cache_clear()
    assert fonts.without_font("a中文жя") == ["ж", "я"]
    (only_fonts_in / "LastResort.ttf").rename(only_fonts_in / "cyrillic.ttf")
    fonts._faces_in_folders.cache_clear()
    fonts._face_of.cache_clear()
    assert fonts.without_font("a中文жя\u0301") == ["я\u0301"]
    assert [Path(face.file).stem for _, face in fonts._runs("a中文жb")] == ["", "chinese", "cyrillic", ""]
    ink = words("中文")
    ys, xs = np.nonzero(ink)
    assert ink[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()  # blocks, and not the outlines of boxes
    assert xs.max() + 1 - xs.min() == 2 * 15


def test_a_line_is_of_one_font_if_one_has_it_all(only_fonts_in):
    font_of("abé", only_fonts_in / "latin.ttf")
    assert [(text, Path(face.file).stem) for text, face in fonts._runs("abé")] == [("abé", "latin")]
    assert fonts.one_line("e\u0301") == "é"  # as typed on some systems


def test_what_fontconfig_names_is_tried(only_fonts_in, monkeypatch):
    file = only_fonts_in / "some where.ttf"
    font_of("中", file)
    program = only_fonts_in / "fc-match"
    program.write_text(f"#!/bin/sh\nprintf '65536 {file}\\n0 /nothing.ttf\\n'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(fonts, "_FOLDERS", ())
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    assert fonts.without_font("中文") == ["文"]
    program.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    fonts._face_of.cache_clear()
    assert fonts.without_font("中文") == ["中", "文"]


def test_matplotlibs_font_has_accents_and_cyrillic(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(fonts, "_installed_faces", lambda cluster: ())
    fonts._face_of.cache_clear()
    assert fonts.without_font("café naïve Ёлка Ελλάδα") == []
    fonts._face_of.cache_clear()


def test_a_long_subtitle_is_wrapped_and_whole():
    cells = [(image((255, 0, 0)), "")] * 2
    parts = [f"a part with its number {i}" for i in range(12)]
    short, long = (draw_sheet("title", "  ·  ".join(p), COLUMNS, [Row("", cells)]) for p in (parts[:1], parts))
    assert long.height > short.height and long.width == short.width
    from todo_attn.compare.sheet import _wrapped

    lines = _wrapped("  ·  ".join(parts), 15, 300)
    assert all(fonts.length(line, 15) <= 300 and not line.startswith("·") for line in lines)
    assert "  ·  ".join(lines).replace("·", "").split() == " ".join(parts).split()
