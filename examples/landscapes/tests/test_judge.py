"""The judge of landscapes: its interface, what it refuses, its accuracy, and its distance; a short training resumed."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.landscapes import judge_data, judge_train
from examples.landscapes.judge import ATTRIBUTES, HERE, Judge, load_judge, named, save_judge
from examples.landscapes.samples import PROMPTS
from examples.landscapes.scenes import MIRRORED, PLACES, SKIES, Scene, render, scene_of_index

SCENE = Scene("sunset", "snowy mountains", "lake", "clear", "left", seed=5)
TINY = {(64, 64): (24, 8, 0.5), (48, 80): (12, 4, 0.5)}


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return Judge().eval()


@pytest.fixture(scope="module")
def scenes():
    """Scenes that the training has not seen."""
    return [scene_of_index(judge_data.TEST_SEED, 1000 + i) for i in range(24)]


@pytest.fixture(scope="module")
def images(scenes):
    """(24, 3, 128, 128) float32 in [0, 1]."""
    return torch.from_numpy(np.stack([render(scene, 128, 128) for scene in scenes])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (101, 67), (96, 200)], ids=str)
def test_shapes_at_any_size(untrained, size):
    images = torch.rand(2, 3, *size)
    features = untrained(images)
    assert features.shape == (2, untrained.num_features) and features.dtype == torch.float32
    assert torch.equal(features, untrained.features(images)) and not features.requires_grad
    maps = untrained.maps(images)
    assert [m.shape[1] for m in maps] == untrained.config["widths"]
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-n // 2 ** (k + 1)) for n in size) for k in range(len(maps))]
    for name, probabilities in untrained.probabilities(images).items():
        assert probabilities.shape == (2, len(ATTRIBUTES[name]))
        torch.testing.assert_close(probabilities.sum(1), torch.ones(2))


def test_an_image_is_judged_the_same_in_any_batch(untrained, images):
    torch.testing.assert_close(untrained(images[:3])[2:], untrained(images[2:3]), atol=1e-4, rtol=1e-4)


def test_uint8_and_float_give_the_same(untrained, images):
    whole = (255 * images[:2]).round().byte()
    assert torch.equal(untrained(whole), untrained(whole.float() / 255))
    assert torch.equal(untrained(whole.double() / 255), untrained(whole))


@pytest.mark.parametrize("size", [128, 256])
def test_fixed_scenes_reach_the_stated_accuracy(judge, scenes, images, size):
    """Within what chance allows 24 scenes: three standard deviations."""
    if size != 128:
        images = torch.from_numpy(np.stack([render(scene, size, size) for scene in scenes])).permute(0, 3, 1, 2)
    stated = json.loads((HERE / "judge" / "metrics.json").read_text())["accuracy"][str(size)]["clean"]
    truth = judge_train.targets(scenes)
    for name, probabilities in judge.probabilities(images).items():
        accuracy = (probabilities.argmax(1) == truth[name]).float().mean().item()
        assert accuracy >= stated[name] - 3 * (stated[name] * (1 - stated[name]) / len(scenes)) ** 0.5 - 1 / len(scenes)
        assert stated[name] > (0.85 if name == "sky" else 0.95)


def test_a_mirrored_scene_moves_left_to_right(judge, scenes, images):
    places = list(PLACES)
    seen = [places[k] for k in judge.probabilities(images)["place"].argmax(1)]
    mirrored = [places[k] for k in judge.probabilities(images.flip(3))["place"].argmax(1)]
    assert {"left", "right"} <= set(seen)
    assert np.mean([MIRRORED[a] == b for a, b in zip(seen, mirrored, strict=True)]) > 0.9


def test_agreement_is_high_for_the_own_caption_and_low_for_another(judge, scenes, images):
    own = judge.agreement(images, [scene.caption() for scene in scenes])
    assert own.shape == (len(scenes),) and own.mean() > 0.9
    others = [replace(s, place=list(PLACES)[list(PLACES).index(s.place) - 1], sky=_other_sky(s)) for s in scenes]
    two_of_five_wrong = judge.agreement(images, [scene.caption() for scene in others])
    assert ((own - two_of_five_wrong).mean() - 0.4).abs() < 0.1


def _other_sky(scene):
    return list(SKIES)[list(SKIES).index(scene.sky) - 1]


def test_agreement_is_the_mean_over_what_the_prompt_names(untrained, images):
    p = {name: values[0] for name, values in untrained.probabilities(images[:1]).items()}
    night, lake = p["time"][3], p["ground"][0]
    torch.testing.assert_close(untrained.agreement(images[:1], ["A Lake, seen at night"])[0], (night + lake) / 2)
    either = untrained.agreement(images[:1], ["green hills and red cliffs"])[0]
    torch.testing.assert_close(either, p["mountains"][2:].sum())


def test_every_caption_is_understood():
    for i in range(50):
        scene = scene_of_index(3, i)
        for seen in (scene, scene.mirrored()):
            truth = {name: [list(classes).index(getattr(seen, name))] for name, classes in ATTRIBUTES.items()}
            assert named(seen.caption()) == truth
            short = named(seen.caption(np.random.default_rng(i)))
            assert short.items() <= truth.items() and set(short) >= {"mountains", "time", "ground"}
    assert all(len(named(prompt)) == 5 for prompt in PROMPTS)


@pytest.mark.parametrize("prompt", ["", "a portrait of a cat", "a lakeside daytime"])
def test_a_prompt_that_names_nothing_is_refused(untrained, images, prompt):
    with pytest.raises(ValueError, match=rf"prompt must name mountains, .* got '{prompt}'"):
        untrained.agreement(images[:1], [prompt])


def test_as_many_prompts_as_images(untrained, images):
    for prompts in (["a lake"], "at night", []):
        with pytest.raises(ValueError, match="prompts must be a list of 2, one an image"):
            untrained.agreement(images[:2], prompts)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.full((1, 3, 64, 64), float("nan")), "images must be finite, got NaN"),
        (torch.rand(1, 3, 64, 64) * 2 - 1, r"images must be in \[0, 1\], got values from -"),
        (torch.rand(3, 64, 64), r"images must be \(B, 3, H, W\)"),
        (torch.rand(1, 4, 64, 64), r"images must be \(B, 3, H, W\)"),
        (torch.rand(1, 3, 64, 31), r"images must be \(B, 3, H, W\), H and W at least 32, got \(1, 3, 64, 31\)"),
        (torch.ones(1, 3, 64, 64, dtype=torch.int64), "images must be uint8 or floating point, got torch.int64"),
    ],
    ids=["nan", "range", "ndim", "channels", "small", "dtype"],
)
def test_bad_images_are_named(untrained, bad, message):
    for method in (
        untrained,
        untrained.maps,
        untrained.probabilities,
        lambda x: untrained.agreement(x, ["a lake"] * len(x)),
    ):
        with pytest.raises(ValueError, match=message):
            method(bad)


def test_distance_grows_with_the_fault(judge, images):
    images = images[:12]
    generator = torch.Generator().manual_seed(0)
    orders = [
        [judge_data.blurred(images, s) for s in (0.5, 1, 2, 4)],
        [judge_data.noisy(images, s, 1, generator) for s in (0.01, 0.03, 0.1, 0.3)],
        [images.roll(s, 3) for s in (1, 2, 4, 16)],
    ]
    assert torch.equal(judge.distance(images, images), torch.zeros(12))
    for worse in orders:
        means = [judge.distance(images, other).mean().item() for other in worse]
        assert means[0] > 0 and means == sorted(means)
    with pytest.raises(ValueError, match=r"others must have the shape of images \(12, 3, 128, 128\)"):
        judge.distance(images, images[:1])


def test_distances_of_sets_see_a_blur(judge, images):
    """Features differ more between sharp and blurred scenes than between two halves of sharp ones."""
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(judge, reset_real_features=False)
    kid = pytest.importorskip("torchmetrics.image.kid").KernelInceptionDistance
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kid = kid(judge, subsets=4, subset_size=8, reset_real_features=False)
    for metric in (fid, kid):
        metric.update((255 * images[:12]).byte(), real=True)
        values = []
        for other in (images[12:], judge_data.blurred(images[12:], 2)):
            metric.reset()
            metric.update(other, real=False)
            values.append(torch.as_tensor(metric.compute()).ravel()[0].item())
        assert values[0] < values[1]


def test_the_shipped_folder_is_small(judge):
    assert sum(path.stat().st_size for path in (HERE / "judge").iterdir()) <= 2e6


def test_what_is_saved_is_loaded_in_float32(untrained, tmp_path):
    save_judge(untrained, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2e6
    loaded = load_judge(tmp_path)
    assert not loaded.training and all(w.dtype == torch.float32 for w in loaded.state_dict().values() if w.ndim)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images), untrained(images), atol=1e-2, rtol=1e-2)


def test_a_folder_without_a_judge_is_named(untrained, tmp_path):
    with pytest.raises(ValueError, match=r"folder must hold a judge's config\.json and model\.safetensors, got .*none"):
        load_judge(tmp_path / "none")
    save_judge(untrained, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["attributes"]["place"] = ["left", "right"]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"folder must hold a judge of the attributes of scenes\.py"):
        load_judge(tmp_path / "other")


def test_standardizing_changes_features_and_no_logit():
    torch.manual_seed(0)
    judge, images = Judge().eval(), torch.rand(16, 3, 32, 32)
    before = judge.probabilities(images)
    for _ in range(2):
        judge.standardize(judge(images))
    assert judge(images).mean(0).abs().max() < 1e-3 and judge(images).std(0).median() == pytest.approx(1, abs=0.01)
    for name, probabilities in judge.probabilities(images).items():
        torch.testing.assert_close(probabilities, before[name], atol=1e-5, rtol=1e-4)


def test_a_training_that_was_stopped_goes_on_to_the_same_losses(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    judge_train.train(tmp_path / "once", 4, sizes=TINY, log_every=1)
    shutil.copytree(tmp_path / "once", tmp_path / "twice", ignore=lambda *_: ["judge.pt", "log.jsonl"])
    monkeypatch.setattr(judge_train.Stage, "stopped", False)
    step = judge_train.cropped

    def stop_in_step_2(*arguments):
        stop_in_step_2.calls += 1
        judge_train.Stage.stopped = stop_in_step_2.calls == 2
        return step(*arguments)

    stop_in_step_2.calls = 0
    monkeypatch.setattr(judge_train, "cropped", stop_in_step_2)
    judge_train.train(tmp_path / "twice", 4, sizes=TINY, log_every=1)
    monkeypatch.setattr(judge_train.Stage, "stopped", False)
    judge_train.train(tmp_path / "twice", 4, sizes=TINY, log_every=1)
    torch.set_num_threads(threads)

    def losses(name):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return {record["step"]: record["loss"] for record in map(json.loads, lines)}

    assert sorted(losses("twice")) == [1, 2, 3, 4] and losses("twice") == losses("once")


def test_faults_keep_shape_and_range(images):
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for size in ((128, 128), (121, 97)):
        part = images[..., : size[0], : size[1]]
        out = judge_data.spoiled(part, rng, generator)
        assert out.shape == part.shape and out.min() >= 0 and out.max() <= 1 and out.dtype == torch.float32
        changed = (out != part).flatten(1).any(1).float().mean()
        assert 0.4 < changed < 1
    assert judge_data.cropped(images, rng).shape[-1] >= 0.93 * 128 - 2
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(judge_data.blurred(flat, 2), flat)
