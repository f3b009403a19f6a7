"""ToDoProcessor branch by branch against diffusers' own AttnProcessor2_0.

AttnProcessor2_0 becomes ToDo when ``to_k`` and ``to_v`` themselves take coarse tokens before they project: everything
else in it, in its order, is then the oracle.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn

from todo_attn import ToDoConfig, ToDoProcessor
from todo_attn.diffusers.state import ATTRIBUTE, AttentionState, ModelState, TransformerState

GRID = (6, 9)
DIM, HEADS, HEAD_DIM = 32, 4, 8  # SpatialNorm normalises in 32 groups

BRANCHES = {
    "plain": {},
    "inner_dim": {"dim_head": 4},
    "out_dim": {"out_dim": 24},
    "bias": {"bias": True},
    "no-out-bias": {"out_bias": False},
    "group_norm": {"norm_num_groups": 4},
    "spatial_norm": {"spatial_norm_dim": 32},
    "norm_q,norm_k=layer_norm": {"qk_norm": "layer_norm"},
    "norm_q,norm_k=fp32_layer_norm": {"qk_norm": "fp32_layer_norm"},
    "norm_q,norm_k=rms_norm": {"qk_norm": "rms_norm"},
    "norm_q,norm_k=l2": {"qk_norm": "l2"},
    "residual_connection": {"residual_connection": True},
    "rescale_output_factor": {"rescale_output_factor": 1.5},
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
    "dropout": {"dropout": 0.5},
    "everything": {
        "bias": True,
        "norm_num_groups": 4,
        "spatial_norm_dim": 32,
        "qk_norm": "layer_norm",
        "residual_connection": True,
        "rescale_output_factor": 2.0,
        "dropout": 0.5,
    },
}
# AttnProcessor2_0 itself cannot give an image of other channels than it got.
CASES = [
    (branch, shape) for branch in BRANCHES for shape in ("tokens", "image") if (branch, shape) != ("out_dim", "image")
]


class CoarseLinear(nn.Module):
    """A Linear that first takes its tokens on a coarser grid."""

    def __init__(self, linear, factor, mode):
        super().__init__()
        self.linear, self.factor, self.mode = linear, factor, mode

    def forward(self, x):
        image = x.transpose(1, 2).unflatten(2, GRID)
        size = (GRID[0] // self.factor, GRID[1] // self.factor)
        return self.linear(F.interpolate(image, size=size, mode=self.mode).flatten(2).transpose(1, 2))


def make_attention(**arguments):
    attn = Attention(DIM, **{"heads": HEADS, "dim_head": HEAD_DIM, **arguments})
    for p in attn.parameters():  # biases and norms away from zero and one
        nn.init.normal_(p, std=0.3)
    return attn.train()  # dropout acts


def put_in_model(attn, config, grid=GRID, original=None):
    """What apply_todo leaves on an attn1 whose transformer has been called on ``grid``."""
    transformer = TransformerState(ModelState(config))
    transformer.plan = transformer.plan_for(grid)
    setattr(attn, ATTRIBUTE, AttentionState(transformer, original))


def run(attn, processor, **inputs):
    torch.manual_seed(7)  # dropout
    return processor(attn, **inputs)


def oracle(attn, inputs, factor, mode="nearest", processor=None):
    to_k, to_v = attn.to_k, attn.to_v
    attn.to_k, attn.to_v = CoarseLinear(to_k, factor, mode), CoarseLinear(to_v, factor, mode)
    try:
        return run(attn, processor or AttnProcessor2_0(), **inputs)
    finally:
        attn.to_k, attn.to_v = to_k, to_v


def inputs_for(arguments, image=False):
    x = torch.randn(3, GRID[0] * GRID[1], DIM)
    inputs = {"hidden_states": x.transpose(1, 2).unflatten(2, GRID).contiguous() if image else x}
    if "spatial_norm_dim" in arguments:  # it works on images, and asks for a condition
        inputs |= {"hidden_states": torch.randn(3, DIM, *GRID), "temb": torch.randn(3, 32, 3, 4)}
    return inputs


@pytest.fixture
def small_cap(monkeypatch):
    """An image has no state: it follows the default configuration, which these small ones would never exceed."""
    monkeypatch.setattr("todo_attn.diffusers.processor._DEFAULT_CONFIG", ToDoConfig(factor=2))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
@pytest.mark.parametrize("factor", [2, 3])
def test_modes_and_factors(factor, mode):
    attn = make_attention()
    inputs = inputs_for({})
    expected = oracle(attn, inputs, factor, {"mean": "area"}.get(mode, mode))
    put_in_model(attn, ToDoConfig(factor=factor, mode=mode))
    torch.testing.assert_close(run(attn, ToDoProcessor(), **inputs), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("branch", "shape"), CASES)
def test_every_branch(small_cap, branch, shape):
    arguments = dict(BRANCHES[branch])
    inputs = inputs_for(arguments, image=shape == "image")
    attn = make_attention(**arguments)
    expected = oracle(attn, inputs, 2)
    put_in_model(attn, ToDoConfig(factor=2))
    actual = run(attn, ToDoProcessor(), **inputs)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(actual, run(attn, AttnProcessor2_0(), **inputs), atol=1e-3)


@pytest.mark.parametrize(("branch", "shape"), CASES)
def test_every_branch_at_factor_one_is_bit_equal(branch, shape):
    arguments = dict(BRANCHES[branch])
    inputs = inputs_for(arguments, image=shape == "image")
    attn = make_attention(**arguments)
    put_in_model(attn, ToDoConfig(factor=1))
    assert torch.equal(run(attn, ToDoProcessor(), **inputs), run(attn, AttnProcessor2_0(), **inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    attn = make_attention(norm_num_groups=4, residual_connection=True).to(dtype)
    inputs = {"hidden_states": torch.randn(2, GRID[0] * GRID[1], DIM, dtype=dtype)}
    expected = oracle(attn, inputs, 2)
    put_in_model(attn, ToDoConfig(factor=2))
    actual = run(attn, ToDoProcessor(), **inputs)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)


def test_scale_qk_false_keeps_its_scale():
    """AttnProcessor2_0 would ignore attn.scale; diffusers gives such a layer AttnProcessor, which does not."""
    attn = make_attention(scale_qk=False)
    assert attn.scale == 1.0
    assert type(attn.processor) is AttnProcessor
    inputs = inputs_for({})
    expected = oracle(attn, inputs, 2, processor=AttnProcessor())
    dense = run(attn, AttnProcessor(), **inputs)
    put_in_model(attn, ToDoConfig(factor=2))
    torch.testing.assert_close(run(attn, ToDoProcessor(), **inputs), expected, atol=1e-6, rtol=1e-5)
    put_in_model(attn, ToDoConfig(factor=1))
    assert torch.equal(run(attn, ToDoProcessor(), **inputs), dense)


@pytest.mark.parametrize("cross_attention_norm", [None, "layer_norm", "group_norm"])
def test_cross_attention_is_bit_equal(cross_attention_norm):
    attn = make_attention(
        cross_attention_dim=8, cross_attention_norm=cross_attention_norm, cross_attention_norm_num_groups=4
    )
    put_in_model(attn, ToDoConfig(factor=2))
    inputs = {**inputs_for({}), "encoder_hidden_states": torch.randn(3, 7, 8)}
    expected = run(attn, AttnProcessor2_0(), **inputs)
    assert torch.equal(run(attn, ToDoProcessor(), **inputs), expected)
    # 54 encoder tokens could be mistaken for the grid
    inputs["encoder_hidden_states"] = torch.randn(3, GRID[0] * GRID[1], 8)
    assert torch.equal(run(attn, ToDoProcessor(), **inputs), run(attn, AttnProcessor2_0(), **inputs))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_a_mask_is_bit_equal(cross):
    attn = make_attention(cross_attention_dim=8 if cross else None)
    put_in_model(attn, ToDoConfig(factor=2))
    keys = 7 if cross else GRID[0] * GRID[1]
    inputs = {**inputs_for({}), "attention_mask": (torch.rand(3, 1, keys) < 0.5) * -10000.0}
    if cross:
        inputs["encoder_hidden_states"] = torch.randn(3, keys, 8)
    expected = run(attn, AttnProcessor2_0(), **inputs)
    assert torch.equal(run(attn, ToDoProcessor(), **inputs), expected)
    assert not torch.equal(expected, run(attn, AttnProcessor2_0(), **{**inputs, "attention_mask": None}))


@pytest.mark.parametrize("only_cross", [False, True])
def test_added_keys_and_values_are_bit_equal(only_cross):
    attn = make_attention(added_kv_proj_dim=8, norm_num_groups=4, only_cross_attention=only_cross)
    inputs = {"hidden_states": torch.randn(3, DIM, *GRID), "encoder_hidden_states": torch.randn(3, 7, 8)}
    expected = run(attn, AttnAddedKVProcessor2_0(), **inputs)
    assert torch.equal(run(attn, ToDoProcessor(), **inputs), expected)


def test_what_an_ip_adapter_gives_is_refused():
    """set_attn_processor takes the IP-Adapter's processors off attn2, and leaves its image tokens in the call."""
    attn = make_attention(cross_attention_dim=8)
    given = (torch.randn(3, 7, 8), [torch.randn(3, 4, 8)])
    with pytest.raises(ValueError, match=r"^encoder_hidden_states must be .* got tuple.*apply_todo") as error:
        ToDoProcessor()(attn, **inputs_for({}), encoder_hidden_states=given)
    assert "IP-Adapter" in str(error.value)


