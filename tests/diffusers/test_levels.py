"""The self-attentions of a model and their levels, in real architectures (on the meta device) and unusual ones."""

from collections import Counter

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel

from todo_attn import ToDoConfig, apply_todo
from todo_attn.diffusers.levels import self_attentions, transformers_by_level

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: UNet2DConditionModel(**SD15), {1: 5, 2: 5, 4: 5, 8: 1}),
        (lambda: UNet2DConditionModel(**SDXL, **UP), {2: 2 * 2 + 3 * 2, 4: 2 * 10 + 10 + 3 * 10}),
        (lambda: ControlNetModel(**SD15), {1: 2, 2: 2, 4: 2, 8: 1}),
        (lambda: ControlNetModel(**SDXL), {2: 2 * 2, 4: 2 * 10 + 10}),
    ],
    ids=["SD1.5", "SDXL", "SD1.5-ControlNet", "SDXL-ControlNet"],
)
def test_the_real_architectures(make, layers):
    with torch.device("meta"):
        model = make()
    count: Counter = Counter()
    for level, transformer in transformers_by_level(model):
        count[level] += len(self_attentions(transformer))
    assert count == layers


@pytest.mark.parametrize("size", [(13, 9), (10, 12)], ids=str)
def test_the_grid_is_measured_where_downsamplers_round_down(make_unet, call, caplog, size):
    """With downsample_padding=0 a stride-2 convolution takes 13 x 9 to 6 x 4, not to 7 x 5."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**make_unet("small").config, "downsample_padding": 0}).eval()
    reads = {}
    for name, module in unet.named_modules():
        if name.endswith("attn1.to_k"):
            module.register_forward_hook(lambda m, args, out, name=name: reads.update({name[:3]: args[0].shape[1]}))
    apply_todo(unet, ToDoConfig(factor=2))
    call(unet, size)
    assert reads == {"dow": (size[0] // 2) * (size[1] // 2), "mid": (size[0] // 2 // 2) * (size[1] // 2 // 2)}
    assert not caplog.records


def test_controlnet_xs_holds_two_models_layers(make_unet):
    unet = UNet2DConditionModel.from_config({**make_unet("sd").config, "layers_per_block": 2})
    adapter = ControlNetXSAdapter.from_unet(unet, size_ratio=1.0, conditioning_embedding_out_channels=(4, 8))
    both = UNetControlNetXSModel.from_unet(unet, adapter)
    assert sorted({level for level, _ in transformers_by_level(both)}) == [1, 2, 4]
