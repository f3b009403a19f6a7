"""docs/recipes.md: the code of each recipe is run as it stands there, and what the page says of it is checked.

Each expectation comes from the same model with the independent reference of fixtures/unets.py in place of ToDo, or is
bit-equal to what the page says.
"""

import copy
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPAGPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from fixtures.unets import ReferenceSelfAttention
from peft import LoraConfig
from torch import nn

from todo_attn import ArgumentError, DaToConfig, ToDoConfig, apply_dato, apply_todo, remove_dato, remove_todo, status

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
CONFIG = ToDoConfig(factor={1: 2, 2: 2})
FACTORS = {1: 2, 2: 2}
SHAPE = {"height": 24, "width": 40}
GRID = (12, 20)


@pytest.fixture
def follow(monkeypatch):
    """follow(heading, pipe, number=0): run the code under a heading of the page; ToDo with this file's CONFIG."""
    text = PAGE.read_text(encoding="utf-8")

    def follow(heading, pipe, number=0):
        (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]
        monkeypatch.setattr("todo_attn.apply_todo", lambda model: apply_todo(model, CONFIG))
        exec(compile(code, f"{PAGE.name}, {heading}", "exec"), {"pipe": pipe})

    return follow


def close(actual, expected, within=2e-5):
    return (actual - expected).abs().max() < within * max(1, expected.abs().max())


def states(pipe):
    return {layer.state for layer in status(pipe).layers}


def needs(package):
    """Skip, with a plain reason, without an optional package."""
    return pytest.importorskip(package, reason=f"needs pip install {package.partition('.')[0]}")


# SageAttention


@pytest.fixture
def head_dim_64(originals):
    """A UNet whose heads have 64 channels, as SDXL's: self-attention once at level 1 and once at level 2."""
    torch.manual_seed(0)
    config = {**originals["small"].config, "block_out_channels": (64, 128), "attention_head_dim": (1, 2)}
    return UNet2DConditionModel.from_config(config).eval()


