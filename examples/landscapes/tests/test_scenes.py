"""The renderer of landscapes: scenes, captions, mirror images."""

from dataclasses import replace

import numpy as np
import pytest

from examples.landscapes.canvas import Canvas
from examples.landscapes.samples import PROMPTS
from examples.landscapes.scenes import (
    CAPTION_WORDS,
    GROUNDS,
    MOUNTAINS,
    PLACES,
    SKIES,
    TIMES,
    Scene,
    random_scene,
    render,
    scene_of_index,
)

SCENE = Scene("sunset", "snowy mountains", "lake", "clear", "left", seed=5)


def test_a_scene_is_the_same_each_time():
    assert np.array_equal(render(SCENE, 64, 64), render(SCENE, 64, 64))
    assert not np.array_equal(render(SCENE, 64, 64), render(replace(SCENE, seed=6), 64, 64))
    assert scene_of_index(3, 7) == scene_of_index(3, 7) != scene_of_index(3, 8)


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("size", [(32, 32), (40, 96), (96, 40), (65, 33)], ids=str)
def test_any_size_and_aspect(ground, size):
    for sky, mountains in zip([*SKIES, "clear"], MOUNTAINS, strict=True):
        image = render(replace(SCENE, ground=ground, sky=sky, mountains=mountains), *size)
        assert image.shape == (*size, 3) and image.dtype == np.float32
        assert np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1 and image.std() > 0.02


def test_sizes_show_the_same_scene():
    large = render(SCENE, 256, 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
    small = render(SCENE, 128, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    other = render(replace(SCENE, seed=6), 128, 128).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(large - small).mean() < 0.03 < np.abs(large - other).mean()


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("sky", SKIES)
def test_the_whole_light_is_seen_and_stands_where_the_caption_says(time, sky):
    for seed, mountains in enumerate(MOUNTAINS):
        place = list(PLACES)[seed % 3]
        scene = Scene(time, mountains, "desert", sky, place, seed)
        image, canvas = render(scene, 64, 64), Canvas(scene, 64, 64)
        assert {"left": 0.1, "center": 0.4, "right": 0.7}[place] < canvas.disc_x
        assert canvas.disc_x < {"left": 0.3, "center": 0.6, "right": 0.9}[place]
        for dx, dy in ((0, 0), (-0.6, 0), (0.6, 0), (0, -0.6), (0, 0.6)):
            column, row = (int(64 * (at + canvas.disc_r * d)) for at, d in ((canvas.disc_x, dx), (canvas.disc_y, dy)))
            assert np.abs(image[row, column] - np.clip(canvas.colour["disc"], 0, 1)).max() < 0.4
            assert image[row, column].mean() > 0.6


def test_a_lake_mirrors_what_stands_above_it():
    """Rows below the shore resemble the rows above it, read upwards, more than those of another scene."""

    def correlation(seed, other):
        a, b = (render(replace(SCENE, seed=s), 128, 128).mean(-1) for s in (seed, other))
        best = -1.0
        for shore in range(72, 86):
            depth = 128 - shore - 6
            below, above = a[shore + 2 : shore + 2 + depth], b[shore - 2 - depth : shore - 2][::-1]
            best = max(best, np.corrcoef(below.ravel(), above.ravel())[0, 1])
        return best

    own = [correlation(seed, seed) for seed in range(4)]
    others = [correlation(seed, seed + 10) for seed in range(4)]
    assert min(own) > 0.5 and np.mean(own) > np.mean(others) + 0.15


def test_a_mirrored_scene_is_the_flipped_image_with_left_and_right_exchanged():
    for place in PLACES:
        scene = replace(SCENE, place=place, sky="clouds")
        mirrored = scene.mirrored()
        assert np.array_equal(render(mirrored, 48, 80), render(scene, 48, 80)[:, ::-1])
        assert mirrored.mirrored() == scene
    assert "the sun on the left" in SCENE.caption() and "the sun on the right" in SCENE.mirrored().caption()


def test_captions_say_what_the_scene_is_in_known_words():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = random_scene(rng)
        caption = scene.caption()
        assert set(caption.replace(",", " ,").split()) <= set(CAPTION_WORDS)
        parts = (scene.mountains, TIMES[scene.time], GROUNDS[scene.ground], SKIES[scene.sky], PLACES[scene.place])
        assert all(part in caption for part in parts)
        assert ("moon" in caption) == (scene.time == "night") == ("sun " not in caption)
        assert scene.caption(rng) in (caption, *partial(scene))


def partial(scene):
    first, sky, light = scene.caption().split(", ")
    return first, f"{first}, {sky}", f"{first}, {light}"


def test_every_prompt_of_the_list_is_a_caption():
    captions = {
        Scene(time, mountains, ground, sky, place, 0).caption()
        for time in TIMES
        for mountains in MOUNTAINS
        for ground in GROUNDS
        for sky in SKIES
        for place in PLACES
    }
    assert len(set(PROMPTS)) == 16 and set(PROMPTS) <= captions


@pytest.mark.parametrize("name", ["time", "mountains", "ground", "sky", "place"])
def test_an_unknown_word_is_named(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .* not 'green'"):
        replace(SCENE, **{name: "green"})
