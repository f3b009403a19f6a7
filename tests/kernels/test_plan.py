"""Planned launches are the ordinary ones, and end with what they depend on; no call skips more than it may."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import stand_in
from todo_attn import ops
from todo_attn.ops import eager
from todo_attn.ops.attention import _forward

pytest.importorskip("triton")
from todo_attn.kernels import plan

ROOT = Path(__file__).parents[2]

# Triton's launcher records its arguments. Each call is made three times: first to plan it, then planned, then anew.
SCRIPT = """
import gc, sys, threading
from pathlib import Path
import torch
from benchmarks.stand_in import StandIn
gpu = StandIn(Path(sys.argv[1]), int(sys.argv[2]))
gpu.use()
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.tools.tensor_descriptor import TensorDescriptor
from todo_attn.kernels import attention, configs, launch, match, pack, plan, sources

def described(x):
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.stride(), x.data_ptr() % 16
    if isinstance(x, TensorDescriptor):
        return described(x.base), x.shape, x.strides, x.block_shape
    return x if x is None or isinstance(x, (int, float, str, bool, tuple)) else type(x)

records, ordinary = [], CudaLauncher.__call__
def record(self, *arguments):
    records.append([self, *map(described, arguments)])
    return ordinary(self, *arguments)
CudaLauncher.__call__ = record

binder, bound = attention.attention_kernel.run.__func__, []
def run(self, *arguments, **options):
    bound.append(self)
    return binder(self, *arguments, **options)
type(attention.attention_kernel).run = run

def tokens(kind, dtype=torch.float16, head_dim=40, count=35):
    shape = 2, count, 3, head_dim
    if kind == "contiguous":
        return torch.zeros(shape, dtype=dtype)
    if kind == "heads first":
        return torch.zeros(2, 3, count, head_dim, dtype=dtype).transpose(1, 2)
    if kind == "fused":
        return torch.zeros(2, count, 3, 3, head_dim, dtype=dtype)[:, :, 1]
    if kind == "odd":
        return torch.zeros(2, count, 3, head_dim + 1, dtype=dtype)[..., 1:]
    return torch.zeros(2 * count * 3 * head_dim + 1, dtype=dtype)[1:].view(shape)  # 2 bytes off

def attend(t, mode="nearest", scale=0.2, coarse=(5, 7)):
    return launch.attention(t, t, t, (5, 7), coarse, mode, scale)

def made(call):
    "What Triton launches in a call, and how many of those launches it worked out itself."
    del records[:], bound[:]
    call()
    return list(records), len(bound)

def check(call, launches=2):
    plan._plans.clear()
    first, second = made(call), made(call)
    plan._plans.clear()
    third = made(call)
    assert first[0] == second[0] == third[0] and len(first[0]) == launches
    assert first[1] == third[1] == launches and second[1] == 0

launch.attention_config = lambda x: configs.KernelConfig(64, 32, 4, 2)  # which compiles sooner than the shipped one
kinds = "contiguous", "heads first", "fused", "odd", "off"
for kind in kinds:
    t = tokens(kind)
    check(lambda: attend(t))
t = tokens("contiguous")
check(lambda: attend(t, mode="mean", scale=-0.3, coarse=(2, 2)))
t = tokens("contiguous", torch.bfloat16, 80)
check(lambda: attend(t))
x, index = torch.zeros(2, 9, 24).half(), torch.zeros(2, 5, dtype=torch.int32)
check(lambda: match.match(x, index, index[:, ::2]))
ids = torch.zeros(2, 20, dtype=torch.int64)
near = torch.zeros(2, 20)
for kept, rivals in ((7, True), (7, False), (17, True)):
    given = ids[:, :kept].contiguous(), ids[:, :3].contiguous(), ids[:, 5:8], ids, near, ids[:, 8:]
    rival = (ids[:, :3].contiguous(), near[:, :3].contiguous()) if rivals else (None, None)
    check(lambda: sources.sources(*given, *rival, ids[:, 1:], 2.0**-21), launches=1)

# Side by side each call finds its own plan.
cases = [lambda t=tokens(kind), s=s: attend(t, scale=s) for kind in kinds for s in (0.2, -0.2, 0.3)]
cases.append(lambda: attend(t))
plan._plans.clear()
first, modules = [made(call) for call in cases], gpu.modules
again = [made(call) for call in cases]
assert [each[0] for each in first] == [each[0] for each in again] and gpu.modules == modules
assert all(each[1] == 0 for each in again)

# What a plan depends on, besides the tensors: each change is seen by the next call.
t = tokens("contiguous")
call = lambda: attend(t)
def changed():
    found, worked_out = made(call)
    return worked_out == 2 and len(found) == 2
call()
assert not changed()
usual = launch.attention_config
launch.attention_config = lambda x: configs.KernelConfig(32, 32, 4, 2)  # as a tuned file would
assert changed() and not changed()
launch.attention_config = usual
assert not changed()
for kernel in (attention.attention_kernel, pack.pack_kernel):
    kernel.device_caches.clear()
assert changed() and not changed()
knobs.runtime.debug = True
assert changed() and not changed()
knobs.runtime.debug = False
assert not changed()
hooked = []
hook = lambda *arguments, **options: hooked.append(1)
for kernel in (attention.attention_kernel, pack.pack_kernel):
    kernel.pre_run_hooks.append(hook)
