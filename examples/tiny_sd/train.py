"""Train the tiny Stable Diffusion pipeline from scenes drawn on the fly (run from the repository's root):

    python -m examples.tiny_sd.train decoder          # latents -> pixels
    python -m examples.tiny_sd.train text             # the text encoder learns to read captions
    python -m examples.tiny_sd.train diffusion        # the UNet, with the text encoder
    python -m examples.tiny_sd.train export           # writes pipeline/

Every stage keeps its state in checkpoints/ and goes on from there when started again; its length is counted in steps
(``--steps`` is the stage's total), so that pauses cost nothing. ``--minutes`` ends a run early, in CPU-independent
wall time. Losses go to train_log.jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers.models.resnet import ResnetBlock2D
from tqdm import tqdm

from .model import build_pipeline, build_scheduler, build_text_encoder, build_unet, build_vae, write_tokenizer
from .scenes import BACKGROUNDS, COLOURS, FILLS, LAYOUTS, SHAPES, SIZES, random_scene, render

HERE = Path(__file__).parent
CHECKPOINTS = HERE / "checkpoints"
LOG = HERE / "train_log.jsonl"
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.splitlines()[0])

# (latent height, latent width, batch, share in the first half of training, share in the second)
SIZE_MIX = (
    (24, 24, 16, 0.20, 0.04),
    (32, 32, 16, 0.60, 0.26),
    (24, 40, 16, 0.08, 0.05),
    (40, 24, 16, 0.06, 0.03),
    (64, 64, 4, 0.06, 0.47),
    (48, 80, 4, 0.00, 0.07),
    (80, 48, 4, 0.00, 0.04),
    (128, 128, 1, 0.00, 0.04),
)


class Stage:
    """A stage's bookkeeping: models and optimizer in one checkpoint, warmup-stable-decay learning rate, log, stop."""

    def __init__(self, name, models, groups, steps, decay, minutes, device, dtype, seed):
        self.name, self.models, self.steps, self.decay = name, models, steps, decay
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
        self.rates = [g["lr"] for g in self.optimizer.param_groups]
        self.step, self.deadline = 0, time.monotonic() + 60 * minutes if minutes else None
        self.path = CHECKPOINTS / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            for key, model in models.items():
                model.load_state_dict(state["models"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        CHECKPOINTS.mkdir(exist_ok=True)
        (CHECKPOINTS / "pid").write_text(f"{os.getpid()}\n")
        torch.manual_seed(seed + self.step)
        self.rng = np.random.default_rng((seed, self.step))

    def save(self):
        models = {k: m.state_dict() for k, m in self.models.items()}
        torch.save({"models": models, "optimizer": self.optimizer.state_dict(), "step": self.step}, f"{self.path}.new")
        os.replace(f"{self.path}.new", self.path)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def run(self, loss_of_step, after_step=None, save_every=100, log_every=10):
        """Step until the end; ``loss_of_step(progress)`` gives the loss and numbers for the log."""
        parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        recent, started = [], time.monotonic()
        todo = range(self.step + 1, self.steps + 1)
        for step in tqdm(todo, initial=self.step, total=self.steps, desc=self.name, mininterval=10):
            self.step = step
            scale = min(1.0, self.step / 100, max(0.01, (self.steps - self.step + 1) / max(self.decay, 1)))
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * scale
            loss, numbers = loss_of_step(self.step / self.steps)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            if after_step:
                after_step(self.step)
            recent.append({"loss": loss.item(), **numbers})
            if self.step % log_every == 0:
                mean = {k: round(float(np.mean([r[k] for r in recent if k in r])), 5) for r in recent for k in r}
                seconds = round((time.monotonic() - started) / len(recent), 3)
                with LOG.open("a") as f:
                    f.write(json.dumps({"stage": self.name, "step": self.step, **mean, "s_per_step": seconds}) + "\n")
                recent, started = [], time.monotonic()
            if self.step % save_every == 0:
                self.save()
            if self.deadline and time.monotonic() > self.deadline:
                break
        self.save()


def draw(rng, count, height, width):
    """Scenes and their images (count, 3, height, width) in [-1, 1]."""
    scenes = [random_scene(rng) for _ in range(count)]
    pixels = np.stack([render(s, height, width) for s in scenes])
    return scenes, torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1


def image_loss(out, pixels):
    """L1 on the pixels and on their differences: the edges."""
    edges = sum(F.l1_loss(torch.diff(out, dim=d), torch.diff(pixels, dim=d)) for d in (2, 3))
    return F.l1_loss(out, pixels) + edges


def crops(rng, scenes=10, each=3, side=64):
    """Square crops of images of the small and the normal size."""
    size = int(rng.choice([256, 512], p=(0.7, 0.3)))
    pixels = draw(rng, scenes, size, size)[1]
    corners = rng.integers(0, (size - side) // 8 + 1, (scenes * each, 2)) * 8
    return torch.stack([pixels[i % scenes, :, y : y + side, x : x + side] for i, (y, x) in enumerate(corners)])


@app.command()
def decoder(
    steps: int = 800, lr: float = 3e-4, decay: int = 300, minutes: float = 0.0, device: str = "cpu",
    dtype: str = "bfloat16", seed: int = 0,
):  # fmt: skip
    """Train the autoencoder's decoder to draw sharp edges from thumbnails (the encoder is set by formula)."""
    torch.manual_seed(seed)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    blocks = [m for m in vae.decoder.modules() if isinstance(m, ResnetBlock2D)]  # the path of the colours stays
    branches = [getattr(m, name) for m in blocks for name in ("norm1", "conv1", "norm2", "conv2")]
    groups = [{"params": [p for m in branches for p in m.parameters()], "lr": lr}]
    stage = Stage("decoder", {"vae": vae}, groups, steps, decay, minutes, device, dtype, seed)

    def loss_of_step(progress):
        pixels = crops(stage.rng).to(device, memory_format=torch.channels_last)
        with stage.autocast():
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mean.float()
            out = vae.decode(latents + 0.03 * torch.randn_like(latents)).sample.float()
        return image_loss(out, pixels), {"pixel": F.l1_loss(out, pixels).item()}

    stage.run(loss_of_step)


def start_weights(model, checkpoint, key, part):
    """``model`` as its stage left it in checkpoints/; in a fresh checkout, where there is none, as it is shipped."""
    if (path := CHECKPOINTS / checkpoint).exists():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["models"][key])
    elif (folder := HERE / "pipeline" / part).exists():
        # Parts that were added later are not in the shipped weights, and keep their initial values.
        model.load_state_dict(type(model).from_pretrained(folder).float().state_dict(), strict=False)
    return model


def load_vae(device="cpu"):
    """The autoencoder, trained as far as it is."""
    torch.manual_seed(0)
    return start_weights(build_vae(), "decoder.pt", "vae", "vae").to(device).eval()


def tokenize(tokenizer, captions):
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


@app.command()
def text(
    steps: int = 1000, lr: float = 1e-3, decay: int = 400, minutes: float = 0.0, device: str = "cpu",
    dtype: str = "float32", seed: int = 0,
):  # fmt: skip
    """Train the text encoder to predict, at the nouns and at the end, what a caption means."""
    tokenizer = write_tokenizer(CHECKPOINTS / "tokenizer")
    encoder = build_text_encoder(tokenizer).to(device)
    per_object = {"shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "fill": len(FILLS)}
    classes = {"layout": len(LAYOUTS), "background": len(BACKGROUNDS), "first": len(COLOURS), "second": len(COLOURS)}
    classes |= {f"{k}{i}": n for k, n in per_object.items() for i in range(2)}
    heads = torch.nn.ModuleDict(
        {f"{at}_{k}": torch.nn.Linear(128, n) for at in ("end", "noun") for k, n in classes.items()}
    ).to(device)
    nouns = torch.tensor(tokenizer.convert_tokens_to_ids([f"{s}</w>" for s in SHAPES]))
    models = {"text_encoder": encoder, "heads": heads}
    groups = [{"params": [p for m in models.values() for p in m.parameters()], "lr": lr}]
    stage = Stage("text", models, groups, steps, decay, minutes, device, dtype, seed)

    def loss_of_step(progress):
        scenes = [random_scene(stage.rng) for _ in range(64)]
        ids = tokenize(tokenizer, [s.caption(stage.rng) for s in scenes])
        labels = {k: torch.tensor([s.labels()[k] for s in scenes], device=device) for k in classes}
        is_noun = torch.isin(ids, nouns).int()
        first, last = is_noun.argmax(1), ids.shape[1] - 1 - is_noun.flip(1).argmax(1)
        with stage.autocast():
            hidden = encoder(ids.to(device))[0]
        rows = torch.arange(len(ids))
        loss, right = 0.0, []
        for k in classes:
            places = {"end": ids.shape[1] - 1}
            if k[-1] in "01":  # an object's own words come before its noun
                places["noun"] = first if k[-1] == "0" else last
            for at, place in places.items():
                out = heads[f"{at}_{k}"](hidden[rows, place].float())
                known = labels[k] >= 0
                loss = loss + F.cross_entropy(out[known], labels[k][known]) / len(classes)
                right.append((out.argmax(1) == labels[k])[known].float().mean().item())
        return loss, {"accuracy": float(np.mean(right))}

    stage.run(loss_of_step)


class Pool:
    """Encoded scenes of one size; a part of every batch is new, the rest is drawn again with new words and noise."""

    def __init__(self, vae, height, width, capacity=20000, fresh=0.25):
        self.vae, self.height, self.width, self.capacity, self.fresh = vae, height, width, capacity, fresh
        self.scenes, self.latents = [], []

    @torch.no_grad()
    def batch(self, rng, count):
        new = count if len(self.scenes) < 4 * count else max(1, round(self.fresh * count))
        scenes, pixels = draw(rng, new, 8 * self.height, 8 * self.width)
        device = next(self.vae.parameters()).device
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            latents = self.vae.encode(pixels).latent_dist.mean
        self.scenes = (self.scenes + scenes)[-self.capacity :]
        self.latents = (self.latents + list(latents.float() * self.vae.config.scaling_factor))[-self.capacity :]
        picked = rng.choice(len(self.scenes), count, replace=False)
        return [self.scenes[i].caption(rng) for i in picked], torch.stack([self.latents[i] for i in picked])


@app.command()
def diffusion(
    steps: int = 4000, lr: float = 6e-4, decay: int = 800, minutes: float = 0.0, device: str = "cpu",
    dtype: str = "bfloat16", seed: int = 0, ema_decay: float = 0.999, dropout: float = 0.1, shipped: bool = False,
):  # fmt: skip
    """Train the UNet and the text encoder: v-prediction, min-SNR weights, mixed sizes, moving average.

    With ``--shipped`` and no checkpoint the UNet starts from the weights in pipeline/ and not from nothing.
    """
    vae = load_vae(device).requires_grad_(False).to(memory_format=torch.channels_last)
    tokenizer = write_tokenizer(CHECKPOINTS / "tokenizer")
    scheduler = build_scheduler()

    def build():
        encoder = start_weights(build_text_encoder(tokenizer), "text.pt", "text_encoder", "text_encoder")
        torch.manual_seed(seed)
        unet = build_unet()
        if shipped:
            unet = start_weights(unet, "none", "unet", "unet")
        return torch.nn.ModuleDict({"unet": unet, "text_encoder": encoder}).to(device)

    model, average = build(), build().requires_grad_(False)
    model["unet"].to(memory_format=torch.channels_last)
    groups = [
        {"params": list(model["unet"].parameters()), "lr": lr},
        {"params": list(model["text_encoder"].parameters()), "lr": lr / 4},
    ]
    stage = Stage("diffusion", {"model": model, "average": average}, groups, steps, decay, minutes, device, dtype, seed)
    pools = {(h, w): Pool(vae, h, w) for h, w, *_ in SIZE_MIX}
    alphas = scheduler.alphas_cumprod.to(device)

    def loss_of_step(progress):
        shares = np.array([row[4 if progress > 0.5 else 3] for row in SIZE_MIX])
        height, width, count, *_ = SIZE_MIX[stage.rng.choice(len(SIZE_MIX), p=shares / shares.sum())]
        captions, latents = pools[height, width].batch(stage.rng, count)
        captions = ["" if stage.rng.random() < dropout else c for c in captions]
        # More noisy timesteps, which decide shapes; more so for larger images, whose noise averages out.
        spread, shift = (torch.arange(count) + torch.rand(count)) / count, (height * width) ** 0.5 / 16
        t = (1000 * shift * spread / (1 + (shift - 1) * spread)).long().clamp(max=999).to(device)
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, t).to(memory_format=torch.channels_last)
        with stage.autocast():
            words = model["text_encoder"](tokenize(tokenizer, captions).to(device))[0]
            out = model["unet"](noisy, t, words).sample
        error = (out.float() - scheduler.get_velocity(latents, noise, t)).square().mean((1, 2, 3))
        snr = alphas[t] / (1 - alphas[t])
        weight = (snr + 1).clamp(max=5) / (snr + 1)  # pure noise in full, the almost clean end less
        return (error * weight).mean(), {f"v_{height}x{width}": error.mean().item()}

    @torch.no_grad()
    def after_step(step):
        decay_now = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay_now)

    stage.run(loss_of_step, after_step)


@app.command()
def export(folder: Path = HERE / "pipeline", average: bool = True):
    """Write the pipeline in half precision; the folder is swapped in whole."""
    tokenizer = write_tokenizer(CHECKPOINTS / "tokenizer")
    state = torch.load(CHECKPOINTS / "diffusion.pt", map_location="cpu", weights_only=True)
    model = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    model.load_state_dict(state["models"]["average" if average else "model"])
    pipe = build_pipeline(load_vae(), model["text_encoder"].eval(), tokenizer, model["unet"].eval())
    new, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(new)
    config = new / "text_encoder" / "config.json"  # transformers loads in the dtype it names, if none is asked for
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):  # what older transformers load
        shutil.copy(CHECKPOINTS / "tokenizer" / name, new / "tokenizer")
    for path in new.rglob("*.safetensors"):
        path.chmod(0o644)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: step {state['step']}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
