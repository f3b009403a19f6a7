"""Token pruning against the paper's method written a second time, in plain loops and float64.

Selection (section 3.2): a base token per patch by score; of the others those most similar to their best base go; each
is filled in from its best match among those that stay.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock

from todo_attn.config.dato import DaToConfig
from todo_attn.config.todo import ToDoConfig
from todo_attn.diffusers.dato import apply_dato, remove_dato


class Reference:
    """On a dense UNet: prunes by replacing the forwards of ``names`` (attn1, attn2, ff) in the finest blocks."""

    def __init__(self, unet, config, *, level, names=("attn1",), paired=True):
        self.config, self.paired, self.level = config, paired, level
        self.outputs, self.noise = [], torch.Generator().manual_seed(config.seed)
        self.chosen = []
        self.size = None
        unet.register_forward_pre_hook(self._size)
        for name, block in unet.named_modules():
            if hasattr(block, "attn1") and _level(name, unet) == level:
                block.register_forward_pre_hook(lambda _, args: self.chosen.append(self.choose(args[0])))
                for part in names:
                    self._wrap(getattr(block, part))

    def _size(self, unet, args):
        self.size = [-(-side // self.level) for side in args[0].shape[-2:]]

    def _wrap(self, module):
        original = module.forward

        def forward(x, *args, **kwargs):
            kept, source = self.chosen[-1]
            rows = [original(x[i : i + 1, kept[i]], *args, **_row(kwargs, i)) for i in range(len(x))]
            return torch.stack([row[0][source[i]] for i, row in enumerate(rows)])

        module.forward = forward

    def choose(self, x):
        (batch, tokens, _), (height, width), (sy, sx) = x.shape, self.size, self.config.patch
        assert tokens == height * width
        images = batch // 2 if self.paired else batch
        score = noise = torch.randn(1, tokens, generator=self.noise).expand(images, -1)
        if len(self.outputs) >= 2 and self.outputs[-1] is not None and self.outputs[-2] is not None:
            change = (self.outputs[-1] - self.outputs[-2]).abs().mean(1)
            change = F.interpolate(change[:, None], size=(height, width), mode="area").flatten(1)[:images]
            score = self.config.dynamics_weight * change + self.config.noise_weight * noise
        plans = [self._plan(x[i].double(), score[i % images], (height, width), (sy, sx)) for i in range(batch)]
        return [kept for kept, _ in plans], [source for _, source in plans]

    def _plan(self, x, score, grid, patch):
        tokens = len(x)
        bases = []
        for top in range(0, grid[0] - patch[0] + 1, patch[0]):
            for left in range(0, grid[1] - patch[1] + 1, patch[1]):
                cells = [(top + i) * grid[1] + left + j for i in range(patch[0]) for j in range(patch[1])]
                bases.append(max(cells, key=lambda n: score[n].item()))
        x = x / x.norm(dim=-1, keepdim=True)
        similarity = x @ x.T
        others = sorted(set(range(tokens)) - set(bases), key=lambda n: -similarity[n, bases].max().item())
        pruned = set(others[: int(self.config.prune_ratio * tokens)])
        kept = [n for n in range(tokens) if n not in pruned]
        best = similarity[:, kept].argmax(1)
        source = torch.tensor([best[n] if n in pruned else kept.index(n) for n in range(tokens)])
        return torch.tensor(kept), source


def _row(kwargs, i):
    return {key: x[i : i + 1] if isinstance(x, torch.Tensor) else x for key, x in kwargs.items()}


def _level(name, unet):
    where, index = name.split(".")[:2]
    depth = len(unet.down_blocks)
    steps = {"down_blocks": lambda: int(index), "up_blocks": lambda: depth - 1 - int(index)}
    return 2 ** steps.get(where, lambda: depth - 1)()


@torch.no_grad()
def compare(unet, dense, reference, inputs, *, size, batch, calls=4):
    """The outputs of ``unet`` under DaTo and of ``dense`` under the reference, call by call."""
    for i, timestep in enumerate(torch.tensor([900 - 50 * i for i in range(calls)])):
        given = inputs(unet, size, batch, seed=i)
        actual = unet(given.sample, timestep, **given.kwargs).sample
        expected = dense(given.sample, timestep, **given.kwargs).sample
        assert (actual - expected).abs().max() < 2e-5 * max(1, expected.abs().max()), i
        reference.outputs.append(expected)


FLAGS = {
    "self": ({}, ("attn1",)),
    "cross": ({"prune_cross_attention": True}, ("attn1", "attn2")),
    "all": ({"prune_cross_attention": True, "prune_feed_forward": True}, ("attn1", "attn2", "ff")),
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("kind", "level"), [("sd", 1), ("sdxl", 2)])
def test_whole_unets(make_unet, inputs, kind, level, flags):
    options, names = FLAGS[flags]
    config = DaToConfig(dynamics_weight=3.0, **options)
    unet, dense, plain = make_unet(kind), make_unet(kind), make_unet(kind)
    reference = Reference(dense, config, level=level, names=names)
    apply_dato(unet, config)
    compare(unet, dense, reference, inputs, size=(8, 12), batch=2)
    given = inputs(unet, (8, 12), 2, seed=9)
    with torch.no_grad():
        changed = unet(given.sample, 5, **given.kwargs).sample - plain(given.sample, 5, **given.kwargs).sample
    assert changed.abs().max() > 1e-3


CASES = {
    "odd grid": {"size": (9, 7)},
    "odd batch": {"batch": 3, "paired": False},
    "one image": {"batch": 1, "paired": False},
    "two pairs": {"batch": 4},
    "not aligned": {"align_guidance": False, "paired": False},
    "patch": {"patch": (3, 2), "prune_ratio": 0.75, "size": (7, 8)},
    "most": {"prune_ratio": 0.75, "size": (8, 6)},
    "noise alone": {"dynamics_weight": 0.0, "seed": 12},
    "dynamics alone": {"noise_weight": 0.0, "dynamics_weight": 1.0, "batch": 1, "paired": False},
}


@pytest.mark.parametrize("case", CASES)
def test_one_block(make_unet, inputs, case):
    options = dict(CASES[case])
    size, batch, paired = options.pop("size", (8, 6)), options.pop("batch", 2), options.pop("paired", True)
    config = DaToConfig(**options)
    unet, dense = make_unet("small"), make_unet("small")
    reference = Reference(dense, config, level=1, paired=paired)
    apply_dato(unet, config)
    compare(unet, dense, reference, inputs, size=size, batch=batch)
    assert len(reference.chosen) == 4
    kept = reference.chosen[-1][0]
    assert all(len(k) == math.prod(size) - int(config.prune_ratio * math.prod(size)) for k in kept)


def test_after_a_reused_output_the_score_is_noise_alone(make_unet, inputs):
    """The last two outputs are the same then. From the next call but one there is a difference again."""
    config = DaToConfig(cache_schedule="220222", dynamics_weight=50.0)
    unet, dense = make_unet("small"), make_unet("small")
    reference = Reference(dense, config, level=1)
    apply_dato(unet, config)
    actual = []
    with torch.no_grad():
        for i, (digit, timestep) in enumerate(zip("2220222", torch.arange(900, 893, -1), strict=True)):
            given = inputs(unet, (8, 6), 2, seed=i)
            actual.append(unet(given.sample, timestep, **given.kwargs).sample)
            if digit == "0":
                assert torch.equal(actual[-1], actual[-2])
                reference.outputs = [actual[-1]]  # the one before it is forgotten
                continue
            expected = dense(given.sample, timestep, **given.kwargs).sample
            assert (actual[-1] - expected).abs().max() < 2e-5, i
            reference.outputs.append(expected)


def test_without_noise_each_patch_keeps_its_first_token_after_a_reused_output(make_unet, inputs):
    """The difference is then 0 everywhere, as published, and noise of weight 0 must not decide."""
    unet, chosen = make_unet("small"), []
    apply_dato(unet, DaToConfig(cache_schedule="22022", noise_weight=0.0, dynamics_weight=1.0))
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    pruning = unet._todo_attn_dato._pruning[0]._blocks[0]
    block.register_forward_pre_hook(lambda *_: chosen.append(pruning.score.clone()))
    with torch.no_grad():
        for i, timestep in enumerate(torch.arange(900, 894, -1)):
            given = inputs(unet, (8, 6), 2, seed=i)
            unet(given.sample, timestep, **given.kwargs)
    assert [bool(score.any()) for score in chosen] == [True, True, True, False, True]  # no block runs in the "0" call


def test_feed_forward_in_chunks_is_not_pruned_and_that_is_said(make_unet, inputs, caplog):
    unet, plain = make_unet("small"), make_unet("small")
    apply_dato(unet, DaToConfig(prune_feed_forward=True))
    apply_dato(plain, DaToConfig())
    for net in (unet, plain):
        for module in net.modules():
            if isinstance(module, BasicTransformerBlock):
                module.set_chunk_feed_forward(8, dim=1)
    given = inputs(unet, (8, 8))
    with torch.no_grad():
        for t in torch.tensor([900, 800]):
            actual, expected = (net(given.sample, t, **given.kwargs).sample for net in (unet, plain))
            assert torch.equal(actual, expected)
    messages = [r.getMessage() for r in caplog.records if r.name == "todo_attn"]
    assert messages == ["DaTo: prune_feed_forward does nothing while feed-forward layers run in chunks of the tokens."]


def test_a_shallow_call_prunes_its_one_attention(make_unet, inputs):
    config = DaToConfig(cache_schedule="1", prune_ratio=0.5)
    unet, seen = make_unet("sd"), []
    for name, module in unet.named_modules():
        if name.endswith("attn1.to_q"):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0].shape[1])))
    apply_dato(unet, config)
    for i, timestep in enumerate(torch.tensor([900, 800])):
        given = inputs(unet, (8, 8), seed=i)
        seen.clear()
        with torch.no_grad():
            unet(given.sample, timestep, **given.kwargs)
    assert [count for _, count in seen] == [32]
    assert seen[0][0].startswith("up_blocks.2.attentions.1.")


def test_only_the_finest_level_is_pruned(any_unet, inputs):
    for kind, finest in (("sd", 64), ("sdxl", 16), ("deep", 64)):
        unet, seen = any_unet(kind), []
        for name, module in unet.named_modules():
            if name.endswith("attn1.to_q"):
                module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
        apply_dato(unet, DaToConfig(prune_ratio=0.5))
        given = inputs(unet, (8, 8))
        with torch.no_grad():
            unet(given.sample, 900, **given.kwargs)
        assert finest // 2 in seen
        assert finest not in seen
        assert finest // 4 in seen


DOWN = {
    "padded on both sides": ({}, (5, 4)),
    "padded on one": ({"downsample_padding": 0}, (4, 3)),
    "pooled": ({"down_block_types": ["ResnetDownsampleBlock2D", *["CrossAttnDownBlock2D"] * 2]}, (4, 3)),
}


@pytest.mark.parametrize("how", DOWN)
def test_the_grid_that_an_odd_image_has_at_level_2(make_unet, inputs, how):
    """Tokens are scored before the UNet halves the image, by its own rounding."""
    options, grid = DOWN[how]
    unet, seen = make_unet("sdxl"), []
    unet = type(unet).from_config({**unet.config, **options, "_use_default_values": []}).eval()
    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    given = inputs(unet, (9, 7))
    with torch.no_grad():
        unet(given.sample, 900, **given.kwargs)
        apply_dato(unet, DaToConfig(prune_ratio=0.5))
        unet(given.sample, 900, **given.kwargs)
    assert seen == [math.prod(grid), math.prod(grid) - math.prod(grid) // 2]


def test_a_ratio_for_each_call(make_unet, inputs):
    ratios = (0.0, 0.25, 0.5, 0.75)
    unet, seen = make_unet("small"), []
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    apply_dato(unet, DaToConfig(prune_ratio=ratios))
    for i, timestep in enumerate(torch.arange(900, 896, -1)):
        given = inputs(unet, (8, 8), seed=i)
        with torch.no_grad():
            unet(given.sample, timestep, **given.kwargs)
    assert seen == [64, 48, 32, 16]


def test_masked_self_attention_keeps_its_tokens(make_unet, inputs):
    """A mask has a column for every token, so it is left as it is."""
    unet, dense = make_unet("small"), make_unet("small")
    given = inputs(unet, (8, 8))
    mask = {"attention_mask": torch.ones(2, 64)}
    unet.mid_block = dense.mid_block = None  # whose grid has another number of tokens than the mask
    apply_dato(unet, DaToConfig())
    with torch.no_grad():
        assert torch.equal(
            unet(given.sample, 900, **given.kwargs, **mask).sample,
            dense(given.sample, 900, **given.kwargs, **mask).sample,
        )


@pytest.mark.parametrize("todo", [None, ToDoConfig(factor={1: 2})], ids=["alone", "with-todo"])
def test_self_attention_in_windows_is_not_pruned_and_that_is_said(make_unet, inputs, caplog, todo):
    """As in HiDiffusion, whose blocks hand windows of the image to attn1: more rows, with fewer tokens each."""
    unet = make_unet("small")
    attn1 = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    given = inputs(unet)
    attn1.register_forward_pre_hook(lambda _, args: (args[0].unflatten(1, (4, -1)).flatten(0, 1),))
    apply_dato(unet, DaToConfig(prune_ratio=0.4, todo=todo))
    attn1.register_forward_hook(lambda _, args, output: output.unflatten(0, (-1, 4)).flatten(1, 2))
    with torch.no_grad():
        actual = [unet(given.sample, timestep, **given.kwargs).sample for timestep in torch.tensor([500, 400])]
        remove_dato(unet)
        expected = [unet(given.sample, timestep, **given.kwargs).sample for timestep in torch.tensor([500, 400])]
    assert all(map(torch.equal, actual, expected))
    assert sum("other tokens than its block" in record.getMessage() for record in caplog.records) == 1


def test_a_grid_without_a_whole_patch_is_left_dense(make_unet, inputs):
    unet, dense = make_unet("small"), make_unet("small")
    apply_dato(unet, DaToConfig(patch=(9, 1)))
    given = inputs(unet, (8, 8))
    with torch.no_grad():
        assert torch.equal(
            unet(given.sample, 900, **given.kwargs).sample, dense(given.sample, 900, **given.kwargs).sample
        )
