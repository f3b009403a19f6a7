"""The benchmarked UNets are the real ones in size, and random weights behave."""

import pytest
import torch

from benchmarks import models
from todo_attn.models import unets
from todo_attn.predict.timing import random_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "millions"), [("sd15", 859.5), ("sdxl", 2567.5)])
def test_parameter_count(name, millions):
    unet = unets.on_meta(models.CONFIGS[name])
    assert sum(parameter.numel() for parameter in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(("name", "levels"), [("sd15", [40, 80, 160]), ("sdxl", [64])])
def test_head_dims(name, levels):
    layers = [module for key, module in unets.on_meta(models.CONFIGS[name]).named_modules() if key.endswith("attn1")]
    assert sorted({layer.inner_dim // layer.heads for layer in layers}) == levels
    assert len(layers) == {"sd15": 16, "sdxl": 70}[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_weights_keep_activations_in_range(dtype):
    unet = unets.with_random_weights(models.CONFIGS["tiny"], CPU, dtype)
    assert all(parameter.dtype == dtype and parameter.count_nonzero() for parameter in unet.parameters())
    with torch.inference_mode():
        output = unet(timestep=500, **random_inputs(unet, 2, 8, 12), return_dict=False)[0]
    assert output.shape == (2, 4, 8, 12)
    assert output.isfinite().all()
    assert 0.1 < output.float().std() < 10


def test_the_same_seed_draws_the_same_weights():
    drawn = [unets.with_random_weights(models.CONFIGS["tiny"], CPU, torch.float32, seed) for seed in (0, 0, 1)]
    first, second, other = (unet.conv_in.weight for unet in drawn)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_twin_shares_the_weights_and_nothing_else():
    unet = unets.with_random_weights(models.CONFIGS["tiny"], CPU, torch.float32)
    twin = unets.twin(unet)
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in unet.parameters()]
    processors = dict(unet.attn_processors)
    twin.set_attn_processor(object())
    twin.register_forward_pre_hook(pytest.fail)
    assert unet.attn_processors == processors
    assert not unet._forward_pre_hooks
    assert not {id(module) for module in unet.modules()} & {id(module) for module in twin.modules()}


def test_sdxl_inputs_carry_its_added_conditions():
    added = {key: value for key, value in models.CONFIGS["sdxl"].items() if "addition" in key or "projection" in key}
    unet = unets.with_random_weights(models.CONFIGS["tiny"] | added, CPU, torch.float32)
    with torch.inference_mode():
        output = unet(timestep=500, **random_inputs(unet, 2, 8, 8), return_dict=False)[0]
    assert output.isfinite().all()


def test_timesteps_fall_evenly_from_the_first():
    assert models.timesteps(CPU, 1).tolist() == [999]
    assert models.timesteps(CPU, 4).tolist() == [999, 749, 499, 249]
    assert models.timesteps(CPU, 1000).tolist() == [*range(999, -1, -1)]


@pytest.mark.parametrize("calls", [0, 1001])
def test_a_run_has_no_more_calls_than_there_are_timesteps(calls):
    with pytest.raises(ValueError, match=f"calls must be from 1 to 1000, got {calls}"):
        models.timesteps(CPU, calls)
