"""The parts of the landscape pipeline, as the classes of diffusers and transformers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import CAPTION_WORDS

MAX_TOKENS = 24
TEXT_WIDTH = 96
START, END = "<|startoftext|>", "<|endoftext|>"
PIXELS = 4  # pixels to a latent's side
LATENTS = 6  # latent channels: three of colour, the rest of texture
# Colours as the latents hold them, each of about unit deviation over the scenes: brightness, orange against blue,
# magenta against green. Rows are the latent's channels, columns red, green and blue.
COLOURS = ((1.25, 1.45, 1.25), (2.8, 0.0, -2.8), (2.2, -4.4, 2.2))
COLOURS_SHIFT = (-1.55, 0.0, 0.0)


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer with one token for each word of the captions; other words become letters."""
    letters = byte_alphabet()
    vocab, merges = letters + [c + "</w>" for c in letters], []
    for word in CAPTION_WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # joined from the left
            joined = pieces[0] + pieces[1]
            if joined not in vocab:
                merges.append(f"{pieces[0]} {pieces[1]}")
                vocab.append(joined)
            pieces = [joined, *pieces[2:]]
    vocab += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, MAX_TOKENS), padded as the pipeline pads them."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(widths: tuple[int, ...] = (40, 80, 160, 160)) -> UNet2DConditionModel:
    """Four levels, the first three with one attention head each, as wide as the level: 40, 80 and 160.

    The fourth, 8 x 8 tokens at the normal size, sees the whole image in a few convolutions.
    """
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=LATENTS,
        out_channels=LATENTS,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=(*("CrossAttnDownBlock2D",) * (len(widths) - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (len(widths) - 1)),
        attention_head_dim=1,  # the number of heads, in the configurations of Stable Diffusion 1.x
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
        # The caption as a whole enters every resnet beside the timestep; this is learned sooner than cross-attention.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    unet.conv_out.weight.data.zero_()
    unet.add_embedding.norm2.weight.data.fill_(0.3)
    return unet


def build_vae(width: int = 32) -> AutoencoderTiny:
    """Four pixels to a latent, no norms: flat colours survive, and cost grows with the pixels only."""
    vae = AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(width, width, width),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=LATENTS,
        scaling_factor=1.0,
    )
    start_as_thumbnail(vae)
    return vae


@torch.no_grad()
def start_as_thumbnail(vae: AutoencoderTiny) -> None:
    """Start the encoder as a mean over 4 x 4 pixels in the colours of ``COLOURS``, and the decoder as its enlargement.

    Three channels carry the image past every block: the blocks' other branch starts at zero there. What is left to
    learn is detail.
    """
    colours, shift = torch.tensor(COLOURS), torch.tensor(COLOURS_SHIFT)
    for half in (vae.encoder, vae.decoder):
        for layer in half.layers:
            if hasattr(layer, "conv"):
                layer.conv[-1].weight[:3] = 0
                layer.conv[-1].bias[:3] = 0
        first, *between, last = (layer for layer in half.layers if isinstance(layer, torch.nn.Conv2d))
        for layer in (first, *between, last):
            layer.weight[:3] = 0
            if layer.bias is not None:
                layer.bias[:3] = 0
        for layer in between:
            kernel = ((0.25, 0.25), (0.25, 0.25)) if half is vae.encoder else ((1.0, 0.0), (0.0, 0.0))
            layer.weight[range(3), range(3), 1:, 1:] = torch.tensor(kernel)
        into, out = (torch.eye(3), colours) if half is vae.encoder else (colours.inverse(), torch.eye(3))
        first.weight[:3, :3, 1, 1], last.weight[:3, :3, 1, 1] = into, out
    vae.encoder.layers[-1].bias[:3] = shift
    vae.decoder.layers[0].bias[:3] = -colours.inverse() @ shift
    vae.encoder.layers[-1].weight[3:] *= 8  # large enough to be heard over the noise of training
    vae.encoder.layers[-1].bias[3:] = 0


def thumbnail(pixels: torch.Tensor) -> torch.Tensor:
    """The first three latent channels (B, 3, H / 4, W / 4) of images (B, 3, H, W) in [-1, 1], by formula."""
    small = torch.nn.functional.avg_pool2d((pixels + 1) / 2, PIXELS)
    shift = torch.tensor(COLOURS_SHIFT, device=pixels.device)[:, None, None]
    return torch.einsum("ic,bchw->bihw", torch.tensor(COLOURS, device=pixels.device), small) + shift


def build_scheduler() -> DDIMScheduler:
    """v-prediction down to pure noise (zero terminal SNR), so that nights come out dark."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def change_config(path: Path, **changes) -> None:
    """Set entries of a JSON file; None removes one."""
    config = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None or key not in changes}
    path.write_text(json.dumps(kept, indent=2) + "\n")


def export_pipeline(vae, text_encoder, tokenizer, unet, folder: Path) -> int:
    """Write the pipeline in half precision, swapped in whole; returns its size in bytes."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    for part in (vae, text_encoder, unet):
        torch.nn.Module.half(part)
    pipe.save_pretrained(new)
    # transformers loads in the dtype that the configuration names, if none is asked for.
    change_config(new / "text_encoder" / "config.json", dtype="float32")
    change_config(new / "vae" / "config.json", block_out_channels=None)  # AutoencoderTiny writes it but warns of it
    write_tokenizer(new / "tokenizer")
    for path in new.rglob("*.safetensors"):
        path.chmod(0o644)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
