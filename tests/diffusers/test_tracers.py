"""ToDo under torch.jit.trace, torch.export and in several threads."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from todo_attn import ToDoConfig, ToDoProcessor, apply_todo

CONFIGS = [ToDoConfig(factor=2), ToDoConfig(factor=3, mode="mean"), ToDoConfig(max_kv_tokens=30)]


class Wrapped(torch.nn.Module):
    """Returns a tensor, as tracers require."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, text):
        return self.unet(sample, timestep, text, return_dict=False)[0]


@pytest.fixture
def unet(make_unet):
    return make_unet("small")


def inputs(timestep):
    return torch.randn(2, 4, 12, 8), torch.tensor(timestep), torch.randn(2, 5, 8)


def jit_traced(model, given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own forward has a dozen
        return torch.jit.trace(model, given)


def exported(model, given):
    return torch.export.export(model, given, strict=False).module()


TRACERS = pytest.mark.parametrize("traced", [jit_traced, exported], ids=["jit.trace", "export"])


@TRACERS
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["apply_todo", "bare"])
def test_a_recorded_model_is_exact_on_other_inputs(unet, call, traced, config, bare):
    dense = call(unet, (12, 8))
    if bare:  # its first call tells it the grid
        unet.set_attn_processor(ToDoProcessor(config))
    else:
        apply_todo(unet, config)
    assert not torch.equal(call(unet, (12, 8)), dense)
    with torch.no_grad():
        recorded, other = traced(Wrapped(unet), inputs(500)), inputs(100)
        assert torch.equal(recorded(*other), Wrapped(unet)(*other))


@TRACERS
def test_a_narrower_range_cannot_be_recorded(unet, call, traced):
    apply_todo(unet, ToDoConfig(factor=2, timestep_range=(0, 400)))
    expected = call(unet, timestep=300)
    with (
        pytest.raises(ValueError, match=r"timestep_range must hold all of 0 to 1000 .* got \(0, 400\)"),
        torch.no_grad(),
    ):
        traced(Wrapped(unet), inputs(500))
    assert torch.equal(call(unet, timestep=300), expected)


def test_in_several_threads_each_call_follows_its_own_grid(make_unet, call):
    """Grids with the same number of tokens, so that the plan of another call would fit."""
    unet = make_unet("sdxl")
    apply_todo(unet, ToDoConfig(factor=2))
    sizes = [(8, 18), (12, 12), (18, 8), (16, 9)] * 6
    expected = {size: call(unet, size) for size in set(sizes)}
    with ThreadPoolExecutor(4) as pool:
        for size, actual in zip(sizes, pool.map(lambda size: call(unet, size), sizes), strict=True):
            assert (actual - expected[size]).abs().max() < 1e-5, size


def test_a_call_in_the_midst_of_another_leaves_its_grid(unet, call):
    """Forces what threads do by chance: another call between the making of a plan and its use."""
    apply_todo(unet, ToDoConfig(factor=2))
    expected = call(unet, (12, 8))
    running = []

    def interrupt(module, args):
        if not running:
            running.append(True)
            call(unet, (8, 12))

    for block in (unet.down_blocks[0].attentions[0].transformer_blocks[0], unet.mid_block.attentions[0]):
        for module in (block, *[m for m in block.modules() if type(m).__name__ in ("Linear", "Attention")]):
            running.clear()
            handle = module.register_forward_pre_hook(interrupt)
            assert torch.equal(call(unet, (12, 8)), expected)
            handle.remove()
