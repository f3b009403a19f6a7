"""Whole pipelines, and ToDo with LoRA, IP-Adapter, ControlNet and offloading, in either order.

Each expectation comes from the same pipeline with the independent reference of conftest.py in place of apply_todo.
"""

import copy

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig, get_peft_model_state_dict

from todo_attn import ToDoConfig, ToDoProcessor, apply_todo, remove_todo

CONFIG = ToDoConfig(factor={1: 2, 2: 2})
FACTORS = {1: 2, 2: 2}


def close(actual, expected):
    return (actual - expected).abs().max() < 2e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0], ids=["no-guidance", "guidance"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_text_to_image(pipe, generate, reference, height, width, images, guidance_scale):
    arguments = {"height": height, "width": width, "images": images, "guidance_scale": guidance_scale}
    dense = generate(pipe, **arguments)
    with reference(pipe.unet, (height // 2, width // 2), FACTORS):
        expected = generate(pipe, **arguments)
    apply_todo(pipe, CONFIG)
    actual = generate(pipe, **arguments)
    assert close(actual, expected)
    assert not close(actual, dense)
    remove_todo(pipe)
    assert torch.equal(generate(pipe, **arguments), dense)


def test_the_headline_in_a_pipeline(pipe, generate):
    dense = generate(pipe, height=136, width=136)
    pipe.unet.set_attn_processor(ToDoProcessor())
    actual = generate(pipe, height=136, width=136)
    assert not close(actual, dense)
    remove_todo(pipe)
    apply_todo(pipe)
    assert torch.equal(generate(pipe, height=136, width=136), actual)


def test_image_to_image(pipe, generate, reference):
    img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    arguments = {"image": torch.rand(1, 3, 24, 40), "strength": 1.0}
    dense = generate(img2img, **arguments)
    with reference(pipe.unet, (12, 20), FACTORS):
        expected = generate(img2img, **arguments)
    apply_todo(pipe, CONFIG)  # the two pipelines share the UNet
    actual = generate(img2img, **arguments)
    assert close(actual, expected)
    assert not close(actual, dense)


@pytest.mark.parametrize("in_channels", [4, 9])
def test_inpainting(pipe, generate, reference, in_channels):
    """With the mask and the masked image as channels of a UNet made for it, and without."""
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": in_channels}).eval()
    inpaint = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    mask = torch.zeros(1, 1, 24, 40)
    mask[..., 10:] = 1
    arguments = {"image": torch.rand(1, 3, 24, 40), "mask_image": mask, "height": 24, "width": 40, "strength": 1.0}
    dense = generate(inpaint, **arguments)
    with reference(pipe.unet, (12, 20), FACTORS):
        expected = generate(inpaint, **arguments)
    apply_todo(inpaint, CONFIG)
    actual = generate(inpaint, **arguments)
    assert close(actual, expected)
    assert not close(actual, dense)


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
def test_controlnet(pipe, generate, reference, make_controlnet, several):
    nets = [make_controlnet(0), make_controlnet(1)] if several else [make_controlnet(0)]
    images = [torch.rand(1, 3, 24, 40) for _ in nets]
    controlled = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=nets if several else nets[0], requires_safety_checker=False
    )
    arguments = {"image": images if several else images[0], "height": 24, "width": 40}
    with reference(pipe.unet, (12, 20), FACTORS):
        unet_alone = generate(controlled, **arguments)
        contexts = [reference(net, (12, 20), FACTORS) for net in nets]
        for context in contexts:
            context.__enter__()
        expected = generate(controlled, **arguments)
        for context in contexts:
            context.__exit__(None, None, None)
    apply_todo(controlled, CONFIG)
    actual = generate(controlled, **arguments)
    assert close(actual, expected)
    assert not close(actual, unet_alone)


# LoRA


@pytest.fixture
def lora(pipe):
    """The state dict of a LoRA with weights on every attention projection, as load_lora_weights takes it."""
    unet = copy.deepcopy(pipe.unet)
    torch.manual_seed(5)
    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    return {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(unet).items()}


@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_lora(pipe, generate, call, reference, lora, order):
    half_scale = {"cross_attention_kwargs": {"scale": 0.5}}  # which the UNet takes off on entry
    before = dict(pipe.unet.attn_processors)
    if order == "between":
        apply_todo(pipe, ToDoConfig(factor=3))
    if order == "after":
        apply_todo(pipe, CONFIG)
    without = generate(pipe)
    pipe.load_lora_weights(lora)
    if order != "after":
        apply_todo(pipe, CONFIG)
    actual = generate(pipe)
    full, half = call(pipe.unet), call(pipe.unet, **half_scale)
    assert not close(actual, without)
    assert not close(full, half)
    remove_todo(pipe)
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)
    with reference(pipe.unet, (16, 16), FACTORS):
        assert close(actual, generate(pipe))
        assert close(half, call(pipe.unet, **half_scale))
    if order == "after":
        apply_todo(pipe, CONFIG)
        pipe.fuse_lora()
        assert close(generate(pipe), actual)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert close(generate(pipe), without)


# IP-Adapter


@pytest.fixture
def ip_adapter(pipe, make_ip_adapter):
    return make_ip_adapter(pipe.unet)


def load(pipe, ip_adapter):
    pipe.load_ip_adapter(ip_adapter, subfolder="", weight_name="", image_encoder_folder=None)


@pytest.mark.parametrize("order", ["before", "after", "bare"])
def test_ip_adapter(pipe, generate, reference, hooks, ip_adapter, order):
    image = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}
    before = dict(pipe.unet.attn_processors)
    original = generate(pipe)
    if order == "before":
        load(pipe, ip_adapter)
        before = dict(pipe.unet.attn_processors)
    elif order == "bare":
        pipe.unet.set_attn_processor(ToDoProcessor())
    apply_todo(pipe, CONFIG)
    if order != "before":
        todo = generate(pipe)
        load(pipe, ip_adapter)  # rebuilds every attn1 processor as processor.__class__()
    assert all(isinstance(p, ToDoProcessor) == (".attn1." in name) for name, p in pipe.unet.attn_processors.items())
    keys = pipe.unet.state_dict().keys()
    actual = generate(pipe, **image)

    remove_todo(pipe)
    assert hooks(pipe.unet) == 0
    after = pipe.unet.attn_processors
    if order == "bare":
        assert not any(isinstance(p, ToDoProcessor) for p in after.values())
    else:
        assert all(after[name] is before[name] for name in before if ".attn1." in name)
    assert all(isinstance(p, IPAdapterAttnProcessor2_0) for name, p in after.items() if ".attn2." in name)
    assert pipe.unet.state_dict().keys() == keys
    dense = generate(pipe, **image)
    with reference(pipe.unet, (16, 16), FACTORS):
        assert close(actual, generate(pipe, **image))
    assert not close(actual, dense)

    apply_todo(pipe, CONFIG)
    pipe.unload_ip_adapter()
    actual = generate(pipe)
    if order != "before":
        assert torch.equal(actual, todo)
    remove_todo(pipe)
    assert torch.equal(generate(pipe), original)
    assert not close(actual, original)


