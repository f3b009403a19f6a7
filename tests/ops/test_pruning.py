"""``ops.plan_pruning`` against a plain-Python loop in float64, wherever its decisions have a gap above 1e-6."""

import subprocess
import sys

import pytest
import torch

from todo_attn.kernels import sources
from todo_attn.ops import fallback, pruning, reference
from todo_attn.ops.pruning import plan_from_bases, plan_pruning

GAP = 1e-6
GRIDS = [(8, 8), (7, 9), (5, 12), (11, 4), (6, 6)]


def cosines(x):
    length = x.norm(dim=-1, keepdim=True)
    unit = x / torch.where(length > 0, length, 1)
    return unit @ unit.transpose(-1, -2)


def check(x, score, grid, ratio, patch):
    """Equal to the loop, sample by sample; a decision within the gap is left out. Returns how many were not."""
    kept, source = plan_pruning(x, score, grid, ratio, patch)
    tokens = grid[0] * grid[1]
    assert kept.dtype == source.dtype == torch.int64
    assert kept.shape == (len(x), tokens - int(ratio * tokens)) and source.shape == (len(x), tokens)
    expected_kept, expected_source = reference.plan_pruning(x.double(), score, grid, ratio, patch)
    compared = 0
    for b, similarity in enumerate(cosines(x.double())):
        height, width = grid[0] // patch[0], grid[1] // patch[1]
        image = score[b].view(grid)[: height * patch[0], : width * patch[1]]
        best = image.reshape(height, patch[0], width, patch[1]).amax((1, 3))
        bases = [i for i in range(tokens) if (score[b, i] == best).any()]  # random scores are all different
        others = [i for i in range(tokens) if i not in bases]
        ranked = similarity[others][:, bases].amax(1).sort(descending=True).values
        pruned = int(ratio * tokens)
        if 0 < pruned < len(others) and ranked[pruned - 1] - ranked[pruned] <= GAP:
            continue
        assert torch.equal(kept[b], expected_kept[b])
        two = similarity[:, kept[b]].topk(2, dim=1).values if kept.shape[1] > 1 else torch.tensor([[1.0, 0.0]])
        gone = torch.ones(tokens, dtype=torch.bool)
        gone[kept[b]] = False
        clear = ~gone | (two[:, 0] - two[:, 1] > GAP)
        assert torch.equal(source[b][clear], expected_source[b][clear])
        compared += 1
    return compared


