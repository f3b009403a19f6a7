"""Whole UNets with apply_todo against ToDo written independently (conftest.py), and against the dense model."""

import pytest
import torch

from todo_attn import ToDoConfig, apply_todo, remove_todo

SIZES = [(16, 16), (10, 22), (13, 9), (1, 7)]


def _id(size):
    return f"{size[0]}x{size[1]}"


@pytest.mark.parametrize("size", SIZES, ids=_id)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("kind", "levels"), [("sd", (1, 2, 4)), ("sdxl", (2, 4))])
def test_equals_the_reference(make_unet, call, reference, kind, levels, batch, size):
    unet = make_unet(kind)
    dense = call(unet, size, batch)
    with reference(unet, size, dict.fromkeys(levels, 2)):
        expected = call(unet, size, batch)
    apply_todo(unet, ToDoConfig(factor=2))
    actual = call(unet, size, batch)
    assert (actual - expected).abs().max() < 1e-5
    assert (actual - dense).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
@pytest.mark.parametrize(
    ("kind", "factor", "factors"),
    [
        ("sd", {1: 3}, {1: 3}),
        ("sd", {2: 2}, {2: 2}),
        ("sd", {1: 4, 2: 2, 4: 3}, {1: 4, 2: 2, 4: 3}),
        ("sd", {"finest": 3, 4: 2}, {1: 3, 4: 2}),
        ("sdxl", {"finest": 3}, {2: 3}),
        ("sdxl", {4: 2}, {4: 2}),
        ("sd", 5, {1: 5, 2: 5, 4: 5}),
        ("sd", 1.5, {1: 1.5, 2: 1.5, 4: 1.5}),
        ("sdxl", {2: 2.75, 4: 1.2}, {2: 2.75, 4: 1.2}),
    ],
    ids=str,
)
def test_factors_by_level_and_modes(make_unet, call, reference, kind, factor, factors, mode):
    unet, size = make_unet(kind), (13, 22)
    dense = call(unet, size)
    with reference(unet, size, factors, mode):
        expected = call(unet, size)
    apply_todo(unet, ToDoConfig(factor=factor, mode=mode))
    actual = call(unet, size)
    assert (actual - expected).abs().max() < 1e-5
    assert (actual - dense).abs().max() > 1e-4


@pytest.mark.parametrize(("kind", "factors"), [("sd", {1: 3, 2: 2, 4: 1}), ("sdxl", {2: 2, 4: 1})])
def test_auto_caps_the_keys_of_every_level_by_its_grid(make_unet, call, reference, kind, factors):
    """16 x 24 latents under 40 keys: 384 tokens / 9 (5 x 8), 96 / 4 (4 x 6), 24. SDXL goes by the same rule."""
    unet, size = make_unet(kind), (16, 24)
    with reference(unet, size, factors):
        expected = call(unet, size)
    apply_todo(unet, ToDoConfig(max_kv_tokens=40))
    assert (call(unet, size) - expected).abs().max() < 1e-5


def test_one_model_at_changing_sizes(unet, call, reference):
    """The grid is that of the running call: 8 x 18 and 12 x 12 have the same number of tokens."""
    apply_todo(unet, ToDoConfig(factor=2))
    for size in [(8, 18), (12, 12), (18, 8), (9, 7), (8, 18)]:
        actual = call(unet, size)
        with reference(unet, size, {1: 2, 2: 2, 4: 2}):
            assert (actual - call(unet, size)).abs().max() < 1e-5, size


@pytest.mark.parametrize("size", SIZES, ids=_id)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_factor_one_is_bit_equal_to_dense(make_unet, call, kind, size):
    unet = make_unet(kind)
    dense = call(unet, size)
    apply_todo(unet, ToDoConfig(factor=1))
    assert torch.equal(call(unet, size), dense)
    remove_todo(unet)
    assert torch.equal(call(unet, size), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(unet, call, reference, dtype):
    size = (12, 10)
    dense = call(unet, size)
    with reference(unet, size, {1: 2, 2: 2, 4: 2}):
        expected = call(unet, size)

    def close(actual):
        """Much closer to ToDo in fp32 than the dense model is."""
        return (actual.float() - expected).norm() < 0.25 * (dense - expected).norm()

    apply_todo(unet, ToDoConfig(factor=2))
    with torch.autocast("cpu", dtype=dtype):
        assert close(call(unet, size))
    unet.to(dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        sample, text = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 5, 8, generator=generator)
        half = unet(sample.to(dtype), 500, text.to(dtype)).sample
    assert half.dtype == dtype
    assert close(half)


def _gradients(unet, size):
    unet.zero_grad()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, *size, generator=generator).requires_grad_()
    text = torch.randn(2, 5, 8, generator=generator)
    unet(sample, 500, text).sample.square().mean().backward()
    return {"sample": sample.grad, **{n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("mode", ["nearest", "mean"])
def test_gradients_in_training(unet, reference, mode, checkpointing):
    size = (9, 12)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with reference(unet, size, {1: 2, 2: 2, 4: 2}, mode):
        expected = _gradients(unet, size)
    apply_todo(unet, ToDoConfig(factor=2, mode=mode))
    actual = _gradients(unet, size)
    assert actual.keys() == expected.keys()
    assert any("attn1.to_k" in name for name in actual)
    for name, grad in expected.items():
        assert (actual[name] - grad).abs().max() < 1e-5 * max(1, grad.abs().max()), name


@pytest.mark.parametrize(
    "calls",
    [[((8, 18), 500), ((18, 8), 500)], [((8, 18), 500), ((8, 12), 500)], [((8, 8), 300), ((8, 8), 700)]],
    ids=str,
)
def test_checkpointing_recomputes_each_call_as_it_was(make_unet, calls):
    """Several calls before one backward: other sizes (with the same number of tokens or not), other timesteps."""

    def gradients(unet):
        generator = torch.Generator().manual_seed(0)
        loss = torch.zeros(())
        for size, timestep in calls:
            sample, text = torch.randn(2, 4, *size, generator=generator), torch.randn(2, 5, 8, generator=generator)
            loss = loss + unet(sample, timestep, text).sample.square().mean()
        loss.backward()
        return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}

    plain, checkpointing = make_unet().train(), make_unet().train()
    checkpointing.enable_gradient_checkpointing()
    for unet in (plain, checkpointing):
        apply_todo(unet, ToDoConfig(factor=2, timestep_range=(0, 600)))
    expected, actual = gradients(plain), gradients(checkpointing)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert (actual[name] - grad).abs().max() < 1e-5 * max(1, grad.abs().max()), name


def test_keys_and_values_are_taken_before_their_projections(unet, call):
    tokens = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v")):
            module.register_forward_hook(lambda m, args, out, name=name: tokens.update({name: args[0].shape[1]}))
    apply_todo(unet, ToDoConfig(factor=2))
    call(unet, (16, 12))
    assert tokens["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"] == 16 * 12
    assert tokens["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"] == 8 * 6
    assert tokens["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"] == 8 * 6
    assert tokens["mid_block.attentions.0.transformer_blocks.0.attn1.to_k"] == 2 * 1
