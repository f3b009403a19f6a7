"""todo_attn.status: whether ToDo is on in each self-attention, what it did in the last call, and why."""

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, UNet2DModel, UNetMotionModel
from torch import nn

import todo_attn
from todo_attn import ToDoConfig, ToDoProcessor, apply_todo, remove_todo, status

FINEST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def finest(model):
    return next(layer for layer in status(model).layers if layer.name.endswith(FINEST))


def states(model):
    return {layer.state for layer in status(model).layers}


def test_coarse_and_dense_layers_with_grid_and_factor(unet, call):
    apply_todo(unet, ToDoConfig(factor={1: 3, 4: 2}))
    assert states(unet) == {"not called yet"}
    call(unet, (16, 12))
    found = {(s.level, s.state, s.grid, s.factor, s.why) for s in status(unet).layers}
    assert found == {
        (1, "coarse", (16, 12), (3, 3), ""),
        (2, "dense", (8, 6), (1, 1), "factor 1 at this size and level"),
        (4, "coarse", (4, 3), (2, 2), ""),
    }
    call(unet, (8, 8))
    assert finest(unet).grid == (8, 8)
    apply_todo(unet, ToDoConfig(factor={1: 1.5}))
    call(unet, (16, 12))
    assert finest(unet).factor == (1.5, 1.5)
    assert " 1.5x1.5" in str(status(unet)) and " 1x1 " in str(status(unet))
    names = [name.removesuffix(".processor") for name in unet.attn_processors if "attn1" in name]
    assert sorted(layer.name for layer in status(unet).layers) == sorted(names)


def test_why_a_call_was_dense(unet, call):
    apply_todo(unet)
    call(unet)
    assert finest(unet).why == "4096 tokens or fewer"
    apply_todo(unet, ToDoConfig(factor=2, timestep_range=(0, 400)))
    call(unet, timestep=500)
    assert (finest(unet).state, finest(unet).factor) == ("dense", (1, 1))
    assert finest(unet).why == "the timestep is outside of timestep_range, 0 to 400"
    call(unet, timestep=300)
    assert finest(unet).state == "coarse"


def test_a_mask(make_unet):
    unet = make_unet("small")
    apply_todo(unet, ToDoConfig(factor={1: 2}))
    transformer = unet.down_blocks[0].attentions[0]
    x, text = torch.randn(1, 8, 8, 8), torch.randn(1, 5, 8)
    with torch.no_grad():
        transformer(x, text, attention_mask=torch.ones(1, 64))
    assert finest(unet).why == "an attention mask was given"
    with torch.no_grad():
        transformer(x, text)
    assert finest(unet).state == "coarse"


def test_tokens_that_are_merged_before(unet, call):
    apply_todo(unet, ToDoConfig(factor=2))
    attn = unet.get_submodule(FINEST)
    handle = attn.register_forward_pre_hook(lambda module, args: (args[0][:, :100], *args[1:]))
    fill = attn.register_forward_hook(lambda module, args, out: torch.cat((out, out, out), 1)[:, :256])
    with torch.no_grad():
        call(unet)
    assert finest(unet).state == "dense" and "another number of tokens" in finest(unet).why
    handle.remove(), fill.remove()
    call(unet)
    assert finest(unet).state == "coarse"


@pytest.mark.parametrize(
    ("put", "why"),
    [
        (lambda pipe: pipe.enable_attention_slicing(1), "SlicedAttnProcessor, of attention slicing, replaced"),
        (lambda pipe: pipe.fuse_qkv_projections(vae=False), "FusedAttnProcessor2_0, of fuse_qkv_projections, replaced"),
        (
            lambda pipe: (pipe.enable_attention_slicing(1), pipe.disable_attention_slicing()),
            "AttnProcessor2_0 replaced",
        ),
    ],
    ids=["slicing", "fused", "slicing-on-and-off"],
)
def test_what_took_todo_off(pipe, call, put, why):
    assert states(pipe) == {"off"}
    assert "apply_todo was not called" in finest(pipe).why
    apply_todo(pipe, ToDoConfig(factor=2))
    call(pipe.unet)
    put(pipe)
    assert states(pipe) == {"off"}
    assert finest(pipe).why.startswith(why) and "call apply_todo after it" in finest(pipe).why
    apply_todo(pipe, ToDoConfig(factor=2))
    assert states(pipe) == {"not called yet"}
    remove_todo(pipe)
    assert states(pipe) == {"off"}


