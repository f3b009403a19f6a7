"""apply_todo and remove_todo: what they touch, what they refuse, and that everything comes back."""

import copy
import pickle

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UNetMotionModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import nn

import todo_attn
from todo_attn import ToDoConfig, ToDoProcessor, apply_todo, remove_todo


def processors(model):
    return dict(model.attn_processors)


def test_only_attn1_changes_and_the_very_same_processors_come_back(unet, hooks, call):
    before, keys, dense = processors(unet), list(unet.state_dict()), call(unet)
    assert apply_todo(unet) is None
    for name, processor in processors(unet).items():
        if ".attn1." in name:
            assert isinstance(processor, ToDoProcessor)
        else:
            assert processor is before[name]
    assert list(unet.state_dict()) == keys
    assert remove_todo(unet) is None
    after = processors(unet)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert hooks(unet) == 0
    assert torch.equal(call(unet), dense)


def test_removing_twice_or_from_an_untouched_model_is_harmless(unet, hooks):
    before = processors(unet)
    remove_todo(unet)
    apply_todo(unet, ToDoConfig(timestep_range=(0, 500)))
    remove_todo(unet)
    remove_todo(unet)
    assert all(processors(unet)[name] is before[name] for name in before)
    assert hooks(unet) == 0
    remove_todo(UNet2DModel(sample_size=8, block_out_channels=(32, 32), norm_num_groups=4, **_NO_ATTENTION))


_NO_ATTENTION = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "add_attention": False,
}


def test_applying_again_replaces(unet, hooks, call, reference):
    before = processors(unet)
    apply_todo(unet, ToDoConfig(factor=2, timestep_range=(0, 500)))
    hooked = hooks(unet)
    apply_todo(unet, ToDoConfig(factor=3, timestep_range=(0, 500)))
    assert hooks(unet) == hooked
    apply_todo(unet, ToDoConfig(factor=3))
    actual = call(unet)
    remove_todo(unet)
    with reference(unet, (16, 16), {1: 3, 2: 3, 4: 3}):
        assert (actual - call(unet)).abs().max() < 1e-5
    assert all(processors(unet)[name] is before[name] for name in before)


def test_what_was_there_is_what_comes_back_and_what_dense_calls_run(unet, call, monkeypatch):
    sliced = SlicedAttnProcessor(1)
    unet.set_attn_processor(sliced)
    calls = []
    forward = SlicedAttnProcessor.__call__

    def counting(self, attn, *args, **kwargs):
        calls.append(attn)
        return forward(self, attn, *args, **kwargs)

    monkeypatch.setattr(SlicedAttnProcessor, "__call__", counting)
    call(unet)
    dense_calls = len(calls)
    apply_todo(unet, ToDoConfig(factor={1: 2}))
    calls.clear()
    call(unet)
    levels = [unet.down_blocks[0], unet.up_blocks[2]]
    coarse = [m for block in levels for n, m in block.named_modules() if n.endswith("attn1")]
    assert len(calls) == dense_calls - len(coarse)
    assert not any(a is c for a in calls for c in coarse)
    remove_todo(unet)
    assert all(processor is sliced for processor in processors(unet).values())


def test_a_processor_put_there_since_is_left_there_and_remembered(unet):
    apply_todo(unet, ToDoConfig(factor=2))
    later = AttnProcessor2_0()
    unet.set_attn_processor(later)
    remove_todo(unet)
    assert all(processor is later for processor in processors(unet).values())

    apply_todo(unet, ToDoConfig(factor=2))
    latest = AttnProcessor2_0()
    unet.set_attn_processor(latest)
    apply_todo(unet, ToDoConfig(factor=2))
    remove_todo(unet)
    assert all(processor is latest for processor in processors(unet).values())


def test_an_exception_in_the_middle_of_a_run_leaves_the_model_usable(unet, call, hooks):
    before, dense = processors(unet), call(unet)
    apply_todo(unet, ToDoConfig(factor=2))
    expected = call(unet)

    def fail(module, args):
        raise RuntimeError("interrupted")

    for module in (unet.mid_block, unet.down_blocks[1].attentions[0].transformer_blocks[0].ff):
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            call(unet, (8, 12))
        handle.remove()
        assert torch.equal(call(unet), expected)
    remove_todo(unet)
    assert torch.equal(call(unet), dense)
    assert hooks(unet) == 0
    assert all(processors(unet)[name] is before[name] for name in before)


