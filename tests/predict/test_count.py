"""Counted operations against formulas written out, torch's own count of the plain UNet, and the published figures."""

import json
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from todo_attn.config import schedule
from todo_attn.config.dato import DaToConfig
from todo_attn.config.todo import ToDoConfig
from todo_attn.models.architectures import CONFIGS, read_architecture
from todo_attn.models.unets import TEXT_TOKENS
from todo_attn.predict import count as cost

GRID, BATCH, CHANNELS = (12, 16), 2, 8
N = GRID[0] * GRID[1]
LAYERS = 3  # self-attentions of the finest level of the model below: one down, two up


def operations(work):
    """Of one call of each kind."""
    return Cost(0, work.full.operations, work.shallow.operations, work.reuse.operations)


class Cost(NamedTuple):
    """Operations of one call: without DaTo, and of each kind."""

    dense: int
    full: int
    shallow: int
    reuse: int


def call_cost(unet, config=None, **kwargs):
    config = DaToConfig() if config is None else config
    works = cost.count_work(unet, *GRID, [config], batch=BATCH, pixels_per_latent=1, **kwargs)
    dense, dato = map(operations, works)
    return dato._replace(dense=dense.full)


@pytest.fixture(scope="module")
def plain(originals):
    """With nothing pruned."""
    return call_cost(originals["sd"], DaToConfig(prune_ratio=0))


@pytest.fixture(scope="module")
def pruned(originals):
    """As a DaToConfig is by default."""
    return call_cost(originals["sd"])


def changed(unet, **arguments):
    """Its configuration with other arguments."""
    return {key: value for key, value in unet.config.items() if not key.startswith("_")} | arguments


def attention(queries, keys):
    """Of one self-attention: to_q and to_out, to_k and to_v, and the two products with every key."""
    return BATCH * (2 * 2 * queries * CHANNELS**2 + 2 * 2 * keys * CHANNELS**2 + 4 * queries * keys * CHANNELS)


def matching(bases, gone):
    """Of one choice of tokens: all others with the bases, then the pruned with those of the others that stay."""
    return 2 * BATCH * CHANNELS * ((N - bases) * bases + gone * (N - bases - gone))


