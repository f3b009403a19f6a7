"""The ComfyUI nodes against the contract of its attn1 patches, and against diffusers' ToDo. No ComfyUI needed."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fixtures.comfyui import PACK, ModelPatcher, SpatialTransformer, UNetModel, run_patches
from torch import nn

from todo_attn import ToDoConfig, apply_todo, ops, remove_todo


@pytest.fixture
def model(make_unet):
    """model("sd" | "sdxl") -> a ComfyUI model around a tiny UNet of diffusers."""
    return lambda kind="sd": ModelPatcher(UNetModel(make_unet(kind)))


@pytest.fixture
def todo(pack):
    def todo(model, factor="auto", max_keys=4096, mode="nearest", start=0.0, end=1.0):
        node = pack.NODE_CLASS_MAPPINGS["TodoAttnToDo"]
        (patched,) = getattr(node(), node.FUNCTION)(model, factor, max_keys, mode, start, end)
        return patched

    return todo


@pytest.fixture
def dato(pack):
    def dato(model, ratio=0.4, seed=0, start=0.0, end=1.0):
        node = pack.NODE_CLASS_MAPPINGS["TodoAttnDaTo"]
        (patched,) = getattr(node(), node.FUNCTION)(model, ratio, seed, start, end)
        return patched

    return dato


@pytest.fixture
def run(make_unet):
    """run(model, size=(h, w), batch=2) -> the UNet's output under the model's patches."""

    def run(model, size=(16, 16), batch=2, sigma=5.0):
        return model(*inputs(model, size, batch)[0], sigma=sigma, **inputs(model, size, batch)[1])

    return run


def inputs(model, size, batch):
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(batch, 4, *size, generator=generator), torch.randn(batch, 5, 8, generator=generator)
    more = {}
    if model.objects["diffusion_model"].diffusers[0].config.addition_embed_type == "text_time":
        pooled = torch.randn(batch, 8, generator=generator)
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.arange(6.0).repeat(batch, 1)}
    return (sample, 500, text), more


def in_diffusers(model, config, size=(16, 16), batch=2):
    """The output of the same UNet under diffusers' ToDo."""
    unet = model.objects["diffusion_model"].diffusers[0]
    (sample, timestep, text), more = inputs(model, size, batch)
    apply_todo(unet, config)
    try:
        with torch.no_grad():
            return unet(sample, timestep, text, **more).sample
    finally:
        remove_todo(unet)


def options(block=("input", 1), latent=(16, 16), batch=2, sigma=5.0, **more):
    return {
        "block": block,
        "block_index": 0,
        "original_shape": [batch, 4, *latent],
        "sigmas": torch.full((batch,), sigma),
        **more,
    }


def tokens(count, batch=2, channels=8):
    return torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(0))


# ToDo


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (27, 48)])  # 27 x 48 is 1920 x 1080, five times smaller
@pytest.mark.parametrize(
    ("factor", "config"),
    [
        ("auto", ToDoConfig(max_kv_tokens=40)),
        ("3", ToDoConfig(3)),
        ("finest: 2", ToDoConfig({"finest": 2})),
        ("2: 2, 4: 3", ToDoConfig({2: 2, 4: 3})),
    ],
)
def test_todo_is_that_of_diffusers(model, todo, run, kind, size, factor, config):
    patched = todo(model(kind), factor, max_keys=40)
    torch.testing.assert_close(run(patched, size), in_diffusers(patched, config, size), rtol=1e-5, atol=1e-6)
    assert not torch.equal(run(patched, size), run(model(kind), size))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
@pytest.mark.parametrize("batch", [1, 3])
def test_modes_and_odd_batches(model, todo, run, mode, batch):
    patched, size = todo(model(), "2", mode=mode), (15, 18)
    expected = in_diffusers(patched, ToDoConfig(2, mode=mode), size, batch)
    torch.testing.assert_close(run(patched, size, batch), expected, rtol=1e-5, atol=1e-6)


def test_attention_is_downsampled_attention(model, todo):
    x, grid = tokens(9 * 14), (9, 14)
    q, k, v = run_patches(todo(model(), "2").patches, x, options(("input", 4), (17, 27)) | {"block": ("input", 3)})
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    got = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    heads = x.unflatten(-1, (2, 4))
    torch.testing.assert_close(got, ops.downsampled_attention(heads, heads, heads, grid, 2))


def test_keys_and_values_stay_one_tensor(model, todo):
    q, k, v = run_patches(todo(model(), "2").patches, tokens(256), options())
    assert k is v and q.shape[1] == 256 and k.shape[1] == 64


def test_a_size_it_does_not_change(model, todo, run):
    assert torch.equal(run(todo(model())), run(model()))


def test_the_latent_of_1920_x_1080(model, todo):
    latent = (135, 240)
    for block, grid, keys in ((("input", 1), (135, 240), 45 * 80), (("input", 3), (68, 120), 34 * 60)):
        q, k, _ = run_patches(todo(model()).patches, tokens(grid[0] * grid[1]), options(block, latent))
        assert (q.shape[1], k.shape[1]) == (grid[0] * grid[1], keys)


