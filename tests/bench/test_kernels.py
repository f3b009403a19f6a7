"""Every candidate of every benchmark on tiny shapes: right against its oracle, and never timed where it is not."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from todo_attn import machine, ops
from todo_attn.bench import attention, harness, kernels, matching, peers, report, tokens, trial
from todo_attn.bench.cases import Case
from todo_attn.bench.harness import Rounds

CPU = torch.device("cpu")
ABOUT = {"device": "none"}
ATTENTION = Case("attention", "sd15", 64, 96, 1, 3, "fp32", max_kv_tokens=24)  # 8 x 12 tokens, 4 x 6 keys
CASES = [
    ATTENTION,
    replace(ATTENTION, peers="sdpa", max_kv_tokens=4096),
    replace(ATTENTION, peers="best", model="sdxl", level=2),
    replace(ATTENTION, benchmark="gather"),
    replace(ATTENTION, benchmark="scatter"),
    replace(ATTENTION, benchmark="recover"),
    replace(ATTENTION, benchmark="recover", residual=True),
    replace(ATTENTION, benchmark="match_tokens"),
    replace(ATTENTION, benchmark="plan_pruning", height=72),  # a row past the last whole patch
    replace(ATTENTION, benchmark="training"),
    replace(ATTENTION, benchmark="training", max_kv_tokens=4096, dtype="bf16"),
]
NAMES = [f"{case.benchmark}-{case.peers}" + "-residual" * case.residual for case in CASES]
on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Two sets of inputs; and Triton's interpreter, which is slow, only where a test asks for it."""
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1)
    if not torch.cuda.is_available():
        monkeypatch.setattr(attention, "_packed", lambda case, device: trial.needs_cuda(device))


PACKED = attention._packed


def run(case, device=CPU):
    (rows,) = kernels.run([case], device, Rounds(warmup=1, rounds=2))
    return rows


def candidates(rows):
    """Each candidate of the rows once, by name."""
    return {row[role]["name"]: row[role] for row in rows for role in ("baseline", "contender")}


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_side_is_right_and_every_pair_a_row(case, device):
    case = case if device == "cpu" else replace(case, dtype="fp16", height=512, width=768)
    rows = run(case, torch.device(device))
    assert len(rows) == case.rows
    assert {row["benchmark"] for row in rows} == {case.benchmark}
    for name, candidate in candidates(rows).items():
        if case.best_only and case.benchmark not in ("attention", "training"):
            assert None not in candidate.get("best_of", {}).values()  # those without a row too
        if candidate["error"] is None:
            assert len(candidate["samples"]) == 2
            assert candidate["gb_per_s"] == pytest.approx(candidate["bytes"] / candidate["seconds"]["p50"] / 1e9)
        else:
            # What a GPU lacks (SageAttention, a backend's head dim) is a peer's to say.
            assert candidate["error"] == "RuntimeError: needs a CUDA GPU" if device == "cpu" else "todo" not in name
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_the_fastest_rival_says_so_and_other_forms_are_set_against_it(monkeypatch):
    monkeypatch.setattr(attention, "SDPA", ("dense", "published", "sdpa-cudnn"))  # of which two run here
    rows = run(ATTENTION)
    named = candidates(rows)
    (best,) = (name for name, candidate in named.items() if "best_of" in candidate)
    medians = named[best]["best_of"]
    assert set(medians) == {"dense", "published", "sdpa-cudnn", *attention.FLASH}
    assert medians["sdpa-cudnn"] is None
    assert best == min(("dense", "published"), key=lambda name: named[name]["seconds"]["p50"])
    others = {row["contender"]["name"]: row["baseline"]["name"] for row in rows if row["contender"]["name"] != "todo"}
    assert others == {"todo-packed": best, "todo-coarse": best}


