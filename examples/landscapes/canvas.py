"""The canvas of a scene: coordinates, colours by time of day, random numbers, and the crest lines of the mountains.

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
