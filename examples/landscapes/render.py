"""Draw a scene: sky, light and clouds, layers of mountains, ground.

Lengths are in units of the image's shorter side, so a scene keeps its shapes at any size and aspect ratio.
"""

from __future__ import annotations

import numpy as np

from .noise import Noise, fbm, smoothstep
from .scenes import MIRRORED, Scene


def rgb(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# Colours by time of day: the sky from its top to the horizon, the disc, and surfaces in light and in shadow.
PALETTES = {
    "dawn": {
        "top": rgb(0.33, 0.44, 0.70), "middle": rgb(0.70, 0.66, 0.80), "horizon": rgb(1.00, 0.80, 0.72),
        "disc": rgb(1.00, 0.93, 0.80), "lit": rgb(1.00, 0.85, 0.80), "shade": rgb(0.44, 0.47, 0.64),
    },
    "day": {
        "top": rgb(0.13, 0.38, 0.78), "middle": rgb(0.38, 0.65, 0.92), "horizon": rgb(0.80, 0.90, 0.97),
        "disc": rgb(1.00, 0.99, 0.88), "lit": rgb(1.06, 1.03, 0.96), "shade": rgb(0.44, 0.52, 0.66),
    },
    "sunset": {
        "top": rgb(0.17, 0.14, 0.40), "middle": rgb(0.66, 0.28, 0.44), "horizon": rgb(1.00, 0.62, 0.26),
        "disc": rgb(1.00, 0.88, 0.52), "lit": rgb(1.08, 0.66, 0.42), "shade": rgb(0.30, 0.22, 0.38),
    },
    "night": {
        "top": rgb(0.015, 0.025, 0.09), "middle": rgb(0.04, 0.07, 0.19), "horizon": rgb(0.15, 0.22, 0.38),
        "disc": rgb(0.97, 0.97, 0.90), "lit": rgb(0.50, 0.57, 0.74), "shade": rgb(0.15, 0.18, 0.31),
    },
}  # fmt: skip
ROCK = {
    "snowy mountains": rgb(0.36, 0.37, 0.44),
    "rocky mountains": rgb(0.52, 0.48, 0.46),
    "green hills": rgb(0.33, 0.50, 0.20),
    "red cliffs": rgb(0.74, 0.33, 0.18),
}
SNOW = rgb(0.96, 0.98, 1.02)
FLOWERS = (
    (rgb(1.0, 0.86, 0.15), rgb(1.0, 1.0, 0.95)),
    (rgb(0.95, 0.20, 0.22), rgb(1.0, 0.85, 0.25)),
    (rgb(0.70, 0.45, 0.95), rgb(0.98, 0.75, 0.90)),
    (rgb(1.0, 1.0, 1.0), rgb(0.98, 0.60, 0.75)),
)


class Canvas:
    """The image so far, its coordinates, and the scene's random numbers and colours."""

    def __init__(self, scene: Scene, height: int, width: int):
        rng = np.random.default_rng(scene.seed)
        self.scene, self.height, self.width = scene, height, width
        side = min(height, width)
        self.px = 1 / side
        self.w, self.h = width / side, height / side
        self.x = ((np.arange(width) + 0.5) / side).astype(np.float32)
        self.y = ((np.arange(height) + 0.5) / side).astype(np.float32)
        self.u = rng.random(40)
        self.noise = [Noise(rng) for _ in range(6)]
        tint = 1 + 0.05 * (rng.random(3, np.float32) - 0.5)
        self.colour = {name: value * tint for name, value in PALETTES[scene.time].items()}
        self.image = np.zeros((height, width, 3), np.float32)
        low = {"lake": 0.54, "meadow": 0.53, "desert": 0.52, "forest": 0.50}[scene.ground]
        self.horizon = (low + 0.05 * self.u[0]) * self.h
        # Mirrored scenes are drawn as they were and flipped at the end.
        place = MIRRORED[scene.place] if scene.flip else scene.place
        self.disc_x = ({"left": 0.19, "center": 0.5, "right": 0.81}[place] + 0.07 * (self.u[1] - 0.5)) * self.w
        self.disc_r = 0.050 + 0.018 * self.u[2]
        self.side = {"left": -1.0, "center": 0.35 if self.u[3] < 0.5 else -0.35, "right": 1.0}[place]
        self.ridges = [Ridge(self, k) for k in range(3)]
        near = self.disc_x + np.linspace(-1, 1, 65) * 1.2 * self.disc_r
        ceiling = min(float(ridge.crest(near).min()) for ridge in self.ridges)
        wanted = {"dawn": 0.30, "day": 0.13, "sunset": 0.33, "night": 0.15}[scene.time] + 0.06 * self.u[4]
        # The whole disc stands over the crests.
        self.disc_y = max(1.25 * self.disc_r, min(wanted * self.h, ceiling - 1.1 * self.disc_r))

    def surface(self, albedo, light) -> np.ndarray:
        """Colours of a surface (..., 3) of that albedo under light (...) between 0 and 1."""
        shade, lit = self.colour["shade"], self.colour["lit"]
        return albedo * (shade + (lit - shade) * light[..., None])

    def over(self, rows: slice, colour, alpha) -> None:
        """Lay a colour (h, w, 3) or (3,) over rows of the image with opacity alpha (h, w)."""
        part = self.image[rows]
        part += (colour - part) * alpha[..., None]


class Ridge:
    """The crest line of the k-th layer of mountains, far to near."""

    def __init__(self, canvas: Canvas, k: int):
        self.kind, self.k, self.noise = canvas.scene.mountains, k, canvas.noise[k % 3]
        self.offset = 100 * canvas.u[5 + k]
        self.base = canvas.horizon + 0.018 * k
        self.room = canvas.horizon

    def crest(self, x: np.ndarray) -> np.ndarray:
        """The crest's y at x."""
        k, x = self.k, np.asarray(x, np.float32)
        row = np.float32(3.5 + 20 * k)
        if self.kind == "green hills":
            n = fbm(self.noise.at, x * (1.3 + 0.6 * k) + self.offset, row, 4, 0.32)
            return self.base - (0.15 - 0.04 * k) * smoothstep(0.15, 0.95, n) * 1.5
        if self.kind == "red cliffs":
            n = fbm(self.noise.at, x * (2.0 + 0.9 * k) + self.offset, row, 3, 0.4)
            fine = fbm(self.noise.at, x * 26 + self.offset, row + 7, 3)
            steps = 0.5 * smoothstep(0.40, 0.46, n) + 0.3 * smoothstep(0.53, 0.57, n) + 0.2 * smoothstep(0.62, 0.65, n)
            return self.base - (0.22 - 0.055 * k) * (0.16 + steps + 0.22 * (n - 0.5)) - 0.012 * fine
        n = fbm(self.noise.at, x * (1.35 + 0.8 * k) + self.offset, row, 7, 0.48, ridged=True)
        height = 0.36 - 0.095 * k if self.kind == "snowy mountains" else 0.30 - 0.08 * k
        return self.base - height * np.clip(1.75 * n - 0.52, 0.06, 1.2)


def draw(scene: Scene, height: int, width: int) -> np.ndarray:
    """See ``scenes.render``."""
    canvas = Canvas(scene, height, width)
    sky(canvas)
    mountains(canvas)
    {"lake": lake, "meadow": meadow, "desert": desert, "forest": forest}[scene.ground](canvas)
    image = np.clip(canvas.image, 0, 1)
    return np.ascontiguousarray(image[:, ::-1]) if scene.flip else image


# --- sky ---


def sky(c: Canvas) -> None:
    """Gradient, stars, halo, disc and clouds."""
    top, middle, horizon = (c.colour[name] for name in ("top", "middle", "horizon"))
    t = np.clip(c.y / (c.horizon + 0.02), 0, 1)[:, None, None]
    gradient = np.where(t < 0.55, top + (middle - top) * (t / 0.55), middle + (horizon - middle) * ((t - 0.55) / 0.45))
    c.image[:] = gradient
    if c.scene.time == "night":
        stars(c)
    dx, dy = c.x[None] - c.disc_x, c.y[:, None] - c.disc_y
    distance = np.sqrt(dx * dx + dy * dy)
    strength = {"dawn": 0.75, "day": 0.6, "sunset": 0.85, "night": 0.35}[c.scene.time]
    rest = np.maximum(distance - c.disc_r, 0)
    glow = 0.62 * np.exp(-rest / 0.06) + 0.38 * np.exp(-rest / 0.28)
    if c.scene.time in ("dawn", "sunset"):  # a band of light along the horizon
        glow += 0.35 * np.exp(-np.abs(dx) / 0.5 - np.abs(c.y[:, None] - c.horizon) / 0.10)
    warm = 0.5 * (c.colour["disc"] + c.colour["horizon"]) if c.scene.time != "day" else c.colour["disc"]
    c.over(slice(None), warm, np.clip(strength * glow, 0, 1))
    disc = np.clip((c.disc_r - distance) / (1.5 * c.px) + 0.5, 0, 1)
    face = c.colour["disc"]
    if c.scene.time == "night":
        maria = fbm(c.noise[3].at, dx / c.disc_r * 1.6 + 9, dy / c.disc_r * 1.6 + 9, 3)
        face = face * (1 - 0.32 * smoothstep(0.5, 0.68, maria))[..., None]
    c.over(slice(None), face, disc)
    if c.scene.sky != "clear":
        clouds(c)


def stars(c: Canvas) -> None:
    noise = c.noise[4]
    rows = slice(0, int(c.horizon / c.px))
    y = c.y[rows, None]
    milky = fbm(c.noise[3].grid, c.x * 5 + 3, c.y[rows] * 5, 4)
    tilt = (c.x[None] - c.w * c.u[10]) * 0.8 * (1 if c.u[11] < 0.5 else -1) + 0.22 * c.h - y
    c.over(rows, rgb(0.30, 0.33, 0.50), 0.55 * np.exp(-((tilt / 0.11) ** 2)) * smoothstep(0.35, 0.75, milky))
    for density, brightest, row in ((26, 1.0, 0), (52, 0.75, 40)):
        column, line = np.floor(c.x * density).astype(np.int32)[None], np.floor(y * density).astype(np.int32)
        jx, jy = noise.hash2(line + row, column), noise.hash2(line + row + 20, column + 50)
        bright = noise.hash2(line + row + 70, column + 11)
        dx = c.x[None] - (column + 0.2 + 0.6 * jx) / density
        dy = y - (line + 0.2 + 0.6 * jy) / density
        r = max(0.0021, 0.62 * c.px)
        spot = np.exp(-(dx * dx + dy * dy) / (r * r)) * min(1, 0.0032 / r) * brightest * smoothstep(0.45, 1.0, bright)
        c.over(rows, rgb(1.0, 0.98, 0.94), np.clip(spot * np.clip((c.horizon - y) * 5, 0, 1), 0, 1))


def clouds(c: Canvas) -> None:
    """Clouds on a plane overhead, smaller and flatter towards the horizon."""
    rows = slice(0, int(c.horizon / c.px))
    shift = max(1, round(0.022 / c.px))  # for the shading, clouds are drawn some rows beyond the top
    y = np.concatenate([c.y[:shift] - shift * c.px, c.y[rows]])[:, None]
    d = (c.horizon - y) / c.h + 0.13
    u, v = (c.x[None] - c.w / 2) / d * 0.62 + 30 * c.u[12], 0.85 / d + 30 * c.u[13]
    noise = c.noise[5]
    fade = smoothstep(0.0, 0.10, (c.horizon - c.y[rows, None]))
    # The disc shines through.
    away = ((c.x[None] - c.disc_x) ** 2 + (c.y[rows, None] - c.disc_y) ** 2) / c.disc_r**2
    fade = fade * (1 - 0.9 * np.exp(-((away / 2.2) ** 2)))
    white = 0.80 * c.colour["lit"] + 0.20 * c.colour["horizon"]
    grey = 0.55 * c.colour["shade"] + 0.45 * c.colour["middle"]
    if c.scene.sky == "wisps":
        bend = noise.at(u * 0.7, v * 0.7)
        n = fbm(noise.at, u * 0.8 + 1.5 * bend, v * 3.2 + 2.0 * bend, 5, 0.55)[shift:]
        alpha = 0.75 * smoothstep(0.46, 0.80, n) * fade
        c.over(rows, white * (1 if c.scene.time != "night" else 0.8), alpha)
        return
    n = fbm(noise.at, u * 1.15, v * 1.5, 5, 0.5)
    n, above = n[shift:], n[:-shift]
    cover = 0.49 - 0.03 * c.u[14]
    alpha = 0.95 * smoothstep(cover, cover + 0.13, n) * fade
    light = np.clip(0.62 + 3.2 * (n - above) - 1.6 * np.clip(n - cover - 0.10, 0, 1), 0, 1)
    if c.scene.time == "sunset":  # lit from below
        light = 1 - 0.85 * light
    c.over(rows, grey + (white - grey) * light[..., None], alpha)


# --- mountains ---


def mountains(c: Canvas) -> None:
    for ridge in c.ridges:
        crest = ridge.crest(c.x)
        rows = slice(max(0, int(crest.min() / c.px) - 1), min(c.height, int((c.horizon + 0.16) / c.px)))
        depth = c.y[rows, None] - crest[None]  # below the crest
        inside = np.nonzero(depth > -c.px)
        colour = np.zeros((*depth.shape, 3), np.float32)
        colour[inside] = mountain_colour(c, ridge, c.x[inside[1]], c.y[rows][inside[0]], depth[inside])
        c.over(rows, colour, np.clip(depth / c.px + 0.5, 0, 1))


def mountain_colour(c: Canvas, ridge: Ridge, x, y, depth) -> np.ndarray:
    """Colours (n, 3) of a layer's points, lit from the side of the sun or moon."""
    kind, noise, k = c.scene.mountains, c.noise[(ridge.k + 1) % 3], ridge.k
    scale = 5.5 + 2.5 * k
    if kind == "green hills":
        px, py, relief = x * scale * 0.5, depth * scale * 1.4, 2.2
    elif kind == "red cliffs":
        px, py, relief = x * scale * 3.2, depth * scale * 0.45, 1.5
    else:
        warp = noise.at(x * 3.1 + ridge.offset, y * 3.1)
        lean = noise.at(x * 2.3 + 5, np.float32(33.5 + 7 * k)) - 0.5  # spurs run down to both sides
        px = x * scale * 1.2 + 0.9 * warp + 2.6 * lean * depth * scale
        py, relief = depth * scale * 0.9 - 0.9 * warp, 2.6
    ridged = kind in ("snowy mountains", "rocky mountains")
    step = 0.22
    here = fbm(noise.at, px + ridge.offset, py, 5, 0.55, ridged)
    there = fbm(noise.at, px + ridge.offset + step * c.side, py - 0.6 * step, 5, 0.55, ridged)
    light = np.clip(0.48 + relief * (here - there) + 0.12 * (here - 0.5), 0, 1)
    albedo = ROCK[kind] * (0.82 + 0.36 * here[:, None])
    if kind == "red cliffs":
        strata = c.noise[3].at(np.float32(0.5), y * 46 + 2.5 * here + ridge.offset)
        albedo = albedo * (0.74 + 0.52 * strata[:, None])
    elif kind == "green hills":
        speckle = fbm(c.noise[4].at, x * 60, y * 75, 2)
        light = np.clip(0.62 + 1.3 * (light - 0.5) - 0.5 * smoothstep(0.5, 0.75, speckle) * (0.4 + 0.3 * k), 0, 1)
    out = c.surface(albedo, light)
    if kind == "snowy mountains":
        line = 0.075 - 0.008 * k + 0.20 * np.clip((ridge.base - (y - depth)) - 0.05, 0, 1)  # taller peaks carry more
        cover = smoothstep(-0.028, 0.022, line - depth + 0.16 * (light - 0.52) + 0.05 * (here - 0.5))
        snow = c.surface(SNOW, np.clip(0.25 + 0.95 * light, 0, 1))
        out = out + (snow - out) * cover[:, None]
    haze = (0.50, 0.27, 0.08)[k] + 0.25 * smoothstep(0.0, 0.25, depth) * (1 - 0.35 * k)
    air = 0.35 * c.colour["middle"] + 0.65 * c.colour["horizon"]
    return out + (air - out) * haze[:, None]


# --- grounds ---


def pines(c: Canvas, base, size: float, spacing: float, row: int, haze: float, floor: bool = True) -> None:
    """A row of pines that stand on the line ``base`` (w,); ``floor`` darkens what lies below it."""
    noise = c.noise[4]
    first = max(0, int((base.min() - 1.35 * size) / c.px))
    last = c.height if floor else min(c.height, int(base.max() / c.px) + 2)
    rows = slice(first, last)
    y = c.y[rows, None]
    air = 0.4 * c.colour["middle"] + 0.6 * c.colour["horizon"]
    dark = rgb(0.08, 0.17, 0.11)
    if floor:
        ground = c.surface(dark * 0.8, np.full_like(y, 0.3)) * (1 - haze) + air * haze
        c.over(rows, ground, np.clip((y - base) / c.px + 0.5, 0, 1))
    place = c.x / spacing
    cell = np.floor(place).astype(np.int32)
    for step in (-1, 1, 0):
        tree = cell + step
        grown, hue, wide = (noise.hash(row + 9 * i, tree) for i in range(3))
        centre = (tree + 0.5 + 0.6 * (noise.hash(row + 5, tree) - 0.5)) * spacing
        tall = size * (0.62 + 0.62 * grown)
        dx = c.x - centre
        level = (y - (base - tall)) / tall  # 0 at the tip, 1 at the foot
        tiers = 7 + 4 * wide
        tooth = (level * tiers + hue) % 1.0
        half = tall * (0.15 + 0.07 * wide) * np.clip(level, 0, 1) * (0.55 + 0.55 * tooth) + 0.003 * tall
        shape = np.clip((half - np.abs(dx)) / c.px + 0.5, 0, 1) * (level > 0) * (level < 1)
        across = np.clip(dx / (half + 1e-6), -1, 1)
        light = np.clip(0.30 + 0.42 * c.side * across + 0.35 * (tooth - 0.5) + 0.18 * (1 - level), 0, 1)
        albedo = dark * (0.9 + 0.9 * hue)[None, :, None] + rgb(0.08, 0.14, 0.03) * light[..., None]
        c.over(rows, c.surface(albedo, light) * (1 - haze) + air * haze, shape)


def perspective(c: Canvas, rows: slice, scale: float, start: float):
    """Coordinates (u, v) on the ground whose cells shrink evenly towards the horizon at ``start``, and the nearness."""
    near = np.maximum(c.y[rows, None] - start, 0) + 0.05
    return scale * (c.x[None] - c.w / 2) / near, scale * np.log(near), near


def ground_line(c: Canvas, drop: float, wave: float, frequency: float) -> np.ndarray:
    n = fbm(c.noise[0].at, c.x * frequency + 50 * c.u[20], np.float32(60.5), 3, 0.4)
    return (c.horizon + drop + wave * (n - 0.5)).astype(np.float32)


def mist(c: Canvas, line: float, strength: float) -> None:
    """Low mist about a line, thick at dawn."""
    strength *= {"dawn": 1.0, "day": 0.25, "sunset": 0.4, "night": 0.35}[c.scene.time]
    n = fbm(c.noise[3].grid, c.x * 3 + 40 * c.u[21], c.y * 22, 3)
    alpha = strength * np.exp(-(((c.y[:, None] - line) / 0.035) ** 2)) * (0.4 + 1.2 * n)
    c.over(slice(None), 0.25 * c.colour["lit"] + 0.75 * c.colour["horizon"], np.clip(alpha, 0, 1))


def lake(c: Canvas) -> None:
    """Still water: the mirror image of all above the shore, broken by ripples that grow towards the viewer."""
    shore = c.horizon + 0.055 + 0.02 * c.u[22]
    bank = ground_line(c, shore - c.horizon - 0.012, 0.022, 3.0)
    if c.u[23] < 0.75:  # a wooded shore
        gap = smoothstep(0.34, 0.5, fbm(c.noise[1].at, c.x * 2.2 + 70 * c.u[24], np.float32(90.5), 2))
        pines(c, bank, 0.058, 0.019, 3, 0.22, floor=False)
        pines(c, bank + 0.010, 0.050 * float(gap.mean() + 0.5), 0.023, 33, 0.10, floor=False)
    rows = slice(int(bank.min() / c.px), c.height)
    soil = c.surface(rgb(0.30, 0.27, 0.20), np.full((1, 1), 0.35))
    c.over(rows, soil, np.clip((c.y[rows, None] - bank) / c.px + 0.5, 0, 1))
    mist(c, shore, 0.55)
    start = int(shore / c.px)
    rows = slice(start, c.height)
    y = c.y[rows]
    near = (y - shore) + 0.02
    v = 9.0 * np.log(near)
    ripple = fbm(c.noise[2].grid, c.x * 5, v * 1.6, 3, 0.6) - 0.5
    ripple_fine = fbm(c.noise[3].grid, c.x * 16, v * 4.5, 2, 0.6) - 0.5
    swell = near[:, None] * (0.16 * ripple + 0.07 * ripple_fine)
    source = np.clip((2 * shore - y[:, None] + swell) / c.px - 0.5, 0, start - 1.001)
    whole = source.astype(np.int32)
    part = (source - whole)[..., None]
    columns = np.arange(c.width)[None]
    mirror = c.image[whole, columns] * (1 - part) + c.image[np.minimum(whole + 1, start - 1), columns] * part
    deep = 0.5 * c.surface(rgb(0.08, 0.24, 0.32), np.full((1, 1), 0.5)) + 0.25 * c.colour["middle"]
    clear = (0.90 - 0.30 * smoothstep(0.0, 0.5, near))[:, None, None]
    water = mirror * clear + deep * (1 - clear)
    water *= 1 + 0.5 * (ripple_fine * smoothstep(0.0, 0.12, near)[:, None])[..., None]
    # Glitter below the light.
    spread = 0.035 + 0.16 * near[:, None]
    path = np.exp(-(((c.x[None] - c.disc_x) / spread) ** 2)) * smoothstep(0.10, 0.26, ripple_fine + 0.5 * ripple)
    c.image[rows] = water
    c.over(rows, c.colour["disc"], np.clip(0.75 * path, 0, 1))
    c.over(slice(start, start + max(1, round(0.004 / c.px))), c.colour["horizon"], np.full((1, 1), 0.30))


def meadow(c: Canvas) -> None:
    """Grass in perspective, strewn with flowers of two colours."""
    edge = ground_line(c, 0.05 + 0.02 * c.u[22], 0.045, 2.2)
    if c.u[23] < 0.6:
        pines(c, edge + 0.004, 0.055, 0.026, 3, 0.20, floor=False)
    mist(c, float(edge.mean()), 0.45)
    rows = slice(int(edge.min() / c.px), c.height)
    u, v, near = perspective(c, rows, 7.0, float(edge.min()) - 0.02)
    patches = fbm(c.noise[1].at, u * 0.35, v * 0.6, 3)
    grass = fbm(c.noise[2].at, u * 3.4 + 0.8 * patches, v * 1.7, 4, 0.62)
    light = np.clip(0.55 + 1.5 * (grass - 0.5) + 0.7 * (patches - 0.5), 0, 1)
    young, old = rgb(0.46, 0.62, 0.17), rgb(0.22, 0.42, 0.13)
    blend = smoothstep(0.35, 0.65, patches)[..., None]
    c.over(rows, c.surface(old + (young - old) * blend, light), np.clip((c.y[rows, None] - edge) / c.px + 0.5, 0, 1))
    kinds = FLOWERS[int(c.u[25] * len(FLOWERS))]
    below = smoothstep(0.0, 0.03, c.y[rows, None] - edge)
    for layer, colour in enumerate(kinds):
        size = (1.25, 1.9)[layer]
        fu, fv = u * size + 7.7 * layer, v * size + 3.3 * layer
        column, line = np.floor(fu).astype(np.int32), np.floor(fv).astype(np.int32)
        a = c.noise[5].hash2(line + 13 * layer, column)
        b = c.noise[5].hash2(line + 50, column + 31 + layer)
        grown = c.noise[5].hash2(line + 90, column + 77 + layer)
        dx, dy = fu - column - 0.2 - 0.6 * a, (fv - line - 0.2 - 0.6 * grown) * 1.3
        r = 0.07 + 0.13 * b
        cell = near / (7.0 * size)  # a cell's side in the image
        soft = np.maximum(c.px / cell, 0.06)
        spot = np.clip((r - np.sqrt(dx * dx + dy * dy)) / soft + 0.5, 0, 1)
        there = smoothstep(0.46, 0.52, 0.6 * patches + 0.4 * grown) if layer == 0 else smoothstep(0.55, 0.6, grown)
        c.over(rows, c.surface(colour, np.clip(0.75 + 0.5 * (grass - 0.5), 0, 1)), spot * there * below)


def desert(c: Canvas) -> None:
    """Dunes in perspective: sharp crests, one side lit, wind ripples on both."""
    sand = rgb(0.92, 0.72, 0.43)
    edge = ground_line(c, 0.045, 0.06, 1.6)
    rows = slice(int(edge.min() / c.px), c.height)
    u, v, near = perspective(c, rows, 1.0, float(edge.min()) - 0.05)
    u, v = u + 50 * c.u[26], 1.7 * v + 50 * c.u[27]
    noise = c.noise[1]
    bend = noise.at(0.45 * u + 9, 0.45 * v)

    def height(u, v):
        return fbm(noise.at, 0.42 * u + 1.1 * bend, 0.62 * v + 0.5 * bend, 3, 0.30, ridged=True)

    step = 0.05
    here = height(u, v)
    slope = (here - height(u + step * c.side, v - 0.8 * step)) / step
    light = 0.56 + 0.62 * np.tanh(1.6 * slope) * smoothstep(0.0, 0.25, near)
    ripple = np.sin(38 * v + 16 * bend + 9 * here + 1.5 * u)
    size = near / (38 * 1.7)  # a radian of the ripples in the image
    light = light + 0.085 * ripple * smoothstep(0.7, 1.6, size / c.px)
    grain = fbm(c.noise[2].at, u * 14, v * 9, 3) - 0.5
    colour = c.surface(sand * (1 + 0.16 * grain[..., None]), np.clip(light, 0, 1))
    air = 0.3 * c.colour["middle"] + 0.7 * c.colour["horizon"]
    haze = 0.38 * np.exp(-(near - 0.05) / 0.07)
    colour = colour + (air - colour) * haze[..., None]
    c.over(rows, colour, np.clip((c.y[rows, None] - edge) / c.px + 0.5, 0, 1))


def forest(c: Canvas) -> None:
    """Rows of pines, each nearer, taller and darker than the one behind it."""
    for k, (drop, size, spacing, haze) in enumerate(
        (
            (0.055, 0.060, 0.022, 0.34),
            (0.100, 0.085, 0.034, 0.24),
            (0.165, 0.125, 0.046, 0.15),
            (0.260, 0.180, 0.066, 0.07),
            (0.450, 0.290, 0.100, 0.00),
        )
    ):
        n = fbm(c.noise[k % 3].at, c.x * 2.4 + 30 * c.u[26 + k], np.float32(70.5 + k), 3)
        base = c.horizon + drop * (1 + 0.5 * (c.h - 1)) + 0.05 * (n - 0.5) * (1 + k)
        pines(c, base.astype(np.float32), size, spacing, 17 * k, haze)
        if k in (0, 2):
            mist(c, c.horizon + drop + 0.01, 0.35)
