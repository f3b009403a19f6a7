"""What apply_dato refuses, and that the model is unchanged then."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import tomesd
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import MultiControlNetModel, UNet2DModel

from todo_attn import ToDoConfig, ToDoProcessor, apply_todo
from todo_attn.config.dato import DaToConfig
from todo_attn.diffusers.dato import apply_dato, remove_dato, reset_dato

TODO = ToDoConfig(factor=2)


def state(module):
    """Everything that hooks and patches leave on a module or in it."""
    return [
        (
            *(m, type(m), set(m.__dict__), m.__dict__.get("forward"), getattr(m, "processor", None)),
            *(len(m._forward_pre_hooks), len(m._forward_hooks)),
        )
        for m in module.modules()
    ]


NO_UNETS = {
    "a pipeline without one": lambda: SimpleNamespace(transformer=torch.nn.Linear(1, 1)),
    "another module": lambda: torch.nn.Linear(1, 1),
    "another UNet": lambda: UNet2DModel(
        sample_size=8, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    ),
    "nothing": lambda: None,
}  # fmt: skip


@pytest.mark.parametrize("what", NO_UNETS)
@pytest.mark.parametrize("function", [apply_dato, remove_dato, reset_dato])
def test_no_unet(what, function):
    given = NO_UNETS[what]()
    before = state(given) if isinstance(given, torch.nn.Module) else None
    with pytest.raises(ValueError, match=rf"pipe_or_unet must be .* got {type(given).__name__}"):
        function(given)
    assert before is None or state(given) == before


def test_no_self_attention(unet):
    blocks = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
    convolutions = type(unet).from_config({**unet.config, **blocks})
    convolutions.mid_block = None
    before = state(convolutions)
    with pytest.raises(ValueError, match="pipe_or_unet must have self-attention"):
        apply_dato(convolutions)
    assert state(convolutions) == before


@pytest.mark.parametrize("config", [{"prune_ratio": 0.4}, ToDoConfig(), 0.4])
def test_no_configuration(unet, config):
    before = state(unet)
    with pytest.raises(ValueError, match="config must be a DaToConfig or None, got"):
        apply_dato(unet, config)
    assert state(unet) == before


def test_deepcache(pipe, calls):
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3)
    helper.enable()
    before = state(pipe.unet)
    for given in (pipe, pipe.unet):
        with pytest.raises(ValueError, match="DeepCache"):
            apply_dato(given)
    assert state(pipe.unet) == before
    helper.disable()
    apply_dato(pipe)
    calls(pipe.unet, 1)


def test_tomesd(pipe, calls):
    tomesd.apply_patch(pipe, ratio=0.5)
    before = state(pipe.unet)
    for given in (pipe, pipe.unet):
        with pytest.raises(ValueError, match="tomesd"):
            apply_dato(given)
    assert state(pipe.unet) == before
    tomesd.remove_patch(pipe)
    apply_dato(pipe)
    calls(pipe.unet, 1)


@pytest.mark.parametrize("put", [lambda u: apply_todo(u, TODO), lambda u: u.set_attn_processor(ToDoProcessor())])
def test_todo_is_there_already(unet, calls, put):
    put(unet)
    before, expected = state(unet), calls(unet, 1)[0]
    with pytest.raises(ValueError, match="config must not have todo="):
        apply_dato(unet, DaToConfig(todo=TODO))
    if before[0][2] == state(unet)[0][2]:  # a processor set by hand has hooks since its first call
        assert torch.equal(calls(unet, 1)[0], expected)
    apply_dato(unet, DaToConfig(prune_ratio=0.0))
    with pytest.raises(ValueError, match="config must not have todo="):
        apply_dato(unet, DaToConfig(todo=TODO))
    assert torch.equal(calls(unet, 1)[0], expected)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: [net], lambda net: MultiControlNetModel([net])])
def test_todo_is_on_a_controlnet_already(pipe, make_controlnet, wrap):
    """A ControlNet's ToDo would be replaced too."""
    controlnet = make_controlnet()
    pipe.controlnet = wrap(controlnet)
    apply_todo(controlnet, TODO)
    before = state(pipe.unet), state(controlnet)
    with pytest.raises(ValueError, match=r"config must not have todo=.*ControlNetModel"):
        apply_dato(pipe, DaToConfig(todo=ToDoConfig(factor=3)))
    assert (state(pipe.unet), state(controlnet)) == before
    apply_dato(pipe.unet, DaToConfig(todo=TODO))  # of a UNet alone it does not
    before = state(pipe.unet), state(controlnet)
    with pytest.raises(ValueError, match=r"config must not have todo=.*ControlNetModel"):
        apply_dato(pipe, DaToConfig(todo=ToDoConfig(factor=3)))
    assert (state(pipe.unet), state(controlnet)) == before
    remove_dato(pipe)
    assert state(controlnet) == before[1]
    apply_dato(pipe, DaToConfig())


