"""Each candidate of the UNet benchmark computes what its row says, the same in every run, and leaves nothing behind."""

import gc
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch._dynamo.testing import CompileCounter

from benchmarks import models, unet_candidates, unet_oracle
from benchmarks.unet_candidates import Candidates, check_exact, check_output, checked
from benchmarks.unet_oracle import against_oracle
from benchmarks.unet_plan import Choice, kinds_of
from todo_attn import DaToConfig, ToDoConfig, ops
from todo_attn.bench import harness
from todo_attn.bench.unet import CallTimes, self_attention
from todo_attn.config.schedule import FULL, SHALLOW
from todo_attn.diffusers import processor
from todo_attn.models import unets
from todo_attn.options.methods import KINDS
from todo_attn.predict.timing import random_inputs

CPU = torch.device("cpu")
CALLS = 7
CONTENDERS = {c.name: c for c in Choice([*KINDS], factors=["2"], schedules=["search"], intervals=[3]).contenders()}
SIZE = {"height": 64, "width": 64, "batch": 2}


@pytest.fixture(scope="module")
def model():
    return unets.with_random_weights(models.CONFIGS["tiny"], CPU, torch.float32)


def test_the_baseline_is_diffusers_own_processor_and_stays_so(model):
    candidates = Candidates(model, **SIZE)
    dense, todo = candidates.dense().build(), candidates.todo("todo", ToDoConfig(factor=2)).build()
    assert not torch.equal(dense(), todo())
    assert {type(processor) for processor in dense.model.attn_processors.values()} == {AttnProcessor2_0}
    with torch.no_grad():
        assert torch.equal(model(timestep=999, **candidates.inputs).sample, dense())


def test_a_run_goes_down_the_timesteps_with_latents_that_change(model):
    run = Candidates(model, **SIZE, calls=3).dense().build()
    seen = []
    run.model.register_forward_pre_hook(lambda module, args: seen.append(args))
    output = run()
    assert [timestep.item() for _, timestep in seen] == [999, 665, 332]
    first, second, third = (sample for sample, _ in seen)
    assert torch.equal(first, run.inputs["sample"])
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert output.shape == first.shape
    assert torch.equal(run(), output)


