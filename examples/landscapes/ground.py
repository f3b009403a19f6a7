"""The grounds: lake, meadow, desert and pine forest."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, rgb
from .noise import fbm, smoothstep

FLOWERS = (
    (rgb(1.0, 0.86, 0.15), rgb(1.0, 1.0, 0.95)),
    (rgb(0.95, 0.20, 0.22), rgb(1.0, 0.85, 0.25)),
    (rgb(0.70, 0.45, 0.95), rgb(0.98, 0.75, 0.90)),
    (rgb(1.0, 1.0, 1.0), rgb(0.98, 0.60, 0.75)),
)


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