def test_a_grid_that_another_node_made_smaller(model, todo):
    """Deep Shrink halves the image inside of the UNet; ComfyUI says what the block was given."""
    shrunk = options(latent=(16, 12), activations_shape=[2, 8, 8, 6])
    assert run_patches(todo(model(), "2").patches, tokens(48), shrunk)[1].shape[1] == 12
    assert run_patches(todo(model(), "2").patches, tokens(48), options(latent=(16, 12)))[1].shape[1] == 48


def test_what_is_not_the_image_is_left_alone(model, todo):
    patches = todo(model(), "2").patches
    for tokens_, given in [
        (tokens(77), options()),  # text
        (tokens(256), options(batch=4)),  # tiles or frames in the batch
        (tokens(256), options(block=("input", 0))),  # a block without attention
        (tokens(256), {"sigmas": torch.ones(2)}),  # a caller that says nothing
    ]:
        q, k, v = run_patches(patches, tokens_, given)
        assert q is k is v is tokens_


def test_the_model_it_was_given_is_untouched(model, todo, dato, run):
    given = model()
    before = run(given)
    todo(given, "2"), dato(given)
    assert given.patches == {}
    assert torch.equal(run(given), before)


def test_other_patches_run_before_and_after(model, todo):
    calls = []

    def note(name):
        def patch(q, k, v, extra_options):
            calls.append((name, q.shape[1], k.shape[1]))
            return q, k, v

        return patch

    given = model()
    given.set_model_attn1_patch(note("before"))
    patched = todo(given, "2")
    patched.set_model_attn1_patch(note("after"))
    run_patches(patched.patches, tokens(256), options())
    assert calls == [("before", 256, 256), ("after", 256, 64)]


def test_beside_a_node_that_merges_queries(model, todo):
    """ComfyUI's own token merging: fewer queries, keys as they are. Both orders give the same."""

    def merge(q, k, v, extra_options):
        return q[:, ::2], k, v

    first, last = model(), todo(model(), "2")
    first.set_model_attn1_patch(merge)
    last.set_model_attn1_patch(merge)
    one = run_patches(todo(first, "2").patches, tokens(256), options())
    for a, b in zip(one, run_patches(last.patches, tokens(256), options()), strict=True):
        assert torch.equal(a, b)
    assert [t.shape[1] for t in one] == [128, 64, 64]


@pytest.mark.parametrize(("sigma", "keys"), [(10.0, 256), (8.0, 64), (5.0, 64), (3.1, 64), (2.9, 256)])
def test_a_range_of_steps(model, todo, sigma, keys):
    patches = todo(model(), "2", start=0.2, end=0.7).patches
    assert run_patches(patches, tokens(256), options(sigma=sigma))[1].shape[1] == keys


def test_the_whole_sampling_reads_no_sigma(model, todo):
    meta = {**options(), "sigmas": torch.ones(2, device="meta")}
    assert run_patches(todo(model(), "2").patches, tokens(256), meta)[1].shape[1] == 64


def test_it_says_once_what_it_does(model, todo, run, caplog):
    with caplog.at_level("INFO", logger="todo_attn"):
        patched = todo(model(), max_keys=100)
        run(patched, (16, 15)), run(patched, (16, 15)), run(patched, (8, 8))
    wanted = [
        "ToDo, latent of 16 x 15: level 1 factor 2 (240 tokens, 56 keys); level 2 dense (64 keys); "
        "level 4 dense (16 keys)",
        "ToDo, latent of 8 x 8: level 1 dense (64 keys); level 2 dense (16 keys); level 4 dense (4 keys)",
    ]
    assert [record.getMessage() for record in caplog.records] == wanted


def test_a_fraction_is_said_in_whole_keys(model, todo, run, caplog):
    with caplog.at_level("INFO", logger="todo_attn"):
        run(todo(model(), factor="1: 1.5"), (16, 15))
    assert "level 1 factor 1.5 (240 tokens, 100 keys)" in caplog.text


# DaTo


def test_pruning_fills_every_token_in(model, dato):
    patched, given, x = dato(model(), 0.4), options(), tokens(256)
    q, k, v = run_patches(patched.patches, x, given)
    assert q is k is v and q.shape[1] == 256 - int(0.4 * 256)
    (leave,) = patched.patches["attn1_output_patch"]
    out = leave(q, given)
    assert out.shape == x.shape
    kept = (out == x).all(-1)
    assert kept.sum(1).eq(q.shape[1]).all()
    assert leave(x, given) is x  # what was left for this call is used up


def test_pruning_only_at_the_finest_level(model, dato):
    x = tokens(64)
    assert run_patches(dato(model()).patches, x, options(("input", 3)))[0] is x


def test_pruning_repeats_and_follows_seed_step_and_block(model, dato):
    def kept(seed=0, **given):
        return run_patches(dato(model(), seed=seed).patches, tokens(256), options(**given))[0]

    assert torch.equal(kept(), kept())
    for other in (kept(seed=1), kept(sigma=4.0), kept(block=("output", 5))):
        assert not torch.equal(kept(), other)


