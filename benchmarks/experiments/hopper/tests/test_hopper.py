"""The Hopper candidate: what it refuses, its code for sm_90 (no GPU needed), and its results on a Hopper GPU.

Compiled in processes of their own, because here Triton's kernels are interpreted ones; run in processes of their own,
because a wrong barrier is a hang.
"""

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.experiments.hopper import check, launch
from benchmarks.experiments.hopper.launch import RUNS, Run
from todo_attn.kernels import launch as shipped

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


# SM clocks per score, as in tests/kernels/test_compile.py: the bound is the shipped kernel's.
CLOCKS = {40: (0.0575, 0.112), 80: (0.079, 0.152)}


@pytest.mark.parametrize("head_dim", CLOCKS)
def test_compiled_for_sm_90(compiled, head_dim):
    row, _ = compiled[head_dim]
    assert row["stack"] == row["spills"] == row["spills_in_loop"] == 0, row
    assert row["shared"] <= 227 * 1024, row
    assert not row["serialised"] and row["waits"] == 4, row
    bound, no_overlap = CLOCKS[head_dim]
    assert row["bound"] <= bound and row["no_overlap"] <= no_overlap, row
    consumers, producer = row["used"].split("+")
    assert all(int(n) <= 240 for n in consumers.split("/")) and int(producer) <= 24, row


@pytest.mark.parametrize("head_dim", CLOCKS)
def test_every_exp2_is_under_the_next_tiles_products(compiled, head_dim):
    row, _ = compiled[head_dim]
    scores = 64 * 2 * row["block_n"] // 128  # a thread's in a trip, of 128 threads
    mufu = scores * 7 // 8 if head_dim <= 64 else scores  # one in eight is a polynomial
    assert row["exp2"] == mufu + 4  # and the factors of two rows, twice
    assert row["under_qk"] == row["exp2"]
    assert row["under_pv"] > row["exp2"] // 4


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--head-dim", "168", "from 8 to 160"), ("--dtype", "fp32", "fp16, bf16")],
)
def test_what_it_is_not_compiled_for(static, option, value, message):
    run = static(option, value)
    assert run.returncode == 2
    assert option in run.stderr and value in run.stderr and message in " ".join(run.stderr.split())


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize(("head_dim", "run"), [(d, run) for d in RUNS for run in RUNS[d]])
def test_as_exact_as_torch_on_a_gpu(head_dim, run):
    row = check.row(head_dim, run)
    assert row["error"] is None and row["worst"] < check.BOUND, row


def inputs(head_dim=40, dtype=torch.float16, tokens=4):
    return *(torch.zeros(1, tokens, 1, head_dim, dtype=dtype) for _ in "qkv"), (2, 2), (1, 1), "nearest"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "scale", "message"),
    [
        (40, torch.float32, 0.1, "query must be float16 or bfloat16, got torch.float32"),
        (168, torch.float16, 0.1, "head_dim must be a multiple of 8 from 8 to 160, got 168"),
        (12, torch.float16, 0.1, "head_dim must be a multiple of 8 from 8 to 160, got 12"),
        (40, torch.float16, 0.7, "scale must be from .* to .*, got 0.7"),
        (40, torch.float16, -0.7, "scale must be from .* to .*, got -0.7"),
        (40, torch.float16, float("nan"), "scale must be from .* to .*, got nan"),
        (40, torch.float16, 0.1, "query must be on a GPU of compute capability 9.0, got one on cpu"),
    ],
)
def test_what_it_does_not_take(head_dim, dtype, scale, message):
    with pytest.raises(ValueError, match=message):
        launch.attention(*inputs(head_dim, dtype), scale)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((96, 4), "block_n must be 64 or 128, got 96"),
        ((64, 3), "stages must be 2, 4 or 8, got 3"),
        ((64, 4, 4), "consumers must be 2 or 3, got 4"),
    ],
)
def test_settings_that_the_kernel_is_not_written_for(numbers, message):
    with pytest.raises(ValueError, match=message):
        Run(*numbers)


def test_signature_of_the_shipped_kernel():
    names = [
        function.__code__.co_varnames[: function.__code__.co_argcount]
        for function in (launch.attention, shipped.attention)
    ]
    assert names[0][:7] == names[1][:7]


def test_the_chosen_configuration_is_measured_first():
    for head_dim, runs in RUNS.items():
        assert runs[0] == launch.configuration(head_dim)
        assert len(set(runs)) == len(runs)


def test_a_check_that_fails_or_does_not_end_is_a_row():
    run = Run(128, 4)
    assert check.row(40, run, seconds=0.01)["error"] == "no end after 0.01 s"
    if not torch.cuda.is_available():
        row = check.row(40, run)
        assert row["worst"] is None and "compute capability 9.0" in row["error"]
        assert (row["head_dim"], row["block_n"], row["halves"]) == (40, 128, True)


@pytest.mark.skipif(HOPPER, reason="refused where there is none")
def test_the_check_needs_a_hopper_gpu():
    app = typer.Typer()
    app.command()(check.main)
    assert CliRunner().invoke(app, ["--head-dim", "48"]).exit_code == 2
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2 and "compute capability" in result.output
