"""The example that trains a LoRA, on a random pipeline and random images."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from examples.lora.__main__ import app
from examples.lora.images import read_captions, read_image
from examples.lora.samples import app as samples
from examples.lora.sunsets import app as sunsets
from examples.lora.train import Settings, train
from todo_attn import ToDoConfig
from todo_attn.config.checks import ArgumentError

CAPTIONS = "metadata.jsonl"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_precision()
    yield
    forget_precision()


def forget_precision():
    """accelerate keeps device and precision for the whole process, unless they are reset."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def images(tmp_path):
    """Three images of noise, one of them not square and one in grey, with captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i, shape in enumerate([(64, 64, 3), (80, 120, 3), (64, 64)]):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"noise {i}"})
    (folder / CAPTIONS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def settings(sd_folder, images):
    return Settings(str(sd_folder), images, size=64, steps=2, learning_rate=1e-2)


def test_factor_1_gives_the_losses_of_dense(settings):
    dense, todo = train(settings), train(settings, ToDoConfig(1))
    assert len(dense.losses) == len(dense.seconds) == 2
    assert dense.losses == pytest.approx(todo.losses, rel=1e-6)
    assert train(settings, ToDoConfig(2)).losses != pytest.approx(dense.losses, rel=1e-6)


@pytest.mark.parametrize("todo", [None, ToDoConfig(2)], ids=["dense", "todo"])
def test_gradient_checkpointing_changes_no_loss(settings, todo):
    again = replace(settings, checkpointing=True)
    assert train(settings, todo).losses == pytest.approx(train(again, todo).losses, rel=1e-5)


def test_bf16(settings):
    full = train(settings, ToDoConfig(2)).losses
    forget_precision()
    half = train(replace(settings, mixed_precision="bf16"), ToDoConfig(2)).losses
    assert half == pytest.approx(full, rel=0.05) and half != full


def test_the_saved_lora_loads_and_changes_the_image(settings, tmp_path):
    train(settings, ToDoConfig(2), tmp_path / "lora")
    pipe = StableDiffusionPipeline.from_pretrained(settings.model)
    pipe.set_progress_bar_config(disable=True)

    def image():
        generator = torch.Generator().manual_seed(0)
        return pipe("noise", 64, 64, 2, output_type="latent", generator=generator).images

    before = image()
    pipe.load_lora_weights(tmp_path / "lora")
    assert pipe.get_active_adapters() and not torch.equal(image(), before)
    pipe.unload_lora_weights()
    assert torch.equal(image(), before)


def test_images_of_any_shape_and_mode_become_squares(images):
    assert [read_image(path, 32).size for path, _ in read_captions(images)] == [(32, 32)] * 3
    assert {read_image(path, 32).mode for path, _ in read_captions(images)} == {"RGB"}


def test_compare_writes_both_runs(settings, tmp_path):
    out = tmp_path / "new" / "comparison.json"
    arguments = ["--images", settings.images, "--model", settings.model, "--size", 64, "--steps", 2, "--compare", out]
    ran = CliRunner().invoke(app, list(map(str, arguments)))
    assert ran.exit_code == 0, ran.output
    report = json.loads(out.read_text())
    assert {name: len(run["losses"]) for name, run in report["runs"].items()} == {"dense": 2, "todo": 2}
    assert report["machine"]["torch"] == torch.__version__
    assert "todo" in ran.output


def test_sunsets_are_images_to_train_on(tmp_path):
    ran = CliRunner().invoke(sunsets, [str(tmp_path / "new"), "--count", "2", "--size", "32"])
    assert ran.exit_code == 0, ran.output
    found = read_captions(tmp_path / "new")
    assert len(found) == 2 and all("sunset" not in caption for _, caption in found)


def spoil(images, what):
    captions = images / CAPTIONS
    if what == "no folder":
        shutil.rmtree(images)
    elif what == "no captions":
        captions.unlink()
    elif what == "empty":
        captions.write_text("\n")
    elif what == "not UTF-8":
        captions.write_bytes('{"file_name": "0.png", "text": "Zürich"}\n'.encode("latin-1"))
    elif what == "not JSON":
        captions.write_text("0.png, noise\n")
    elif what == "no caption":
        captions.write_text('{"file_name": "0.png"}\n')
    elif what == "missing image":
        (images / "0.png").unlink()
    elif what == "broken image":
        (images / "0.png").write_bytes(b"no image")


BROKEN = {
    "no folder": "must be a folder of images, got",
    "no captions": "must hold captions in metadata.jsonl",
    "empty": "must hold at least one image",
    "not UTF-8": "must hold captions in UTF-8",
    "not JSON": "line 1 must be",
    "no caption": "line 1 must be",
    "missing image": "line 1 must name an image, got '0.png'",
    "broken image": "line 1 must name an image, got '0.png'",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_that_cannot_be_used(settings, what):
    spoil(settings.images, what)
    with pytest.raises(ArgumentError, match=BROKEN[what]) as refused:
        train(settings)
    assert refused.value.argument == "images"


def without_unet(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text())
    del index["unet"]
    (copy / "model_index.json").write_text(json.dumps(index))
    return copy


def test_a_model_that_cannot_be_trained(settings, sd_folder, sdxl_folder, tmp_path):
    for model, says in {
        without_unet(sd_folder, tmp_path): "must be a pipeline with a UNet",
        sdxl_folder: "must be a pipeline of Stable Diffusion 1.x or 2.x, got StableDiffusionXLPipeline",
        tmp_path / "none": "cannot be",
    }.items():
        with pytest.raises(ArgumentError, match=says) as refused:
            train(replace(settings, model=str(model)))
        assert refused.value.argument == "model"


def test_a_size_that_the_unet_cannot_take(settings):
    with pytest.raises(ArgumentError, match="must be a multiple of 16 pixels for this model, got 40"):
        train(replace(settings, size=40))


def test_the_command_refuses_in_one_line(settings, tmp_path):
    ran = CliRunner().invoke(app, ["--images", str(tmp_path / "none"), "--compare", str(tmp_path / "c.json")])
    assert ran.exit_code == 2
    assert "must be a folder of images" in " ".join(ran.output.replace("│", "").split())
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("option", ["--out", "--compare"])
def test_what_cannot_be_written_is_refused_before_training(settings, images, option):
    below_a_file = str(images / "0.png" / "lora")
    ran = CliRunner().invoke(app, ["--images", str(images), "--model", settings.model, option, below_a_file])
    assert ran.exit_code == 2
    assert "must be a file that can be written" in " ".join(ran.output.replace("│", "").split())


def test_samples_have_a_row_for_each_lora(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    train(settings, ToDoConfig(2), tmp_path / "lora")
    arguments = [tmp_path / "lora", "--model", settings.model, "--size", 64, "--out", tmp_path / "samples.png"]
    ran = CliRunner().invoke(samples, list(map(str, arguments)))
    assert ran.exit_code == 0, ran.output
    with Image.open(tmp_path / "samples.png") as sheet:
        without, with_lora = (np.asarray(sheet)[top : top + 64] for top in (0, 64))
        assert sheet.size == (4 * 64, 2 * 64)
    assert (without != with_lora).any()
