"""``unet.set_attn_processor(ToDoProcessor(config))``: the processor has its own configuration and keeps it."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from todo_attn import DaToConfig, ToDoConfig, ToDoProcessor, apply_dato, apply_todo, remove_dato, remove_todo
from todo_attn.diffusers.levels import self_attentions, transformers_by_level

TWO, THREE = ToDoConfig(factor=2), ToDoConfig(factor=3)
BY_LEVEL = ToDoConfig(factor={1: 3, 4: 2})


def close(actual, expected):
    return (actual - expected).abs().max() < 2e-5 * max(1, expected.abs().max())


@pytest.fixture
def applied(make_unet, call):
    """applied(config, **arguments): what apply_todo makes of the same call."""

    def applied(config, kind="sd", **arguments):
        unet = make_unet(kind)
        apply_todo(unet, config)
        return call(unet, **arguments)

    return applied


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "config",
    [
        TWO,
        ToDoConfig(max_kv_tokens=20, mode="mean"),
        ToDoConfig(factor={4: 2, "finest": 3}),
        ToDoConfig(factor={2: 2}, timestep_range=(200, 600)),
        ToDoConfig(max_kv_tokens=20, timestep_range=(600, 1000)),
    ],
    ids=["int", "auto", "levels", "range", "range-outside"],
)
def test_it_acts_as_apply_todo_does_from_the_first_call_on(make_unet, call, applied, kind, config):
    unet = make_unet(kind)
    unet.set_attn_processor(ToDoProcessor(config))
    for timestep in (500, torch.tensor(700), 500):
        for size in ((16, 16), (9, 14)):
            arguments = {"size": size, "timestep": timestep}
            assert torch.equal(call(unet, **arguments), applied(config, kind, **arguments))


def test_in_a_controlnet(make_controlnet):
    inputs = torch.randn(1, 4, 16, 16), 500, torch.randn(1, 5, 8), torch.randn(1, 3, 32, 32)
    net, expected = make_controlnet(), make_controlnet()
    apply_todo(expected, BY_LEVEL)
    net.set_attn_processor(ToDoProcessor(BY_LEVEL))
    with torch.no_grad():
        for actual, right in zip(*(n(*inputs, return_dict=False)[0] for n in (net, expected)), strict=True):
            assert torch.equal(actual, right)


def test_a_transformer_alone_has_no_levels_and_no_timestep(unet):
    transformer = copy.deepcopy(unet.down_blocks[0].attentions[0])
    attn = transformer.transformer_blocks[0].attn1
    x, text = torch.randn(1, 8, 6, 6), torch.randn(1, 5, 8)
    with torch.no_grad():
        dense = transformer(x, text)[0]
        for config, name in ((BY_LEVEL, "factor"), (ToDoConfig(timestep_range=(0, 500)), "timestep_range")):
            attn.set_processor(ToDoProcessor(config))
            with pytest.raises(ValueError, match=rf"^{name} of a ToDoProcessor .*apply_todo"):
                transformer(x, text)
        attn.set_processor(ToDoProcessor(TWO))
        assert not torch.equal(transformer(x, text)[0], dense)


def test_a_level_that_the_model_lacks_names_those_it_has(make_unet, call, hooks):
    unet = make_unet("sdxl")
    for levels, message in (({1: 2}, r"2, 4 or 'finest', got 1$"), ({"finest": 2, 2: 2}, "a level once")):
        unet.set_attn_processor(ToDoProcessor(ToDoConfig(factor=levels)))
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                call(unet)
        assert hooks(unet) == 0
    unet.set_attn_processor(ToDoProcessor(TWO))
    call(unet)


@pytest.mark.parametrize(
    ("config", "name"), [(BY_LEVEL, "factor"), (ToDoConfig(timestep_range=(0, 500)), "timestep_range")]
)
def test_a_vae_has_no_levels_and_no_timestep(pipe, config, name):
    pipe.vae.set_attn_processor(ToDoProcessor(config))
    with pytest.raises(ValueError, match=rf"^{name} of a ToDoProcessor .*apply_todo"), torch.no_grad():
        pipe.vae.decode(torch.randn(1, 4, 8, 8))


def test_in_a_vae(pipe, monkeypatch):
    reads = []
    attn = pipe.vae.decoder.mid_block.attentions[0]
    attn.to_k.register_forward_hook(lambda module, args, out: reads.append(args[0].shape[1]))
    pipe.vae.set_attn_processor(ToDoProcessor(TWO))
    with torch.no_grad():
        pipe.vae.decode(torch.randn(1, 4, 12, 10))
    assert reads == [6 * 5]


@pytest.mark.parametrize("wrong", [4096, "auto", {"factor": 2}, ToDoConfig, DaToConfig()], ids=repr)
def test_a_config_of_another_type(wrong):
    with pytest.raises(ValueError, match="config must be a ToDoConfig or None, got "):
        ToDoProcessor(wrong)


# What diffusers and users do with processors


@pytest.mark.parametrize("called", [False, True], ids=["before-the-first-call", "after"])
@pytest.mark.parametrize("config", [TWO, ToDoConfig(factor={1: 3}, timestep_range=(0, 2000))], ids=["int", "levels"])
def test_an_ip_adapter_comes_and_goes(pipe, generate, make_ip_adapter, called, config):
    adapter = make_ip_adapter(pipe.unet)
    image = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}
    reference = copy.deepcopy(pipe)
    apply_todo(reference, config)
    for p in (pipe, reference):
        p.set_progress_bar_config(disable=True)
    expected = generate(reference)
    reference.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
    with_image = generate(reference, **image)

    pipe.unet.set_attn_processor(ToDoProcessor(config))
    if called:
        assert torch.equal(generate(pipe), expected)
    pipe.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
    assert torch.equal(generate(pipe, **image), with_image)
    pipe.unload_ip_adapter()
    assert torch.equal(generate(pipe), expected)


def test_rebuilt_copied_and_pickled_it_keeps_its_configuration(unet, call, applied):
    processor = ToDoProcessor(BY_LEVEL)
    for kept in (processor.__class__(), copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert isinstance(kept, ToDoProcessor) and kept.config == BY_LEVEL
        assert type(kept) is type(processor)
        unet.set_attn_processor(kept)
        assert torch.equal(call(unet), applied(BY_LEVEL))
    assert type(processor).__name__ == "ToDoProcessor"
    assert ToDoProcessor().config is None and type(ToDoProcessor()) is ToDoProcessor
    assert not isinstance(processor, nn.Module)


def test_made_again_by_its_own_class_it_is_a_todo_processor(unet, call, applied):
    """Tools copy a processor like this, also with another configuration."""
    first = ToDoProcessor(ToDoConfig(factor=2))
    again = type(first)(ToDoConfig(factor=3))
    assert type(again) is type(ToDoProcessor(ToDoConfig(factor=3)))
    assert pickle.loads(pickle.dumps(again)).config == ToDoConfig(factor=3)
    unet.set_attn_processor(again)
    apply_todo(unet)


def test_a_subclass_may_have_arguments_of_its_own():
    class Counting(ToDoProcessor):
        def __init__(self, config=None, *, count=0):
            super().__init__(config)
            self.count = count

    processor = Counting(TWO, count=3)
    assert (processor.config, processor.count) == (TWO, 3)
    assert isinstance(processor, Counting)


def test_one_serves_several_models(make_unet, call, applied):
    processor = ToDoProcessor(BY_LEVEL)
    unets = [make_unet(), make_unet()]
    for unet in unets:
        unet.set_attn_processor(processor)
    for size in ((16, 16), (8, 12)):
        for unet in unets:
            assert torch.equal(call(unet, size), applied(BY_LEVEL, size=size))


@pytest.mark.parametrize("first", [ToDoProcessor(TWO), ToDoProcessor(), "apply_todo"], ids=repr)
def test_another_configuration_replaces_the_first(unet, call, applied, hooks, first):
    before = dict(unet.attn_processors)
    if first == "apply_todo":
        apply_todo(unet, TWO)
    else:
        unet.set_attn_processor(first)
    call(unet)
    hooked = hooks(unet)
    for config in (THREE, BY_LEVEL, ToDoConfig(factor=2, timestep_range=(0, 600)), ToDoConfig(factor=3, mode="mean")):
        unet.set_attn_processor(ToDoProcessor(config))
        for timestep in (500, 700):
            assert torch.equal(call(unet, timestep=timestep), applied(config, timestep=timestep)), config
    assert hooks(unet) == hooked + 1  # the one that reads the timestep
    remove_todo(unet)
    assert hooks(unet) == 0
    after = unet.attn_processors
    assert not any(isinstance(p, ToDoProcessor) for p in after.values())
    if first == "apply_todo":
        assert all(after[name] is before[name] for name in before if ".attn1." in name)


def test_a_refused_configuration_leaves_the_one_before(unet, call, applied):
    unet.set_attn_processor(ToDoProcessor(TWO))
    call(unet)
    unet.set_attn_processor(ToDoProcessor(ToDoConfig(factor={3: 2})))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1, 2, 4 or 'finest', got 3$"):
            call(unet)
    unet.set_attn_processor(ToDoProcessor(THREE))
    assert torch.equal(call(unet), applied(THREE))


def test_without_arguments_it_is_what_the_model_says_again(unet, call, applied):
    apply_todo(unet, TWO)
    unet.set_attn_processor(ToDoProcessor(THREE))
    assert torch.equal(call(unet), applied(THREE))
    unet.set_attn_processor(ToDoProcessor())
    assert torch.equal(call(unet), applied(TWO))


def test_apply_todo_after_takes_over(unet, call, applied, hooks):
    unet.set_attn_processor(ToDoProcessor(ToDoConfig(factor=3, timestep_range=(0, 900))))
    call(unet)
    apply_todo(unet, BY_LEVEL)
    assert torch.equal(call(unet), applied(BY_LEVEL))
    remove_todo(unet)
    assert hooks(unet) == 0
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


def test_configurations_by_layer(unet, call, reference):
    levels = {attn: level for level, t in transformers_by_level(unet) for attn in self_attentions(t)}
    for attn, level in levels.items():
        attn.set_processor(ToDoProcessor({1: TWO, 2: THREE}.get(level)))
    actual = [call(unet), call(unet)]
    remove_todo(unet)
    with reference(unet, (16, 16), {1: 2, 2: 3}):
        expected = call(unet)
    assert all(close(a, expected) for a in actual)


def test_two_configurations_in_one_transformer_are_refused(make_unet, call):
    unet = make_unet("sdxl")
    apply_todo(unet, TWO)
    blocks = next(t.transformer_blocks for _, t in transformers_by_level(unet) if len(t.transformer_blocks) == 2)
    blocks[1].attn1.set_processor(ToDoProcessor(THREE))
    with pytest.raises(ValueError, match="config of a ToDoProcessor must be the same in all blocks"):
        call(unet)
    blocks[1].attn1.set_processor(ToDoProcessor(ToDoConfig(factor=2)))
    call(unet)


# Beside the rest


def test_under_dato(make_unet, call):
    def run(unet):
        return [call(unet, timestep=timestep) for timestep in (900, 500, 100)]

    expected, unet = make_unet(), make_unet()
    apply_todo(expected, BY_LEVEL)
    unet.set_attn_processor(ToDoProcessor(BY_LEVEL))
    for model in (expected, unet):
        apply_dato(model, DaToConfig(cache_schedule="12"))
    for actual, right in zip(run(unet), run(expected), strict=True):
        assert close(actual, right)
    remove_dato(unet)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_after_a_call_and_with_another_configuration(make_unet, call):
    def expected(config, **arguments):
        other = make_unet("small")
        apply_todo(other, config)
        return call(other, **arguments)

    unet = make_unet("small")
    graphs = torch._dynamo.testing.CompileCounter()
    narrow = ToDoConfig(factor={1: 2}, timestep_range=(0, 600))
    unet.set_attn_processor(ToDoProcessor(narrow))
    call(unet)
    compiled = torch.compile(unet, fullgraph=True, backend=graphs)
    for timestep in (500, 700, 500, 700):
        assert close(call(compiled, timestep=timestep), expected(narrow, timestep=timestep))
    assert graphs.frame_count == 2
    unet.set_attn_processor(ToDoProcessor(THREE))
    for _ in range(3):
        assert close(call(compiled), expected(THREE))
    assert graphs.frame_count <= 4