def test_ip_adapter_with_the_bare_processor(pipe, generate, ip_adapter):
    """Every attn1 gets its own processor; their state is on the model."""
    image = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}
    load(pipe, ip_adapter)
    apply_todo(pipe)
    expected = generate(pipe, height=136, width=136, **image)
    remove_todo(pipe)
    pipe.unload_ip_adapter()
    pipe.unet.set_attn_processor(ToDoProcessor())
    generate(pipe, height=136, width=136)
    load(pipe, ip_adapter)
    assert torch.equal(generate(pipe, height=136, width=136, **image), expected)


# Offloading


@pytest.fixture
def moves(monkeypatch):
    """The modules that accelerate's offloading hook has brought to their device, in order."""
    from accelerate.hooks import CpuOffload

    moved = []
    pre_forward = CpuOffload.pre_forward

    def recording(self, module, *args, **kwargs):
        moved.append(module)
        return pre_forward(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", recording)
    return moved


ORDERS = ["apply,offload,remove", "offload,apply,remove", "apply,offload,hooks,remove", "offload,apply,hooks,remove"]


@pytest.mark.parametrize("order", ORDERS)
def test_model_cpu_offload(pipe, generate, reference, hooks, moves, order):
    """In every order offloading keeps its wrapper while it is on, and ToDo keeps acting."""
    before, dense = dict(pipe.unet.attn_processors), generate(pipe)
    with reference(pipe.unet, (16, 16), FACTORS):
        expected = generate(pipe)
    applied = offloaded = False
    for step in order.split(","):
        if step == "apply":
            apply_todo(pipe, ToDoConfig(factor={1: 2, 2: 2}, timestep_range=(0, 999)))
        elif step == "offload":
            pipe.enable_model_cpu_offload(device="cpu")
        elif step == "hooks":
            pipe.remove_all_hooks()
        else:
            remove_todo(pipe)
        applied = {"apply": True, "remove": False}.get(step, applied)
        offloaded = {"offload": True, "hooks": False}.get(step, offloaded)
        moves.clear()
        latents = generate(pipe)
        assert close(latents, expected) if applied else torch.equal(latents, dense)
        assert (pipe.unet in moves) == offloaded, step
    assert hooks(pipe.unet) == 0
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)


def test_layers_that_move_their_arguments(pipe, generate, reference):
    """As under sequential offloading, whose hook on every layer rebuilds whatever is passed to it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    with reference(pipe.unet, (16, 16), FACTORS):
        expected = generate(pipe)
    apply_todo(pipe, CONFIG)
    for module in pipe.unet.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert close(generate(pipe), expected)


def test_a_failed_run_leaves_the_pipeline_usable(pipe, generate):
    dense = generate(pipe)
    apply_todo(pipe, CONFIG)
    expected = generate(pipe)

    def interrupt(pipe, step, timestep, arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, height=24, width=40, callback_on_step_end=interrupt)
    assert torch.equal(generate(pipe), expected)
    remove_todo(pipe)
    assert torch.equal(generate(pipe), dense)