def test_a_copy_has_a_state_of_its_own(unet, call, hooks):
    dense = call(unet)
    config = ToDoConfig(factor=2, timestep_range=(0, 600))
    apply_todo(unet, config)
    expected = call(unet)
    twin, pickled = copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))
    with torch.no_grad():
        for p in unet.parameters():
            p.zero_()
    assert torch.equal(call(twin), expected)
    assert torch.equal(call(pickled), expected)
    assert not torch.equal(call(twin, timestep=700), call(twin, timestep=500))
    remove_todo(twin)
    assert hooks(twin) == 0
    assert hooks(unet) == hooks(pickled) > 0
    assert torch.equal(call(twin), dense)


def test_moving_and_casting_the_model(unet, call):
    apply_todo(unet, ToDoConfig(factor=2))
    expected = call(unet)
    assert torch.equal(call(unet.to(torch.float64).to("cpu").to(torch.float32)), expected)


# What is covered


def test_a_pipelines_unet_and_controlnets(pipe, make_controlnet, hooks):
    for controlnet in (make_controlnet(), [make_controlnet(0), make_controlnet(1)]):
        controlled = StableDiffusionControlNetPipeline(
            **{k: v for k, v in pipe.components.items() if k != "controlnet"},
            controlnet=controlnet,
            requires_safety_checker=False,
        )
        nets = controlnet if isinstance(controlnet, list) else [controlnet]
        before = [processors(net) for net in (pipe.unet, *nets)]
        apply_todo(controlled, ToDoConfig(factor=2))
        for net in (pipe.unet, *nets):
            installed = [n for n, p in processors(net).items() if isinstance(p, ToDoProcessor)]
            assert installed == [n for n in processors(net) if ".attn1." in n]
        remove_todo(controlled)
        for net, known in zip((pipe.unet, *nets), before, strict=True):
            assert all(processors(net)[name] is known[name] for name in known)
            assert hooks(net) == 0


@pytest.mark.parametrize("as_list", [False, True], ids=["MultiControlNetModel", "ModuleList"])
def test_several_controlnets_alone(make_controlnet, hooks, as_list):
    nets = [make_controlnet(0), make_controlnet(1)]
    several = nn.ModuleList(nets) if as_list else MultiControlNetModel(nets)
    apply_todo(several, ToDoConfig(factor=2))
    assert all(any(isinstance(p, ToDoProcessor) for p in processors(net).values()) for net in nets)
    remove_todo(several)
    assert hooks(several) == 0


@pytest.mark.parametrize("container", [MultiControlNetModel, nn.ModuleList])
def test_a_model_that_is_there_twice(make_controlnet, hooks, container):
    net = make_controlnet()
    before, several = processors(net), container([net, net])
    inputs = torch.randn(1, 4, 16, 16), 500, torch.randn(1, 5, 8), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        dense = net(*inputs, return_dict=False)[1]
        apply_todo(several, ToDoConfig(factor=1))
        assert torch.equal(net(*inputs, return_dict=False)[1], dense)
    remove_todo(several)
    assert hooks(several) == 0
    assert all(processors(net)[name] is before[name] for name in before)


def test_a_pipeline_with_a_controlnet_twice(pipe, make_controlnet, generate, hooks):
    net = make_controlnet()
    controlled = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=[net, net], requires_safety_checker=False
    )
    arguments = {"image": [torch.rand(1, 3, 24, 40)] * 2, "height": 24, "width": 40}
    before, dense = processors(net), generate(controlled, **arguments)
    apply_todo(controlled, ToDoConfig(factor=1))
    assert torch.equal(generate(controlled, **arguments), dense)
    remove_todo(controlled)
    assert hooks(controlled.controlnet) == hooks(controlled.unet) == 0
    assert all(processors(net)[name] is before[name] for name in before)


def test_a_model_in_data_parallel(make_unet, call, hooks):
    """With compiled models inside, or compiled as a whole."""
    unet = make_unet()
    apply_todo(unet, ToDoConfig(factor=2))
    expected = call(unet)
    for wrap in (
        nn.DataParallel,
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ):
        unet = make_unet()
        wrapped = wrap(unet)
        apply_todo(wrapped, ToDoConfig(factor=2))
        assert torch.equal(call(unet), expected)
        remove_todo(wrapped)
        assert hooks(unet) == 0