@pytest.mark.parametrize(
    ("case", "rivals"),
    [
        (CASES[3], {"torch", "index_select"}),
        (CASES[4], {"torch", "index_copy"}),
        (CASES[6], {"torch", "index_select", "published"}),
        (CASES[7], {"published", "torch-pairs"}),
        (CASES[8], {"published", "torch-pairs"}),
    ],
)
def test_every_way_to_do_it_in_torch_is_a_rival(case, rivals):
    baselines = [row["baseline"] for row in run(case)]
    (best,) = (candidate for candidate in baselines if "best_of" in candidate)
    assert set(best["best_of"]) == rivals
    assert best["best_of"][best["name"]] == min(best["best_of"].values())
    told = {best["name"], "copy"} if case.best_only else rivals
    assert len(baselines) == 2 and {candidate["name"] for candidate in baselines} == told


def test_where_no_rival_runs_each_says_why(monkeypatch):
    def broken(inputs, case, device):
        raise RuntimeError("no such backend")

    for name in attention.SDPA:
        monkeypatch.setitem(peers.BUILD, name, broken)
    rows = run(replace(ATTENTION, peers="best"))
    assert [row["baseline"]["error"] for row in rows] == ["RuntimeError: no such backend"] * 3
    assert [row["speedup"] for row in rows] == [None] * 3


def spoiled(function, spoil):
    return lambda *arguments, **named: spoil(function(*arguments, **named))


@pytest.mark.parametrize(
    ("name", "case", "spoil", "reason"),
    [
        ("downsampled_attention", ATTENTION, lambda out: out * 1.001, "off by 0.001 of its norm"),
        ("downsampled_attention", ATTENTION, lambda out: out.log(), "not finite"),
        ("gather_tokens", CASES[3], lambda out: out.nextafter(torch.tensor(9.0)), "not the same to the last bit"),
        ("scatter_tokens", CASES[4], lambda out: out.roll(1, 0), "not the same to the last bit"),
        ("recover_tokens", CASES[6], lambda out: out[:, 1:], "not the same to the last bit"),
        ("match_tokens", CASES[7], lambda out: ((out[0] + 1) % 24, out[1]), "a match is off by"),
        ("match_tokens", CASES[7], lambda out: (out[0], out[1] + 1e-4), "a similarity is off by 0.0001"),
        ("match_tokens", CASES[7], lambda out: (out[0] - 24, out[1]), "positions out of range"),
        ("plan_pruning", CASES[8], lambda out: (out[0].flip(1), out[1]), "ascending order"),
        ("plan_pruning", CASES[8], lambda out: (out[0], out[1].roll(1, 1)), "not filled in from itself"),
        ("plan_pruning", CASES[8], lambda out: (out[0], out[1] + 1), "positions out of range"),
    ],
)
def test_a_wrong_result_is_never_timed(monkeypatch, name, case, spoil, reason):
    monkeypatch.setattr(ops, name, spoiled(getattr(ops, name), spoil))
    for row in run(case):
        assert row["speedup"] is None
        if row["contender"]["name"] == "todo":
            assert row["contender"]["error"].startswith("ValueError: wrong result, not timed: ")
            assert reason in row["contender"]["error"]
            assert row["contender"]["samples"] == []


MANY = replace(ATTENTION, height=256, width=264)  # 32 x 33 tokens, more than an oracle samples
MATCH = replace(MANY, benchmark="match_tokens")


def unsampled(count):
    """A mask of what an oracle's sample leaves out."""
    mask = torch.ones(count, dtype=torch.bool)
    mask[trial.spread(count, 512, CPU)] = False
    return mask


def filled(value, part=0):
    """Spoils what no sample looks at, of a tensor or of a tuple's ``part``."""

    def spoil(out):
        t = out[part] if isinstance(out, tuple) else out
        t[:, unsampled(t.shape[1])] = value
        return out

    return spoil


def in_the_midst(value, part=0):
    """Spoils the second image of three, which no sample looks at."""

    def spoil(out):
        (out[part] if isinstance(out, tuple) else out)[1] = value
        return out

    return spoil


