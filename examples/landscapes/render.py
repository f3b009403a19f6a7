"""Draw a scene: sky, light and clouds, layers of mountains, ground."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Ridge, rgb
from .ground import desert, forest, lake, meadow
from .noise import fbm, smoothstep
from .scenes import Scene

ROCK = {
    "snowy mountains": rgb(0.36, 0.37, 0.44),
    "rocky mountains": rgb(0.52, 0.48, 0.46),
    "green hills": rgb(0.33, 0.50, 0.20),
    "red cliffs": rgb(0.74, 0.33, 0.18),
}
SNOW = rgb(0.96, 0.98, 1.02)


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
