"""The training of the landscape pipeline, on tiny sizes: killed and resumed, exported, begun from an export."""

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from examples.landscapes import train
from examples.landscapes.latents import Pool, load_vae
from examples.landscapes.model import LATENTS, build_unet, build_vae, thumbnail, write_tokenizer
from examples.landscapes.stage import Stage

ROOT = Path(__file__).parents[3]
TINY = {
    "widths": (8, 16, 32, 32),
    "sizes": {(8, 8): (2, 6), (8, 16): (1, 4)},
    "shares": {0: {(8, 8): 1.0}, 3: {(8, 8): 0.5, (8, 16): 0.5}},
    "dtype": torch.float32,
    "log_every": 1,
    "fresh": 0.5,
}
KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from examples.landscapes import train
torch.set_num_threads(1)
lerp, calls = torch._foreach_lerp_, 0
def kill_in_step_5(*arguments):
    global calls
    calls += 1
    if calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    lerp(*arguments)
torch._foreach_lerp_ = kill_in_step_5
tiny = {tiny}
train.train_unet(Path({work!r}), 7, save_minutes=0, background=True, **tiny)
"""


TOGETHER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from examples.landscapes import processes, train
torch.set_num_threads(1)
if __name__ == "__main__":  # the process in the background imports this file
    with processes.joined():
        train.train_unet(Path({work!r}), 3, **{tiny})
"""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work folder with every stage trained for a few steps, never interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("trained")
    train.train_vae(work, 3, sizes=(32,), side=16, dtype=torch.float32, log_every=1)
    train.train_unet(work, 7, background=False, **TINY)
    torch.set_num_threads(threads)
    return work


def losses(work, stage):
    records = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if r["stage"] == stage]


def test_a_killed_run_goes_on_to_the_same_losses(trained, tmp_path):
    (tmp_path / "vae.pt").write_bytes((trained / "vae.pt").read_bytes())
    script = KILLED.format(root=str(ROOT), work=str(tmp_path), tiny=repr(TINY))
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [step for step, _ in losses(tmp_path, "unet")] == [1, 2, 3, 4]
    train.train_unet(tmp_path, 7, background=False, **TINY)
    assert losses(tmp_path, "unet") == losses(trained, "unet")
    assert [step for step, _ in losses(tmp_path, "unet")] == [*range(1, 8)]


