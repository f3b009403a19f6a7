"""What runs if no model is named."""

import numpy as np

from benchmarks.fidelity import defaults


def test_without_trained_landscapes_there_are_no_defaults(monkeypatch, tmp_path):
    monkeypatch.setattr(defaults, "LANDSCAPES", tmp_path)
    assert defaults.defaults() == defaults.Defaults()


def test_landscapes_come_with_their_prompts_and_true_images(monkeypatch, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    monkeypatch.setattr(defaults, "LANDSCAPES", tmp_path)
    found = defaults.defaults()
    assert found.model == str(tmp_path / "pipeline")
    assert (found.steps, found.guidance) == (25, 3.0)
    assert found.features is None  # no judge there
    assert len(found.prompts) == defaults.PROMPTS
    assert all(" with a" in prompt for prompt in found.prompts)
    assert found.reference == "benchmarks.fidelity.defaults:true_scene"
    image = defaults.true_scene(3, 32, 48)
    assert image.shape == (32, 48, 3) and 0 <= image.min() < image.max() <= 1
    assert np.array_equal(image, defaults.true_scene(3, 32, 48))
