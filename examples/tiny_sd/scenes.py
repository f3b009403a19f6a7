"""Captioned scenes drawn from a formula, so that one scene can be had at any size and shape.

A scene is one or two flat shapes on a plain or patterned background. Everything is a signed distance, measured in
units of the image's short side and turned into coverage over one pixel: the same scene at 256, 512 or 1024 pixels
is the same image, with equally sharp edges.

    scene = random_scene(np.random.default_rng(0))
    scene.caption(rng)            "a large striped red star and a blue ring on a yellow background"
    render(scene, 512, 768)       float32 array (512, 768, 3) in [0, 1]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (0.84, 0.14, 0.14),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.98, 0.86, 0.20),
    "green": (0.15, 0.62, 0.28),
    "blue": (0.13, 0.33, 0.85),
    "purple": (0.50, 0.22, 0.68),
    "pink": (0.97, 0.58, 0.75),
    "white": (0.97, 0.97, 0.97),
    "black": (0.08, 0.08, 0.08),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "heart", "diamond", "cross")
SIZES = ("small", "", "large")
FILLS = ("", "striped", "dotted")
LAYOUTS = ("one", "beside", "above")
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "gradient")
PREFIXES = ("a drawing of", "a picture of", "an image of", "a photo of", "a painting of", "an illustration of")
JOINS = {"beside": ("and", "next to", "beside", "left of", "to the left of"), "above": ("above", "over", "on top of")}
LEGENDS = "a an the with in of on to and or background shape colour color two pattern sky big tiny simple , ."
WORDS = sorted(
    {*COLOURS, *SHAPES, *SIZES, *FILLS, *BACKGROUNDS, *LEGENDS.split()}
    | {w for phrase in (*PREFIXES, *JOINS["beside"], *JOINS["above"]) for w in phrase.split()} - {""}
)
WORDS.remove("")


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@dataclass(frozen=True)
class Shape:
    """One object: what the caption says of it, and the small shifts of position that it does not."""

    shape: str
    colour: str
    size: str = ""
    fill: str = ""
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)  # x, y, radius, each in [-1, 1]

    def phrase(self) -> str:
        return article(" ".join(w for w in (self.size, self.fill, self.colour, self.shape) if w))


@dataclass(frozen=True)
class Scene:
    """Objects, their arrangement and the background; ``phase`` shifts the background's pattern."""

    objects: tuple[Shape, ...]
    layout: str = "one"
    background: str = "plain"
    colours: tuple[str, str] = ("white", "white")  # the second one equal to the first: a lighter tone of it
    phase: tuple[float, float] = (0.0, 0.0)
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def background_phrase(self, rng: np.random.Generator | None = None) -> str:
        first, second = self.colours
        if self.background == "plain":
            return article(f"{first} background")
        if self.background == "gradient":
            return article(f"{first} to {second} gradient background")
        if first != second:
            return article(f"{first} and {second} {self.background} background")
        swapped = rng is not None and rng.random() < 0.5
        return article(f"{self.background} {first} background" if swapped else f"{first} {self.background} background")

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """The caption. With ``rng`` its wording varies; some captions have a stray word or no background."""
        join = JOINS.get(self.layout, ("",))
        join_word = join[rng.integers(len(join))] if rng is not None else join[0]
        text = f" {join_word} ".join(o.phrase() for o in self.objects)
        text = f"{text} on {self.background_phrase(rng)}"
        if rng is None:
            return text
        if rng.random() < 0.15:
            text = f"{PREFIXES[rng.integers(len(PREFIXES))]} {text}"
        if rng.random() < 0.08:
            text = " ".join(w for w in text.split() if w not in ("a", "an", "the"))
        if rng.random() < 0.05:  # an unknown word, spelled out in letters: to be read past
            words = text.split()
            stray = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 8)))
            text = " ".join([*words[: (at := int(rng.integers(len(words))))], stray, *words[at:]])
        return text

    def labels(self) -> dict[str, int]:
        """The caption's meaning as class indices, absent ones -1 (what the text encoder is first trained to read)."""
        out = {"layout": LAYOUTS.index(self.layout), "background": BACKGROUNDS.index(self.background)}
        names = list(COLOURS)
        out["first"], out["second"] = (names.index(c) for c in self.colours)
        for i in range(2):
            o = self.objects[i] if i < len(self.objects) else None
            for key, classes in (("shape", SHAPES), ("colour", names), ("size", SIZES), ("fill", FILLS)):
                out[f"{key}{i}"] = -1 if o is None else classes.index(getattr(o, key))
        return out


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene whose colours can be told apart."""

    def pick(options, p=None):
        return options[rng.choice(len(options), p=p)]

    def spread(n):
        return tuple(float(v) for v in rng.uniform(-1, 1, n))

    background = pick(BACKGROUNDS, (0.5, 0.14, 0.12, 0.12, 0.12))
    names = list(rng.permutation(list(COLOURS)))
    first = str(names.pop())
    two = background == "gradient" or (background != "plain" and rng.random() < 0.5)
    second = str(names.pop()) if two else first
    layout = pick(LAYOUTS, (0.6, 0.25, 0.15))
    objects = tuple(
        Shape(pick(SHAPES), str(pick(names)), pick(SIZES, (0.25, 0.5, 0.25)), pick(FILLS, (0.8, 0.1, 0.1)), spread(3))
        for _ in range(1 if layout == "one" else 2)
    )
    return Scene(objects, layout, background, (first, second), spread(2), spread(3))


def _ngon(x, y, n, outer, inner, turn=0.0):
    """Distance to an n-pointed star; a regular polygon where ``inner`` is its apothem's corner."""
    angle = np.arctan2(x, -y) + turn
    wedge = np.pi / n
    angle = np.abs(np.mod(angle + wedge, 2 * wedge) - wedge)
    r = np.hypot(x, y)
    px, py = r * np.cos(angle), r * np.sin(angle)
    ix, iy = inner * np.cos(wedge), inner * np.sin(wedge)
    ex, ey = ix - outer, iy
    return ((px - outer) * ey - py * ex) / np.hypot(ex, ey)


