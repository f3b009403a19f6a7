"""If Triton cannot compile or launch, torch serves, says so once, and the doctor knows; other errors pass through."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import stand_in
from todo_attn import doctor, ops
from todo_attn.config.checks import ArgumentError
from todo_attn.ops import backends, fallback

triton = pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from todo_attn.kernels import launch, match  # noqa: E402

ROOT = Path(__file__).parents[2]
INDEX = torch.arange(12)[None]


def tokens(head_dim=40, dtype=torch.float16):
    return [torch.randn(1, 12, 2, head_dim).to(dtype) for _ in range(3)]


def of_class(error):
    return error.__class__.__name__


MACHINE = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    PermissionError(13, "Permission denied", "/root/.triton/cache"),
    ImportError("libtriton.so: undefined symbol"),
]
KERNEL = [
    OutOfResources(300000, 232448, "shared memory"),
    PTXASError("Value 'sm_130' is not defined for option 'gpu-name'"),
    RuntimeError("PassManager::run failed"),
    RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    AttributeError("'JITFunction' object has no attribute 'run'"),
]
OTHERS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
    RuntimeError("CUDA error: unspecified launch failure"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    KeyboardInterrupt(),
]


@pytest.fixture
def failing(monkeypatch):
    """failing(error) has both launchers raise it, on a CPU that passes for a GPU; returns the calls so far."""
    monkeypatch.setattr(fallback, "_failures", {})
    monkeypatch.setattr(backends, "choose", stand_in.choose)

    def failing(error):
        calls = []

        def raises(*args, **kwargs):
            calls.append(args)
            raise error

        monkeypatch.setattr(launch, "attention", raises)
        monkeypatch.setattr(match, "match", raises)
        return calls

    return failing


@pytest.fixture
def said(caplog):
    """The package's own log records."""
    return lambda: [record for record in caplog.records if record.name == "todo_attn"]


@pytest.mark.parametrize("error", MACHINE + KERNEL, ids=of_class)
def test_torch_serves_bit_equal_and_the_reason_is_logged_once(failing, said, error):
    calls, (query, key, value) = failing(error), tokens()
    for _ in range(3):
        out = ops.downsampled_attention(query, key, value, (3, 4), 2)
        assert torch.equal(out, ops.downsampled_attention(query, key, value, (3, 4), 2, backend="torch"))
    assert len(calls) == 1
    (record,) = said()
    assert "torch's own operations serve from now on" in record.message
    assert type(error).__name__ in record.message
    assert type(error).__name__ in fallback.reason(query.device, query.dtype, 40)


@pytest.mark.parametrize("error", MACHINE + KERNEL, ids=of_class)
def test_matching_falls_back_too(failing, said, error):
    x = torch.randn(1, 12, 8).half()
    calls = failing(error)
    found = [ops.match_tokens(x, INDEX[:, :4], INDEX[:, 4:]) for _ in range(2)]
    assert len(calls) == len(said()) == 1
    expected = ops.match_tokens(x.double(), INDEX[:, :4], INDEX[:, 4:])
    assert all(torch.equal(position, expected[0]) for position, _ in found)


@pytest.mark.parametrize("error", MACHINE, ids=of_class)
def test_a_failure_of_the_machine_is_one_for_every_call(failing, said, error):
    calls = failing(error)
    ops.downsampled_attention(*tokens(), (3, 4))
    ops.downsampled_attention(*tokens(64, torch.bfloat16), (3, 4))
    ops.match_tokens(torch.randn(1, 12, 8).half(), INDEX, INDEX)
    assert len(calls) == len(said()) == 1


@pytest.mark.parametrize("error", KERNEL, ids=of_class)
def test_a_failure_of_one_kernel_leaves_the_others(failing, said, error):
    calls = failing(error)
    for _ in range(2):
        ops.downsampled_attention(*tokens(40), (3, 4))
        ops.downsampled_attention(*tokens(64), (3, 4))
        ops.downsampled_attention(*tokens(40, torch.bfloat16), (3, 4))
        ops.match_tokens(torch.randn(1, 12, 8).half(), INDEX, INDEX)
    assert len(calls) == len(said()) == 4
    text = " ".join(record.message for record in said())
    assert "for head_dim 40 in float16" in text and "for matching in float16" in text


@pytest.mark.parametrize("error", OTHERS, ids=of_class)
def test_errors_that_are_not_of_triton_pass_through(failing, said, error):
    failing(error)
    with pytest.raises(type(error)) as raised:
        ops.downsampled_attention(*tokens(), (3, 4))
    assert raised.value is error
    with pytest.raises(type(error)):
        ops.match_tokens(torch.randn(1, 12, 8).half(), INDEX, INDEX)
    assert not fallback._failures and not said()