@pytest.mark.parametrize("name", CONTENDERS)
def test_each_call_computes_what_its_kind_says(model, name):
    candidate = Candidates(model, **SIZE, calls=CALLS).of(CONTENDERS[name])
    run = candidate.build()
    ran = {"middle": 0, "last": 0}

    def count(part):
        def hook(module, args):
            ran[part] += 1

        return hook

    run.model.mid_block.resnets[0].register_forward_pre_hook(count("middle"))
    run.model.up_blocks[-1].resnets[-1].register_forward_pre_hook(count("last"))
    run()
    kinds = candidate.times.kinds
    assert len(kinds) == CALLS
    assert ran == {"middle": kinds.count(FULL), "last": kinds.count(FULL) + kinds.count(SHALLOW)}
    assert (len(set(kinds)) > 1) == ("dato" in name or "deepcache" in name)


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op`")
def test_runs_end_the_same_and_leave_nothing_behind(model, name):
    def held():
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]  # no fake ones of other tests
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    run = Candidates(model, height=128, width=128, batch=1, calls=CALLS).of(CONTENDERS[name]).build()
    before = held()
    first = run()
    few = first.untyped_storage().nbytes() // 2
    assert held() - before - first.untyped_storage().nbytes() < few
    assert torch.equal(run(), first)


@pytest.mark.parametrize("name", ["deepcache-3", "dato-search", "todo-2+dato-search"])
def test_a_short_warm_up_compiles_all_there_is_one_graph_per_kind_of_call(monkeypatch, name):
    model = unets.with_random_weights(unets.SMALLEST, CPU, torch.float32)  # tracing takes long
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend=counter, **options))
    torch.compiler.reset()
    make = [Candidates(model, **SIZE | {"batch": 1}, calls=6, warmup=1, compiled=c) for c in (False, True)]
    candidate = make[1].of(CONTENDERS[name])
    eager, compiled = make[0].of(CONTENDERS[name]).build(), candidate.build()
    for _ in ("short", "whole"):
        assert torch.equal(compiled(), eager())
        assert counter.frame_count == len(set(candidate.times.kinds))


def test_the_share_is_taken_once_and_leaves_no_hook(model):
    with self_attention(model, CPU) as spans, torch.no_grad():
        model(timestep=500, **random_inputs(model, 2, 8, 8))
    assert len(spans) == sum(name.endswith("attn1") for name, _ in model.named_modules())
    assert all(harness.elapsed(*span) > 0 for span in spans)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_the_observed_run_is_looked_into(model):
    candidate = Candidates(model, **SIZE, warmup=2).dense()
    run = candidate.build()
    run()
    assert "self_attention_share" not in candidate.info
    run()
    assert 0 < candidate.info["self_attention_share"] < 1
    assert candidate.info.get("peak_gib", 0) >= 0  # not every system tells


@pytest.mark.parametrize(
    ("kinds", "first"), [("2", 1), ("22222", 2), ("2111", 2), ("210012", 6), ("22", 2), ("20120", 4)]
)
def test_warm_up_runs_show_each_kind_and_a_second_full_call(kinds, first):
    assert CallTimes(kinds).first == first


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_warm_up_run_is_short_and_those_after_are_whole(model, name):
    size = SIZE | {"batch": 1}  # of a pair ToMe draws other tokens in each run
    candidate = Candidates(model, **size, calls=CALLS, warmup=2).of(CONTENDERS[name])
    run = candidate.build()
    output = [run() for _ in range(4)]
    assert torch.equal(output[0], output[1]) and torch.equal(output[2], output[3])
    assert 0 < candidate.info["self_attention_share"] < 1
    whole = Candidates(model, **size, calls=CALLS).of(CONTENDERS[name]).build()
    assert torch.equal(output[3], whole())
    counts = {kind: told["calls"] for kind, told in candidate.times.by_kind().items()}
    assert sum(counts.values()) == CALLS
    assert output[0].shape == output[3].shape
    assert not torch.equal(output[0], output[3])


def test_what_a_whole_run_takes_follows_from_its_first_calls():
    assert CallTimes("2112101").whole([4.0, 1.0, 2.0, 6.0, 1.0, 0.5]) == 2 * 5.0 + 4 * 1.0 + 0.5


def test_a_whole_run_that_ends_in_nothing_is_not_timed():
    meter = checked(harness.Meter(CPU))
    assert meter(lambda: torch.zeros(2)).seconds >= 0
    with pytest.raises(ValueError, match="finite"):
        meter(lambda: torch.zeros(2) / 0)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("height, width", [(64, 128), (136, 72)])  # the last with odd latents
def test_the_oracle_knows_right_from_wrong(dtype, mode, height, width):
    model = unets.with_random_weights(models.CONFIGS["tiny"], CPU, dtype)
    right = ToDoConfig(factor={"finest": 3, 2: 2}, mode=mode)
    run = Candidates(model, height, width, batch=2).todo("todo", right).build()  # held against the oracle there
    other = {"nearest": "mean", "mean": "nearest", "nearest-exact": "nearest"}[mode]
    for wrong in (ToDoConfig(factor=2, mode=mode), ToDoConfig(factor=1), replace(right, mode=other)):
        with pytest.raises(ValueError, match="must be within"), against_oracle(run.model, wrong):
            run()
    with against_oracle(run.model, right):
        run()


@pytest.mark.parametrize("filling", [0.0, float("nan")])
@pytest.mark.parametrize("share", [1, 8])
def test_the_oracle_sees_one_wrong_tile_of_one_head(model, monkeypatch, share, filling):
    monkeypatch.setattr(unet_oracle, "_SCORES", 16 * 16 * 64 * 2 * 8 // share)  # all scores, or every ninth row's
    exact = ops.downsampled_attention

    def wrong(*args, **kwargs):
        out = exact(*args, **kwargs)
        if out.shape[1] == 256:
            out[-1, -64:, -1] = filling
        return out

    monkeypatch.setattr(ops, "downsampled_attention", wrong)
    candidate = Candidates(model, 128, 128, batch=2).todo("todo", ToDoConfig(factor=2))
    with pytest.raises(ValueError, match="16 x 16 tokens"):
        candidate.build()


def test_the_oracle_sees_answers_for_other_tokens_than_those_kept(model, monkeypatch):
    candidates = Candidates(model, **SIZE, calls=2)
    config = DaToConfig(cache_schedule="2", todo=ToDoConfig(factor=2))
    candidates.dato("todo+dato", config).build()
    gather = processor.ops.gather_tokens
    monkeypatch.setattr(processor.ops, "gather_tokens", lambda x, index: gather(x, index.flip(1)))
    with pytest.raises(ValueError, match="must be within"):
        candidates.dato("todo+dato", config).build()


def test_the_oracle_leaves_no_hook(model):
    run = Candidates(model, **SIZE).todo("todo", ToDoConfig(factor=2)).build()
    layers = [module for name, module in run.model.named_modules() if name.endswith(("attn1", "to_out.0"))]
    assert not any(layer._forward_hooks for layer in layers)
    assert not any(layer._forward_pre_hooks for layer in layers if isinstance(layer, torch.nn.Linear))


def test_the_time_of_a_kind_is_the_median_of_its_calls():
    times = CallTimes("22101", [[0.0, 1.0, 2.0], [0.0, 4.0, 6.0, 7.0, 7.5, 8.0]])
    assert times.by_kind() == {
        "full": {"calls": 2, "seconds": 3.0},
        "shallow": {"calls": 2, "seconds": 0.75},
        "reuse": {"calls": 1, "seconds": 0.5},
    }
    times.runs.append([0.0, 8.0, 16.0, 17.0, 17.5, 18.0])
    assert times.medians(skip=1) == {"2": 6.0, "1": 0.75, "0": 0.5}


def test_wrong_outputs_are_not_timed():
    good = torch.zeros(1, 4, 8, 8)
    check_output(good, good + 1)
    with pytest.raises(ValueError, match="shape"):
        check_output(good, good[..., 1:])
    with pytest.raises(ValueError, match="finite"):
        check_output(good, good / 0)


@pytest.mark.parametrize(
    ("kind", "apply", "name"),
    [("todo", "apply_todo", "ToDo with factor 1"), ("dato", "apply_dato", "DaTo"), ("todo+dato", "apply_dato", "ToDo")],
)
def test_a_method_told_to_do_nothing_that_does_something_stops_the_run(model, monkeypatch, kind, apply, name):
    def nudge(module, inputs, output):
        return output + 1e-3

    check_exact(model, kinds_of(kind))
    monkeypatch.setattr(
        unet_candidates.todo_attn, apply, lambda model, config: model.conv_in.register_forward_hook(nudge)
    )
    with pytest.raises(RuntimeError, match=f"{name}.* differs from dense"):
        check_exact(model, kinds_of(kind))


def test_pruning_alone_would_not_pass_for_dense(model):
    candidates = Candidates(model, **SIZE, calls=3)
    dense, pruned = (candidate.build()() for candidate in (candidates.dense(), candidates.dato("dato", DaToConfig())))
    assert not torch.equal(dense, pruned)