@pytest.mark.parametrize(
    ("name", "case", "spoil", "reason"),
    [
        ("downsampled_attention", MANY, filled(0), "in the 128 queries from"),
        ("downsampled_attention", ATTENTION, in_the_midst(0), "in the 128 queries from 0 on"),
        ("downsampled_attention", ATTENTION, lambda out: out[:, 1:], "of shape (3, 95, 8, 40), not (3, 96, 8, 40)"),
        ("match_tokens", MATCH, filled(-5), "positions out of range"),
        ("match_tokens", MATCH, filled(264), "positions out of range"),
        ("match_tokens", MATCH, filled(0), "a similarity is off by"),
        ("match_tokens", MATCH, filled(0.5, part=1), "a similarity is off by"),
        ("match_tokens", MATCH, filled(1.1, part=1), "similarities out of range"),
        ("match_tokens", MATCH, filled(torch.nan, part=1), "similarities out of range"),
        ("match_tokens", CASES[7], in_the_midst(0), "a similarity is off by"),
        ("match_tokens", CASES[7], lambda out: (out[0][:, 1:], out[1]), "of shapes (3, 71) and (3, 72), not (3, 72)"),
        ("plan_pruning", CASES[8], in_the_midst(-1), "positions out of range"),
    ],
)
def test_a_result_that_is_wrong_where_nothing_is_sampled_is_never_timed(monkeypatch, name, case, spoil, reason):
    monkeypatch.setattr(ops, name, spoiled(getattr(ops, name), spoil))
    errors = {row["contender"]["error"] for row in run(case) if row["contender"]["name"] == "todo"}
    assert len(errors) == 1 and reason in errors.pop()


@pytest.mark.parametrize("first", [0, 896, 1024])
def test_a_wrong_tile_is_found_and_named(first):
    """Of one head, by the loose bound; the last tile is not whole."""
    made = attention.trial(MANY, CPU)
    candidate, x = made.ours[0], made.inputs[-1]
    right = candidate.build()(x)
    candidate.check(right)
    wrong = right.clone()
    wrong[1, first : first + 128, 3] *= 1.001
    with pytest.raises(ValueError, match=rf"off by 0.001 of their norm in the 128 queries from {first} on"):
        candidate.check(wrong)


def test_tiles_are_compared_a_few_at_a_time(monkeypatch):
    """To the same end, so that no more of them need be in memory."""
    right = torch.randn((2, 300, 2, 8), generator=torch.Generator().manual_seed(0))
    out = right.clone()
    out[1, 299, 1] += 1
    whole = attention._worst_tile(out, right)
    monkeypatch.setattr(attention, "_PIECE", 1)
    assert attention._worst_tile(out, right) == pytest.approx(whole)
    assert whole[1] == 256


def test_the_oracle_is_the_same_a_few_queries_at_a_time(monkeypatch):
    x = attention.trial(ATTENTION, CPU).inputs[0]
    whole = attention._oracle(x, ATTENTION, dense=False)
    monkeypatch.setattr(attention, "_PIECE", 1)
    pieces = attention._oracle(x, ATTENTION, dense=False)
    torch.testing.assert_close(pieces.out, whole.out, rtol=1e-12, atol=1e-12)


def plan_check(change):
    """The plan of CASES[8] after ``change(kept, source, oracle)``, before the check."""
    case = CASES[8]
    made = matching.trial(case, CPU)
    x = made.inputs[-1]
    oracle = matching._plan_oracle(x, case)
    kept, source = (trial.ends(t) for t in ops.plan_pruning(x.x, x.score, case.grid, 0.4))
    matching._check_plan(oracle, (kept, source), 1e-5)
    matching._check_plan(oracle, change(kept.clone(), source.clone(), oracle), 1e-5)


def test_a_plan_that_prunes_the_wrong_token_is_found():
    def swap(kept, source, oracle):
        """The first token that goes stays, in the place of the one that is kept with the lowest similarity."""
        worst = oracle.to_base.masked_fill(oracle.to_base == -torch.inf, torch.inf)[0].argmin()
        gone = next(i for i in range(source.shape[1]) if i not in kept[0])
        kept[0] = torch.cat([kept[0][kept[0] != worst], torch.tensor([gone])]).sort().values
        source.scatter_(1, kept, torch.arange(kept.shape[1]).expand_as(kept))
        return kept, source

    with pytest.raises(ValueError, match="a token is pruned before one whose similarity is higher"):
        plan_check(swap)