def test_triton_asked_for_by_name_raises_with_the_reason(failing, monkeypatch):
    error = OutOfResources(300000, 232448, "shared memory")
    failing(error)
    message = "backend must be 'auto' or 'torch' here, got 'triton': .*out of resource: shared memory"
    with pytest.raises(ArgumentError, match=message) as raised:
        ops.downsampled_attention(*tokens(), (3, 4), backend="triton")
    assert raised.value.__cause__ is error
    monkeypatch.undo()
    monkeypatch.setattr(fallback, "_failures", {(torch.device("cuda:0"), torch.float16, 40): "it failed"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda:0")
    assert backends.choose("auto", cuda, torch.float16, 40) == "torch"
    assert backends.choose("auto", cuda, torch.float16, 64) == "triton"
    assert backends.choose("auto", torch.device("cuda:1"), torch.float16, 40) == "triton"
    with pytest.raises(ArgumentError, match="got 'triton': it failed"):
        backends.choose("triton", cuda, torch.float16, 40)


def test_threads_log_once(failing, said):
    failing(MACHINE[0])
    q, outs, ready = tokens(), [], threading.Barrier(4)

    def call():
        ready.wait()
        outs.append(ops.downsampled_attention(*q, (3, 4)))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 4 and all(torch.equal(out, outs[0]) for out in outs)
    assert len(said()) == 1


def test_a_compiled_graph_falls_back_when_it_runs(failing, said):
    calls, q = failing(MACHINE[0]), tokens()
    function = torch.compile(
        lambda q, k, v: ops.downsampled_attention(q, k, v, (3, 4), 2), backend="aot_eager", fullgraph=True
    )
    expected = ops.downsampled_attention(*q, (3, 4), 2, backend="torch")
    assert all(torch.equal(function(*q), expected) for _ in range(2))
    assert len(calls) == len(said()) == 1


def test_fake_tensors_try_nothing(failing):
    calls = failing(MACHINE[0])
    with torch._subclasses.FakeTensorMode():
        assert ops.downsampled_attention(*tokens(), (3, 4)).shape == (1, 12, 2, 40)
    assert not calls and not fallback._failures


def test_gradients_through_the_fallback(failing):
    failing(MACHINE[0])
    q = [t.float().requires_grad_() for t in tokens()]
    half = [t.half() for t in q]
    ops.downsampled_attention(*half, (3, 4), 2).sum().backward()
    assert all(t.grad.isfinite().all() for t in q)


def test_the_doctor_tries_triton_and_says_why_not(failing, monkeypatch):
    failing(MACHINE[0])
    monkeypatch.setattr(backends, "triton_unavailable_reason", fallback.reason)
    found = doctor.examine()
    assert found["ok"]
    for row in found["ops"]:
        if row["op"] in ("downsampled_attention", "match_tokens"):
            assert row["backend"] == "torch" and "Failed to find C compiler" in row["why_not_triton"]


# With Triton's own launcher, in a process of its own.

SCRIPT = """
import sys
from pathlib import Path
import torch
from benchmarks.stand_in import StandIn
gpu = StandIn(Path(sys.argv[1]), 90)
try:
    gpu.use()
except Exception:
    pass  # it fails again in the op
from todo_attn import ops
q = torch.randn(1, 12, 2, 40).half()
for _ in range(2):
    out = ops.downsampled_attention(q, q, q, (3, 4), 2)
    print(gpu.launches, torch.equal(out, ops.downsampled_attention(q, q, q, (3, 4), 2, backend="torch")))
if len(sys.argv) > 2:
    ops.downsampled_attention(q, q, q, (3, 4), 2, backend="triton")
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if reason := stand_in.unavailable_reason():
        pytest.skip(reason)
    return stand_in.build(tmp_path_factory.mktemp("driver"))


def run(driver, *arguments, **environment):
    command = [sys.executable, "-c", SCRIPT, str(driver), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    for name in ("TRITON_INTERPRET", "CC"):
        environment.pop(name, None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_triton_runs_where_it_can(driver):
    done = run(driver)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["2", "4"] and done.stderr == ""


@pytest.mark.parametrize("how", ["no compiler", "no cache"])
def test_a_slim_container(driver, tmp_path, how):
    (tmp_path / "file").touch()  # a cache folder cannot be made below it, not even by root
    cache = tmp_path / "file" / "cache" if how == "no cache" else tmp_path / "cache"
    environment = {"TRITON_CACHE_DIR": str(cache)} | ({"PATH": str(tmp_path)} if how == "no compiler" else {})
    done = run(driver, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 True", "0 True"]
    assert done.stderr.count("torch's own operations serve from now on") == len(done.stderr.splitlines()) == 1
    assert ("Failed to find C compiler" if how == "no compiler" else str(cache)) in done.stderr

    done = run(driver, "triton", **environment)
    assert done.returncode == 1 and "got 'triton': Triton failed: " in done.stderr