assert changed() and len(hooked) == 2
for kernel in (attention.attention_kernel, pack.pack_kernel):
    kernel.pre_run_hooks.clear()
names = []
hook = lambda metadata: names.append(metadata.get()["name"])
for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
    chain.add(hook)
call()
assert names == ["pack_kernel"] * 2 + ["attention_kernel"] * 2, names
for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
    chain.remove(hook)

# A Triton without what a plan needs launches as ever.
keep = plan.Launch._cache
def missing(self):
    raise AttributeError("device_caches")
plan.Launch._cache = missing
plan._plans.clear()
assert changed() and changed()
plan.Launch._cache = keep

plan._plans.clear()
launches, failed = gpu.launches, []
def work():
    try:
        for _ in range(20):
            for call in cases[:9]:
                call()
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert not failed and gpu.launches - launches == 4 * 20 * 9 * 2

def alive():
    gc.collect()
    return sum(type(each) is torch.Tensor for each in gc.get_objects())
plan._plans.clear()
before = alive()
attend(tokens("contiguous")), attend(tokens("fused")), match.match(x, index, index)
assert alive() == before and plan._plans
print("done")
"""


@pytest.mark.parametrize("arch", [90])  # which has descriptors too
def test_a_planned_launch_is_the_ordinary_one(tmp_path, arch):
    if reason := stand_in.unavailable_reason():
        pytest.skip(reason)
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(stand_in.build(tmp_path)), str(arch)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "Python.h" in done.stderr:
        pytest.skip("no Python headers, which Triton's launcher is compiled with")
    assert done.stdout == "done\n", done.stderr[-3000:]


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(plan, "_LIMIT", 5)
    for size in range(1, 10):
        q = torch.zeros(1, size, 1, 8)
        ops.downsampled_attention(q, q, q, (1, size), backend="triton")
        assert 0 < len(plan._plans) <= 5


class Subclass(torch.Tensor):
    pass


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def test_what_is_plain():
    x = torch.zeros(2, 3)
    assert eager.plain(x, x)
    with torch.inference_mode():
        assert eager.plain(x, torch.zeros(2))
    leaf = torch.zeros(2, requires_grad=True)
    assert not eager.plain(x, leaf)
    with torch.no_grad():
        assert eager.plain(x, leaf)
    others = [
        Subclass(),
        torch.nn.Parameter(x),
        x.to_sparse(),
        x.to("meta"),
        torch._neg_view(x),
        x.to_mkldnn(),
        None,
        1.0,
    ]
    for other in others:
        assert not eager.plain(x, other), type(other)
    with torch.autocast("cpu", torch.bfloat16):
        assert not eager.plain(x)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert eager.plain(x)
    with torch._subclasses.FakeTensorMode():
        assert not eager.plain(torch.zeros(2))
    with Mode():
        assert not eager.plain(x)
    with torch.overrides.BaseTorchFunctionMode():
        assert not eager.plain(x)
    with torch.profiler.profile():
        assert not eager.plain(x)
    with torch.autograd.forward_ad.dual_level():
        assert not eager.plain(x)
    seen = []

    def see(t):
        seen.append(eager.plain(t))
        seen.append(eager.plain(x))
        return t + 1

    torch.func.vmap(see)(x)
    torch.func.jvp(see, (x,), (x,))
    torch.func.functionalize(see)(x)
    torch.func.grad(lambda t: see(t).sum())(x)
    torch.jit.trace(see, x, check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(see)(x)
    assert len(seen) == 12 and not any(seen)
    assert eager.plain(x)


def test_no_call_is_plain_if_torch_lacks_what_tells(monkeypatch):
    monkeypatch.setattr(eager, "_known", False)
    assert not eager.plain(torch.zeros(2))
    monkeypatch.undo()
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    assert not eager.plain(torch.zeros(2))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_plain_calls_give_what_the_op_gives(backend):
    query, key, value = (torch.randn(1, 12, 2, 8) for _ in range(3))
    out = ops.downsampled_attention(query, key, value, (3, 4), 2, scale=0.3, backend=backend)
    through_torch = _forward(query, key, value, [3, 4], [1, 2], "nearest", 0.3, backend)
    assert torch.equal(out, through_torch) and out.is_contiguous() and not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pruning_plans_are_the_same_through_the_dispatcher(monkeypatch, dtype):
    x, score = torch.randn(2, 63, 24).to(dtype), torch.randn(2, 63)
    x[0, ::2] = x[0, 0]
    x[1, 5] = float("nan")
    plain = ops.plan_pruning(x, score, (7, 9), 0.5)
    monkeypatch.setattr(eager, "_known", False)
    assert all(torch.equal(a, b) for a, b in zip(plain, ops.plan_pruning(x, score, (7, 9), 0.5), strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_captures_planned_launches():
    query, key, value = (torch.randn(2, 144, 2, 40, device="cuda").half() for _ in range(3))
    expected = ops.downsampled_attention(query, key, value, (12, 12), 2, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.downsampled_attention(query, key, value, (12, 12), 2, backend="triton")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
