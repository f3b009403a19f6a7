"""The page in a real browser: it loads without a complaint, and works by keyboard, by mouse and on a phone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures.chromium import Chromium

from todo_attn.compare.curve import Curve, Estimate, Point
from todo_attn.compare.page import Column, Example, Page, Setting, Table, TableRow, build_page

METHODS = ("todo:2", "dato", "todo+dato:coco", "tome:0.5", "tome:0.75", "deepcache:3", "deepcache:5")
TAB, LEFT, RIGHT, HOME, END = (("Tab", 9), ("ArrowLeft", 37), ("ArrowRight", 39), ("Home", 36), ("End", 35))
HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"> 🚀 שלום " + "long" * 40
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight methods, one of which lacks an image; a prompt that no page should run; long code."""
    rng = np.random.default_rng(0)
    images = {m: rng.integers(0, 255, (96, 128, 3), dtype=np.uint8) for m in ("dense", *METHODS)}
    captions = {m: f"{i} s  ·  PSNR 30 dB" for i, m in enumerate(images)} | {"dato": "not installed"}
    points = [
        Point(m, m.partition(":")[0], Estimate(5 - i / 2, 4 - i / 2, 6), Estimate(40 - i))
        for i, m in enumerate(METHODS)
    ]
    columns = [Column(f"a column {i}") for i in range(8)]
    rows = [TableRow(m, {c.heading: Estimate(1234.5, 1000, 2000) for c in columns}) for m in images]
    page = Page(
        HOSTILE,
        HOSTILE,
        notes=[HOSTILE],
        examples=[
            Example("a red circle", "seed 0", images, captions),
            Example(HOSTILE, "seed 1", {m: i for m, i in images.items() if m != "dato"}, captions),
        ],
        curves=[Curve("At 96", "seconds", "PSNR", points, lines=[("dense", 6.0)])],
        tables=[Table("Of all", columns, rows)],
        settings=[Setting(m, {"Python": f"apply({m!r}, '{'1' * 200}')\n# more"}) for m in METHODS],
        about=["What it means."],
    )
    written = tmp_path_factory.mktemp("page") / "a page.html"
    written.write_text(build_page(page), encoding="utf-8")
    return written


def shown(chromium: Chromium) -> list[str]:
    """The layers that can be seen: "reference dense"."""
    return chromium.run(
        "[...document.querySelectorAll('.layer')].filter((layer) => layer.checkVisibility())"
        ".map((layer) => layer.classList[1] + ' ' + layer.dataset.method)"
    )


def active(chromium: Chromium) -> str:
    return chromium.run("document.activeElement.name + '=' + document.activeElement.value")


def clip(chromium: Chromium) -> str:
    return chromium.run("getComputedStyle(document.querySelector('.method.on')).clipPath")


def focus(chromium: Chromium, selector: str) -> None:
    chromium.run(f"document.querySelector('{selector}').focus()")


def test_it_loads_without_a_complaint(chromium, file):
    chromium.open(file)
    images = chromium.run("[...document.images].map((image) => [image.naturalWidth, image.naturalHeight])")
    assert images == [[128, 96]] * (15 + 13)
    assert chromium.run("document.title").startswith("<script>")
    assert chromium.run("performance.getEntriesByType('resource').filter((e) => !e.name.startsWith('data:'))") == []
    assert shown(chromium) == ["reference dense", "method todo:2"] * 2
    assert chromium.problems == []


def test_the_console_is_watched(chromium, tmp_path):
    """A page with faults is found out: the test above can fail."""
    broken = tmp_path / "broken.html"
    broken.write_text("<script>console.error('said'); setTimeout(() => { throw Error('thrown') })</script>")
    chromium.open(broken)
    chromium.run("new Promise((done) => setTimeout(done, 50))")
    assert any("said" in problem for problem in chromium.problems)
    assert any("thrown" in problem for problem in chromium.problems)


def test_the_slider_by_keyboard(chromium, file):
    chromium.open(file)
    assert clip(chromium) == "inset(0px 0px 0px 50%)"
    focus(chromium, ".stage input")
    for key, at in ((RIGHT, 51), (RIGHT, 52), (LEFT, 51), (END, 100), (HOME, 0)):
        chromium.press(*key)
        assert clip(chromium) == f"inset(0px 0px 0px {at}%)"
        said = chromium.run("document.activeElement.getAttribute('aria-valuetext')")
        assert said == f"{at} % dense, {100 - at} % todo:2"
    others = chromium.run("[...document.querySelectorAll('.stage input')].map((range) => range.value)")
    assert others == ["0", "50"]
    ring = chromium.run("getComputedStyle(document.querySelector('.stage')).outlineStyle")
    assert ring == "solid" and chromium.problems == []


def test_the_slider_by_mouse(chromium, file):
    """The divider is under the pointer, at both edges too."""
    chromium.open(file)
    box = chromium.run("(({x, y, width}) => [x, y, width])(document.querySelector('.stage').getBoundingClientRect())")
    left, top, width = box
    for share in (0.25, 0.75, 0.0, 1.0):
        start = float(chromium.run("document.querySelector('.stage input').value")) / 100
        chromium.drag(left + width * min(max(start, 0.01), 0.99), top + 20, left + width * share)
        value = int(chromium.run("document.querySelector('.stage input').value"))
        assert abs(value - 100 * share) <= 2
        assert clip(chromium) == f"inset(0px 0px 0px {value}%)"


