"""The compiled token operations: bit-equal to torch, loaded where they can run, explained where they cannot."""

import ctypes
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from todo_attn.ops import libraries, tokens  # noqa: F401  (tokens defines the ops)

ROOT = Path(__file__).parents[2]
CUDA_LIBRARY = next(Path(libraries.__file__).parents[1].glob("_C_cuda.*"), None)
CXX = shutil.which(os.environ.get("CXX") or "c++")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
compiled = torch.ops.todo_attn


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A device with its library in use: here a build that failed is a failure, not a reason to skip."""
    if request.param == "cpu" and CXX is None:
        pytest.skip("needs a C++ compiler to have been built")
    if request.param == "cpu" and (reason := libraries._processor_unavailable_reason()):
        pytest.skip(reason)
    if request.param == "cuda" and not CUDA_LIBRARY:
        pytest.skip("needs the CUDA library: there was no nvcc")
    assert libraries.unavailable_reason(request.param) is None
    return request.param


def tensor(rng, shape, dtype, device, expanded=True):
    """Random values in random strides: contiguous, transposed, sliced, expanded along a dimension."""
    b, n, c = shape
    kind = rng.randrange(6 if expanded else 4)
    if kind == 0:
        x = torch.randn(b, n, c)
    elif kind == 1:
        x = torch.randn(b, c, n).transpose(1, 2)
    elif kind == 2:
        x = torch.randn(n, b, c + 3)[:, :, 2 : 2 + c].transpose(0, 1)
    elif kind == 3:
        x = torch.randn(b, 2 * n, 2 * c + 1)[:, ::2, 1::2]
    elif kind == 4:
        x = torch.randn(1, n, c).expand(b, n, c)
    else:
        x = torch.randn(b, n, 1).expand(b, n, c)
    to = torch.empty_like(x, dtype=dtype, device=device) if kind < 4 else None
    return x.to(device, dtype) if to is None else to.copy_(x)


def indices(rng, b, k, n, device, unique=False):
    rows = [torch.randperm(n)[:k] if unique else torch.randint(0, max(n, 1), (k,)) for _ in range(b)]
    index = torch.stack(rows) if b else torch.zeros(0, k, dtype=torch.int64)
    index = index.to(device, rng.choice([torch.int32, torch.int64]))
    return index.t().contiguous().t() if rng.random() < 0.5 else index


def same(out, expected):
    return out.is_contiguous() and out.dtype == expected.dtype and torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal_to_torch(device, dtype):
    rng = random.Random(0)
    for _ in range(150):
        b, n = rng.choice([0, 1, 2, 3]), rng.choice([1, 2, 7, 64, 129])
        c, k = rng.choice([0, 1, 2, 3, 5, 8, 31, 40, 320]), rng.choice([0, 1, n // 2, n])
        x = tensor(rng, (b, n, c), dtype, device)
        index = indices(rng, b, k, n, device)
        residual = tensor(rng, (b, k, c), dtype, device)
        taken = x.gather(1, index.long()[..., None].expand(b, k, c))
        assert same(compiled.gather_tokens(x, index), taken)
        assert same(compiled.recover_tokens(x, index, None), taken)
        assert same(compiled.recover_tokens(x, index, residual), (taken + residual).contiguous())

        index = indices(rng, b, k, n, device, unique=True)
        x = tensor(rng, (b, n, c), dtype, device, expanded=False)
        before = x.clone()
        written = x.contiguous().scatter(1, index.long()[..., None].expand(b, k, c), residual.contiguous())
        assert same(compiled.scatter_tokens(x, index, residual), written)
        assert torch.equal(x, before)
        compiled.scatter_tokens_(x, index, residual)
        assert torch.equal(x, written)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bases_are_those_of_argmax(device, dtype):
    rng = random.Random(0)
    for _ in range(100):
        b, h, w, ph, pw = rng.randint(0, 3), *(rng.randint(1, 9) for _ in range(4))
        score = torch.randint(0, 4, (b, h * w)).to(device, dtype)
        if rng.random() < 0.3:
            score[torch.rand(score.shape, device=device) < 0.2] = float("nan")
        strided = score.t().contiguous().t() if rng.random() < 0.5 else score
        expected = []
        for y in range(0, h - ph + 1, ph):
            for x in range(0, w - pw + 1, pw):
                patch = score.view(b, h, w)[:, y : y + ph, x : x + pw].flatten(1)
                best = patch.cpu().argmax(1)  # on a GPU torch's does not say which of equals it takes
                expected.append((y + best // pw) * w + x + best % pw)
        expected = torch.stack(expected, 1) if expected else torch.zeros(b, 0, dtype=torch.int64)
        assert same(compiled.select_base_tokens(strided, h, w, ph, pw).cpu(), expected)


@pytest.mark.parametrize("bad", [-1, 5, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_an_index_out_of_range_raises_before_any_write(bad, dtype):
    x, source = torch.zeros(2, 5, 3), torch.ones(2, 2, 3)
    index = torch.tensor([[0, 1], [2, bad]], dtype=dtype)
    message = rf"must lie in \[0, 5\), got {bad}"
    with pytest.raises(IndexError, match=message):
        compiled.gather_tokens(x, index)
    with pytest.raises(IndexError, match=message):
        compiled.scatter_tokens(x, index, source)
    with pytest.raises(IndexError, match=message):
        compiled.recover_tokens(x, index, source)
    with pytest.raises(IndexError, match=message):
        compiled.scatter_tokens_(x, index, source)
    assert not x.any()


def test_threads_agree_and_the_first_bad_index_is_named():
    """Enough rows for several threads, the bad indices in the parts of different ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x = torch.randn(2, 70000, 3)
        index = torch.randint(0, 70000, (2, 70000))
        assert torch.equal(compiled.gather_tokens(x, index), torch.stack([x[b, index[b]] for b in range(2)]))
        index[0, 60000] = index[1, 3] = 70000
        with pytest.raises(IndexError, match=r"got 70000"):
            compiled.gather_tokens(x, index)
        with pytest.raises(IndexError, match=r"\[0, 0\)"):
            compiled.gather_tokens(x[:, :0], index)
    finally:
        torch.set_num_threads(threads)