def test_an_attention_whose_forward_tgate_replaced(unet, call):
    """T-GATE's forward computes attention itself, and no processor is called."""
    apply_todo(unet, ToDoConfig(factor=2))
    call(unet)
    attn1 = unet.get_submodule(FINEST)

    def forward(hidden_states, **kwargs):
        return hidden_states

    forward.__module__ = "tgate.tgate_utils"
    attn1.forward = forward
    call(unet)
    layer = finest(unet)
    assert layer.state == "off" and "T-GATE" in layer.why
    del attn1.forward
    assert finest(unet).state == "coarse"


def test_the_bare_processor(make_unet, call):
    unet = make_unet()
    unet.set_attn_processor(ToDoProcessor(ToDoConfig(factor=2)))
    assert states(unet) == {"not called yet"}
    assert "first call" in finest(unet).why
    call(unet)
    assert states(unet) == {"coarse"}


def test_a_pipeline_with_controlnets(pipe, make_controlnet, generate):
    controlled = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=[make_controlnet(0), make_controlnet(1)], requires_safety_checker=False
    )
    apply_todo(controlled, ToDoConfig(factor=2))
    generate(controlled, image=[torch.rand(1, 3, 32, 32)] * 2, height=32, width=32)
    layers = status(controlled).layers
    assert {layer.name.split(".")[0] for layer in layers} == {
        *("UNet2DConditionModel[0]", "ControlNetModel[1]", "ControlNetModel[2]")
    }
    assert {layer.state for layer in layers} == {"coarse"}


def test_a_pipeline_that_builds_another_unet_starts_without(unet):
    """AnimateDiff builds one from Stable Diffusion's: the table shows that ToDo is off there, until apply_todo."""
    apply_todo(unet, ToDoConfig(factor=2))
    motion = UNetMotionModel.from_unet2d(unet, None)
    assert states(motion) == {"off"}
    assert "apply_todo was not called" in str(status(motion))
    apply_todo(motion, ToDoConfig(factor=2))
    assert states(motion) == {"not called yet"} == states(unet)


def test_it_prints_a_table_with_equal_blocks_in_one_row(make_unet, call):
    unet = make_unet("sdxl")
    apply_todo(unet, ToDoConfig(factor={4: 2}))
    call(unet)
    text = str(status(unet))
    lines = text.splitlines()
    assert lines[0] == f"ToDo, in {len(status(unet).layers)} self-attentions: 8 coarse, 3 dense"
    assert lines[1].split() == ["self-attention", "level", "in", "the", "last", "call", "grid", "factor", "why"]
    assert "mid_block.attentions.0.transformer_blocks.0.attn1 and 1 more" in text
    assert all(line.index("4x4") == lines[1].index("grid") for line in lines if "4x4" in line)
    assert len(lines) < 2 + len(status(unet).layers)
    assert text == todo_attn.status(unet).__str__()


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model(make_unet, call):
    unet = make_unet("small")
    apply_todo(unet, ToDoConfig(factor=2))
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for size in ((8, 8), (12, 8)):
        call(compiled, size)
        assert (finest(compiled).state, finest(compiled).grid) == ("coarse", size)


def test_models_without_self_attention_over_an_image_and_what_is_no_model():
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    for nothing in (model, nn.Linear(1, 1)):
        assert status(nothing).layers == ()
        assert "no self-attention" in str(status(nothing))
    with pytest.raises(ValueError, match="pipe_or_model must be a diffusers pipeline"):
        status("unet")
