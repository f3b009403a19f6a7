"""Landscapes from formulas: what a scene is, and the words that describe it.

    scene = random_scene(rng)
    scene.caption()                # "snowy mountains at sunset with a lake, a clear sky, the sun on the left"
    render(scene, height, width)   # (height, width, 3) float32 in [0, 1]

A scene is a few words and a seed. ``render`` draws the same scene at any size and aspect ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

TIMES = {"dawn": "at dawn", "day": "by day", "sunset": "at sunset", "night": "at night"}
MOUNTAINS = ("snowy mountains", "rocky mountains", "green hills", "red cliffs")
GROUNDS = {"lake": "a lake", "meadow": "a flower meadow", "desert": "a desert", "forest": "a pine forest"}
SKIES = {"clear": "a clear sky", "clouds": "white clouds", "wisps": "thin clouds"}
PLACES = {"left": "on the left", "center": "in the center", "right": "on the right"}
MIRRORED = {"left": "right", "center": "center", "right": "left"}
# A lake is the hardest to learn: its mirror image spans the whole image.
GROUND_SHARES = {"lake": 0.4, "meadow": 0.2, "desert": 0.2, "forest": 0.2}
CLEAR_SHARE = 0.5  # one bright thing in an empty sky teaches left from right
CAPTION_WORDS = sorted(
    {
        word
        for text in (*TIMES.values(), *MOUNTAINS, *GROUNDS.values(), *SKIES.values(), *PLACES.values())
        for word in text.split()
    }
    | {"with", "the", "sun", "moon", ","}
)


@dataclass(frozen=True)
class Scene:
    """What a caption says, and the seed of what it leaves open.

    ``flip`` draws the image mirrored; ``place`` is the light's side as seen, after the flip.
    """

    time: str
    mountains: str
    ground: str
    sky: str
    place: str
    seed: int
    flip: bool = False

    def __post_init__(self):
        known = {"time": TIMES, "mountains": MOUNTAINS, "ground": GROUNDS, "sky": SKIES, "place": PLACES}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}")

    @property
    def light(self) -> str:
        return "moon" if self.time == "night" else "sun"

    def mirrored(self) -> Scene:
        """The scene seen in a mirror: left and right exchanged."""
        return replace(self, place=MIRRORED[self.place], flip=not self.flip)

    def caption(self, rng: np.random.Generator | None = None) -> str:
        """The scene in words; with ``rng`` some phrases are left out now and then, so that short prompts work too."""
        first = f"{self.mountains} {TIMES[self.time]} with {GROUNDS[self.ground]}"
        phrases = [SKIES[self.sky], f"the {self.light} {PLACES[self.place]}"]
        if rng is not None:
            kept = rng.random(2) > (0.2, 0.1)
            phrases = [phrase for phrase, keep in zip(phrases, kept, strict=True) if keep]
        return ", ".join([first, *phrases])


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of random words and a random seed."""
    sky = "clear" if rng.random() < CLEAR_SHARE else ("clouds", "wisps")[rng.integers(2)]
    return Scene(
        time=list(TIMES)[rng.integers(len(TIMES))],
        mountains=MOUNTAINS[rng.integers(len(MOUNTAINS))],
        ground=str(rng.choice(list(GROUND_SHARES), p=list(GROUND_SHARES.values()))),
        sky=sky,
        place=list(PLACES)[rng.integers(len(PLACES))],
        seed=int(rng.integers(1 << 31)),
    )


def scene_of_index(seed: int, index: int) -> Scene:
    """The ``index``-th scene of an endless fixed sequence."""
    return random_scene(np.random.default_rng((seed, index)))


def render(scene: Scene, height: int, width: int) -> np.ndarray:
    """Draw the scene: (height, width, 3) float32 in [0, 1]."""
    from .render import draw

    return draw(scene, height, width)