def test_a_plan_that_prunes_a_base_is_found():
    def drop(kept, source, oracle):
        gone = next(i for i in range(source.shape[1]) if i not in kept[0])
        kept[0] = torch.cat([kept[0][kept[0] != oracle.bases[0, 0]], torch.tensor([gone])]).sort().values
        return kept, source

    with pytest.raises(ValueError, match="a base is pruned"):
        plan_check(drop)


def test_a_plan_with_a_worse_source_is_found():
    def other(kept, source, oracle):
        gone = next(i for i in range(source.shape[1]) if i not in kept[0])
        source[0, gone] = (source[0, gone] + 1) % kept.shape[1]
        return kept, source

    with pytest.raises(ValueError, match="a source is off by"):
        plan_check(other)


@pytest.mark.parametrize("name", ["to_base", "unit"])
def test_a_plan_that_cannot_be_judged_is_not_right(name):
    case = CASES[8]
    x = matching.trial(case, CPU).inputs[-1]
    oracle = matching._plan_oracle(x, case)
    plan = ops.plan_pruning(x.x, x.score, case.grid, 0.4)
    with pytest.raises(ValueError, match=r"(off|higher) by nan"):
        matching._check_plan(oracle._replace(**{name: getattr(oracle, name) * torch.nan}), plan, 1e-5)


def test_a_missing_peer_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(peers, "needs_cuda", lambda device: None)
    monkeypatch.setitem(peers.BUILD, "flex", lambda *_: 1 / 0)  # compiles for the CPU otherwise
    monkeypatch.setitem(sys.modules, "sageattention", None)
    row = next(row for row in run(ATTENTION) if row["baseline"]["name"] == "sage")
    assert row["baseline"]["error"].startswith("ModuleNotFoundError: ")
    assert row["speedup"] is None
    assert row["contender"]["error"] is None
    assert "sageattention" in report.table([row])


def test_another_flash_attention_is_torchs_only_within_its_calls(monkeypatch):
    """Its package is missing here, which its row says; a stand-in for it is switched on for its own calls alone."""
    monkeypatch.setattr(peers, "needs_cuda", lambda device: None)
    monkeypatch.setitem(peers.BUILD, "flex", lambda *_: 1 / 0)
    rows = {row["baseline"]["name"]: row for row in run(ATTENTION)}
    for name, package in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn")):
        assert rows[name]["baseline"]["error"].startswith(f"ModuleNotFoundError: No module named '{package}")
    active, seen = [], []
    handle = types.SimpleNamespace(remove=active.clear)
    flash = torch.nn.attention
    monkeypatch.setitem(flash._registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: active.append("FA3") or handle)
    attend = peers.torch_attention
    monkeypatch.setattr(peers, "torch_attention", lambda *inputs: seen.append(tuple(active)) or attend(*inputs))
    rows = {row["baseline"]["name"]: row for row in run(ATTENTION)}
    assert rows["fa3"]["baseline"]["error"] is None
    assert set(seen) == {(), ("FA3",)} and not active and flash.current_flash_attention_impl() is None


def test_sage_gets_padded_tokens_and_keys_of_its_own(monkeypatch):
    """As 1.0.6: it knows a head dim of 64, wants the true scale, and takes the mean out of its keys in place."""

    seen = []

    def sageattn(query, key, value, tensor_layout, sm_scale):
        seen.append((query, key, value))
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] == 64
        assert tensor_layout == "NHD"
        key -= key.mean(1, keepdim=True)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=sm_scale).transpose(1, 2)

    module = types.ModuleType("sageattention")
    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    monkeypatch.setattr(peers, "needs_cuda", lambda device: None)
    monkeypatch.setitem(peers.BUILD, "flex", lambda *_: 1 / 0)
    rows = {row["baseline"]["name"]: row for row in run(ATTENTION) if row["contender"]["name"] == "todo"}
    assert rows["sage"]["baseline"]["error"] is None
    assert rows["sdpa-flash"]["baseline"]["error"] is None
    queries, keys, values = ({id(t) for t in tensors} for tensors in zip(*seen, strict=True))
    assert len(queries) == len(seen) > 2
    assert len(keys) == len(values) == 2  # one a set of inputs, padded before anything is timed
    wide = [row for row in run(replace(ATTENTION, level=4)) if row["baseline"]["name"] == "sage"]
    assert wide[0]["baseline"]["error"] == "RuntimeError: knows head dims up to 128, not 160"


