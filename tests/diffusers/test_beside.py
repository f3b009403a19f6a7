"""ToDo with diffusers' own methods that set processors, in every order; and copies of models under ToDo."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import (
    AttnAddedKVProcessor,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)

from todo_attn import DaToConfig, ToDoConfig, ToDoProcessor, apply_dato, apply_todo, remove_dato, remove_todo

CONFIG = ToDoConfig(factor=2)


def kinds(model):
    return {type(processor) for processor in model.attn_processors.values()}


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "todo_attn"]


# set_default_attn_processor


@pytest.mark.parametrize("factor", [1, 2])
def test_diffusers_default_processors_take_todo_off(make_unet, call, hooks, caplog, factor):
    unet, plain = make_unet(), make_unet()
    apply_todo(unet, ToDoConfig(factor=factor, timestep_range=(0, 900)))
    call(unet)
    caplog.clear()
    for model in (unet, plain):
        model.set_default_attn_processor()
    assert kinds(unet) == kinds(plain) == {AttnProcessor}
    assert torch.equal(call(unet), call(plain))
    assert hooks(unet) == 0
    assert unet.__dict__.keys() == plain.__dict__.keys()
    remove_todo(unet)
    assert kinds(unet) == {AttnProcessor}
    assert not said(caplog)
    apply_todo(unet, CONFIG)
    remove_todo(unet)
    assert kinds(unet) == {AttnProcessor}


def test_default_processors_of_controlnets_and_after_the_bare_processor(make_controlnet, unet, call):
    net = make_controlnet()
    apply_todo(net, CONFIG)
    net.set_default_attn_processor()
    assert kinds(net) == {AttnProcessor}
    unet.set_attn_processor(ToDoProcessor())
    call(unet)
    unet.set_default_attn_processor()
    assert kinds(unet) == {AttnProcessor}


def test_default_processors_are_refused_as_without_todo_and_todo_stays(make_unet, call):
    """diffusers does not know its own fused processor as one that can be replaced."""
    unet = make_unet()
    unet.fuse_qkv_projections()
    apply_todo(unet, CONFIG)
    expected, before = call(unet), dict(unet.attn_processors)
    with pytest.raises(ValueError, match=r"set_default_attn_processor.*FusedAttnProcessor2_0"):
        unet.set_default_attn_processor()
    assert all(unet.attn_processors[name] is before[name] for name in before)
    assert torch.equal(call(unet), expected)
    remove_todo(unet)
    assert kinds(unet) == {FusedAttnProcessor2_0}


def test_where_diffusers_refuses_a_bare_processor_its_error_names_the_way_out():
    """ToDo does not hook a VAE, nor a model with added keys and values, which has another default processor."""
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4)
    vae.set_attn_processor(ToDoProcessor(CONFIG))
    with pytest.raises(ValueError, match=r"todo_attn\.remove_todo\(model\)"):
        vae.set_default_attn_processor()
    remove_todo(vae)
    vae.set_default_attn_processor()
    assert kinds(vae) == {AttnProcessor}


def test_added_keys_and_values_keep_their_own_default(make_unet):
    unet = make_unet()
    unet.set_attn_processor(AttnAddedKVProcessor())
    unet.set_default_attn_processor()
    assert kinds(unet) == {AttnAddedKVProcessor}


def test_default_processors_under_dato_with_todo(pipe, generate, hooks):
    before, dense = hooks(pipe.unet), generate(pipe)
    apply_dato(pipe, DaToConfig(prune_ratio=0.0, todo=CONFIG))
    pipe.unet.set_default_attn_processor()
    assert (generate(pipe) - dense).abs().max() < 1e-4
    remove_dato(pipe)
    assert hooks(pipe.unet) == before


def test_a_model_under_todo_is_freed_with_its_last_reference(make_unet, call):
    gc.collect()
    gc.disable()
    try:
        unet = make_unet()
        apply_todo(unet, CONFIG)
        call(unet)
        freed = weakref.ref(unet)
        del unet
        assert freed() is None
    finally:
        gc.enable()


# fuse_qkv_projections


@pytest.mark.parametrize(
    "order",
    [
        "apply,fuse,remove,unfuse",
        "fuse,apply,remove,unfuse",
        "fuse,apply,unfuse,remove",
        "apply,fuse,unfuse,remove",
        "apply,fuse,apply,remove,unfuse",
        "apply,fuse,apply,unfuse,remove",
    ],
)
def test_fusing_and_removing_in_any_order_gives_back_what_was_there(pipe, unet, call, hooks, order):
    before, dense = dict(unet.attn_processors), call(unet)
    pipe.fusing_unet = False
    for step in order.split(","):
        {
            "apply": lambda: apply_todo(pipe, CONFIG),
            "remove": lambda: remove_todo(pipe),
            "fuse": lambda: pipe.fuse_qkv_projections(vae=False),
            "unfuse": lambda: pipe.unfuse_qkv_projections(vae=False),
        }[step]()
        call(unet)
    assert all(unet.attn_processors[name] is before[name] for name in before)
    assert torch.equal(call(unet), dense)
    assert hooks(unet) == 0


def test_unfusing_brings_todo_back_where_it_was_not_removed(unet, call):
    apply_todo(unet, CONFIG)
    expected = call(unet)
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    assert torch.equal(call(unet), expected)


# What takes ToDo off


def slicing(pipe):
    pipe.enable_attention_slicing(1)


def slicing_on_and_off(pipe):
    pipe.enable_attention_slicing(1)
    pipe.disable_attention_slicing()


def custom_diffusion(pipe):
    pipe.unet.set_attn_processor(
        {
            name: CustomDiffusionAttnProcessor2_0(
                train_kv=False, train_q_out=False, hidden_size=8, cross_attention_dim=8
            )
            for name in pipe.unet.attn_processors
        }
    )


@pytest.mark.parametrize(
    ("by", "processor"),
    [
        (slicing, SlicedAttnProcessor),
        (slicing_on_and_off, AttnProcessor2_0),
        (custom_diffusion, CustomDiffusionAttnProcessor2_0),
        (lambda pipe: pipe.fuse_qkv_projections(vae=False), FusedAttnProcessor2_0),
    ],
    ids=["slicing", "slicing-on-and-off", "CustomDiffusion", "fused"],
)
@pytest.mark.parametrize("bare", [False, True], ids=["apply_todo", "bare"])
def test_what_takes_todo_off_is_said_once(pipe, unet, call, caplog, by, processor, bare):
    dense = call(unet)
    if bare:
        unet.set_attn_processor(ToDoProcessor(CONFIG))
    else:
        apply_todo(pipe, CONFIG)
    todo = call(unet)
    assert not said(caplog)
    by(pipe)
    for _ in range(2):
        assert (call(unet) - dense).abs().max() < 1e-5
    (message,) = said(caplog)
    assert processor.__name__ in message and "call apply_todo after" in message
    if processor is not CustomDiffusionAttnProcessor2_0:  # which may have weights
        apply_todo(pipe, CONFIG)
        assert (call(unet) - todo).abs().max() < 1e-5
        assert len(said(caplog)) == 1


def test_giving_back_what_was_there_needs_no_word(unet, call, caplog):
    before = dict(unet.attn_processors)
    apply_todo(unet, CONFIG)
    call(unet)
    unet.set_attn_processor(dict(before))
    call(unet)
    assert not said(caplog)


# Copies


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("config", [CONFIG, ToDoConfig(factor={"finest": 3}, timestep_range=(0, 600))], ids=str)
@pytest.mark.parametrize("bare", [False, True], ids=["apply_todo", "bare"])
def test_a_copy_of_a_unet_acts_alone(make_unet, call, hooks, copied, config, bare):
    unet, dense = make_unet(), call(make_unet())
    if bare:
        unet.set_attn_processor(ToDoProcessor(config))
    else:
        apply_todo(unet, config)
    for twin in (copied(unet), copied(unet) if call(unet) is not None else None):
        expected, hooked = call(unet), hooks(unet)
        assert torch.equal(call(twin), expected)
        assert not torch.equal(expected, dense)
        assert torch.equal(call(twin, timestep=700), call(unet, timestep=700))
        twin.set_default_attn_processor()
        assert kinds(twin) == {AttnProcessor}
        assert hooks(twin) == 0 and hooks(unet) == hooked
        assert torch.equal(call(unet), expected)


def test_a_deep_copy_of_a_pipeline_acts_alone(pipe, generate, hooks):
    dense = generate(pipe)
    apply_todo(pipe, CONFIG)
    expected = generate(pipe)
    twin = copy.deepcopy(pipe)
    remove_todo(pipe)
    assert hooks(twin.unet) > hooks(pipe.unet) == 0
    assert torch.equal(generate(twin), expected)
    assert torch.equal(generate(pipe), dense)
    remove_todo(twin)
    assert torch.equal(generate(twin), dense)


def test_another_pipeline_with_the_same_unet_keeps_todo(pipe, generate):
    apply_todo(pipe, CONFIG)
    expected = generate(pipe)
    other = StableDiffusionPipeline.from_pipe(pipe, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate(other), expected)