@pytest.mark.parametrize("first", ["recipe", "ToDo"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="ToDo's kernel runs in Triton's interpreter here")
def test_sage_attention_serves_what_todo_leaves_dense(head_dim_64, call, follow, monkeypatch, first):
    """With a stand-in for SageAttention, and ToDo's own attention by its kernel, as on a GPU."""
    pytest.importorskip("triton", reason="needs Triton")
    calls, torch_attention = [], F.scaled_dot_product_attention

    def sageattn(query, key, value, is_causal, sm_scale):
        calls.append((query.shape[2], key.shape[2]))
        return torch_attention(query, key, value, is_causal=is_causal, scale=sm_scale)

    config = ToDoConfig(factor={1: 2})
    apply_todo(head_dim_64, config)
    expected = call(head_dim_64, batch=1)
    remove_todo(head_dim_64)

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr(F, "scaled_dot_product_attention", torch_attention)  # to be put back after the test
    monkeypatch.setattr("todo_attn.ops.backends.choose", lambda *_: "triton")
    if first == "ToDo":
        apply_todo(head_dim_64, config)
    follow("SageAttention", head_dim_64)
    apply_todo(head_dim_64, config)
    actual = call(head_dim_64, batch=1)
    assert close(actual, expected)
    # Level 1 is coarse, by the kernel: cross-attention alone is left. Level 2 is dense.
    assert calls == [(256, 5), (64, 64), (64, 5)]
    remove_todo(head_dim_64)
    calls.clear()
    apply_dato(head_dim_64, DaToConfig(prune_ratio=0.4))
    call(head_dim_64, batch=1)
    assert calls == [(154, 154), (256, 5), (64, 64), (64, 5)]


def test_sage_attention_leaves_other_head_dims_and_masks_to_torch(pipe, generate, follow, monkeypatch):
    def sageattn(*args, **kwargs):
        raise AssertionError("these models have 4 and 8 channels a head")

    apply_todo(pipe, CONFIG)
    expected = generate(pipe)
    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    follow("SageAttention", pipe)
    assert torch.equal(generate(pipe), expected)


def test_the_attention_backend_of_diffusers_changes_nothing_in_a_unet(unet, call):
    apply_todo(unet, CONFIG)
    before, expected = dict(unet.attn_processors), call(unet)
    unet.set_attention_backend("_native_math")
    assert all(unet.attn_processors[name] is before[name] for name in before)
    assert not any(hasattr(processor, "_attention_backend") for processor in before.values())
    assert torch.equal(call(unet), expected)


@pytest.mark.parametrize("first", ["processor", "ToDo"])
def test_a_processor_of_ones_own_goes_on_cross_attention_only(unet, call, first):
    calls = []

    class Own(AttnProcessor2_0):
        def __call__(self, attn, *args, **kwargs):
            calls.append(attn)
            return super().__call__(attn, *args, **kwargs)

    crossing = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    own = Own()
    if first == "ToDo":
        apply_todo(unet, CONFIG)
    for attn in crossing:
        attn.set_processor(own)
    if first == "processor":
        apply_todo(unet, CONFIG)
    call(unet)
    assert len(calls) == len(crossing) and set(calls) == set(crossing)
    assert "coarse" in states(unet)
    remove_todo(unet)
    unet.set_attn_processor(own)
    with pytest.raises(ArgumentError, match="plain attention processors"):
        apply_todo(unet, CONFIG)


# HiDiffusion


@pytest.fixture
def hidiffusion(originals, pipe, follow):
    """The package, and ``pipe`` with a UNet of Stable Diffusion 1.5's parts, which HiDiffusion finds by their names."""
    if find_spec("hidiffusion") is None:
        pytest.skip("needs pip install hidiffusion")
    torch.manual_seed(0)
    config = {name: originals["sd"].config[name] for name in ("attention_head_dim", "norm_num_groups", "sample_size")}
    pipe.unet = UNet2DConditionModel(**config, cross_attention_dim=8, block_out_channels=(8, 8, 16, 16)).eval()
    pipe.register_to_config(_name_or_path="runwayml/stable-diffusion-v1-5")
    follow("HiDiffusion", pipe)  # the package cannot be imported in another way
    import hidiffusion

    remove_todo(pipe)
    hidiffusion.remove_hidiffusion(pipe)
    return hidiffusion


LARGE = {"height": 48, "width": 32, "num_inference_steps": 4}


def test_todo_follows_the_grids_of_hidiffusion(pipe, generate, follow, hidiffusion):
    dense = generate(pipe, **LARGE)
    hidiffusion.apply_hidiffusion(pipe, apply_window_attn=False)
    alone = generate(pipe, **LARGE)
    grids = set()
    handles = []
    for name, transformer in pipe.unet.named_modules():
        if isinstance(transformer, Transformer2DModel):
            attn = transformer.transformer_blocks[0].attn1
            level = {"mid_block": 8, "down_blocks.0": 1, "up_blocks.3": 1, "down_blocks.1": 2, "up_blocks.2": 2}
            level = next((at for part, at in level.items() if name.startswith(part)), 4)
            attn.processor = processor = ReferenceSelfAttention(None, FACTORS.get(level, 1))

            def measure(_, args, processor=processor, level=level):
                processor.grid = tuple(args[0].shape[-2:])
                grids.add((level, processor.grid))

            handles.append(transformer.register_forward_pre_hook(measure))
    expected = generate(pipe, **LARGE)
    for handle in handles:
        handle.remove()
    assert {grid for level, grid in grids if level == 2} == {(12, 8), (6, 4)}  # RAU-Net's in the first step
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    hidiffusion.remove_hidiffusion(pipe)
    follow("HiDiffusion", pipe)
    actual = generate(pipe, **LARGE)
    assert close(actual, expected)
    assert not close(actual, alone)
    remove_todo(pipe)
    assert torch.equal(generate(pipe, **LARGE), alone)
    apply_todo(pipe, CONFIG)  # the other order
    hidiffusion.apply_hidiffusion(pipe, apply_window_attn=False)
    assert torch.equal(generate(pipe, **LARGE), actual)
    remove_todo(pipe)
    hidiffusion.remove_hidiffusion(pipe)
    assert torch.equal(generate(pipe, **LARGE), dense)


@pytest.mark.parametrize("apply", [apply_todo, apply_dato], ids=["ToDo", "DaTo"])
def test_windows_take_the_place_of_todo_and_dato(pipe, generate, hidiffusion, caplog, apply):
    hidiffusion.apply_hidiffusion(pipe)

    def seeded():
        torch.manual_seed(0)  # the windows are shifted at random
        return generate(pipe, **LARGE)

    alone = seeded()
    apply(pipe, {apply_todo: ToDoConfig(factor={1: 2}), apply_dato: DaToConfig(prune_ratio=0.4)}[apply])
    assert torch.equal(seeded(), alone)
    message = {apply_todo: "grid of tokens", apply_dato: "other tokens than its block"}[apply]
    assert sum(message in record.getMessage() for record in caplog.records) == 1


def test_dato_prunes_beside_rau_net_and_a_schedule_spoils_its_count(pipe, generate, hidiffusion):
    hidiffusion.apply_hidiffusion(pipe, apply_window_attn=False)
    alone = generate(pipe, **LARGE)
    counting = pipe.unet.down_blocks[1]
    apply_dato(pipe, DaToConfig(prune_ratio=0.4, todo=CONFIG))
    assert not close(generate(pipe, **LARGE), alone)
    assert counting.timestep == 0  # ready for the next image
    remove_dato(pipe)
    assert torch.equal(generate(pipe, **LARGE), alone)
    apply_dato(pipe, DaToConfig(cache_schedule="111"))
    generate(pipe, **LARGE)
    assert counting.timestep == 1  # of 4 calls it saw one


# Few-step LoRAs


def add_lora(unet):
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets))