def test_a_todo_that_does_not_fit(unet, calls):
    """The earlier DaTo stays, with its ToDo."""
    before = state(unet)
    with pytest.raises(ValueError, match="factor must name levels"):
        apply_dato(unet, DaToConfig(todo=ToDoConfig(factor={8: 2})))
    assert state(unet) == before
    apply_dato(unet, DaToConfig(todo=TODO))
    before, expected = state(unet), calls(unet, 2)
    with pytest.raises(ValueError, match="factor must name levels"):
        apply_dato(unet, DaToConfig(todo=ToDoConfig(factor={8: 2})))
    assert state(unet) == before
    assert all(map(torch.equal, calls(unet, 2), expected))


def test_a_ratio_above_what_the_patch_allows(unet, calls, kinds):
    """The grid is known only at the call, which raises; the next call works."""
    apply_dato(unet, DaToConfig(prune_ratio=(0.4, 0.8), cache_schedule="2"))
    with pytest.raises(ValueError, match=r"ratio must be at most 0.75.*got 0.8"):
        calls(unet, 2, size=(8, 8))
    log = kinds(unet)
    first = calls(unet, 1, size=(8, 8))[0]
    assert log == ["2"]
    remove_dato(unet)
    apply_dato(unet, DaToConfig())
    assert torch.equal(calls(unet, 1, size=(8, 8))[0], first)


def test_a_call_without_a_sample_or_timestep(unet):
    apply_dato(unet)
    with pytest.raises((TypeError, KeyError)):
        unet()


def test_applying_again_replaces(unet, calls, kinds, make_unet):
    def counts():
        return [(kept, pre, post) for _, _, kept, _, _, pre, post in state(unet)]

    log = kinds(unet)
    apply_dato(unet, DaToConfig(cache_schedule="1", prune_feed_forward=True))
    for digits in ("111", "000", "212"):
        apply_dato(unet, DaToConfig(cache_schedule=digits))
        hooks = counts()
        log.clear()
        outputs = calls(unet, 4)
        assert "".join(log) == "2" + digits
        apply_dato(unet, DaToConfig(cache_schedule=digits))
        assert counts() == hooks
    other = make_unet("sd")
    apply_dato(other, DaToConfig(cache_schedule="212"))
    assert all(map(torch.equal, outputs, calls(other, 4)))


def test_group_offloading_with_a_schedule(unet):
    """It loads several blocks when the first runs, which a schedule may skip."""
    unet.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2)
    before = state(unet)
    with pytest.raises(ValueError, match="cache_schedule must be None on a UNet with diffusers' group offloading"):
        apply_dato(unet, DaToConfig(cache_schedule="1"))
    assert state(unet) == before
    apply_dato(unet, DaToConfig())


COPIES = {
    "deep copy of the UNet": lambda pipe: copy.deepcopy(pipe.unet),
    "deep copy of the pipeline": copy.deepcopy,
    "pickle": lambda pipe: pickle.dumps(pipe.unet),
    "torch.save": lambda pipe: torch.save(pipe.unet, io.BytesIO()),
}


@pytest.mark.parametrize("cache_schedule", [None, "101"])
@pytest.mark.parametrize("how", COPIES)
def test_copies(pipe, generate, how, cache_schedule):
    """The hooks of a copy would run the original's blocks."""
    apply_dato(pipe, DaToConfig(cache_schedule=cache_schedule))
    first, before = generate(pipe, height=16, width=16), state(pipe.unet)
    with pytest.raises(RuntimeError, match=r"cannot be copied or pickled: remove_dato\(pipe\) first"):
        COPIES[how](pipe)
    assert state(pipe.unet) == before
    assert torch.equal(generate(pipe, height=16, width=16), first)
    remove_dato(pipe)
    COPIES[how](pipe)


class Positional(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, prompt):
        return self.unet(sample, timestep, prompt, return_dict=False)[0]


EXPORTS = {
    "torch.export": lambda module, arguments: torch.export.export(module, arguments),
    "torch.export, strict": lambda module, arguments: torch.export.export(module, arguments, strict=True),
    "torch.jit.trace": lambda module, arguments: torch.jit.trace(module, arguments, check_trace=False),
}


@pytest.mark.parametrize("how", EXPORTS)
def test_exports(make_unet, inputs, how, fresh_dynamo):
    """A graph holds one kind of call only."""
    unet = make_unet("small")
    given = inputs(unet, (8, 8))
    arguments = (given.sample, torch.tensor(900), given.kwargs["encoder_hidden_states"])
    apply_dato(unet, DaToConfig(cache_schedule="101"))
    with torch.no_grad():
        expected = unet(*arguments).sample
        reset_dato(unet)
        with pytest.raises(RuntimeError, match=r"remove_dato\(pipe\) first"):
            EXPORTS[how](Positional(unet), arguments)
        assert torch.equal(unet(*arguments).sample, expected)


def test_a_configuration_that_leaves_nothing_out_is_said(unet, caplog):
    apply_dato(unet, DaToConfig(prune_ratio=0, cache_schedule="22"))
    (record,) = (r for r in caplog.records if r.name == "todo_attn")
    assert record.levelname == "WARNING" and "this will not help" in record.getMessage()
    apply_dato(unet, DaToConfig(prune_ratio=(0.0, 0.1)))
    assert len(caplog.records) == 1
