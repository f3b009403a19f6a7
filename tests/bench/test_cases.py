"""Which shapes are timed, and in what order."""

from dataclasses import replace

import pytest
import torch

from todo_attn.bench import cases
from todo_attn.bench.cases import Case

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_at_most_68_telling_rows_those_with_a_target_first():
    plan = cases.plan(GPU)
    assert sum(case.rows for case in plan) <= 68
    assert len(set(plan)) == len(plan)
    first = plan[0]
    assert (first.tokens, first.keys, first.heads, first.head_dim) == (65536, 4096, 8, 40)
    assert (first.batch, first.dtype) == (2, "fp16")
    assert [(case.head_dim, case.tokens, case.keys) for case in plan[1:5]] == [
        (80, 16384, 4096),
        (160, 4096, 4096),
        (64, 16384, 4096),
        (64, 4096, 4096),
    ]
    assert [case.benchmark for case in plan[5:13]] == [
        *("gather", "scatter", "recover", "recover"),
        *("match_tokens",) * 2,
        *("plan_pruning",) * 2,
    ]
    assert [case.tokens for case in plan[9:13]] == [4096, 16384] * 2
    for case in plan[5:9]:
        assert case.batch * 2 * case.kept * case.channels * 2 > 100e6


def test_full_has_every_shape_once():
    full = cases.full(GPU)
    assert full[: len(cases.plan(GPU))] == cases.plan(GPU)
    assert len(set(full)) == len(full)
    every = [case for case in full if case.benchmark == "attention" and case.peers == "all"]
    levels = sum(map(len, cases.MODELS.values()))
    assert len(every) == len(cases.SIZES) * 2 * 3 * 2 * levels
    assert {(case.height, case.width) for case in every} >= {(4096, 4096), (2304, 4096), (288, 512)}


@pytest.mark.parametrize(
    ("height", "width", "level", "grid", "factor", "coarse"),
    [
        (2048, 2048, 1, (256, 256), (4, 4), (64, 64)),
        (432, 768, 8, (7, 12), (1, 1), (7, 12)),  # 6.75 rounds up, as a stride-2 convolution does
        (1152, 2048, 1, (144, 256), (3, 3), (48, 85)),
    ],
)
def test_grids(height, width, level, grid, factor, coarse):
    case = Case("attention", "sd15", height, width, level, 2, "fp16")
    assert (case.grid, case.factor, case.coarse) == (grid, factor, coarse)


def test_at_factor_1_what_says_nothing_is_left_out():
    case = Case("attention", "sd15", 512, 512, 1, 2, "fp16")
    peers, forms = case.candidates
    assert (peers, forms) == ((*cases.SDPA, *cases.FLASH, "flex", "sage"), ("todo-packed",))
    assert replace(case, max_kv_tokens=1024).rows == case.rows + 3


def test_the_short_form_times_the_levels_where_todo_acts():
    short = cases.short("sd15", 1024, 1024, 2, "fp16")
    assert [(case.benchmark, case.level) for case in short] == [
        *(("attention", 1), ("gather", 1), ("recover", 1), ("match_tokens", 1))
    ]
    assert [case.level for case in cases.short("sdxl", 2048, 2048, 2, "fp16")] == [2, 2, 2, 2]
    assert "attention" not in {case.benchmark for case in cases.short("sdxl", 1024, 1024, 2, "fp16")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sd3", 512, 512, 1, "fp16"), "model must be one of sd15, sdxl, got sd3"),
        (("sd15", 500, 512, 1, "fp16"), "height must be a multiple of 8 pixels, at least 64, got 500"),
        (("sd15", 512, 0, 1, "fp16"), "width must be a multiple of 8 pixels, at least 64, got 0"),
        (("sd15", 512, 512, 1, "int8"), "dtype must be one of fp32, fp16, bf16, got int8"),
    ],
)
def test_what_there_is_not_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cases.short(*arguments)