@pytest.fixture
def lora(pipe, monkeypatch):
    """A LoRA in the place of the one that the page downloads."""
    monkeypatch.setattr(pipe, "load_lora_weights", lambda name: add_lora(pipe.unet), raising=False)


FEW = {**SHAPE, "num_inference_steps": 4, "guidance_scale": 1.0}


def test_a_few_step_lora(pipe, generate, reference, follow, lora):
    without = generate(pipe, **FEW)
    follow("Few-step LoRAs", pipe)
    actual = generate(pipe, **FEW)
    assert isinstance(pipe.scheduler, LCMScheduler)
    remove_todo(pipe)
    dense = generate(pipe, **FEW)
    with reference(pipe.unet, GRID, FACTORS):
        expected = generate(pipe, **FEW)
    assert close(actual, expected)
    assert not close(actual, dense) and not close(dense, without)


@pytest.mark.parametrize(
    "scheduler",
    [
        LCMScheduler(steps_offset=1),
        TCDScheduler(steps_offset=1),
        EulerAncestralDiscreteScheduler(steps_offset=1, timestep_spacing="trailing"),
        DDIMScheduler(steps_offset=1, timestep_spacing="trailing", clip_sample=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_calls_of_a_few_steps_are_found(pipe, generate, caplog, scheduler):
    pipe.scheduler = scheduler
    apply_todo(pipe, ToDoConfig(factor=2, steps=(0.0, 0.5)))
    generate(pipe, **FEW)
    assert {layer.why for layer in status(pipe).layers} == {"call 4 of 4 is outside of steps, 0 to 0.5"}
    remove_todo(pipe)
    apply_dato(pipe, DaToConfig(prune_ratio=0.4))
    generate(pipe, **FEW)
    assert (status(pipe).dato.call, status(pipe).dato.calls, status(pipe).dato.prune_ratio) == (4, 4, 0.4)
    apply_dato(pipe, DaToConfig.preset("coco"))
    generate(pipe, **FEW)
    assert status(pipe).dato.schedule == "100"  # one shallow, two reused: hardly more than one step
    assert not [record for record in caplog.records if "cannot be" in record.getMessage()]


# Quantised weights


@pytest.mark.parametrize("number", [0, 1], ids=["int8", "layerwise"])
def test_quantised_weights_in_either_order(pipe, generate, follow, number):
    if number == 0:
        needs("torchao")
    quantised, other = copy.deepcopy(pipe), copy.deepcopy(pipe)
    apply_todo(pipe, CONFIG)
    todo = generate(pipe, **SHAPE)

    follow("Quantised weights", quantised, number)
    actual = generate(quantised, **SHAPE)
    assert "coarse" in states(quantised)
    remove_todo(quantised)
    dense = generate(quantised, **SHAPE)
    assert not close(actual, dense) and not torch.equal(actual, todo)

    apply_todo(other, CONFIG)
    follow("Quantised weights", other, number)
    assert torch.equal(generate(other, **SHAPE), actual)
    remove_todo(other)
    assert torch.equal(generate(other, **SHAPE), dense)
    if number == 0:  # layerwise casting with DaTo: dato/test_beside.py
        apply_dato(other, DaToConfig(cache_schedule="1", prune_ratio=0.4))
        generate(other, **SHAPE)
        assert status(other).dato.kind == "shallow"
        remove_dato(other)
        assert torch.equal(generate(other, **SHAPE), dense)


# torch.compile, and all together


@pytest.fixture
def traces(monkeypatch, fresh_dynamo):
    """``module.compile`` without a code generator; counts the graphs."""
    counter, original = torch._dynamo.testing.CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend=counter, **options))
    return counter


@pytest.fixture
def small(pipe, make_unet):
    pipe.unet = make_unet("small")
    return pipe


def test_a_compiled_unet(small, generate, follow, traces):
    eager = copy.deepcopy(small)
    apply_todo(eager, CONFIG)
    expected = generate(eager, **SHAPE)
    follow("torch.compile", small)
    assert close(generate(small, **SHAPE), expected)
    assert traces.frame_count == 1
    assert states(small) == {"coarse"}


def test_all_together(small, generate, follow, lora, traces):
    quantization = needs("torchao.quantization")
    eager = copy.deepcopy(small)
    follow("All together", small)
    actual = generate(small, **SHAPE)
    assert traces.frame_count == 1
    assert states(small) == {"coarse"}

    add_lora(eager.unet)
    eager.fuse_lora()
    eager.unload_lora_weights()
    quantization.quantize_(eager.unet, quantization.Int8WeightOnlyConfig())
    dense = generate(eager, **SHAPE)
    apply_todo(eager, CONFIG)
    assert close(actual, generate(eager, **SHAPE))
    assert not close(actual, dense)


# The VAE


def test_tiles_and_slices_of_the_vae(pipe, generate, follow):
    whole = copy.deepcopy(pipe)
    apply_todo(whole, CONFIG)
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
    follow("The VAE of a large image", pipe)
    latents = generate(pipe, **SHAPE, images=2)
    assert torch.equal(latents, generate(whole, **SHAPE, images=2))
    image = generate(pipe, **SHAPE, images=2, output_type="pt")
    assert not torch.equal(image, generate(whole, **SHAPE, images=2, output_type="pt"))  # the seams of tiles
    with torch.no_grad():
        expected = pipe.vae.tiled_decode(latents / pipe.vae.config.scaling_factor).sample
    assert close(image, (expected / 2 + 0.5).clamp(0, 1))
    pipe.vae.disable_tiling()
    one = generate(pipe, **SHAPE, output_type="pt")
    assert torch.equal(one, generate(whole, **SHAPE, output_type="pt"))  # slicing, one image


# FreeU, PAG, channels_last, group offloading


def test_freeu_and_channels_last(pipe, generate, reference, follow):
    plain = generate(pipe, **SHAPE)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    dense = generate(pipe, **SHAPE)
    with reference(pipe.unet, GRID, FACTORS):
        expected = generate(pipe, **SHAPE)
    pipe.disable_freeu()
    follow("FreeU, PAG, channels_last, group offloading", pipe)
    actual = generate(pipe, **SHAPE)
    assert close(actual, expected, within=1e-4)
    assert not close(actual, dense, within=1e-2)
    pipe.disable_freeu()
    remove_todo(pipe)
    assert close(generate(pipe, **SHAPE), plain, within=1e-4)
    apply_todo(pipe, CONFIG)  # the other order
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert close(generate(pipe, **SHAPE), expected, within=1e-4)
    apply_dato(pipe, DaToConfig(cache_schedule="1", prune_ratio=0.4))
    generate(pipe, **SHAPE)
    assert status(pipe).dato.kind == "shallow"


def test_perturbed_attention_guidance(pipe, generate, reference, caplog):
    pag = StableDiffusionPAGPipeline(**pipe.components, pag_applied_layers=["mid"], requires_safety_checker=False)
    pag.set_progress_bar_config(disable=True)
    arguments = {**SHAPE, "pag_scale": 3.0}
    dense = generate(pag, **arguments)
    with reference(pag.unet, GRID, FACTORS):
        expected = generate(pag, **arguments)
    apply_todo(pag, CONFIG)
    before = dict(pag.unet.attn_processors)
    actual = generate(pag, **arguments)
    assert close(actual, expected)
    assert not close(actual, dense)
    assert sum("ToDo is off in a self-attention" in record.getMessage() for record in caplog.records) == 1
    assert all(pag.unet.attn_processors[name] is before[name] for name in before)
    remove_todo(pag)
    apply_dato(pag, DaToConfig(cache_schedule="1", prune_ratio=0.4))
    generate(pag, **arguments)
    assert status(pag).dato.kind == "shallow"
    remove_dato(pag)
    assert torch.equal(generate(pag, **arguments), dense)


@pytest.mark.parametrize("how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
@pytest.mark.parametrize("first", ["offloading", "ToDo"])
def test_group_offloading(pipe, generate, how, first):
    """From the CPU to the CPU, which moves nothing: the hooks of both are there, in either order."""
    here = torch.device("cpu")
    dense = generate(pipe, **SHAPE)
    apply_todo(pipe, CONFIG)
    expected = generate(pipe, **SHAPE)
    if first == "offloading":
        remove_todo(pipe)
    blocks = {"num_blocks_per_group": 1} if how["offload_type"] == "block_level" else {}
    pipe.unet.enable_group_offload(onload_device=here, offload_device=here, **how, **blocks)
    if first == "offloading":
        apply_todo(pipe, CONFIG)
    assert torch.equal(generate(pipe, **SHAPE), expected)
    remove_todo(pipe)
    assert torch.equal(generate(pipe, **SHAPE), dense)
    apply_dato(pipe, DaToConfig(prune_ratio=0.4))
    assert not close(generate(pipe, **SHAPE), dense)


# Other caches


@pytest.mark.parametrize("first", ["DeepCache", "ToDo"])
def test_deepcache(pipe, generate, reference, first):
    helper = needs("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    arguments = {**SHAPE, "num_inference_steps": 4}
    dense = generate(pipe, **arguments)
    helper.enable()
    with reference(pipe.unet, GRID, FACTORS):
        expected = generate(pipe, **arguments)
    alone = generate(pipe, **arguments)
    if first == "ToDo":
        helper.disable()
    apply_todo(pipe, CONFIG)
    if first == "ToDo":
        helper.enable()
    actual = generate(pipe, **arguments)
    assert close(actual, expected)
    assert not close(actual, alone) and not close(alone, dense)
    helper.disable()
    remove_todo(pipe)
    assert torch.equal(generate(pipe, **arguments), dense)


@pytest.mark.parametrize("first", ["T-GATE", "ToDo"])
def test_tgate_leaves_nothing_for_todo(pipe, first):
    tgate = needs("tgate")
    gate = {"gate_step": 2, "sp_interval": 1, "fi_interval": 1, "warm_up": 0, "num_inference_steps": 3}

    def generate(loaded):
        generator = torch.Generator().manual_seed(3)
        prompt, negative = torch.randn(2, 1, 5, 8, generator=generator)
        arguments = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": 5.0, **SHAPE}
        return loaded.tgate(**arguments, **gate, output_type="latent", generator=generator).images

    twin = copy.deepcopy(pipe)
    alone = generate(tgate.TgateSDLoader(twin, **gate))
    if first == "ToDo":
        apply_todo(pipe, CONFIG)
    loaded = tgate.TgateSDLoader(pipe, **gate)
    if first == "T-GATE":
        apply_todo(pipe, CONFIG)
    assert torch.equal(generate(loaded), alone)
    assert states(pipe) == {"off"}
