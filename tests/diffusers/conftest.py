"""Tiny random models in the shape of Stable Diffusion's, and ToDo written a second time to hold them against."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from torch import nn

_UNET = {
    "sample_size": 16,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
}


def _sd_unet(**config):
    """Like SD1.5: self-attention at the finest level too. Levels 1, 2 and (mid block) 4."""
    return UNet2DConditionModel(
        **{
            **_UNET,
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            **config,
        }
    ).eval()


def _sdxl_unet():
    """Like SDXL: none at the finest, linear projections, several blocks a transformer, pooled text. Levels 2 and 4."""
    return _sd_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


@pytest.fixture(scope="session")
def _originals():
    torch.manual_seed(0)
    return {"sd": _sd_unet(), "sdxl": _sdxl_unet(), "small": _sd_unet(**_SMALL)}


# One self-attention at level 1 and one at level 2: what torch.compile can trace in seconds.
_SMALL = {
    "block_out_channels": (8, 8),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


@pytest.fixture
def make_unet(_originals):
    """make_unet("sd" | "sdxl" | "small") -> a UNet with the same random weights each time."""
    return lambda kind="sd": copy.deepcopy(_originals[kind])


@pytest.fixture
def unet(make_unet):
    return make_unet("sd")


@pytest.fixture
def call():
    """call(unet, size=(h, w), batch=2, timestep=500, seed=0) -> the prediction for inputs that depend on ``seed``."""

    def call(unet, size=(16, 16), batch=2, timestep=500, seed=0, **kwargs):
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randn(batch, 4, *size, generator=generator)
        text = torch.randn(batch, 5, 8, generator=generator)
        if getattr(unet, "config", {}).get("addition_embed_type") == "text_time":
            pooled = torch.randn(batch, 8, generator=generator)
            kwargs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.arange(6.0).repeat(batch, 1)}
        with torch.no_grad():
            return unet(sample, timestep, text, **kwargs).sample

    return call


@pytest.fixture
def make_controlnet():
    def make(seed=0):
        torch.manual_seed(seed)
        net = ControlNetModel(
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=4,
            cross_attention_dim=8,
            block_out_channels=(8, 16, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            conditioning_embedding_out_channels=(4, 8),
        ).eval()
        for p in net.parameters():  # the convolutions that join the two networks start at zero
            if not p.any():
                nn.init.normal_(p, std=0.1)
        return net

    return make


@pytest.fixture(scope="session")
def _vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


@pytest.fixture
def pipe(unet, _vae):
    """Stable Diffusion without its text encoder: called with prompt embeddings; 2 pixels per latent pixel."""
    pipe = StableDiffusionPipeline(
        vae=copy.deepcopy(_vae),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def generate():
    """generate(pipe, **arguments) -> the latents after two steps, the same for the same arguments."""

    def generate(pipe, images=1, guidance_scale=5.0, **kwargs):
        generator = torch.Generator().manual_seed(3)
        prompt, negative = torch.randn(2, images, 5, 8, generator=generator)
        return pipe(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            guidance_scale=guidance_scale,
            **{"num_inference_steps": 2, "output_type": "latent", "generator": generator, **kwargs},
        ).images

    return generate


class ReferenceSelfAttention:
    """ToDo for one attn1 as the paper says it, with nothing of the package's: softmax of Q on interpolated tokens."""

    def __init__(self, grid, factor, mode="nearest"):
        self.grid, self.factor, self.mode = grid, factor, mode

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        assert encoder_hidden_states is None and attention_mask is None
        batch, tokens, channels = hidden_states.shape
        height, width = self.grid
        assert tokens == height * width
        image = hidden_states.transpose(1, 2).reshape(batch, channels, height, width)
        size = (max(1, height // self.factor), max(1, width // self.factor))
        image = F.interpolate(image, size=size, mode={"mean": "area"}.get(self.mode, self.mode))
        coarse = image.reshape(batch, channels, -1).transpose(1, 2)

        def heads(x):
            return x.reshape(batch, x.shape[1], attn.heads, -1).permute(0, 2, 1, 3)

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(coarse)), heads(attn.to_v(coarse))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        out = (scores.softmax(-1) @ value).permute(0, 2, 1, 3).reshape(batch, tokens, -1)
        return attn.to_out[1](attn.to_out[0](out))


def _level(name, depth):
    """The level of a layer of these models, whose every block but the last halves the grid, by its name."""
    block, index = name.split(".")[:2]
    return (
        2
        ** {"down_blocks": lambda: int(index), "up_blocks": lambda: depth - 1 - int(index)}.get(
            block, lambda: depth - 1
        )()
    )


@pytest.fixture
def reference():
    """with reference(model, (h, w), {level: factor}): ``model`` does ToDo by the code above, on latents of h x w."""

    @contextmanager
    def reference(model, size, factors, mode="nearest"):
        before = {}
        for name, module in model.named_modules():
            if not name.endswith(".attn1"):
                continue
            level = _level(name, len(model.down_blocks))
            grid = tuple(-(-side // level) for side in size)  # a stride-2 convolution rounds up
            before[module] = module.processor
            module.processor = ReferenceSelfAttention(grid, factors.get(level, 1), mode)
        try:
            yield
        finally:
            for module, processor in before.items():
                module.processor = processor

    return reference


@pytest.fixture
def hooks():
    """hooks(model) -> how many forward hooks and states of any kind are on ``model`` and in it."""

    def count(model):
        return sum(
            len(module._forward_pre_hooks) + len(module._forward_hooks) + ("_todo_attn" in module.__dict__)
            for module in model.modules()
        )

    return count


@pytest.fixture
def make_ip_adapter():
    """make_ip_adapter(unet): the state dict of an IP-Adapter for it, as load_ip_adapter takes it."""

    def make_ip_adapter(unet):
        torch.manual_seed(5)
        weights, key = {}, 1
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                processor = IPAdapterAttnProcessor2_0(hidden_size=module.inner_dim, cross_attention_dim=8)
                weights[f"{key}.to_k_ip.weight"] = processor.to_k_ip[0].weight.detach() * 10
                weights[f"{key}.to_v_ip.weight"] = processor.to_v_ip[0].weight.detach() * 10
                key += 2
        projection = ImageProjection(cross_attention_dim=8, image_embed_dim=6, num_image_text_embeds=4).state_dict()
        names = {"image_embeds.weight": "proj.weight", "image_embeds.bias": "proj.bias"}
        image_proj = {names.get(name, name): weight for name, weight in projection.items()}
        return {"image_proj": image_proj, "ip_adapter": weights}

    return make_ip_adapter


@pytest.fixture
def fresh_dynamo():
    """torch.compile with nothing compiled before, and nothing left after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
