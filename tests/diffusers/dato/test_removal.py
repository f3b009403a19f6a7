"""After remove_dato the UNet is as before: bit-equal, no hook, no attribute."""

import copy

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

from todo_attn import ToDoConfig
from todo_attn.config.dato import DaToConfig
from todo_attn.diffusers.dato import apply_dato, remove_dato, reset_dato

EVERYTHING = DaToConfig(
    cache_schedule="2101", prune_cross_attention=True, prune_feed_forward=True, todo=ToDoConfig(factor=2)
)


def inside(unet):
    """Every attribute of every module, and the number of its hooks of each kind."""
    return {
        name: (set(m.__dict__), {k: len(v) for k, v in m.__dict__.items() if "hook" in k and hasattr(v, "__len__")})
        for name, m in unet.named_modules()
    }


@pytest.mark.parametrize("kind", ["sd", "sdxl", "deep", "small"])
@pytest.mark.parametrize("config", [DaToConfig(), EVERYTHING], ids=["default", "everything"])
def test_nothing_is_left(any_unet, calls, kind, config):
    unet = any_unet(kind)
    before, keys, expected = inside(unet), list(unet.state_dict()), calls(unet, 3)
    processors = dict(unet.attn_processors)
    apply_dato(unet, config)
    assert inside(unet) != before
    assert list(unet.state_dict()) == keys
    assert not all(map(torch.equal, calls(unet, 3), expected))
    remove_dato(unet)
    assert inside(unet) == before
    assert all(unet.attn_processors[name] is processors[name] for name in processors)
    assert all(map(torch.equal, calls(unet, 3), expected))
    remove_dato(unet)  # harmless
    reset_dato(unet)
    assert inside(unet) == before


def test_before_any_call(unet, calls):
    before = inside(unet)
    apply_dato(unet, EVERYTHING)
    reset_dato(unet)
    remove_dato(unet)
    assert inside(unet) == before


def test_in_the_middle_of_a_run(unet, calls):
    expected = calls(unet, 1)[0]
    apply_dato(unet, DaToConfig(cache_schedule="000"))
    calls(unet, 2)
    remove_dato(unet)
    assert torch.equal(calls(unet, 1)[0], expected)


def test_a_deep_copy_afterwards_is_on_its_own(unet, calls):
    apply_dato(unet, EVERYTHING)
    calls(unet, 2)
    remove_dato(unet)
    expected = calls(unet, 1)[0]
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for p in unet.parameters():
            p.zero_()
    assert torch.equal(calls(other, 1)[0], expected)
    apply_dato(other, DaToConfig(cache_schedule="1"))
    calls(other, 2)


def test_two_unets_do_not_know_each_other(make_unet, inputs):
    """Called in turns, each keeps its place in its own run."""
    config = DaToConfig(cache_schedule="21021")
    alone = []
    with torch.no_grad():
        for in_turns in (False, True):
            one, two = make_unet("sd"), make_unet("sd")
            apply_dato(one, config)
            apply_dato(two, DaToConfig(cache_schedule="1", seed=4))
            outputs = []
            timesteps, others = torch.arange(900, 894, -1), torch.arange(6)
            for i in range(6):
                given = inputs(one, seed=i)
                outputs.append(one(given.sample, timesteps[i], **given.kwargs).sample.clone())
                if in_turns:
                    two(given.sample, others[i], **given.kwargs)
            alone.append(outputs)
    assert all(map(torch.equal, *alone))


class Doubling(ModelHook):
    """Another package's hook on the same blocks."""

    def post_forward(self, module, output):
        return output * 2


@pytest.mark.parametrize("order", ["before", "after", "around"])
def test_hooks_of_others_stay(unet, calls, order):
    def put(name="other"):
        HookRegistry.check_if_exists_or_initialize(unet.mid_block).register_hook(Doubling(), name)

    plain = calls(unet, 1)[0]
    put()
    expected = calls(unet, 1)[0]
    assert not torch.equal(expected, plain)
    if order != "before":
        unet.mid_block._diffusers_hook.remove_hook("other")
    apply_dato(unet, DaToConfig(prune_ratio=0.0))
    if order == "after":
        put()
    if order == "around":
        put("first")
        remove_dato(unet)
        apply_dato(unet, DaToConfig(prune_ratio=0.0))
    assert torch.equal(calls(unet, 1)[0], expected)
    remove_dato(unet)
    assert list(unet.mid_block._diffusers_hook.hooks) == ["first" if order == "around" else "other"]
    assert torch.equal(calls(unet, 1)[0], expected)
    assert "_diffusers_hook" not in unet.down_blocks[0].__dict__