def test_tabs_by_keyboard(chromium, file):
    """Tab goes from the methods to the views to the sliders; arrows choose."""
    chromium.open(file)
    chromium.press(*TAB)
    assert active(chromium) == "method=todo:2"
    chromium.press(*RIGHT)
    assert active(chromium) == "method=dato"
    assert shown(chromium) == ["reference dense", "method dato", "reference dense", "missing dato"]
    assert "No image by dato: not installed" in chromium.run("document.querySelector('.missing.on').textContent")
    assert chromium.run("document.querySelector('#shown').textContent") == "dato"
    assert "dato not installed" in chromium.run("document.querySelector('.captions').textContent")
    ring = chromium.run("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle")
    assert ring == "solid"
    chromium.press(*RIGHT)
    chromium.press(*TAB)
    assert active(chromium) == "view=slider"
    chromium.press(*RIGHT)
    assert shown(chromium)[:3] == ["reference dense", "method todo+dato:coco", "difference todo+dato:coco"]
    assert chromium.run("document.querySelector('#shown').textContent") == (
        "todo+dato:coco: difference, amplified 4 times"
    )
    assert not chromium.run("document.querySelector('.stage input').checkVisibility()")
    chromium.press(*RIGHT)
    assert chromium.run("getComputedStyle(document.querySelector('.difference.on img')).filter") == "brightness(2)"
    assert chromium.run("document.querySelector('.difference.on figcaption').textContent").endswith(", x8")
    chromium.press(*LEFT)
    chromium.press(*LEFT)
    chromium.press(*TAB)
    assert chromium.run("document.activeElement.type") == "range"
    assert chromium.problems == []


def test_copy(chromium, file):
    """By its button, and in the clipboard as it stands."""
    chromium.open(file)
    chromium.run("document.addEventListener('copy', () => { window.copied = getSelection().toString() })")
    chromium.run("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    for refusing in (False, True):
        if refusing:
            chromium.run("navigator.clipboard.writeText = async () => { throw Error('no permission') }")
        chromium.run("window.copied = null; document.querySelector('.code button').click()")
        chromium.run("new Promise((done) => setTimeout(done, 50))")
        assert chromium.run("window.copied") == f"apply('todo:2', '{'1' * 200}')\n# more"
        assert chromium.run("document.querySelector('#copied').textContent") == "Copied"
    assert chromium.problems == []


WIDER = """[...document.querySelectorAll('body *')].filter((element) =>
    element.getBoundingClientRect().right > innerWidth + 0.5 && !element.matches('.unseen, .choices i, .stage input')
    && !element.parentElement.closest('.scroll, .choices')).map((element) => element.outerHTML.slice(0, 200))"""


def test_a_phone(chromium, file):
    """Nothing is wider than the screen but the table and the tabs, which scroll inside of it."""
    chromium.open(file, **PHONE)
    assert chromium.run("innerWidth") == 360
    assert chromium.run("document.documentElement.scrollWidth") <= 360
    assert chromium.run(WIDER) == []
    assert chromium.run("document.querySelector('.stage').getBoundingClientRect().width") > 300
    for control in (".choices label", ".stage input", "button"):
        assert chromium.run(f"document.querySelector('{control}').getBoundingClientRect().height") >= 24
    visible = chromium.run("[...document.querySelectorAll('.plot')].map((plot) => plot.checkVisibility())")
    assert visible == [False, True]
    assert chromium.problems == []


CONTRAST = """(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return parts(colour)[3] === 0 ? behind(element.parentElement) : colour;
  };
  return Math.min(...[...document.querySelectorAll('h1,h2,h3,p,li,th,td,small,legend,button,code,caption,.choices span,'
    + '.captions b,.bar span')].filter((e) => !e.matches('.unseen')).map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    }));
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(chromium, file, scheme):
    """At least 4.5, as WCAG's level AA asks of text."""
    chromium.open(file, prefers_color_scheme=scheme)
    paper = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 22, 26)")
    assert chromium.run(CONTRAST) >= 4.5


def test_in_print_all_methods_stand_side_by_side(chromium, file):
    chromium.open(file)
    chromium.send("Emulation.setEmulatedMedia", media="print")
    assert len(shown(chromium)) == 15 + 14
    assert not chromium.run("document.querySelector('.controls').checkVisibility()")
    places = chromium.run(
        "[...document.querySelectorAll('.stage img')].map((i) => i.getBoundingClientRect()).map((r) => r.x + ',' + r.y)"
    )
    assert len(set(places)) == 15 + 13


def test_without_javascript_too(chromium, file):
    try:
        chromium.send("Emulation.setScriptExecutionDisabled", value=True)
        chromium.open(file)
        assert len(shown(chromium)) == 15 + 14
        assert not chromium.run("document.querySelector('.controls').checkVisibility()")
    finally:
        chromium.send("Emulation.setScriptExecutionDisabled", value=False)
