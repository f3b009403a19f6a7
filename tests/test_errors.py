"""What is raised about an argument: its name and what is wrong, apart and as one sentence."""

import copy
import pickle
import re

import pytest
import torch

import todo_attn
from todo_attn import ArgumentError, DaToConfig, ToDoConfig, apply_dato, apply_todo, ops
from todo_attn.bench.cases import short
from todo_attn.bench.jsonl import check_appendable
from todo_attn.config import schedule
from todo_attn.options.methods import MethodOptions, SettingError, UnreachableError, parse_factor
from todo_attn.options.settings import CompareSettings

X, HEADS = torch.zeros(1, 12, 4), torch.zeros(1, 12, 2, 8)
INDEX = torch.zeros(1, 3, dtype=torch.int64)
CALLS = [
    ("factor", lambda: ToDoConfig(0)),
    ("factor", lambda: ToDoConfig({0: 2})),
    ("factor", lambda: ToDoConfig({1: 0})),  # "factor of level 1 must ..."
    ("max_kv_tokens", lambda: ToDoConfig(max_kv_tokens=0)),
    ("mode", lambda: ToDoConfig(mode="bilinear")),
    ("timestep_range", lambda: ToDoConfig(timestep_range=(0, 1))),
    ("steps", lambda: ToDoConfig(steps=(0.7, 0.3))),
    ("width", lambda: ToDoConfig.paper(512, 0)),
    ("data", lambda: ToDoConfig.from_dict({"Factor": 2})),
    ("prune_ratio", lambda: DaToConfig(1)),
    ("prune_ratio", lambda: DaToConfig([0.1], cache_schedule="12")),
    ("cache_schedule", lambda: DaToConfig(cache_schedule="3")),
    ("cache_schedule", lambda: DaToConfig.preset("coco", cache_schedule="1")),
    ("patch", lambda: DaToConfig(patch=2)),
    ("dynamics_weight", lambda: DaToConfig(dynamics_weight=-1)),
    ("align_guidance", lambda: DaToConfig(align_guidance=1)),
    ("todo", lambda: DaToConfig(todo=2)),
    ("seed", lambda: DaToConfig(seed=-1)),
    ("steps", lambda: DaToConfig.preset("coco", 0)),
    ("calls", lambda: DaToConfig().schedule_for(0)),
    ("call", lambda: DaToConfig().ratio_for(-1)),
    ("data", lambda: DaToConfig.from_dict([])),
    ("schedule", lambda: schedule.load("cocoa")),
    ("digits", lambda: schedule.Schedule("")),
    ("published_speedup", lambda: schedule.Schedule("1", published_speedup=0)),
    ("data", lambda: schedule.Schedule.from_dict({})),
    ("length", lambda: schedule.resample("1", -1)),
    ("query", lambda: ops.downsampled_attention(X, HEADS, HEADS, (3, 4))),
    ("key", lambda: ops.downsampled_attention(HEADS, HEADS[:, :, :1], HEADS, (3, 4))),
    ("grid", lambda: ops.downsampled_attention(HEADS, HEADS, HEADS, (3, 5))),
    ("scale", lambda: ops.downsampled_attention(HEADS, HEADS, HEADS, (3, 4), scale="1")),
    ("backend", lambda: ops.downsampled_attention(HEADS, HEADS, HEADS, (3, 4), backend="cuda")),
    ("factor", lambda: ops.downsample_tokens(X, (3, 4), 5)),
    ("mode", lambda: ops.downsample_tokens(X, (3, 4), 2, mode="bilinear")),
    ("x", lambda: ops.gather_tokens(X[0], INDEX)),
    ("index", lambda: ops.gather_tokens(X, INDEX.float())),
    ("source", lambda: ops.scatter_tokens(X, INDEX, X)),
    ("x", lambda: ops.scatter_tokens_(X.expand(2, -1, -1), INDEX.expand(2, -1), X[:, :3].expand(2, -1, -1))),
    ("residual", lambda: ops.recover_tokens(X, INDEX, X)),
    ("patch", lambda: ops.select_base_tokens(X[..., 0], (3, 4), 0)),
    ("key_index", lambda: ops.match_tokens(X, INDEX, INDEX[:, :0])),
    ("ratio", lambda: ops.plan_pruning(X, X[..., 0], (3, 4), 1)),
    ("score", lambda: ops.plan_pruning(X, X[:, :3, 0], (3, 4), 0.4)),
    ("pipe_or_model", lambda: apply_todo(torch.nn.Linear(2, 2))),
    ("pipe_or_unet", lambda: apply_dato(torch.nn.Linear(2, 2))),
    ("config", lambda: apply_todo(None, 2)),
    ("factor", lambda: MethodOptions(factor="0")),
    ("max_kv_tokens", lambda: MethodOptions(max_kv_tokens=0)),
    ("schedule", lambda: MethodOptions(schedule="cocoa")),
    ("methods", lambda: MethodOptions(methods="dense,todo:0")),
    ("steps", lambda: CompareSettings(steps=0)),
    ("factor", lambda: parse_factor("0", 64, 64)),
    ("model", lambda: short("sd3", 512, 512, 1, "fp32")),
    ("height", lambda: short("sd15", 8, 512, 1, "fp32")),
    ("out", lambda: check_appendable(todo_attn.example_pipeline())),
]


@pytest.mark.parametrize(("argument", "call"), CALLS)
def test_an_error_says_which_argument(argument, call):
    with pytest.raises(ArgumentError) as caught:
        call()
    error = caught.value
    assert error.argument == argument
    assert re.match(r"(of level 1 )?(must|has) ", error.problem)
    assert str(error) == f"{argument} {error.problem}" and isinstance(error, ValueError)


@pytest.mark.parametrize("kind", [ArgumentError, SettingError, UnreachableError])
def test_an_error_survives_copies_and_processes(kind):
    error = kind("seed", "must be an integer, got 'x'")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (again.argument, again.problem) == ("seed", "must be an integer, got 'x'")
        assert str(again) == "seed must be an integer, got 'x'"