def test_two_processes_train_what_one_does(trained, tmp_path):
    tiny = TINY | {"sizes": {(8, 8): (2, 6)}, "shares": {0: {(8, 8): 1.0}}}
    for name, launcher in ("one", [sys.executable]), ("two", [torchrun(), "--nproc_per_node", "2"]):
        work = tmp_path / name
        work.mkdir()
        (work / "vae.pt").write_bytes((trained / "vae.pt").read_bytes())
        script = tmp_path / f"{name}.py"
        script.write_text(TOGETHER.format(root=str(ROOT), work=str(work), tiny=tiny))
        done = subprocess.run([*launcher, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        torch.load(tmp_path / name / "unet.pt", weights_only=True)["models"]["model"] for name in ("one", "two")
    )
    start = train.build_model(write_tokenizer(tmp_path / "one" / "tokenizer"), TINY["widths"], None).state_dict()
    moved = max((one[k] - start[k]).abs().max().item() for k in one)
    apart = max((one[k] - two[k]).abs().max().item() for k in one)
    assert apart < 0.01 * moved  # but for the order of sums


def torchrun() -> str:
    return str(Path(sys.executable).with_name("torchrun"))


def test_the_autoencoder_goes_on_to_the_same_losses(trained, tmp_path):
    options = {"sizes": (32,), "side": 16, "dtype": torch.float32, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        stopped = dict(options, save_minutes=0)
        step = Stage.scale
        try:
            Stage.scale = lambda self: step(self) if self.step < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
            train.train_vae(tmp_path, 3, **stopped)
        finally:
            Stage.scale = step
    train.train_vae(tmp_path, 3, **options)
    assert losses(tmp_path, "vae") == losses(trained, "vae")


def test_the_export_loads_the_ordinary_way_and_training_starts_from_it(trained, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    train.export_from(trained, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    run = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    image = pipe("snowy mountains at night with a lake", 32, 64, **run).images[0]
    assert image.shape == (32, 64, 3) and np.isfinite(image).all()
    again = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    source = Image.fromarray((image * 255).astype(np.uint8))
    assert again("red cliffs by day", source, 0.5, **run | {"num_inference_steps": 4}).images[0].shape == (32, 64, 3)

    other = tmp_path / "other"
    train.start_from(folder, other)
    begun = torch.load(other / "vae.pt", weights_only=True)
    ours = torch.load(trained / "vae.pt", weights_only=True)
    assert begun["step"] == ours["step"] == 3
    train.train_unet(other, 8, source=folder, background=False, **TINY)
    assert [step for step, _ in losses(other, "unet")] == [8]


def test_one_command_runs_every_stage_and_the_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SIZES", TINY["sizes"])
    monkeypatch.setattr(train, "SHARES", TINY["shares"])
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    arguments = ["--work", tmp_path / "work", "--vae-steps", 1, "--steps", 1, "--nice", 0, "--threads", 1]
    result = CliRunner().invoke(train.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    folder, sheet = tmp_path / "work" / "pipeline", tmp_path / "sheet.png"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 15e6 < size <= 20e6
    train.samples(folder, sheet, size=32, steps=1, threads=1)
    assert Image.open(sheet).size == (4 * 32, 4 * (32 + 34))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--stage", "unett"], "stage must be all, vae, latents or unet"), (["--stage", "unet"], "has no vae.pt")],
)
def test_a_command_that_cannot_run_says_why(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    result = CliRunner().invoke(train.app, [*arguments, "--work", str(tmp_path / "none"), "--nice", "0"])
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(Exception, match=r"is no pipeline folder: it has no model_index\.json"):
        train.start_from(tmp_path, tmp_path / "work")


def test_a_new_autoencoder_starts_as_a_thumbnail_and_its_enlargement():
    pixels = torch.rand(1, 3, 16, 24) * 2 - 1
    vae = build_vae()
    latents = vae.encode(pixels).latents
    assert latents.shape == (1, LATENTS, 4, 6)
    torch.testing.assert_close(latents[:, :3], thumbnail(pixels), atol=1e-4, rtol=1e-4)
    flat = torch.full((1, 3, 16, 16), 0.2)
    torch.testing.assert_close(vae.decode(vae.encode(flat).latents).sample, flat, atol=0.1, rtol=0)


def test_a_pool_makes_each_scene_once_and_renews_what_leaves_the_window(trained, tmp_path):
    pool = Pool(tmp_path, 8, 8, capacity=8, seed=1, fresh=0.5)
    vae, _ = load_vae(trained / "vae.pt")
    for index in pool.missing(0, 8):
        pool.make(int(index), vae)
    first = np.array(pool.latents[3])
    assert not len(Pool(tmp_path, 8, 8, 8, 1, 0.5).missing(0, 8))  # on disk
    assert list(pool.missing(pool.start(4), 8)) == [8, 9]
    for index in (8, 9, 10, 11, 12):
        pool.make(index, vae)
    assert list(pool.missing(0, 8)) == [0, 1, 2, 3]
    pool.make(3, vae)
    assert np.array_equal(pool.latents[3], first)
    scenes, latents = pool.draw(np.random.default_rng(0), 5, 0)
    assert len(scenes) == 5 and latents.shape == (5, LATENTS, 8, 8) and latents.dtype == torch.float32


def test_the_shipped_size():
    """Head dims 40, 80 and 160."""
    unet = build_unet()
    dims = {module.to_q.out_features // module.heads for name, module in unet.named_modules() if name.endswith("attn1")}
    assert dims == {40, 80, 160}


def test_captions_are_one_token_a_word(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    caption = "snowy mountains at sunset with a lake, a clear sky, the sun on the left"
    assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.replace(",", " ,").split()]
    assert len(tokenizer.tokenize("xylophone")) == 9


def test_the_sizes_of_a_step():
    for first, shares in train.SHARES.items():
        assert train.shares_at(first) == train.shares_at(first + 1) == shares
        assert sum(shares.values()) == pytest.approx(1) and set(shares) <= set(train.SIZES)
