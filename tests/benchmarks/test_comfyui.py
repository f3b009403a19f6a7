"""The run in a real ComfyUI, as far as it goes without one."""

import pytest
from diffusers import UNet2DConditionModel
from fixtures.comfyui import PACK

from benchmarks.comfyui.checkpoint import STRUCTURES, write_config
from benchmarks.comfyui.workflow import DATO, DATO_INPUTS, SAMPLER, TODO, TODO_INPUTS, Task, workflow
from todo_attn.diffusers.levels import transformers_by_level
from todo_attn.models.unets import on_meta


@pytest.mark.parametrize(("name", "levels"), [("sd15", {1, 2, 4, 8}), ("sd15-small", {1, 2, 4, 8})])
def test_structures_of_stable_diffusion(name, levels):
    assert {level for level, _ in transformers_by_level(on_meta(STRUCTURES[name].diffusers))} == levels


@pytest.mark.parametrize("name", ["sdxl", "sdxl-small"])
def test_structures_of_sdxl(name):
    unet = on_meta(STRUCTURES[name].diffusers)
    depths = {level: len(transformer.transformer_blocks) for level, transformer in transformers_by_level(unet)}
    assert depths == dict(zip((2, 4), STRUCTURES[name].diffusers["transformer_layers_per_block"][1:], strict=True))


def test_the_configuration_is_where_diffusers_looks(tmp_path):
    folder = write_config(STRUCTURES["sd15"], tmp_path)
    assert UNet2DConditionModel.load_config(folder, subfolder="unet")["cross_attention_dim"] == 768


def test_nodes_are_chained_between_checkpoint_and_sampler():
    dense = workflow(Task("a.safetensors", 64, 96))
    both = workflow(Task("a.safetensors", 64, 96, nodes=((DATO, DATO_INPUTS), (TODO, TODO_INPUTS))))
    assert dense[SAMPLER]["inputs"]["model"] == ["load", 0]
    assert [both[name]["inputs"]["model"] for name in ("patch 0", "patch 1", SAMPLER)] == [
        ["load", 0],
        ["patch 0", 0],
        ["patch 1", 0],
    ]
    assert both["patch 1"] == {"class_type": TODO, "inputs": {"model": ["patch 0", 0], **TODO_INPUTS}}


def test_the_inputs_are_those_of_the_nodes():
    source = (PACK / "nodes.py").read_text()
    for name in (*TODO_INPUTS, *DATO_INPUTS):
        assert f'"{name}": (' in source