def test_more_than_2_to_31_elements(device):
    """4 GB of address space, of which a few pages are touched."""
    channels, tokens_ = 64, 2**31 // 64 + 3
    x = torch.empty(1, tokens_, channels, dtype=torch.float16, device=device)
    index = torch.tensor([[tokens_ - 1, 0, tokens_ - 2]], device=device)
    rows = torch.randn(1, 3, channels, device=device).half()
    compiled.scatter_tokens_(x, index, rows)
    assert torch.equal(x[0, index[0]], rows[0])
    assert torch.equal(compiled.gather_tokens(x, index.int()), rows)
    assert torch.equal(compiled.recover_tokens(x, index, rows), rows + rows)


def test_an_output_of_more_than_2_to_31_elements(device, needs_memory):
    needs_memory(10)  # 4.3, and some more
    channels, rows = 2**16, 2**15 + 1
    x = torch.randn(1, 2, channels, device=device).half()
    index = torch.zeros(1, rows, dtype=torch.int32, device=device)
    index[0, -1] = 1
    out = compiled.gather_tokens(x, index)
    assert out.numel() > 2**31
    for row in (0, rows // 2, rows - 2, rows - 1):
        assert torch.equal(out[0, row], x[0, index[0, row]])


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_arguments_that_do_not_fit(device):
    """The public functions check first; called past them the kernels must not touch what is not there either."""
    x, index, source = torch.zeros(1, 4, 2), torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, 2)
    for call in (
        lambda: compiled.gather_tokens(x.long(), index),
        lambda: compiled.gather_tokens(x, index.short()),
        lambda: compiled.gather_tokens(x, index.expand(2, 3)),
        lambda: compiled.gather_tokens(x[0], index),
        lambda: compiled.scatter_tokens(x, index, source[:, :2]),
        lambda: compiled.scatter_tokens_(x, index, source.double()),
        lambda: compiled.scatter_tokens_(x[:, :1].expand(1, 4, 2), index, source),
        lambda: compiled.recover_tokens(x, index, source[..., :1]),
        lambda: compiled.select_base_tokens(x[..., 0], 2, 3, 1, 1),
        lambda: compiled.select_base_tokens(x[..., 0], 2, 2, 0, 1),
    ):
        with pytest.raises(ValueError, match=r"must (be|have|not)"):
            call()


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_the_current_stream_is_used():
    assert libraries.unavailable_reason("cuda") is None
    x = torch.zeros(2, 4096, 320, device="cuda")
    index = torch.arange(4096, device="cuda").expand(2, 4096)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            x.fill_(1)
            out = compiled.recover_tokens(compiled.gather_tokens(x, index), index, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert (out == 2).all()


@pytest.mark.gpu
def test_on_a_gpu_an_index_out_of_range_is_a_device_assert():
    code = (
        "import torch, todo_attn\n"
        "x = torch.zeros(1, 4, 8, device='cuda')\n"
        "torch.ops.todo_attn.gather_tokens(x, torch.tensor([[4]], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "assert" in done.stderr


def run(code, **environment):
    """Run ``code`` outside the checkout, which need not be installed."""
    command = [sys.executable, "-c", code]
    path = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_can_be_turned_off():
    code = (
        "import torch\nfrom todo_attn.ops import libraries, tokens\nlibraries.load()\n"
        "print(libraries.unavailable_reason('cpu'), libraries.unavailable_reason('cuda'))\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('todo_attn::gather_tokens', 'CPU'))\n"
        "print(torch.ops.todo_attn.gather_tokens(torch.ones(1, 4, 1), torch.tensor([[2]])).item())\n"
        "from todo_attn.ops import match_tokens\n"
        "print(match_tokens(torch.eye(4)[None], torch.tensor([[2]]), torch.tensor([[1, 2]]))[0].item())\n"
    )
    off = "TODO_ATTN_LIBRARIES=0 is set"
    assert run(code, TODO_ATTN_LIBRARIES="0").splitlines() == [f"{off} {off}", "False", "1.0", "1"]


def test_a_gpu_without_code_leaves_the_library_to_the_others():
    """Tried on the CPU, whose device has no number, by the code that divides the GPUs."""
    code = (
        "import torch\nfrom todo_attn.ops import libraries, tokens\n"
        "def calls(served):\n"
        "    def kernel(x, *rest):\n"
        "        served.append(x.shape)\n"
        "        return x.new_ones(1)\n"
        "    return kernel\n"
        "torchs, compiled = libraries._kernels('CPU'), []\n"
        "library = torch.library.Library('todo_attn', 'IMPL')\n"
        "for op in ('gather_tokens', 'recover_tokens', 'select_base_tokens'):\n"
        "    library.impl(op, calls(compiled), 'CPU')\n"
        "libraries._divide('CPU', torchs)\n"
        "x, index = torch.arange(8.0).view(1, 4, 2), torch.tensor([[2, 0]])\n"
        "def use():\n"
        "    tokens.gather_tokens(x, index)\n"
        "    tokens.recover_tokens(x, index, x[:, :2])\n"
        "    tokens.select_base_tokens(x[..., 0], (2, 2), (2, 2))\n"
        "    return len(compiled)\n"
        "print(use())\n"
        "libraries._foreign[None] = 'no code'\n"
        "print(use(), tokens.gather_tokens(x, index).tolist())\n"
        "tokens.scatter_tokens_(x, index, -x[:, :2])\n"
        "print(x[0, :, 0].tolist())\n"
    )
    served, foreign, written = run(code, TODO_ATTN_LIBRARIES="0").splitlines()
    assert (served, foreign) == ("3", "3 [[[4.0, 5.0], [0.0, 1.0]]]")
    assert written == "[-2.0, 2.0, -0.0, 6.0]"


def test_a_reason_of_one_gpu(fresh, monkeypatch):
    monkeypatch.setattr(libraries, "_reasons", {"cuda": None})
    monkeypatch.setattr(libraries, "_foreign", {1: "it is not compiled for compute capability 7.5"})
    assert libraries.unavailable_reason("cuda") is libraries.unavailable_reason("cuda", 0) is None
    assert "7.5" in libraries.unavailable_reason("cuda", 1)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library loaded yet, and none in the folder where they are looked for."""
    monkeypatch.setattr(libraries, "_reasons", {})
    monkeypatch.setattr(libraries, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.delenv("TODO_ATTN_LIBRARIES", raising=False)
    return tmp_path


def test_a_library_that_was_not_built(fresh):
    libraries.load()
    assert "_C_cpu was not built" in libraries.unavailable_reason("cpu")
    assert "pip install --no-build-isolation" in libraries.unavailable_reason("cpu")


def test_a_library_that_does_not_load(fresh):
    (fresh / "_C_cpu.abi3.so").write_bytes(b"not a library")
    libraries.load()
    assert libraries.unavailable_reason("cpu").startswith("_C_cpu.abi3.so does not load: ")


def test_a_processor_without_avx2(fresh, monkeypatch):
    monkeypatch.setattr(libraries.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    libraries.load()
    assert libraries.unavailable_reason("cpu") == "the processor has no AVX2 (torch uses DEFAULT)"


def test_other_devices_have_none():
    assert "no compiled library for 'mps'" in libraries.unavailable_reason("mps")


def test_the_cuda_library_waits_for_cuda(fresh, monkeypatch):
    """Importing must not initialise CUDA: a process that has cannot fork."""
    later = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_call", later.append)
    monkeypatch.setattr(torch.cuda, "init", lambda: [call() for call in later])
    libraries.load()
    assert len(later) == 1 and "cuda" not in libraries._reasons
    assert "_C_cuda was not built" in libraries.unavailable_reason("cuda")


def test_without_a_gpu_or_without_cuda(fresh, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert libraries.unavailable_reason("cuda") == "torch sees no GPU that it can use"
    monkeypatch.setattr(torch.version, "cuda", None)
    libraries.load()
    assert libraries.unavailable_reason("cuda") == "this torch is built without CUDA"


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@pytest.mark.skipif(CUDA_LIBRARY is None, reason="needs the CUDA library: there was no nvcc")
def test_the_cuda_library_finds_all_that_it_needs_of_torch():
    """No GPU is needed: without a driver that it can use, a loaded library says so."""
    code = "from todo_attn.ops import libraries, tokens\nlibraries._load_cuda()\nprint(libraries._reasons['cuda'])"
    reason = run(code).strip()
    assert reason == "None" or "NVIDIA driver" in reason


# What the CUDA runtime asks a driver for: this one is for CUDA 1.0 and knows nothing else.
OLD_DRIVER = """
#include <dlfcn.h>
static int nothing() { return 3; }
extern "C" int cuDriverGetVersion(int* version) { *version = 1000; return 0; }
extern "C" int cuGetProcAddress_v2(const char* name, void** to, int, unsigned long, int*) {
  *to = dlsym(dlopen("libcuda.so.1", RTLD_LAZY), name);
  if (!*to) *to = reinterpret_cast<void*>(nothing);
  return 0;
}
extern "C" int cuGetProcAddress(const char* name, void** to, int version, unsigned long flags) {
  return cuGetProcAddress_v2(name, to, version, flags, nullptr);
}
"""
TORCH_CUDA = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA: the gpu tests load the library itself")
@pytest.mark.parametrize("driver", ["none", "old"])
def test_the_cuda_library_explains_a_driver_it_cannot_use(tmp_path, driver):
    """Loaded with a stand-in for torch's CUDA half: it says why, registers nothing, and does not crash."""
    if CXX is None or not CUDA_LIBRARY:
        pytest.skip("needs a C++ compiler, and the CUDA library, which needs nvcc")
    try:
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("there is a driver here")
    except OSError:
        pass
    for name, source in (("libhalf.so", TORCH_CUDA), *([("libcuda.so.1", OLD_DRIVER)] if driver == "old" else [])):
        command = [CXX, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c++", "-", "-o", str(tmp_path / name), "-ldl"]
        subprocess.run(command, input=source, text=True, check=True)
    code = (
        "import ctypes, torch\n"
        f"ctypes.CDLL({str(tmp_path / 'libhalf.so')!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "from todo_attn.ops import libraries, tokens\n"
        "libraries._load_cuda()\n"
        "print(libraries._reasons['cuda'])\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('todo_attn::gather_tokens', 'CUDA'))\n"
    )
    reason, registered = run(code, LD_LIBRARY_PATH=str(tmp_path)).splitlines()
    expected = (
        "there is no NVIDIA driver" if driver == "none" else "the NVIDIA driver is for CUDA 1.0, the library needs"
    )
    assert reason.startswith(expected)
    assert registered == "False"