@pytest.mark.parametrize("patch", [(2, 2), (3, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_the_loop(grid, patch):
    tokens = grid[0] * grid[1]
    most = 1 - (grid[0] // patch[0]) * (grid[1] // patch[1]) / tokens
    compared = 0
    ratios = (0.0, 0.1, 0.3, 0.4, most)
    for seed, ratio in enumerate(ratios):
        torch.manual_seed(seed)
        x, score = torch.randn(2, tokens, 6), torch.randn(2, tokens)
        compared += check(x, score, grid, ratio, patch)
    assert compared >= 2 * len(ratios) - 1  # a gap that small is rare


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_strides(dtype):
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(7, 63, 2).to(dtype).permute(2, 1, 0)
        score = torch.randn(63, 2).t()
        assert check(x, score, (7, 9), 0.4, (2, 2)) >= 1


def test_ties_are_pruned_in_token_order():
    """All tokens alike: the first that are no bases go, each filled in from the first kept token."""
    x = torch.randn(1, 1, 320).expand(2, 64, 320)
    score = torch.zeros(2, 64)  # of a patch's ties the lowest offset is the base
    kept, source = plan_pruning(x, score, (8, 8), 0.4)
    others = [i for i in range(64) if i % 2 or i // 8 % 2]
    gone = others[:25]
    expected = [i for i in range(64) if i not in gone]
    assert kept.tolist() == [expected] * 2
    assert source.tolist() == [[0 if i in gone else expected.index(i) for i in range(64)]] * 2


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_tied_sources_go_to_the_lowest_kept_token(ratio):
    """All tokens alike, the bases anywhere in their patches: it may be a base or not, in any patch."""
    for seed in range(10):
        torch.manual_seed(seed)
        x, score = torch.randn(1, 1, 40).expand(2, 63, 40), torch.randn(2, 63)
        kept, source = plan_pruning(x, score, (7, 9), ratio)
        expected_kept, expected_source = reference.plan_pruning(x.double(), score, (7, 9), ratio, (2, 2))
        assert torch.equal(kept, expected_kept) and torch.equal(source, expected_source)


def test_scaled_copies_tie():
    """Cosines that are 1 but for rounding are as similar as those that are 1 exactly."""
    x = torch.randn(1, 1, 320) * (1 + torch.arange(64)[None, :, None] / 3)
    kept, _ = plan_pruning(x, torch.zeros(1, 64), (8, 8), 0.4)
    others = [i for i in range(64) if i % 2 or i // 8 % 2]
    assert kept.tolist() == [[i for i in range(64) if i not in others[:25]]]


def test_tokens_of_zeros_stay_finite():
    x = torch.randn(1, 16, 4)
    x[0, 1:7] = 0
    kept, source = plan_pruning(x, torch.randn(1, 16), (4, 4), 0.5)
    assert kept.shape == (1, 8) and ((source >= 0) & (source < 8)).all()
    kept, _ = plan_pruning(torch.zeros(1, 16, 4), torch.zeros(1, 16), (4, 4), 0.75)
    assert kept.tolist() == [[0, 2, 8, 10]]


def test_ratio_zero_and_the_most():
    x, score = torch.randn(2, 63, 5), torch.randn(2, 63)
    kept, source = plan_pruning(x, score, (7, 9), 0)
    assert kept.tolist() == source.tolist() == [list(range(63))] * 2
    kept, _ = plan_pruning(x, score, (7, 9), (63 - 12) / 63)
    assert kept.shape == (2, 63 - int((63 - 12) / 63 * 63))
    with pytest.raises(
        ValueError, match=r"ratio must be at most 0.8095\d*, .* the 12 base tokens .* among 63, got 0.81"
    ):
        plan_pruning(x, score, (7, 9), 0.81)


def test_empty_batch():
    kept, source = plan_pruning(torch.zeros(0, 16, 4), torch.zeros(0, 16), (4, 4), 0.5)
    assert kept.shape == (0, 8) and source.shape == (0, 16)


def test_given_bases_stay():
    x = torch.randn(2, 64, 5)
    bases = torch.stack([torch.randperm(64)[:16] for _ in range(2)]).int()
    kept, _ = plan_from_bases(x, bases, 3 * x.shape[1] // 4)
    assert torch.equal(kept, bases.long().sort(1).values)


def test_traces_in_one_graph_and_on_meta_tensors():
    x, score = torch.randn(2, 63, 5, requires_grad=True), torch.randn(2, 63)
    compiled = torch.compile(plan_pruning, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(x, score, (7, 9), 0.4), plan_pruning(x, score, (7, 9), 0.4), strict=True):
        assert torch.equal(actual, expected) and not actual.requires_grad
    kept, source = plan_pruning(x.to("meta"), score.to("meta"), (7, 9), 0.4)
    assert kept.shape == (2, 38) and source.shape == (2, 63) and kept.is_meta


MEASURE = """
import resource, sys, torch
from todo_attn.ops.pruning import plan_pruning
torch.set_num_threads(1)
side = int(sys.argv[1])
x, score = torch.randn(1, side * side, 32), torch.randn(1, side * side)
plan_pruning(x[:, :256], score[:, :256], (16, 16), 0.4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan_pruning(x, score, (side, side), 0.4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_linearly():
    """16 times the tokens, at most 16 times the peak, the block of scores counted once (KiB). Quadratic: 256 times."""

    def peak(side):
        run = subprocess.run([sys.executable, "-c", MEASURE, str(side)], capture_output=True, text=True, check=True)
        return int(run.stdout)

    block = 4 * 1024 * (4 + 1)  # 2^22 scores in fp32 and their mask of bytes, in KiB
    small, large = peak(32), peak(128)
    assert large <= 16 * max(small, 1024) + 2 * block, (small, large)
    assert large < 16384 * 9830 * 4 // 1024 // 4, "a quarter of the kept x pruned scores would be more"


BAD = [
    ({"x": torch.zeros(2, 12)}, "x must have shape"),
    ({"grid": (3, 5)}, "grid must match the tokens of x"),
    ({"score": torch.zeros(2, 11)}, "score must have the batch and tokens of x"),
    ({"score": torch.zeros(2, 12, device="meta")}, "score must be on the device of x"),
    ({"score": torch.zeros(2, 12, dtype=torch.int64)}, "score must be of dtype"),
    ({"ratio": -0.1}, "ratio must be a number from 0"),
    ({"ratio": 1.0}, "ratio must be a number from 0"),
    ({"ratio": float("nan")}, "ratio must be a number from 0"),
    ({"ratio": True}, "ratio must be a number from 0"),
    ({"ratio": "0.4"}, "ratio must be a number from 0"),
    ({"ratio": 0.76}, "ratio must be at most 0.75"),
    ({"patch": (0, 2)}, "patch must"),
    ({"x": torch.zeros(2, 12, 0)}, "x must have at least one channel"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m + str(i) for i, (_, m) in enumerate(BAD)])
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(2, 12, 4), "score": torch.zeros(2, 12), "grid": (2, 6), "ratio": 0.4} | change
    with pytest.raises(ValueError, match=message):
        plan_pruning(**arguments)


def test_a_grid_without_a_whole_patch():
    x, score = torch.randn(1, 3, 8), torch.randn(1, 3)
    with pytest.raises(ValueError, match="ratio must be 0 on a grid without a whole patch"):
        plan_pruning(x, score, (1, 3), 0.5)
    kept, source = plan_pruning(x, score, (1, 3), 0)
    assert kept.tolist() == source.tolist() == [[0, 1, 2]]


@pytest.fixture
def poisoned():
    """New memory holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("grid, ratio", [((7, 9), 0.4), ((16, 20), 0.1), ((6, 6), 0.75), ((2, 2), 0.25), ((7, 3), 0.5)])
def test_the_kernel_of_the_sources_chooses_what_torch_does(monkeypatch, poisoned, grid, ratio, dtype):
    torch.manual_seed(0)
    x, score = torch.randn(3, grid[0] * grid[1], 6), torch.randn(3, grid[0] * grid[1])
    if dtype == torch.int64:  # few values, so that many similarities tie
        x, dtype = x.sign(), torch.float32
    x[1, ::2] = x[1, 0]
    x[2, 1] = float("nan")
    x = x.to(dtype)
    expected = plan_pruning(x, score, grid, ratio)
    launches = []
    launch = sources.sources
    monkeypatch.setattr(sources, "sources", lambda *chosen: launches.append(chosen) or launch(*chosen))
    monkeypatch.setattr(pruning, "backend_of", lambda x: "triton")
    assert all(torch.equal(a, b) for a, b in zip(plan_pruning(x, score, grid, ratio), expected, strict=True))
    assert len(launches) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled here")
@pytest.mark.parametrize("ahead", [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, float("nan")])
def test_the_kernel_of_the_sources_on_both_sides_of_a_tie(ahead):
    """Token 2 is pruned; token 0 or 3 is its base, the other its rival, which is ``ahead`` steps more similar."""
    step = 2.0**-21
    for base, rival in ((0, 3), (3, 0)):
        chosen = pruning._Chosen(
            kept=torch.tensor([[0, 1, 3]]),
            gone=torch.tensor([[2]]),
            first=torch.tensor([[1]]),
            base=torch.tensor([[0, 1]]),
            similarity=torch.tensor([[0.5, 0.5]]),
            bases=torch.tensor([[1, base]]),
            rival=torch.tensor([[0]]),
            rival_similarity=torch.tensor([[0.5 + ahead * step]]),
            stays=torch.tensor([[rival]]),
        )
        winner = rival if ahead > 1 else min(base, rival) if ahead >= -1 else base
        expected = torch.tensor([[0, 1, [0, None, None, 2][winner], 2]])
        assert torch.equal(pruning._sources(chosen), expected)
        assert torch.equal(sources.sources(*chosen, step), expected)


def test_a_failing_kernel_of_the_sources_leaves_it_to_torch(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of registers")

    x, score = torch.randn(1, 36, 4), torch.randn(1, 36)
    expected = plan_pruning(x, score, (6, 6), 0.5)
    monkeypatch.setattr(sources, "sources", fails)
    monkeypatch.setattr(pruning, "backend_of", lambda x: "triton")
    monkeypatch.setattr(fallback, "_failures", {})
    assert all(torch.equal(a, b) for a, b in zip(plan_pruning(x, score, (6, 6), 0.5), expected, strict=True))
    assert "out of registers" in fallback.reason(x.device, x.dtype)