def test_a_controlnet_without_self_attention_or_the_level_stays_dense(pipe, unet, hooks):
    class NoAttention(nn.Module):
        pass

    pipe.controlnet = NoAttention()
    apply_todo(pipe, ToDoConfig(factor={1: 2}))
    remove_todo(pipe)
    assert hooks(pipe.controlnet) == hooks(unet) == 0


def test_motion_modules_are_left_alone():
    unet = UNetMotionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=8,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=4,
    ).eval()
    inputs = torch.randn(1, 4, 3, 8, 10), 500, torch.randn(3, 5, 8)  # three frames
    with torch.no_grad():
        dense = unet(*inputs).sample
        apply_todo(unet, ToDoConfig(factor=2))
        for name, processor in processors(unet).items():
            spatial = ".attentions." in name and ".attn1." in name
            assert isinstance(processor, ToDoProcessor) == spatial, name
        assert not torch.equal(unet(*inputs).sample, dense)
        apply_todo(unet, ToDoConfig(factor=1))
        assert torch.equal(unet(*inputs).sample, dense)


def test_attention_that_only_crosses_is_left_alone(make_unet, call):
    """The finest transformers of the x4 upscaler attend to the text twice."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        only_cross_attention=(True, False),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    with pytest.raises(ValueError, match=r"levels .* has self-attention at, 2 or 'finest', got 1$"):
        apply_todo(unet, ToDoConfig(factor={1: 2}))
    dense = call(unet)
    apply_todo(unet, ToDoConfig(factor={"finest": 2}))
    installed = {n.split(".")[0:2][1] for n, p in processors(unet).items() if isinstance(p, ToDoProcessor)}
    assert not isinstance(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor, ToDoProcessor)
    assert installed
    assert not torch.equal(call(unet), dense)


def test_fused_projections(make_unet, call):
    """diffusers keeps to_q, to_k and to_v beside the fused layer, which a coarse grid of keys cannot use."""
    unet = make_unet()
    apply_todo(unet, ToDoConfig(factor=2))
    expected = call(unet)
    unet = make_unet()
    with torch.no_grad():
        unet.fuse_qkv_projections()
    dense = call(unet)
    apply_todo(unet, ToDoConfig(factor=2))
    assert (call(unet) - expected).abs().max() < 1e-5
    apply_todo(unet, ToDoConfig(factor=1))
    assert torch.equal(call(unet), dense)
    remove_todo(unet)
    assert {type(p) for p in processors(unet).values()} == {FusedAttnProcessor2_0}
    assert torch.equal(call(unet), dense)


# What is refused, with nothing changed


class RecordingProcessor(AttnProcessor):
    """A user's own subclass, to watch the attention."""


@pytest.mark.parametrize(
    "processor",
    [
        CustomDiffusionAttnProcessor2_0(train_kv=True, train_q_out=True, hidden_size=16, cross_attention_dim=None),
        RecordingProcessor(),
        lambda attn, hidden_states, **kwargs: hidden_states,
    ],
    ids=["CustomDiffusionAttnProcessor2_0", "RecordingProcessor", "function"],
)
def test_a_processor_that_does_more_than_attention_is_not_thrown_away(pipe, unet, make_controlnet, hooks, processor):
    net = make_controlnet()
    pipe.controlnet = [make_controlnet(1), net]
    where = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    net.get_submodule(where).set_processor(processor)
    before, keys = processors(unet), list(net.state_dict())
    message = rf"pipe_or_model .* {type(processor).__name__} at ControlNetModel\.{where}"
    with pytest.raises(ValueError, match=message):
        apply_todo(pipe)
    assert list(net.state_dict()) == keys
    assert net.get_submodule(where).processor is processor
    assert hooks(unet) == hooks(net) == 0
    assert all(processors(unet)[name] is before[name] for name in before)


