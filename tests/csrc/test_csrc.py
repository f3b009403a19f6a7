"""The C++ and CUDA sources: their row arithmetic under sanitizers, and a clean build for every architecture."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CXX = shutil.which(os.environ.get("CXX") or "c++")
NVCC = shutil.which(os.environ.get("NVCC") or "nvcc")
INCLUDE = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="needs a C++ compiler"),
    pytest.mark.xdist_group("csrc"),  # one build serves all
]


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def rows_test(tmp_path_factory):
    program = tmp_path_factory.mktemp("rows") / "rows_test"
    # As setup.py compiles the CPU library, where this processor can run it.
    x86 = platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    sanitizers = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = ["-std=c++17", "-O1", *sanitizers, *(["-mavx2", "-mfma", "-mf16c"] if x86 else []), *WARNINGS, *INCLUDE]
    run(CXX, *flags, Path(__file__).with_name("rows_test.cpp"), "-o", program)
    return program


def test_every_job_and_the_kernel_under_sanitizers(rows_test):
    """Each case draws shapes, strides, alignments and indices for every job."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # leak detection needs ptrace
    assert run(rows_test, 10000, 0, env=environment) == "10000 cases\n"


@pytest.mark.parametrize("source", ["tokens_cpu.cpp", "match_cpu.cpp", "tokens_cuda.cpp"])
def test_no_warnings_on_the_host(source):
    macros = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    run(CXX, "-fsyntax-only", "-std=c++17", *macros, *WARNINGS, *INCLUDE, CSRC / source)


def test_nothing_is_used_that_torch_2_10_lacks():
    """TORCH_TARGET_VERSION hides newer functions, but no newer macros: this one came after 2.11."""
    for source in CSRC.iterdir():
        assert "STABLE_TORCH_ERROR_CODE_CHECK" not in source.read_text(), source.name


@pytest.fixture(scope="module")
def cuda_object(tmp_path_factory):
    if NVCC is None:
        pytest.skip("needs nvcc")
    compiled = tmp_path_factory.mktemp("cuda") / "launch.o"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    host = ["-Xcompiler", ",".join(["-fPIC", *WARNINGS])]
    flags = ["-O3", "-std=c++17", "-UNDEBUG", "--threads=2", "-Werror", "all-warnings"]
    run(NVCC, "-c", CSRC / "launch.cu", "-o", compiled, *flags, *host, *targets, *INCLUDE)
    return compiled


def test_cuda_compiles_for_every_architecture_without_warnings(cuda_object):
    assert cuda_object.stat().st_size > 0


def test_the_kernels_move_16_bytes_at_a_time(cuda_object):
    """In the machine code for Hopper: 128-bit loads and stores in every job that moves rows, and a device assert."""
    tools = pytest.importorskip("triton").__path__[0] + "/backends/nvidia/bin"
    path = os.pathsep.join([tools, os.environ["PATH"]])
    cuobjdump = shutil.which("cuobjdump", path=path)
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    code = run(cuobjdump, "-sass", "-arch", "sm_90", cuda_object, env=os.environ | {"PATH": path})
    functions = re.split(r"Function : ", code)[1:]
    movers = [
        f for f in functions if any(job in f.split()[0] for job in ("Gather", "Scatter", "Replace", "RecoverAdd"))
    ]
    assert len(movers) == 7 and len(functions) == 12
    for function in movers:
        assert "LDG.E.128" in function and "STG.E.128" in function, function.split()[0]
        if "Replace" not in function.split()[0]:  # which reads no token number that a user gave
            assert "__assertfail" in function or "CALL" in function, function.split()[0]