def test_inputs_that_do_not_fit_end_their_case_alone(monkeypatch):
    def none(case, device):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(kernels._TRIALS, "gather", none)
    failed, fine = kernels.run([CASES[3], CASES[4]], CPU, Rounds(warmup=1, rounds=2))
    assert failed[0]["contender"]["error"] == "no inputs: OutOfMemoryError: CUDA out of memory."
    assert failed[0]["speedup"] is None
    assert all(row["speedup"] for row in fine)
    assert "any peer, todo: no inputs: OutOfMemoryError: CUDA out of memory." in report.table([*failed, *fine])


def test_the_kernel_alone_packs_each_set_once(monkeypatch):
    """Run in Triton's interpreter where there is no GPU."""
    from todo_attn.kernels import launch

    packed = []

    class Pack(launch.Pack):
        def __call__(self, key, value):
            packed.append(1)
            return super().__call__(key, value)

    monkeypatch.setattr(launch, "Pack", Pack)
    monkeypatch.setattr(attention, "_packed", PACKED)
    made = attention.trial(replace(ATTENTION, batch=1), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    candidate = next(candidate for candidate in made.ours if candidate.name == "todo-packed")
    call = candidate.build()
    for x in made.inputs:
        call(x)
    candidate.check(call(made.inputs[-1]))
    assert len(packed) == len(made.inputs)


def test_sets_of_inputs_differ_and_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 2 * 10**5)
    made = tokens.trial(replace(CASES[3], batch=1), CPU).inputs
    size = sum(t.numel() * t.element_size() for t in made[0] if isinstance(t, torch.Tensor))
    assert len(made) == -(-6 * 10**5 // size) > 2
    assert [x.number for x in made] == list(range(len(made)))
    assert not torch.equal(made[0].tokens, made[1].tokens)
    assert all(x.tokens.count_nonzero() == x.tokens.numel() for x in made)


def test_ours_is_called_slower_where_it_is():
    def row(name, ratio, **info):
        candidates = [
            harness.Measured(harness.Candidate(candidate, print, dict(more)), [seconds])
            for candidate, seconds, more in ((name, ratio, info), ("todo", 1.0, {}))
        ]
        return harness.compare("attention", ATTENTION.describe(), ABOUT, candidates)[0]

    rows = [row("sdpa-flash", 0.5, best_of={}), row("dense", 0.8), row("sdpa-cudnn", 0.9), row("dense", 1.5)]
    flash, dense = report.slower(rows)
    assert "takes 2.00x the time of sdpa-flash" in flash
    assert "takes 1.25x the time of dense" in dense
    assert "sd15 96x64 level 1, batch 3, fp32" in flash


def row_of(baseline, contender):
    """A row with these two candidates, each a name and an error."""
    made = [harness.Measured(harness.Candidate(name, print), error=error) for name, error in (baseline, contender)]
    return harness.compare("attention", ATTENTION.describe(), ABOUT, made)[0]


WRONG = "ValueError: wrong result, not timed: off by 1"


def test_what_was_wrong_of_ours_is_said_once():
    rows = [
        row_of(("sdpa-flash", None), ("todo", WRONG)),
        row_of(("dense", None), ("todo", WRONG)),
        row_of(("sdpa-flash", WRONG), ("todo", None)),
        row_of(("dense", None), ("todo-packed", "RuntimeError: needs a CUDA GPU")),
        row_of(("todo", WRONG), ("128x64, 4 warps", None)),
        row_of(("dense", None), ("todo-coarse", WRONG)),
    ]
    where = "attention, sd15 96x64 level 1, batch 3, fp32"
    assert report.refused(rows) == [f"{where}: {name} was refused: {WRONG}" for name in ("todo", "todo-coarse")]
    assert report.refused(rows[2:4]) == []


def test_a_note_shortens_each_error_by_itself():
    long = "RuntimeError: " + "x" * 200
    table = report.table([row_of(("sdpa-cudnn", long), ("todo", WRONG))])
    assert f"sdpa-cudnn: {long[:97]}...; todo: {WRONG}" in table
