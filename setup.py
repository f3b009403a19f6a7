"""Package layout, and the compiled token operations; the metadata lives in pyproject.toml.

``kernels/`` is installed as ``todo_attn.kernels`` (the top-level name ``kernels`` belongs to another package, which
diffusers imports) and the shipped demo pipeline as data in ``todo_attn/landscapes``.

``csrc/`` becomes two libraries on torch's stable ABI, which todo_attn/ops/libraries.py loads by path: one for the CPU
and, if there is an nvcc, one for NVIDIA GPUs. Neither needs a GPU to be built. What cannot be built is left out with
a message, and the package then runs on torch's own kernels. They need torch at build time, so:
``pip install --no-build-isolation .``

Environment:
    TODO_ATTN_CUDA: 0 leaves the CUDA library out.
    TODO_ATTN_CUDA_ARCHS: the compute capabilities it is compiled for, such as "8.0;9.0"; the newest also as PTX.
    CXX, CXXFLAGS, NVCC: the compilers.
"""

import os
import platform
import re
import shutil
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0"
HEADERS = ["csrc/rows.h", "csrc/ops.h", "csrc/match.h", "csrc/launch.h", "csrc/row_kernel.h"]
# Nothing newer than torch 2.10's stable ABI and Python 3.10's limited API is used: one build serves all later ones.
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
PYTHON_TAG = "cp310"


def say(message):
    print(f"todo_attn: {message}", file=sys.stderr, flush=True)


def cuda_archs():
    """The compute capabilities to compile for, 90 for 9.0, ascending; none if this nvcc knows none of ours.

    An nvcc lacks the newest ones if it is older than they are.
    """
    asked = os.environ.get("TODO_ATTN_CUDA_ARCHS")
    names = [a for a in re.split(r"[;,\s]+", asked or CUDA_ARCHS) if a]
    if not names or not all(re.fullmatch(r"\d+\.\d", name) for name in names):
        raise SystemExit(f"TODO_ATTN_CUDA_ARCHS must be like {CUDA_ARCHS!r}, got {asked!r}")
    numbers = sorted({int(name.replace(".", "")) for name in names})
    if asked:
        return numbers
    known = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [n for n in numbers if f"compute_{n}" in known]


def cuda_flags():
    """Flags for nvcc: machine code for each architecture, and PTX for the newest."""
    numbers = cuda_archs()
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    flags.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    # -UNDEBUG: an index out of range is a device assert.
    return ["-O3", "-std=c++17", "-UNDEBUG", "-Xcompiler", "-fPIC", f"--threads={os.cpu_count()}", *flags]


def find_nvcc():
    return shutil.which(os.environ.get("NVCC") or "nvcc")


def cuda_library_dirs(nvcc):
    """Where nvcc itself would look for the CUDA runtime; nvcc may be a wrapper, so its own path says nothing."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    return re.findall(r'"-L([^"]+)"', dry.stderr)


def extensions():
    if sys.platform not in ("linux", "darwin"):
        say(f"no compiled libraries on {sys.platform}")
        return []
    try:
        from torch.utils import cpp_extension
    except ImportError:
        say("torch is not here while building, so nothing is compiled; use pip install --no-build-isolation")
        return []
    common = {
        "include_dirs": cpp_extension.include_paths(),
        "library_dirs": cpp_extension.library_paths(),
        "libraries": ["c10", "torch_cpu"],
        "depends": HEADERS,
        "language": "c++",
        "py_limited_api": True,
        "optional": True,  # a failed build is a warning
    }
    flags = ["-O3", "-g0", "-std=c++17"]
    # fp16 sums and products of rows want what processors have since 2013; todo_attn/ops/libraries.py asks for it.
    cpu_flags = [*flags, "-mavx2", "-mfma", "-mf16c"] if platform.machine() in ("x86_64", "AMD64") else flags
    built = [
        Extension(
            "todo_attn._C_cpu",
            ["csrc/tokens_cpu.cpp", "csrc/match_cpu.cpp"],
            extra_compile_args=cpu_flags,
            define_macros=MACROS,
            **common,
        )
    ]
    nvcc = find_nvcc()
    if os.environ.get("TODO_ATTN_CUDA") == "0":
        say("no CUDA library: TODO_ATTN_CUDA=0")
    elif sys.platform != "linux" or nvcc is None:
        say("no CUDA library: there is no nvcc")
    elif not cuda_archs():
        say(f"no CUDA library: {nvcc} --list-gpu-arch names none of {CUDA_ARCHS}; TODO_ATTN_CUDA_ARCHS chooses others")
    else:
        common["library_dirs"] = [*common["library_dirs"], *cuda_library_dirs(nvcc)]
        built.append(
            Extension(
                "todo_attn._C_cuda",
                ["csrc/tokens_cuda.cpp", "csrc/launch.cu"],
                extra_compile_args=flags,
                define_macros=[*MACROS, ("USE_CUDA", None)],
                # libtorch brings libtorch_cuda if torch has it; the torch at hand while building need not. The CUDA
                # runtime is linked in and kept to ourselves, so that torch's may be of another version.
                extra_link_args=[
                    "-Wl,--no-as-needed",
                    "-ltorch",
                    "-lcudart_static",
                    "-ldl",
                    "-lrt",
                    "-lpthread",
                    "-Wl,--exclude-libs,ALL",
                ],
                **common,
            )
        )
    return built


class Build(build_ext):
    """Compiles .cu files with nvcc, and says what is missing if a library cannot be built.

    Not torch's BuildExtension: it refuses an nvcc of another CUDA version than torch's, which does not matter to a
    library that shares no CUDA code with torch, and without a GPU build of torch it does not look for nvcc at all.
    """

    def build_extensions(self):
        self.compiler.src_extensions.append(".cu")
        host_compile = self.compiler._compile

        def compile_one(obj, src, ext, cc_args, extra_postargs, pp_opts):
            if ext != ".cu":
                return host_compile(obj, src, ext, cc_args, extra_postargs, pp_opts)
            self.spawn([find_nvcc(), "-c", src, "-o", obj, *pp_opts, *cuda_flags()])

        self.compiler._compile = compile_one
        super().build_extensions()

    def get_export_symbols(self, ext):
        return ext.export_symbols  # these are not Python modules: there is no PyInit


# A wheel with libraries serves every Python from 3.10 on; one without is for any platform.
modules = extensions()
setup(
    packages=[
        "todo_attn",
        "todo_attn.bench",
        "todo_attn.cli",
        "todo_attn.compare",
        "todo_attn.config",
        "todo_attn.ops",
        "todo_attn.diffusers",
        "todo_attn.diffusers.dato",
        "todo_attn.kernels",
        "todo_attn.models",
        "todo_attn.options",
        "todo_attn.predict",
        "todo_attn.landscapes",
        "todo_attn.search",
    ],
    package_dir={
        "todo_attn": "todo_attn",
        "todo_attn.kernels": "kernels",
        "todo_attn.landscapes": "examples/landscapes/pipeline",
    },
    ext_modules=modules,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}} if modules else {},
)
