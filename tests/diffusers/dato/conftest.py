"""Inputs, a log of what was computed, and the UNets that DaTo's tests run."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D


@pytest.fixture(scope="session")
def _deep(originals):
    """SD1.5's own topology: two layers a block, three in the last up block."""
    torch.manual_seed(1)
    model = originals["sd"]
    return type(model).from_config({**model.config, "layers_per_block": 2}).eval()


@pytest.fixture
def any_unet(make_unet, _deep):
    """any_unet("sd" | "sdxl" | "small" | "deep"): the UNets of this folder, the same weights each time."""
    return lambda kind: copy.deepcopy(_deep) if kind == "deep" else make_unet(kind)


@pytest.fixture
def inputs():
    """inputs(unet, size, batch, seed) -> sample, by ``seed``, and keyword arguments of a call.

    The prompt embeddings are one tensor for each batch size, as in a run.
    """
    prompts = {}

    def inputs(unet, size=(16, 12), batch=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randn(batch, 4, *size, generator=generator)
        if batch not in prompts:
            prompts[batch] = torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(99))
        kwargs = {"encoder_hidden_states": prompts[batch]}
        if unet.config.addition_embed_type == "text_time":
            pooled = torch.randn(batch, 8, generator=generator)
            kwargs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.arange(6.0).repeat(batch, 1)}
        return SimpleNamespace(sample=sample, kwargs=kwargs)

    return inputs


@pytest.fixture
def calls(inputs):
    """calls(unet, n) -> the outputs of a run of n calls, each with its own inputs."""

    @torch.no_grad()
    def calls(unet, n, size=(16, 12), batch=2, same=False, **extra):
        outputs = []
        timesteps = torch.tensor([500 if same else 900 - 50 * i for i in range(n)])
        for i, timestep in enumerate(timesteps):
            given = inputs(unet, size, batch, seed=0 if same else i)
            # The UNet empties lists, so each call gets its own.
            more = {key: list(x) if isinstance(x, list) else x for key, x in extra.items()}
            outputs.append(unet(given.sample, timestep, **given.kwargs, **more).sample.clone())
        return outputs

    return calls


@pytest.fixture
def kinds():
    """kinds(unet) -> a list that grows by a digit with every call of ``unet``, from which resnets it ran."""

    def kinds(unet):
        names = {m: name for name, m in unet.named_modules() if isinstance(m, ResnetBlock2D)}
        last = f"up_blocks.{len(unet.up_blocks) - 1}.resnets.{len(unet.up_blocks[-1].resnets) - 1}"
        digit = {frozenset(names.values()): "2", frozenset((last,)): "1", frozenset(): "0"}
        digits, ran = [], []

        def finish(*_):
            assert len(ran) == len(set(ran))
            digits.append(digit[frozenset(ran)])

        for module, name in names.items():  # a layer in it, because torch's hooks are called on skipped modules too
            module.conv1.register_forward_hook(lambda *_, name=name: ran.append(name))
        unet.register_forward_pre_hook(lambda *_: ran.clear())
        unet.register_forward_hook(finish)
        return digits

    return kinds