def modules_cost(unet):
    """What torch counts in each module of a plain call, by its name."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet.to("meta")(
            torch.empty(BATCH, 4, *GRID, device="meta"), 1, torch.empty(BATCH, TEXT_TOKENS, 8, device="meta")
        )
    counts = counter.get_flop_counts()
    return {name.partition(".")[2]: sum(by_op.values()) for name, by_op in counts.items()}


def test_without_pruning_a_call_costs_what_torch_counts(unet, plain):
    modules = modules_cost(unet)
    last = "up_blocks.2"
    shallow = ("conv_in", "time_embedding", f"{last}.resnets.1", f"{last}.attentions.1", "conv_out")
    assert plain.full == plain.dense == modules[""]
    assert plain.shallow == sum(modules[name] for name in shallow)
    assert plain.reuse <= modules["conv_in"] + modules["conv_out"] + modules["time_embedding"]


@pytest.mark.parametrize(("ratio", "patch"), [(0.4, (2, 2)), (0.8, (5, 3))])
def test_pruning_by_formula(unet, plain, ratio, patch):
    gone, bases = int(ratio * N), (GRID[0] // patch[0]) * (GRID[1] // patch[1])
    found = call_cost(unet, DaToConfig(prune_ratio=ratio, patch=patch))
    change = attention(N - gone, N - gone) + matching(bases, gone) - attention(N, N)
    assert found.full - plain.full == LAYERS * change
    assert found.shallow - plain.shallow == change
    assert found.dense == plain.dense and found.reuse == plain.reuse


def test_pruning_with_todo_by_formula(unet, plain):
    gone, bases = int(0.4 * N), N // 4
    coarse = (GRID[0] // 3) * (GRID[1] // 3)
    # At every timestep, whatever the range.
    todo = ToDoConfig(factor={1: 3}, timestep_range=(0, 10), steps=(0.5, 1))
    found = call_cost(unet, DaToConfig(todo=todo))
    change = attention(N - gone, coarse) + matching(bases, gone) - attention(N, N)
    assert found.full - plain.full == LAYERS * change
    assert found.shallow - plain.shallow == change
    assert found.dense == plain.dense


def test_more_that_is_pruned_by_formula(unet, pruned):
    cross = call_cost(unet, DaToConfig(prune_cross_attention=True))
    both = call_cost(unet, DaToConfig(prune_cross_attention=True, prune_feed_forward=True))
    text = TEXT_TOKENS
    saved = int(0.4 * N) * BATCH * (2 * 2 * CHANNELS**2 + 4 * text * CHANNELS)  # of to_q, to_out and both products
    assert pruned.full - cross.full == LAYERS * saved
    assert cross.shallow - both.shallow == int(0.4 * N) * BATCH * 2 * 12 * CHANNELS**2  # GEGLU of width 4


def test_a_ratio_per_call_is_refused(unet):
    with pytest.raises(ValueError, match=r"config must have one prune_ratio for all calls, got 5"):
        call_cost(unet, DaToConfig(prune_ratio=(0.4, 0, 0, 0.4, 0), cache_schedule="1212"))


def test_nothing_is_left_behind(unet, hooks):
    state, heard = torch.get_rng_state(), []
    before = hooks(unet)
    call_cost(unet, watch=lambda done, total: heard.append((done, total)))
    assert hooks(unet) == before
    assert not any(parameter.is_meta for parameter in unet.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_sdxl_is_counted_with_its_sizes(make_unet):
    found = call_cost(make_unet("sdxl"))
    assert found.dense > found.full > found.shallow > found.reuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 100}, "height must be a positive multiple of 8, in pixels, got 100"),
        ({"width": 0}, "width must be a positive multiple of 8, in pixels, got 0"),
        ({"width": 64.0}, "width must be a positive multiple of 8, in pixels, got 64.0"),
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_counted(unet, arguments, message):
    with pytest.raises(ValueError, match=message):
        cost.count_work(unet, **{"height": 64, "width": 64, "configs": [], **arguments})


def test_models_that_want_other_inputs(unet):
    message = r"unet must have no addition_embed_type but 'text' and 'text_time', got 'image'"
    with pytest.raises(ValueError, match=message):
        call_cost(changed(unet, addition_embed_type="image", encoder_hid_dim=8))
    with pytest.raises(ValueError, match=r"unet must have no class_embed_type, got 'timestep'"):
        call_cost(changed(unet, class_embed_type="timestep"))


def test_a_caption_beside_the_timestep_is_counted(unet, plain):
    """The shipped pipeline has one; it is computed at every call, of whatever kind."""
    counted = call_cost(
        changed(unet, addition_embed_type="text", addition_embed_type_num_heads=4), DaToConfig(prune_ratio=0)
    )
    more = counted.dense - plain.dense
    assert more > 0
    assert counted == Cost(*(count + more for count in plain))


def test_class_labels_are_given(unet, plain):
    # The embedding is looked up, which costs nothing.
    assert call_cost(changed(unet, num_class_embeds=10), DaToConfig(prune_ratio=0)) == plain


def test_stable_diffusion_at_512_saves_7_times_with_the_coco_preset():
    dense, coco, plain = map(
        operations,
        cost.count_work(CONFIGS["sd15"], 512, 512, [DaToConfig(), DaToConfig(prune_ratio=0)]),
    )
    kinds = "2" + schedule.load("coco").digits
    assert [kinds.count(kind) for kind in "210"] == [5, 21, 25]
    assert dense.full == pytest.approx(1606.5e9, rel=1e-4)
    assert 51 * dense.full / (5 * coco.full + 21 * coco.shallow + 25 * coco.reuse) > 7
    # What the published code needs: nothing pruned, and the middle block in each shallow call.
    published = 51 * dense.full / (5 * plain.full + 21 * (plain.shallow + 24.2e9) + 25 * 0.19e9)
    assert published == pytest.approx(schedule.load("coco").published_speedup, abs=0.006)


def test_built_in_architectures():
    assert read_architecture("sd15").size == (512, 512)
    assert read_architecture("sdxl").size == (1024, 1024)


def write_pipeline(folder, unet, vae=None):
    for name, config in (("unet", unet), ("vae", vae)):
        if config is not None:
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(config))


def test_a_folder_is_read_by_its_configurations_alone(tmp_path, unet, plain):
    config = changed(unet, _class_name="UNet2DConditionModel", sample_size=[16, 24])
    write_pipeline(tmp_path, config, {"block_out_channels": [4, 8]})
    found = read_architecture(str(tmp_path))
    assert (found.name, found.pixels_per_latent, found.size) == (str(tmp_path), 2, (32, 48))
    assert call_cost(found.config, DaToConfig(prune_ratio=0)) == plain


def test_a_folder_without_vae_or_size(tmp_path):
    write_pipeline(tmp_path, {"_class_name": "UNet2DConditionModel", "sample_size": None})
    found = read_architecture(str(tmp_path))
    assert (found.pixels_per_latent, found.size) == (8, None)


@pytest.mark.parametrize("content", [None, "", "[1]", "nothing"], ids=["absent", "empty", "list", "no-json"])
def test_a_folder_that_holds_no_unet(tmp_path, content):
    (tmp_path / "unet").mkdir()
    if content is not None:
        (tmp_path / "unet" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"^model must be sd15, sdxl, or a folder or Hub id of a pipeline with a UNet"):
        read_architecture(str(tmp_path))


def test_another_kind_of_unet(tmp_path):
    write_pipeline(tmp_path, {"_class_name": "UNet3DConditionModel"})
    with pytest.raises(ValueError, match=r"^model must have a UNet2DConditionModel, .* has a UNet3DConditionModel"):
        read_architecture(str(tmp_path))