def test_dense_calls_run_through_the_processor_that_was_there():
    attn, calls = make_attention(), []

    class Original(SlicedAttnProcessor):  # which takes no temb
        def __call__(self, *args, **kwargs):
            calls.append(len(args))
            return super().__call__(*args, **kwargs)

    inputs = inputs_for({})
    put_in_model(attn, ToDoConfig(factor=1), original=Original(1))
    torch.testing.assert_close(run(attn, ToDoProcessor(), **inputs), run(attn, AttnProcessor2_0(), **inputs))
    assert calls == [4]


@pytest.mark.parametrize("factor", [1, 2])
def test_the_deprecated_scale_argument_warns_and_is_ignored(factor):
    attn = make_attention()
    put_in_model(attn, ToDoConfig(factor=factor))
    inputs = inputs_for({})
    expected = run(attn, ToDoProcessor(), **inputs)
    with pytest.warns(FutureWarning, match="scale"):
        assert torch.equal(run(attn, ToDoProcessor(), **inputs, scale=0.5), expected)
    with pytest.warns(FutureWarning, match="scale"):
        torch.manual_seed(7)
        assert torch.equal(ToDoProcessor()(attn, inputs["hidden_states"], None, None, None, 0.5), expected)


def test_it_is_called_through_attention_forward():
    """The keyword arguments that Attention.forward passes are those named in the processor's signature."""
    attn = make_attention()
    put_in_model(attn, ToDoConfig(factor=2))
    inputs = inputs_for({})
    expected = run(attn, ToDoProcessor(), **inputs)
    attn.set_processor(ToDoProcessor())
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attn(inputs["hidden_states"], ip_adapter_masks=None), expected)


def test_another_number_of_tokens_than_the_grid_has_is_dense(caplog):
    """Another patch may merge tokens before the attention."""
    attn = make_attention()
    put_in_model(attn, ToDoConfig(factor=2))
    inputs, processor = {"hidden_states": torch.randn(2, 11, DIM)}, ToDoProcessor()
    for _ in range(2):
        assert torch.equal(run(attn, processor, **inputs), run(attn, AttnProcessor2_0(), **inputs))
    assert [r.name for r in caplog.records] == ["todo_attn"]
    assert "apply_todo" in caplog.text


def test_it_holds_no_weights_and_no_arguments():
    """IP-Adapter rebuilds processors as ``processor.__class__()``, and a module would enter the state dict."""
    assert not isinstance(ToDoProcessor(), nn.Module)
    attn = make_attention()
    before = attn.state_dict().keys()
    put_in_model(attn, ToDoConfig(factor=2))
    attn.set_processor(ToDoProcessor())
    assert attn.state_dict().keys() == before
