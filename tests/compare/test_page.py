"""The page: what is in it, that nothing of it is elsewhere, and what is refused."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from todo_attn.compare.curve import Curve, Estimate, Point, draw_curve, pareto_front, ticks
from todo_attn.compare.page import Column, Example, Page, Setting, Table, TableRow, build_page
from todo_attn.config.checks import ArgumentError

VOID = {"meta", "link", "img", "input", "path"}


class Outline(HTMLParser):
    """Checks that tags are balanced; keeps each start tag with its attributes, and the text inside of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self._open.append(len(self.tags) - 1)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag):
        assert self.tags[self._open.pop()][0] == tag

    def handle_data(self, data):
        for index in self._open:
            self.texts[index] += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        wanted = {name.rstrip("_"): value for name, value in wanted.items()}
        return [attributes for found, attributes in self.tags if found == tag and wanted.items() <= attributes.items()]

    def text(self, tag: str) -> list[str]:
        return [" ".join(text.split()) for (found, _), text in zip(self.tags, self.texts, strict=True) if found == tag]


def image(value: int, height: int = 24, width: int = 32) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    return np.uint8(noise + value)


def pixels(uri: str) -> np.ndarray:
    start = "data:image/webp;base64,"
    assert uri.startswith(start)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(start), validate=True))))


METHODS = ("todo", "dato")
POINTS = [
    Point("todo", "todo", Estimate(2.0, 1.8, 2.2), Estimate(40.0, 38.0, 41.0)),
    Point("dato", "dato", Estimate(1.0), Estimate(20.0)),
    Point("tome", "tome", Estimate(3.0), Estimate(30.0)),
]
PAGE = Page(
    title="The title",
    subtitle="below it",
    notes=["A note."],
    examples=[
        Example(
            f"prompt {i}",
            f"seed {i}",
            {"dense": image(10), "todo": image(12), "dato": image(90)},
            {"todo": "1 s", "tome": "not installed"},
        )
        for i in range(2)
    ],
    curves=[Curve("At one size", "seconds", "PSNR", POINTS, lines=[("dense", 4.0)], note="More on it.")],
    tables=[
        Table(
            "Of all",
            [Column("seconds", "{:.1f} s".format), Column("PSNR")],
            [
                TableRow("dense", {"seconds": Estimate(4.0)}),
                TableRow("todo", {"seconds": Estimate(2.0, 1.75, 2.25), "PSNR": "the same"}),
                TableRow("tome", note="not installed"),
            ],
        )
    ],
    settings=[Setting("todo", {"Python": "apply_todo(pipe)\n# more", "Command": "todo-attn compare"})],
    about=["What it means."],
)


def test_structure():
    page = Outline(build_page(PAGE))
    assert page.all("html")[0]["lang"] == "en" and page.text("title")[0] == "The title"
    assert page.text("h1") == ["The title"]
    assert page.text("h2") == ["Images", "Quality against time", "Figures", "Settings to copy", "About the figures"]
    assert page.text("h3") == ["prompt 0 seed 0", "prompt 1 seed 1", "At one size", "todo"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes["aria-labelledby"] in ids for attributes in page.all("section"))
    labelled = [*page.all("svg", role="img"), *page.all("input", type="range"), *page.all("div", role="region")]
    assert labelled and all(attributes["aria-label"].strip() for attributes in labelled)
    words = " ".join(page.text("main"))
    for word in ("More on it.", "What it means.", "WebP at quality 92", "amplified 4, 8 or 16"):
        assert word in words
    assert page.text("p")[1] == "A note."


