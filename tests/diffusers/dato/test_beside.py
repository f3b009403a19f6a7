"""DaTo with FreeU, ControlNet, T2I-Adapter, LoRA, IP-Adapter, offloading and layerwise casting.

Mostly by replay: on the inputs of the full call a shallow call must give what the dense UNet gives, with whatever is on
it. A cached tensor that somebody wrote into, or a block that was not to run, would show.
"""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import StableDiffusionControlNetPipeline
from peft import LoraConfig

from todo_attn.config.dato import DaToConfig
from todo_attn.diffusers.dato import apply_dato, remove_dato

REPLAY = DaToConfig(prune_ratio=0.0, cache_schedule="110211")
EIGHT = {"height": 16, "width": 16, "num_inference_steps": 6}
SCHEDULE = DaToConfig(cache_schedule="11021")


def replays(unet, calls, expected, **extra):
    outputs = calls(unet, 7, same=True, **extra)
    return all((output - expected).abs().max() < 1e-6 for output in outputs)


def lora(unet):
    torch.manual_seed(4)
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "small"])
@pytest.mark.parametrize("first", ["FreeU", "DaTo"])
def test_freeu(make_unet, calls, kind, first):
    """FreeU writes into the inputs of blocks; in a UNet of two blocks, into that of the last."""
    unet, plain = make_unet(kind), make_unet(kind)
    if first == "DaTo":
        apply_dato(unet, REPLAY)
    for model in (unet, plain):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    apply_dato(unet, REPLAY)
    expected = calls(plain, 1, same=True)[0]
    assert replays(unet, calls, expected)
    unet.disable_freeu()
    plain.disable_freeu()
    dense = calls(plain, 1, same=True)[0]
    assert not torch.equal(dense, expected)
    assert replays(unet, calls, dense)


def controlled(scale):
    """The outputs of a ControlNet for the "sd" UNet on latents of 16 x 12: for each skip, and for the middle."""
    torch.manual_seed(6)
    shapes = [(8, 16, 12)] * 2 + [(8, 8, 6)] + [(16, 8, 6)] + [(16, 4, 3)] * 2
    residuals = [torch.randn(2, *shape) * scale for shape in shapes]
    return {"down_block_additional_residuals": residuals, "mid_block_additional_residual": residuals[-1] * 2}


def test_controlnet_residuals(make_unet, calls, inputs):
    unet, plain = make_unet("sd"), make_unet("sd")
    apply_dato(unet, REPLAY)
    assert replays(unet, calls, calls(plain, 1, same=True, **controlled(1))[0], **controlled(1))


def test_a_shallow_call_takes_the_running_call_s_controlnet_residual(make_unet, inputs):
    """Only that of conv_in's output, the only one that it reads."""
    unet, plain = make_unet("sd"), make_unet("sd")
    apply_dato(unet, DaToConfig(prune_ratio=0.0, cache_schedule="1"))
    given, hidden = inputs(unet), []
    last = plain.up_blocks[-1].resnets[-1]
    first, second = torch.tensor([900, 800])
    with torch.no_grad():
        unet(given.sample, first, **given.kwargs, **controlled(1))
        actual = unet(given.sample, second, **given.kwargs, **controlled(3)).sample
        handle = last.register_forward_pre_hook(lambda _, args: hidden.append(args[0][:, :-8]))
        plain(given.sample, 900, **given.kwargs, **controlled(1))
        handle.remove()
        skip = plain.conv_in(given.sample) + controlled(3)["down_block_additional_residuals"][0]
        last.register_forward_pre_hook(lambda _, args: (torch.cat((hidden[0], skip), 1), *args[1:]))
        expected = plain(given.sample, 800, **given.kwargs).sample
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_controlnet_pipeline(pipe, generate, make_controlnet, kinds, guidance_scale):
    control = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=make_controlnet(), requires_safety_checker=False
    )
    control.set_progress_bar_config(disable=True)
    arguments = {**EIGHT, "guidance_scale": guidance_scale, "image": torch.rand(1, 3, 16, 16)}
    dense = generate(control, **arguments)
    apply_dato(control, DaToConfig(prune_ratio=0.0, cache_schedule="22222"))
    assert torch.equal(generate(control, **arguments), dense)
    apply_dato(control, SCHEDULE)
    log = kinds(control.unet)
    first = generate(control, **arguments)
    assert torch.equal(generate(control, **arguments), first)
    assert "".join(log) == "211021" * 2
    assert not torch.equal(first, dense)
    remove_dato(control)
    assert torch.equal(generate(control, **arguments), dense)


def test_t2i_adapter_residuals(make_unet, calls):
    """The UNet adds them in place to the output of a block without attention."""
    torch.manual_seed(6)
    residuals = [torch.randn(2, *shape) for shape in ((8, 16, 12), (16, 8, 6), (16, 4, 3))]
    unet, plain = make_unet("sd"), make_unet("sd")
    expected = calls(plain, 1, same=True, down_intrablock_additional_residuals=residuals)[0]
    assert not torch.equal(expected, calls(plain, 1, same=True)[0])
    apply_dato(unet, REPLAY)
    assert replays(unet, calls, expected, down_intrablock_additional_residuals=residuals)
    assert replays(unet, calls, calls(plain, 1, same=True)[0])  # nothing of it has stayed


