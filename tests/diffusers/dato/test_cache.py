"""What full, shallow and reuse calls compute on whole UNets, compared with layers run by hand."""

import pytest
import torch

from todo_attn.config.dato import DaToConfig
from todo_attn.diffusers.dato import apply_dato

SIZES = [(8, 8), (8, 12), (15, 9)]
UNETS = ["sd", "sdxl", "deep", "small"]


def cached(digits, **options):
    return DaToConfig(prune_ratio=0.0, cache_schedule=digits, **options)


@torch.no_grad()
def hidden_of(unet, given, timestep):
    """What enters the last resnet of a dense call, without the skip connection."""
    seen = []
    last = unet.up_blocks[-1].resnets[-1]
    handle = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    unet(given.sample, timestep, **given.kwargs)
    handle.remove()
    return seen[0][:, : -unet.config.block_out_channels[0]]


@torch.no_grad()
def shallow_by_hand(unet, hidden, given, timestep):
    times = torch.full((len(given.sample),), timestep)
    emb = unet.time_embedding(unet.time_proj(times))
    if "added_cond_kwargs" in given.kwargs:
        added = given.kwargs["added_cond_kwargs"]
        ids = unet.add_time_proj(added["time_ids"].flatten()).reshape(len(times), -1)
        emb = emb + unet.add_embedding(torch.cat((added["text_embeds"], ids), -1))
    block = unet.up_blocks[-1]
    x = block.resnets[-1](torch.cat((hidden, unet.conv_in(given.sample)), 1), emb)
    if hasattr(block, "attentions"):
        x = block.attentions[-1](x, given.kwargs["encoder_hidden_states"]).sample
    return unet.conv_out(torch.nn.functional.silu(unet.conv_norm_out(x)))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", UNETS)
def test_a_shallow_call_is_the_last_layers_on_the_hidden_state(any_unet, inputs, kind, size, batch):
    dense, unet = any_unet(kind), any_unet(kind)
    apply_dato(unet, cached("1121"))
    hidden = None
    with torch.no_grad():
        # Other samples, texts and timesteps than the full call's.
        for i, (digit, timestep) in enumerate(zip("21121", torch.arange(900, 400, -100), strict=True)):
            given = inputs(unet, size, batch, seed=i)
            actual = unet(given.sample, timestep, **given.kwargs).sample
            if digit == "2":
                hidden = hidden_of(dense, given, timestep)
                assert torch.equal(actual, dense(given.sample, timestep, **given.kwargs).sample)
            else:
                expected = shallow_by_hand(dense, hidden, given, timestep)
                assert (actual - expected).abs().max() < 1e-5
                assert (actual - dense(given.sample, timestep, **given.kwargs).sample).abs().max() > 1e-3


@pytest.mark.parametrize("kind", UNETS)
def test_full_calls_with_nothing_pruned_are_dense(any_unet, calls, kind):
    dense, unet = any_unet(kind), any_unet(kind)
    apply_dato(unet, cached("2222"))
    assert all(map(torch.equal, calls(unet, 5), calls(dense, 5)))


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_reusing_call_returns_the_output_before(make_unet, inputs, return_dict):
    unet = make_unet("sd")
    apply_dato(unet, cached("001000"))
    expected = None
    with torch.no_grad():
        for i, (digit, timestep) in enumerate(zip("2001000", torch.arange(900, 200, -100), strict=True)):
            given = inputs(unet, seed=i)
            output = unet(given.sample, timestep, **given.kwargs, return_dict=return_dict)[0]
            if digit != "0":
                assert expected is None or not torch.equal(output, expected)
                expected = output.clone()
            assert torch.equal(output, expected)
            output.mul_(7)  # as a scheduler might, which is given this tensor


def test_what_a_reusing_call_returns_has_the_same_type(make_unet, inputs):
    unet = make_unet("sd")
    apply_dato(unet, cached("0"))
    given = inputs(unet)
    first, second = torch.tensor([900, 800])
    with torch.no_grad():
        full = unet(given.sample, first, **given.kwargs)
        reused = unet(given.sample, second, **given.kwargs)
    assert type(reused) is type(full)
    assert torch.equal(reused.sample, full.sample)
    assert torch.equal(reused["sample"], full["sample"])


SCHEDULES = [
    "1", "0", "2", "1111111", "0000000", "2222", "2101201", "0121", "1200112", "11110110110112100011",
]  # fmt: skip


@pytest.mark.parametrize("digits", SCHEDULES)
@pytest.mark.parametrize("kind", ["small", "sdxl", "deep"])
def test_the_blocks_that_run_are_those_of_the_schedule(any_unet, calls, kinds, kind, digits):
    unet = any_unet(kind)
    log = kinds(unet)
    apply_dato(unet, DaToConfig(cache_schedule=digits))
    calls(unet, len(digits) + 1, size=(8, 8), batch=1)
    assert "".join(log) == "2" + digits


def test_the_mid_block_and_conv_in(make_unet, calls):
    """No part of them runs: the mid block runs in full calls only, conv_in in every call."""
    unet, ran = make_unet("sd"), []
    for name in ("conv_in", "mid_block.attentions.0.norm", "mid_block.resnets.1.conv1"):
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    apply_dato(unet, cached("1021"))
    calls(unet, 5)
    assert ran.count("mid_block.attentions.0.norm") == ran.count("mid_block.resnets.1.conv1") == 2
    assert ran.count("conv_in") == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(make_unet, inputs, dtype):
    unet = make_unet("sd").to(dtype)
    dense = make_unet("sd").to(dtype)
    apply_dato(unet, DaToConfig(cache_schedule="1021"))
    with torch.no_grad():
        given = inputs(unet)
        text = given.kwargs["encoder_hidden_states"].to(dtype)
        for i, timestep in enumerate(torch.arange(900, 895, -1)):
            given = inputs(unet, seed=i)
            output = unet(given.sample.to(dtype), timestep, text).sample
            assert output.dtype == dtype
            assert output.isfinite().all()
        apply_dato(unet, cached("111"))
        for timestep in torch.full((4,), 900):  # the same inputs again: what is cached is what would have been computed
            replay = unet(given.sample.to(dtype), timestep, text).sample
            assert torch.equal(replay, dense(given.sample.to(dtype), timestep, text).sample)


def test_without_no_grad(make_unet, inputs):
    """Gradients reach what a call computes, and nothing that was kept from another call."""
    unet = make_unet("sd")
    apply_dato(unet, DaToConfig(cache_schedule="1"))
    given = inputs(unet)
    first, second = torch.tensor([900, 800])
    unet(given.sample, first, **given.kwargs)
    unet(given.sample, second, **given.kwargs).sample.sum().backward()
    assert unet.up_blocks[-1].resnets[-1].conv1.weight.grad is not None
    assert unet.mid_block.resnets[0].conv1.weight.grad is None