def test_a_processor_of_another_layer_may_do_anything(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(RecordingProcessor())
    apply_todo(unet)


@pytest.mark.parametrize(
    ("kind", "levels", "message"),
    [
        ("sd", {8: 2}, r"1, 2, 4 or 'finest', got 8$"),
        ("sd", {1: 2, 3: 2, 16: 2}, r"1, 2, 4 or 'finest', got 3, 16$"),
        ("sdxl", {1: 2}, r"2, 4 or 'finest', got 1$"),
        ("sdxl", {2: 2, "finest": 3}, r"factor must name a level once, got 'finest' and 2"),
    ],
)
def test_a_level_that_the_model_lacks_names_those_it_has(make_unet, hooks, kind, levels, message):
    unet = make_unet(kind)
    apply_todo(unet, ToDoConfig(factor=2))
    before, hooked = processors(unet), hooks(unet)
    with pytest.raises(ValueError, match=message):
        apply_todo(unet, ToDoConfig(factor=levels))
    assert all(processors(unet)[name] is before[name] for name in before)
    assert hooks(unet) == hooked


@pytest.mark.parametrize("wrong", [None, "unet", 3, set(), [], {}], ids=repr)
def test_neither_pipeline_nor_model(wrong):
    for function in (apply_todo, remove_todo):
        with pytest.raises(ValueError, match="pipe_or_model must be a diffusers pipeline") as error:
            function(wrong)
        assert type(wrong).__name__ in str(error.value)


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Linear(2, 2),
        lambda: UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 32),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
    ],
    ids=["Linear", "UNet2DModel"],
)
def test_a_model_without_self_attention_over_an_image(model):
    model = model()
    with pytest.raises(ValueError, match=f"pipe_or_model must have self-attention .* got {type(model).__name__}"):
        apply_todo(model)


def test_a_pipeline_without_a_unet(pipe):
    pipe.unet = None
    with pytest.raises(ValueError, match=r"pipe_or_model .* with a unet"):
        apply_todo(pipe)


@pytest.mark.parametrize("config", [{"factor": 2}, 2, "auto", ToDoConfig], ids=repr)
def test_a_config_of_another_type(unet, hooks, config):
    with pytest.raises(ValueError, match="config must be a ToDoConfig or None, got "):
        apply_todo(unet, config)
    assert hooks(unet) == 0


# What is said


def test_a_configuration_that_changes_nothing_is_logged_once_and_kept(make_unet, call, caplog):
    unet = make_unet("sdxl")
    apply_todo(unet)  # as SDXL at 1024 pixels: no level has more than 4096 tokens
    for size in [(16, 24), (8, 8)]:
        call(unet, size)
    assert [(r.name, r.levelname) for r in caplog.records] == [("todo_attn", "WARNING")]
    assert "max_kv_tokens=4096" in caplog.text
    assert "8x12, 4x6" in caplog.text
    assert call(unet, (160, 130), batch=1).isfinite().all()  # 80 x 65 tokens: now it acts, at level 2
    assert len(caplog.records) == 1


def test_one_log_for_a_pipeline_with_controlnets(pipe, make_controlnet, generate, caplog):
    pipe = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=[make_controlnet(0), make_controlnet(1)], requires_safety_checker=False
    )
    apply_todo(pipe)
    generate(pipe, image=[torch.rand(1, 3, 16, 16)] * 2, height=16, width=16)
    assert [r.name for r in caplog.records if r.name == "todo_attn"] == ["todo_attn"]


def test_a_configuration_that_acts_logs_nothing(unet, call, caplog):
    apply_todo(unet, ToDoConfig(factor={2: 2}, timestep_range=(0, 100)))  # dense at timestep 500, but it will act
    call(unet, (8, 8))
    assert not caplog.records


@pytest.mark.parametrize("config", [ToDoConfig(4096), ToDoConfig(factor={1: 2, 4: 4})], ids=str)
def test_a_factor_that_reaches_the_side_of_a_grid_warns_once(unet, call, caplog, config):
    """A user who meant max_kv_tokens."""
    apply_todo(unet, config)
    for _ in range(2):
        call(unet)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name == "todo_attn"
    assert "max_kv_tokens is the number of keys" in record.getMessage() and "4x4" in record.getMessage()


@pytest.mark.parametrize("config", [ToDoConfig(max_kv_tokens=1), ToDoConfig(factor={1: 15, 4: 3})], ids=str)
def test_a_single_key_that_was_asked_for_needs_no_word(unet, call, caplog, config):
    apply_todo(unet, config)
    call(unet)
    assert not caplog.records


def test_the_names_are_exported_lazily():
    assert todo_attn.apply_todo is apply_todo
    assert todo_attn.remove_todo is remove_todo
    assert todo_attn.ToDoProcessor is ToDoProcessor
    assert todo_attn.status(nn.Linear(1, 1)).layers == ()