def _polygon(x, y, n, outer, turn=0.0):
    return _ngon(x, y, n, outer, outer * np.cos(np.pi / n), turn)


def _heart(x, y):
    x, y = np.abs(x) / 1.7, (0.84 - y) / 1.7
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    point = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - (m := np.maximum(x + y, 0) / 2)) ** 2 + (y - m) ** 2))
    return 1.7 * np.where(x + y > 1, lobe, point * np.sign(x - y))


def _distance(shape: str, x, y):
    """Signed distance to a shape about one unit in radius (negative inside, y down)."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.2
    if shape == "square":
        return _polygon(x, y, 4, 1.12, np.pi / 4)
    if shape == "diamond":
        return _polygon(x * 1.25, y, 4, 1.05) / 1.1
    if shape == "triangle":
        return _polygon(x, y - 0.22, 3, 1.15)
    if shape == "star":
        return _ngon(x, y - 0.05, 5, 1.08, 0.47)
    if shape == "heart":
        return _heart(x, y)
    ax, ay = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(ax - 0.3, ay - 0.92), np.maximum(ay - 0.3, ax - 0.92))


def _wave(s, period):
    """Distance to bands of half a period."""
    return (np.abs(np.mod(s / period, 1) - 0.5) - 0.25) * period


def _dots(x, y, period):
    return np.hypot(*(np.mod(v / period, 1) * period - period / 2 for v in (x, y))) - 0.3 * period


def _rgb(name: str, tint=(0.0, 0.0, 0.0)) -> np.ndarray:
    return np.clip(np.array(COLOURS[name]) + 0.03 * np.array(tint), 0, 1).astype(np.float32)


def _tone(rgb: np.ndarray) -> np.ndarray:
    """The same colour, lighter; a grey for white."""
    return rgb * 0.72 if rgb.min() > 0.85 else rgb + (1 - rgb) * 0.5


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """Draw the scene: float32 (height, width, 3) in [0, 1]."""
    short = min(height, width)
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / short)[:, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / short)[None, :]

    def cover(distance):
        return np.clip(0.5 - distance * short, 0, 1)

    first, second = (_rgb(c, scene.tint) for c in scene.colours)
    if scene.colours[0] == scene.colours[1]:
        second = _tone(first)
    u, v = x + 0.0625 * scene.phase[0], y + 0.0625 * scene.phase[1]
    if scene.background == "striped":
        mix = cover(_wave((u + v) * np.sqrt(0.5), 0.125))
    elif scene.background == "checkered":
        a, b = cover(_wave(u, 0.25)), cover(_wave(v, 0.25))
        mix = a + b - 2 * a * b
    elif scene.background == "dotted":
        mix = cover(_dots(u, v, 0.125))
    elif scene.background == "gradient":
        mix = y * short / height + 0.5
    else:
        mix = np.zeros_like(y)
    image = np.broadcast_to(first + (second - first) * mix[..., None], (height, width, 3)).copy()

    rows, columns = (1, 1) if scene.layout == "one" else (1, 2) if scene.layout == "beside" else (2, 1)
    cell = min(height / rows, width / columns) / short
    cell *= 1.0 if scene.layout == "one" else 1.15
    for i, o in enumerate(scene.objects):
        jx, jy, jr = o.jitter
        radius = cell * {"small": 0.18, "": 0.27, "large": 0.38}[o.size] * (1 + 0.06 * jr)
        cx = ((i + 0.5) / columns - 0.5 if columns > 1 else 0) * width / short + 0.04 * cell * jx
        cy = ((i + 0.5) / rows - 0.5 if rows > 1 else 0) * height / short + 0.04 * cell * jy
        reach = 1.3 * radius + 2 / short  # only the box around the object is drawn
        rows_in = np.flatnonzero(np.abs(y[:, 0] - cy) < reach)
        columns_in = np.flatnonzero(np.abs(x[0] - cx) < reach)
        if not len(rows_in) or not len(columns_in):
            continue
        box = np.s_[rows_in[0] : rows_in[-1] + 1, columns_in[0] : columns_in[-1] + 1]
        ox, oy = x[:, box[1]] - cx, y[box[0]] - cy
        rgb = _rgb(o.colour, scene.tint[::-1])
        paint = np.broadcast_to(rgb, (*np.broadcast(ox, oy).shape, 3))
        if o.fill:
            d = _wave(oy, 0.08) + 0 * ox if o.fill == "striped" else _dots(ox, oy, 0.08)
            paint = paint + (_tone(rgb) - rgb) * cover(d)[..., None]
        alpha = cover(_distance(o.shape, ox / radius, oy / radius) * radius)[..., None]
        image[box] += (paint - image[box]) * alpha
    return image.astype(np.float32)
