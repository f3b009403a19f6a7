"""The contact sheet shows every picture whole, and words only where there is room."""

import numpy as np
import pytest

from todo_attn.contact_sheet import Column, Row, draw_sheet


def picture(colour: tuple[int, int, int], height: int = 40, width: int = 60) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3)).copy()


def area(sheet, colour) -> int:
    return int((np.asarray(sheet) == colour).all(-1).sum())


COLUMNS = [Column("dense", "", "2 s per picture"), Column("todo", "2.00x", "1 s per picture")]


def test_shows_every_picture_whole():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    a, b, c, d = map(picture, colours)
    sheet = draw_sheet("title", "subtitle", COLUMNS, [Row("one", [(a, ""), (b, "")]), Row("two", [(c, ""), (d, "")])])
    assert [area(sheet, colour) for colour in colours] == [40 * 60] * 4


@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (512, 1024), (1024, 512)])
def test_large_pictures_are_scaled_to_512(height, width):
    red = picture((255, 0, 0), height, width)
    sheet = draw_sheet("title", "subtitle", COLUMNS, [Row("one", [(red, "a caption"), (None, "left out")])])
    assert area(sheet, (255, 0, 0)) == height * width // 4
    assert sheet.width < 2 * 512 + 200


def test_words_do_not_reach_the_next_column():
    long = "words " * 200

    def sheet(caption: str) -> np.ndarray:
        cells = [(picture((255, 0, 0)), caption), (picture((0, 255, 0)), "")]
        return np.asarray(draw_sheet("", "", COLUMNS, [Row("", cells)]))

    with_words, without = sheet(long), sheet("")
    assert with_words.shape == without.shape
    columns = np.flatnonzero((with_words != without).any((0, 2)))
    green = np.flatnonzero((without == (0, 255, 0)).all(-1).any(0))
    assert 0 < columns.max() < green.min()


def test_a_long_title_stays_inside():
    cells = [(picture((255, 0, 0)), ""), (picture((0, 255, 0)), "")]
    sheet = np.asarray(draw_sheet("title " * 100, "subtitle " * 100, COLUMNS, [Row("prompt " * 100, cells)]))
    assert (sheet[:, -16:] == 255).all()