def test_every_image_and_difference_is_there():
    page = Outline(build_page(PAGE))
    figures = [a for tag, a in page.tags if tag == "figure" and "layer" in a["class"]]
    kinds = [(a["class"].split()[1], a["data-method"]) for a in figures]
    of_each = [("reference", "dense")] + [(kind, m) for m in METHODS for kind in ("method", "difference")]
    assert kinds == of_each * 2
    images = page.all("img")
    assert len(images) == len(kinds) and all(a["alt"].strip() for a in images)
    assert len({a["alt"] for a in images}) == len(images)
    assert {(a["width"], a["height"]) for a in images} == {("32", "24")}
    shown = [pixels(a["src"]).astype(int) for a in images[:5]]
    for found, value in zip((shown[0], shown[1], shown[3]), (10, 12, 90), strict=True):
        assert found.shape == (24, 32, 3) and abs(found.mean() - image(value).mean()) < 2
    assert abs(shown[2] - 2 * 4).max() <= 1  # the difference, amplified
    assert shown[4].min() >= 254  # 80 * 4 is beyond white
    assert [a["value"] for a in page.all("input", name="method")] == list(METHODS)
    assert [a["value"] for a in page.all("input", name="view")] == ["slider", "4", "8", "16"]


def test_nothing_is_loaded():
    html = build_page(PAGE)
    assert re.search("https?:|//[a-z]|@import|url\\(", re.sub('data:image[^"]*', "", html)) is None
    page = Outline(html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not {"iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}


def test_the_same_page_is_the_same_text():
    assert build_page(PAGE) == build_page(replace(PAGE))


HOSTILE = "<script>alert(1)</script> \"quoted\" 'too' & --> {{ 7 * 7 }} 🚀 שלום \u202e \x1b\n</style>"


def test_text_is_only_text():
    plain = Outline(build_page(PAGE))
    images = {name: image(9) for name in ("dense", HOSTILE)}
    page = Page(
        HOSTILE,
        HOSTILE,
        notes=[HOSTILE],
        examples=[Example(HOSTILE, HOSTILE, images, {HOSTILE: HOSTILE})],
        curves=[Curve(HOSTILE, HOSTILE, HOSTILE, [Point(HOSTILE, HOSTILE, Estimate(1), Estimate(2))], note=HOSTILE)],
        tables=[Table(HOSTILE, [Column(HOSTILE)], [TableRow(HOSTILE, {HOSTILE: HOSTILE}), TableRow("b", {}, HOSTILE)])],
        settings=[Setting(HOSTILE, {HOSTILE: HOSTILE})],
        about=[HOSTILE],
    )
    hostile = Outline(build_page(page))
    assert len(hostile.all("script")) == len(plain.all("script")) and len(hostile.all("style")) == 1
    assert hostile.text("h1") == [" ".join(HOSTILE.split())]
    assert hostile.text("h3")[0].startswith("<script>alert(1)</script>")
    assert hostile.text("code") == [" ".join(HOSTILE.split())]  # to copy: as it is
    assert hostile.all("input", name="method")[0]["value"] == HOSTILE


def test_a_prompt_may_run_from_right_to_left():
    """And does not turn the rest of its line around."""
    page = Outline(build_page(replace(PAGE, examples=[replace(PAGE.examples[0], prompt="שלום")])))
    assert page.text("bdi") == ["שלום"]


def test_a_method_without_an_image_says_why():
    one, two = PAGE.examples
    two = replace(two, images={m: i for m, i in two.images.items() if m != "dato"}, captions={"dato": "out of memory"})
    page = Outline(build_page(replace(PAGE, examples=[one, two])))
    assert "No image by dato: out of memory" in page.text("p")
    assert len(page.all("img")) == 5 + 3


def test_without_the_reference_there_is_no_slider_and_no_difference():
    example = replace(PAGE.examples[0], images={"todo": image(1), "dato": image(2)})
    page = Outline(build_page(replace(PAGE, examples=[example])))
    assert len(page.all("img")) == 2 and not page.all("input", type="range")


def test_the_reference_alone():
    page = Outline(build_page(Page("One", "", examples=[Example("a", "", {"dense": image(1)})])))
    assert len(page.all("img")) == 1 and not page.all("input") and page.text("h2") == ["Images", "About the figures"]


def test_equal_images_differ_by_nothing():
    example = Example("a", "", {"dense": image(1), "todo": image(1)})
    shown = Outline(build_page(Page("", "", examples=[example]))).all("img")
    assert pixels(shown[2]["src"]).max() == 0


def test_huge_images_are_scaled_down(monkeypatch):
    monkeypatch.setattr("todo_attn.compare.page.MAX_SIDE", 16)
    page = Outline(build_page(PAGE))
    assert {pixels(a["src"]).shape for a in page.all("img")} == {(12, 16, 3)}
    assert {a["width"] for a in page.all("img")} == {"32"}
    assert any("scaled down to 16 pixels a side" in text for text in page.text("li"))


def test_the_size_of_a_page():
    """Two prompts by three methods at 512 x 512, with detail like a photograph's: below 2 MB."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 255, (n, n, 3), dtype=np.uint8)).resize((512, 512)) for n in (8, 64, 256)]
    scene = sum(np.asarray(layer) * weight for layer, weight in zip(coarse, (0.75, 0.15, 0.1), strict=True))
    images = {name: np.uint8(scene * (1 - i / 50)) for i, name in enumerate(("dense", "todo", "dato"))}
    assert len(build_page(Page("", "", examples=[Example("a", "", images)] * 2))) < 2e6


def test_table():
    page = Outline(build_page(PAGE))
    assert page.text("tr") == [
        "method seconds PSNR".replace(" ", ""),
        "dense4.0 s-",
        "todo2.0 s1.8 s to 2.2 sthe same",
        "tomenot installed",
    ]
    assert page.all("td", colspan="2")
    assert [a["scope"] for a in page.all("th")] == ["col"] * 3 + ["row"] * 3
    assert page.text("caption") == ["Of all"]


def test_code_is_copied_as_it_is():
    page = Outline(build_page(PAGE))
    code = [text for (tag, _), text in zip(page.tags, page.texts, strict=True) if tag == "code"]
    assert code == ["apply_todo(pipe)\n# more", "todo-attn compare"]
    assert [a["aria-label"] for a in page.all("button")] == ["Copy Python for todo", "Copy Command for todo"]


# The curve.


def test_the_front_is_what_nothing_beats():
    front = pareto_front(PAGE.curves[0])
    assert [p.method for p in front] == ["dato", "todo"]  # tome is slower than todo, and worse
    lower = replace(PAGE.curves[0], higher_is_better=False)
    assert [p.method for p in pareto_front(lower)] == ["dato"]


def test_equal_points_are_on_the_front_once():
    points = [Point(name, "a", Estimate(1.0), Estimate(5.0)) for name in "ab"]
    assert len(pareto_front(Curve("", "", "", points))) == 1


@pytest.mark.parametrize("width", [720, 340])
def test_points_and_labels_are_inside(width):
    drawing = draw_curve(PAGE.curves[0], ["todo", "dato", "tome"], width)
    places = {mark.point.method: mark for mark in drawing.marks}
    assert places["dato"].x < places["todo"].x < places["tome"].x
    assert places["todo"].y < places["tome"].y < places["dato"].y  # y grows downwards
    for mark in drawing.marks:
        assert drawing.left <= mark.x <= drawing.right and drawing.top <= mark.y <= drawing.bottom
        assert mark.label is not None
    assert places["dato"].x_whisker is None
    low, high = places["todo"].x_whisker
    assert low < places["todo"].x < high
    high, low = places["todo"].y_whisker
    assert low < places["todo"].y < high
    assert drawing.front == (
        f"M{places['dato'].x:.1f} {places['dato'].y:.1f}H{places['todo'].x:.1f}V{places['todo'].y:.1f}"
    )


def test_labels_do_not_overlap():
    """Many methods at the same place: those on the front keep their labels, others have none."""
    points = [Point(f"method-{i}", "a", Estimate(10 + i / 100), Estimate(40 - i / 100)) for i in range(40)]
    drawing = draw_curve(Curve("", "", "", points), ["a"], 720)
    labelled = [mark for mark in drawing.marks if mark.label]
    assert "method-0" in {mark.point.method for mark in labelled} and len(labelled) < 40
    boxes = []
    for mark in labelled:
        x, y, anchor = mark.label
        width = 7 * len(mark.point.method)  # at least
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, y - 11, left + width, y))
    for i, one in enumerate(boxes):
        for two in boxes[:i]:
            assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
    assert len(Outline(build_page(Page("", "", curves=[Curve("", "", "", points)]))).all("g")) == 2 * 40


@pytest.mark.parametrize("value", [0.0, 1e-9, 5.0, -3.0, 1e12])
def test_a_single_point(value):
    drawing = draw_curve(Curve("", "", "", [Point("a", "a", Estimate(abs(value)), Estimate(value))]), ["a"], 720)
    assert drawing.top < drawing.marks[0].y < drawing.bottom and len(drawing.y_ticks) >= 2


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (0.13, 0.19, ["0.14", "0.16", "0.18"]),
        (-0.5, 2, ["-0.5", "0.0", "0.5", "1.0", "1.5", "2.0"]),
        (0, 23456, ["0", "5000", "10000", "15000", "20000"]),
    ],
)
def test_ticks_are_round(low, high, texts):
    assert [text for _, text in ticks(low, high, 5)] == texts


# What is refused.


def refused(page: Page) -> str:
    with pytest.raises(ArgumentError) as error:
        build_page(page)
    return str(error.value)


def with_images(**images: np.ndarray) -> Page:
    return replace(PAGE, examples=[PAGE.examples[0], Example("b", "", images)])


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (image(1).astype(np.float32), "got float32 of shape (24, 32, 3) by 'todo'"),
        (image(1)[..., 0], "got uint8 of shape (24, 32) by 'todo'"),
        (image(1)[:0], "got uint8 of shape (0, 32, 3) by 'todo'"),
        (image(1, 32, 24), "got (24, 32, 3) by 'dense' and (32, 24, 3) by 'todo'"),
    ],
)
def test_images_that_do_not_fit(bad, found):
    said = refused(with_images(dense=image(1), todo=bad))
    assert said.startswith("examples[1].images must be ") and said.endswith(found)


def test_an_example_without_images():
    assert refused(with_images()) == "examples[1].images must have an image, got none"


@pytest.mark.parametrize(
    ("estimate", "problem"),
    [
        (Estimate(float("nan")), "must be finite"),
        (Estimate(1.0, 0.0, float("inf")), "must be finite"),
        (Estimate(1.0, 0.5), "must have both ends"),
        (Estimate(1.0, 2.0, 3.0), "must be inside of its interval"),
    ],
)
def test_numbers_that_do_not_fit(estimate, problem):
    table = replace(PAGE.tables[0], rows=[TableRow("todo", {"PSNR": estimate})])
    assert refused(replace(PAGE, tables=[table])).startswith(f"tables[0] 'todo' 'PSNR' {problem}")
    for axis in "xy":
        points = [replace(POINTS[0], **{axis: estimate})]
        assert refused(replace(PAGE, curves=[replace(PAGE.curves[0], points=points)])).startswith(
            f"curves[0] 'todo' {axis} {problem}"
        )


def test_names_that_do_not_fit():
    table, curve = PAGE.tables[0], PAGE.curves[0]
    unknown = replace(table, rows=[TableRow("todo", {"LPIPS": None})])
    assert "must be in a column of the table" in refused(replace(PAGE, tables=[unknown]))
    twice = replace(table, rows=[*table.rows, table.rows[0]])
    assert refused(replace(PAGE, tables=[twice])) == "tables[0].rows must have each name once, got 'dense' again"
    twice = replace(table, columns=[*table.columns, Column("PSNR")])
    assert refused(replace(PAGE, tables=[twice])) == "tables[0].columns must have each name once, got 'PSNR' again"
    points = [*curve.points, curve.points[0]]
    assert "got 'todo' again" in refused(replace(PAGE, curves=[replace(curve, points=points)]))
    assert "must have a point" in refused(replace(PAGE, curves=[replace(curve, points=[])]))
    negative = [replace(POINTS[0], x=Estimate(-1.0))]
    assert "must be at least 0" in refused(replace(PAGE, curves=[replace(curve, points=negative)]))