def test_an_image_does_not_depend_on_its_batch(model, dato, run):
    patched = dato(model())
    torch.testing.assert_close(run(patched, (15, 16), 3)[:1], run_first(patched, (15, 16)), rtol=1e-4, atol=1e-5)


def run_first(model, size):
    (sample, timestep, text), _ = inputs(model, size, 3)
    return model(sample[:1], timestep, text[:1])


def test_dato_and_todo_in_either_order(model, todo, dato):
    """As diffusers' ``DaToConfig(todo=...)``: the kept queries attend to the coarse grid of all tokens."""
    x = tokens(256)
    one = run_patches(todo(dato(model()), "2").patches, x, options())
    other = run_patches(dato(todo(model(), "2")).patches, x, options())
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one[1], ops.downsample_tokens(x, (16, 16), 2))
    assert one[0].shape[1] == 256 - int(0.4 * 256)


def test_pruning_in_a_range_of_steps_and_at_ratio_0(model, dato, run):
    assert torch.equal(run(dato(model(), start=0.6)), run(model()))
    torch.testing.assert_close(run(dato(model(), 0.0)), run(model()))


# Bad input


def test_a_model_without_self_attention_over_an_image(model, todo, dato):
    class Flux(nn.Module):
        pass

    for node in (todo, dato):
        with pytest.raises(ValueError, match=r"^model must be a UNet with self-attention over an image .* got Flux"):
            node(ModelPatcher(Flux()))


def test_blocks_that_only_cross_attend_do_not_count(model, todo):
    given = model()
    given.objects["diffusion_model"].input_blocks[1] = nn.ModuleList([SpatialTransformer(1, disable_self_attn=True)])
    x = tokens(256)
    assert run_patches(todo(given, "2").patches, x, options())[1] is x


@pytest.mark.parametrize(
    ("kind", "factor", "message"),
    [
        ("sdxl", "1: 2", "factor must name levels that UNetModel has self-attention at, 2, 4 or 'finest', got 1"),
        ("sd", "finest: 2, 1: 3", "factor must name a level once, got 'finest' and 1, the same in this model"),
        ("sd", "1: 2, 1: 3", "factor must name a level once, got 1 twice in '1: 2, 1: 3'"),
        ("sd", "1: 2, 3", "factor must be like '1: 4, 2: 2', level: factor, got '3' in '1: 2, 3'"),
        ("sd", "0", "factor must be 'auto', a number of at least 1 or {level: number}, got 0"),
        ("sd", "fast", "factor must be 'auto', a number of at least 1 or {level: number}, got 'fast'"),
        ("sd", "1: 0", "factor of level 1 must be a number of at least 1, got 0"),
    ],
)
def test_a_wrong_factor(model, todo, kind, factor, message):
    with pytest.raises(ValueError) as error:
        todo(model(kind), factor)
    assert str(error.value) == message


def test_a_wrong_factor_is_refused_before_a_model_is_loaded(pack):
    validate = pack.NODE_CLASS_MAPPINGS["TodoAttnToDo"].VALIDATE_INPUTS
    assert validate("auto") is validate("1: 4, 2: 2") is validate(None) is True
    assert validate("fast") == "factor must be 'auto', a number of at least 1 or {level: number}, got 'fast'"


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (0.5, 0.5, "end_percent must be above start_percent, 0.5, got 0.5"),
        (-0.1, 1.0, "start_percent must be a share of the sampling from 0 to 1, got -0.1"),
        (0.0, 20, "end_percent must be a share of the sampling from 0 to 1, got 20"),
    ],
)
def test_a_wrong_range(model, todo, start, end, message):
    with pytest.raises(ValueError) as error:
        todo(model(), start=start, end=end)
    assert str(error.value) == message


# The pack


def test_nodes_are_what_comfyui_asks_for(pack):
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        required = node.INPUT_TYPES()["required"]
        assert {"RETURN_TYPES", "FUNCTION", "CATEGORY", "DESCRIPTION"} <= set(vars(node))
        arguments = node.patch.__code__.co_varnames[1 : node.patch.__code__.co_argcount]
        assert tuple(required) == arguments
        assert name in pack.NODE_DISPLAY_NAME_MAPPINGS


def test_workflows_use_the_nodes_as_they_are(pack):
    names = set()
    for path in PACK.glob("example_workflows/*.json"):
        for node in json.loads(path.read_text())["nodes"]:
            kind = pack.NODE_CLASS_MAPPINGS.get(node["type"])
            if kind is not None:
                names.add(node["type"])
                widgets = [name for name in kind.INPUT_TYPES()["required"] if name != "model"]
                assert len(node["widgets_values"]) == len(widgets)
    assert names == set(pack.NODE_CLASS_MAPPINGS)


def test_the_pack_needs_neither_comfyui_nor_diffusers():
    code = f"""
import importlib.util, sys
sys.modules["diffusers"] = sys.modules["comfy"] = None
folder = {str(PACK)!r}
spec = importlib.util.spec_from_file_location("a/b", folder + "/__init__.py", submodule_search_locations=[folder])
module = sys.modules["a/b"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACK.parents[1])
