"""The real launcher, on a stand-in for the CUDA driver: what it compiles is what benchmarks.compile_report reports on.

In a process of its own for each architecture, because here the kernels are Triton's interpreted ones.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import stand_in

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The folder of the stand-in for libcuda."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build the stand-in for the CUDA driver")
    return stand_in.build(tmp_path_factory.mktemp("libcuda"))


_LAUNCH = """
import json, sys
from pathlib import Path
from benchmarks.stand_in import StandIn

arch = int(sys.argv[2])
gpu = StandIn(Path(sys.argv[1]), arch)
gpu.use()

import torch, triton
from triton.backends.compiler import GPUTarget
from benchmarks import compile_report
from todo_attn.kernels import attention, pack

variants = [compile_report.Variant(kernel, arch, "fp16", 40, mode) for kernel, mode in (
    ("attention", "plain"), ("pack", "nearest"))]
compile_report.attention(variants[0])
ran = {kernel.hash for each in (attention.attention_kernel, pack.pack_kernel)
       for kernel in each.device_caches[0][0].values()}
counted = gpu.launches, gpu.descriptors
found = {each.kernel: each for each in compile_report.launches(variants[0])}
target = GPUTarget("cuda", arch, 32)
said = {triton.compile(found[v.kernel].source, target=target, options=found[v.kernel].options).hash for v in variants}
print(json.dumps([*counted, sorted(ran), sorted(said)]))
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_the_report_compiles_what_the_launcher_does(library, capability, tmp_path):
    """The same key in Triton's cache: source, signature, specialisation, options, target."""
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LAUNCH, str(library), str(capability)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if "Python.h" in done.stderr:
        pytest.skip("no Python headers, which Triton's launcher is compiled with")
    assert done.returncode == 0, done.stderr[-2000:]
    launches, _, ran, said = json.loads(done.stdout)
    assert launches == 2
    assert ran == said and len(ran) == 2
