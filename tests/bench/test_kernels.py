"""Every side of every benchmark on tiny shapes: right against its oracle, and never timed where it is not."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from todo_attn import ops
from todo_attn.bench import attention, harness, kernels, machine, matching, report, tokens, trial
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
]
NAMES = [f"{case.benchmark}-{case.peers}" + "-residual" * case.residual for case in CASES]
on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Two sets of inputs; and Triton's interpreter, which is slow, only where a test asks for it."""
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1)
    if not torch.cuda.is_available():
        monkeypatch.setattr(attention, "_packed", lambda case, device: attention.needs_cuda(device))


PACKED = attention._packed


def run(case, device=CPU):
    (rows,) = kernels.run([case], device, Rounds(warmup=1, rounds=2))
    return rows


def sides(rows):
    """Each side of the rows once, by name."""
    return {row[role]["name"]: row[role] for row in rows for role in ("baseline", "contender")}


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_side_is_right_and_every_pair_a_row(case, device):
    case = case if device == "cpu" else replace(case, dtype="fp16", height=512, width=768)
    rows = run(case, torch.device(device))
    assert len(rows) == case.rows
    assert {row["benchmark"] for row in rows} == {case.benchmark}
    for name, side in sides(rows).items():
        if side["error"] is None:
            assert len(side["samples"]) == 2
            assert side["gb_per_s"] == pytest.approx(side["bytes"] / side["seconds"]["p50"] / 1e9)
        else:
            # What a GPU lacks (SageAttention, a backend's head dim) is a peer's to say.
            assert side["error"] == "RuntimeError: needs a CUDA GPU" if device == "cpu" else "todo" not in name
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_the_fastest_rival_says_so_and_other_forms_are_set_against_it(monkeypatch):
    monkeypatch.setattr(attention, "SDPA", ("dense", "published", "sdpa-cudnn"))  # of which two run here
    rows = run(ATTENTION)
    named = sides(rows)
    (best,) = (name for name, side in named.items() if "best_of" in side)
    medians = named[best]["best_of"]
    assert set(medians) == {"dense", "published", "sdpa-cudnn"}
    assert medians["sdpa-cudnn"] is None
    assert best == min(("dense", "published"), key=lambda name: named[name]["seconds"]["p50"])
    others = {row["contender"]["name"]: row["baseline"]["name"] for row in rows if row["contender"]["name"] != "todo"}
    assert others == {"todo-packed": best, "todo-coarse": best}


def test_where_no_rival_runs_each_says_why(monkeypatch):
    def broken(backend, device):
        raise RuntimeError("no such backend")

    monkeypatch.setattr(attention, "_sdpa", broken)
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
        ("match_tokens", CASES[7], lambda out: (out[0] - 24, out[1]), "positions that are none"),
        ("plan_pruning", CASES[8], lambda out: (out[0].flip(1), out[1]), "ascending order"),
        ("plan_pruning", CASES[8], lambda out: (out[0], out[1].roll(1, 1)), "not filled in from itself"),
        ("plan_pruning", CASES[8], lambda out: (out[0], out[1] + 1), "positions that are none"),
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


def test_a_missing_peer_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(attention, "needs_cuda", lambda device: None)
    monkeypatch.setattr(attention, "_flex", lambda device: 1 / 0)  # compiles for the CPU otherwise
    monkeypatch.setitem(sys.modules, "sageattention", None)
    row = next(row for row in run(ATTENTION) if row["baseline"]["name"] == "sage")
    assert row["baseline"]["error"].startswith("ModuleNotFoundError: ")
    assert row["speedup"] is None
    assert row["contender"]["error"] is None
    assert "sageattention" in report.table([row])


def test_sage_gets_padded_tokens_and_keys_of_its_own(monkeypatch):
    """As 1.0.6: it knows a head dim of 64, wants the true scale, and takes the mean out of its keys in place."""

    def sageattn(query, key, value, tensor_layout, sm_scale):
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] == 64
        assert tensor_layout == "NHD"
        key -= key.mean(1, keepdim=True)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=sm_scale).transpose(1, 2)

    module = types.ModuleType("sageattention")
    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    monkeypatch.setattr(attention, "needs_cuda", lambda device: None)
    monkeypatch.setattr(attention, "_flex", lambda device: 1 / 0)
    rows = {row["baseline"]["name"]: row for row in run(ATTENTION) if row["contender"]["name"] == "todo"}
    assert rows["sage"]["baseline"]["error"] is None
    assert rows["sdpa-flash"]["baseline"]["error"] is None
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
    from todo_attn.kernels import attention as kernel

    packed, pack = [], kernel.pack
    monkeypatch.setattr(kernel, "pack", spy := lambda *arguments: packed.append(1) or pack(*arguments))
    monkeypatch.setattr(attention, "_packed", PACKED)
    made = attention.trial(replace(ATTENTION, batch=1), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    side = next(side for side in made.ours if side.name == "todo-packed")
    call = side.build()
    for x in made.inputs:
        call(x)
    side.check(call(made.inputs[-1]))
    assert len(packed) == len(made.inputs)
    assert kernel.pack is spy


def test_sets_of_inputs_differ_and_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 2 * 10**5)
    made = tokens.trial(replace(CASES[3], batch=1), CPU).inputs
    size = sum(t.numel() * t.element_size() for t in made[0][1:])
    assert len(made) == -(-6 * 10**5 // size) > 2
    assert [x.number for x in made] == list(range(len(made)))
    assert not torch.equal(made[0].tokens, made[1].tokens)
    assert all(x.tokens.count_nonzero() == x.tokens.numel() for x in made)


def test_ours_is_called_slower_where_it_is():
    def row(name, ratio, **info):
        sides = [
            harness.Measured(harness.Side(side, print, dict(more)), [seconds])
            for side, seconds, more in ((name, ratio, info), ("todo", 1.0, {}))
        ]
        return harness.compare("attention", ATTENTION.describe(), ABOUT, sides)[0]

    rows = [row("sdpa-flash", 0.5, best_of={}), row("dense", 0.8), row("sdpa-cudnn", 0.9), row("dense", 1.5)]
    flash, dense = report.slower(rows)
    assert "takes 2.00x the time of sdpa-flash" in flash
    assert "takes 1.25x the time of dense" in dense
    assert "sd15 96x64 level 1, batch 3, fp32" in flash