@pytest.mark.parametrize("first", ["LoRA", "DaTo"])
def test_lora(make_unet, calls, first):
    unet, plain, bare = make_unet("sd"), make_unet("sd"), make_unet("sd")
    lora(plain)
    if first == "LoRA":
        lora(unet)
    apply_dato(unet, REPLAY)
    if first == "DaTo":
        lora(unet)
    expected = calls(plain, 1, same=True)[0]
    assert not torch.equal(expected, calls(bare, 1, same=True)[0])
    assert replays(unet, calls, expected)
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    assert replays(unet, calls, calls(plain, 1, same=True, **scaled)[0], **scaled)
    apply_dato(unet, DaToConfig(prune_cross_attention=True, prune_feed_forward=True))
    pruned = calls(unet, 1, same=True)[0]
    if first == "LoRA":
        remove_dato(unet)
        assert torch.equal(calls(unet, 1, same=True)[0], expected)
        unet.delete_adapters("default")
    else:
        unet.delete_adapters("default")
        assert not torch.equal(calls(unet, 1, same=True)[0], pruned)
        remove_dato(unet)
    assert torch.equal(calls(unet, 1, same=True)[0], calls(bare, 1, same=True)[0])


@pytest.fixture
def ip_adapter(unet, make_ip_adapter):
    return make_ip_adapter(unet)


@pytest.mark.parametrize("first", ["IP-Adapter", "DaTo"])
def test_ip_adapter(pipe, generate, ip_adapter, first):
    image, original = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}, generate(pipe, **EIGHT)

    def load():
        pipe.load_ip_adapter(ip_adapter, subfolder="", weight_name="", image_encoder_folder=None)

    load()
    dense = generate(pipe, **image, **EIGHT)
    if first == "DaTo":
        pipe.unload_ip_adapter()
    apply_dato(pipe, DaToConfig(prune_ratio=0.0))
    if first == "DaTo":
        load()
    assert torch.equal(generate(pipe, **image, **EIGHT), dense)
    apply_dato(pipe, DaToConfig(cache_schedule="11021", prune_cross_attention=True))
    pruned = generate(pipe, **image, **EIGHT)
    assert torch.equal(generate(pipe, **image, **EIGHT), pruned)
    assert not torch.equal(pruned, dense)
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}}
    masked = generate(pipe, **image, **EIGHT, **masks)  # laid over all the tokens, which cross-attention keeps then
    assert masked.isfinite().all()
    remove_dato(pipe)
    assert torch.equal(generate(pipe, **image, **EIGHT), dense)
    pipe.unload_ip_adapter()
    assert torch.equal(generate(pipe, **EIGHT), original)


def of_the_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def of_its_layers(pipe):
    """Hooks placed like those of sequential offloading, which works on a GPU only."""
    for module in pipe.unet.modules():
        if module is pipe.unet or [*module.parameters(recurse=False)]:
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True), append=True)


ORDERS = ["apply,offload,remove", "offload,apply,remove", "apply,offload,hooks,remove", "offload,apply,hooks,remove"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("offload", [of_the_model, of_its_layers])
def test_offloading(pipe, generate, kinds, order, offload):
    """In every order DaTo acts while it is on, and accelerate's hooks are where they are without it."""
    expected = {False: generate(pipe, **EIGHT)}
    apply_dato(pipe, SCHEDULE)
    expected[True] = generate(pipe, **EIGHT)
    remove_dato(pipe)
    applied = False
    unet = pipe.unet
    for step in order.split(","):
        hooked = {name for name, module in unet.named_modules() if hasattr(module, "_hf_hook")}
        if step == "apply":
            apply_dato(pipe, SCHEDULE)
        elif step == "offload":
            offload(pipe)
        elif step == "hooks":
            pipe.remove_all_hooks()
        else:
            remove_dato(pipe)
        applied = {"apply": True, "remove": False}.get(step, applied)
        now = {name for name, module in unet.named_modules() if hasattr(module, "_hf_hook")}
        assert now == hooked if step in ("apply", "remove") else bool(now) == (step == "offload")
        assert torch.equal(generate(pipe, **EIGHT), expected[applied]), step
        assert torch.equal(generate(pipe, **EIGHT), expected[applied]), step
    assert not any("_todo_attn_dato" in module.__dict__ for module in unet.modules())


@pytest.mark.parametrize("first", ["casting", "DaTo"])
def test_layerwise_casting(make_unet, calls, first):
    unet, plain = make_unet("sd"), make_unet("sd")
    casting = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    plain.enable_layerwise_casting(**casting)
    if first == "DaTo":
        apply_dato(unet, REPLAY)
    unet.enable_layerwise_casting(**casting)
    if first == "casting":
        apply_dato(unet, REPLAY)
    expected = calls(plain, 1, same=True)[0]
    assert replays(unet, calls, expected)
    apply_dato(unet, SCHEDULE)
    calls(unet, 6)
    remove_dato(unet)
    assert torch.equal(calls(unet, 1, same=True)[0], expected)
    hooks = [{*m._diffusers_hook.hooks} for m in unet.modules() if "_diffusers_hook" in m.__dict__]
    assert hooks == [{*m._diffusers_hook.hooks} for m in plain.modules() if "_diffusers_hook" in m.__dict__]
    assert hooks
