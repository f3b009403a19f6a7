"""The parts of the tiny Stable Diffusion pipeline, as the real classes of diffusers and transformers."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scenes import WORDS

MAX_TOKENS = 48
TEXT_WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with every occurrence of the pair joined."""
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer with one token for each word of the captions; other words become pieces and letters.

    Byte-pair encoding, trained on the list of words until each is whole.
    """
    letters = byte_alphabet()
    vocab, merges = letters + [c + "</w>" for c in letters], []
    words = [[*word[:-1], word[-1] + "</w>"] for word in WORDS]
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        words = [merge(word, best) for word in words]
        merges.append(" ".join(best))
        vocab.append("".join(best))
    vocab += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


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


def build_unet() -> UNet2DConditionModel:
    """Four levels, with one attention head on three of them, as wide as the level: 40, 80 and 120."""
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        block_out_channels=(40, 80, 120, 120),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=1,  # the number of heads, in the configurations of Stable Diffusion 1.x
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
        # An embedding of the whole caption is added to the timestep's in every resnet. Shapes are learned sooner than
        # by cross-attention alone.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    unet.conv_out.weight.data.zero_()
    unet.add_embedding.norm2.weight.data.fill_(0.3)
    return unet


def build_vae() -> AutoencoderKL:
    """8 pixels to a latent pixel, 4 channels, no attention, so that decoding grows linearly with the pixels."""
    return start_as_thumbnail(
        AutoencoderKL(
            sample_size=512,
            block_out_channels=(16, 32, 64, 96),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,  # more would normalise a flat image's colours away
            mid_block_add_attention=False,
        )
    )


@torch.no_grad()
def start_as_thumbnail(vae: AutoencoderKL) -> AutoencoderKL:
    """Set the encoder to draw a thumbnail, which stays fixed, and the decoder to start by enlarging it.

    Eight channels carry the colours, their negatives and two constants past every block, whose residual branches are
    zero; ``silu(x) - silu(-x) = x`` brings them out of the last layer, and the constants hold its norm nearly still.
    The fourth latent channel stays empty. What is left for the decoder to learn is detail: sharp edges.
    """
    centre, quarter = torch.zeros(3, 3), torch.zeros(3, 3)
    centre[1, 1], quarter[:2, :2] = 1, 0.25

    def carry(conv, kernel):
        conv.weight[:8] = torch.eye(8, conv.weight.shape[1])[:, :, None, None] * kernel
        conv.bias[:8] = 0

    for half in (vae.encoder, vae.decoder):
        colours = torch.cat([torch.eye(3), -torch.eye(3)])
        if half is vae.encoder:
            half.conv_in.weight.zero_()
            half.conv_in.bias.zero_()
        half.conv_in.weight[:8] = 0
        half.conv_in.weight[:6, :3, 1, 1] = colours
        constant = 4.0 if half is vae.encoder else 2.0
        half.conv_in.bias[:8] = torch.tensor([0.0] * 6 + [constant, -constant])
        for module in half.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()
                if module.conv_shortcut is not None:
                    carry(module.conv_shortcut, torch.ones(1, 1))
            elif isinstance(module, Downsample2D):
                carry(module.conv, quarter)
            elif isinstance(module, Upsample2D):
                carry(module.conv, centre)
            if half is vae.encoder and isinstance(module, torch.nn.Conv2d) and module is not half.conv_in:
                module.weight[8:] = 0
                module.bias[8:] = 0
        half.conv_out.weight.zero_()
        half.conv_out.bias.zero_()
        half.conv_out.weight[:3, :6, 1, 1] = colours.T
    vae.encoder.conv_out.bias[4:] = -14.0  # the posterior's logarithmic variance: hardly any
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight[:, :, 0, 0] = torch.eye(len(conv.weight))
        conv.bias.zero_()
    pixels = torch.rand(16, 3, 4, 4).repeat_interleave(32, 2).repeat_interleave(32, 3) * 2 - 1
    for half, run in (
        (vae.encoder, lambda: vae.encode(pixels).latent_dist.mean[:, :3]),
        (vae.decoder, lambda: vae(pixels).sample),
    ):
        half.conv_out.weight *= pixels.std() / run().std()
    vae.register_to_config(scaling_factor=1.5)  # latents of about unit deviation
    return vae


def build_scheduler() -> DDIMScheduler:
    """v-prediction down to pure noise (zero terminal SNR), so that white and black backgrounds come out whole."""
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


def build_pipeline(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
