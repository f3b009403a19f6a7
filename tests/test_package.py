"""What is installed, and what importing it does."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from packaging import version

from todo_attn.ops import libraries

pytestmark = pytest.mark.xdist_group("package")  # one build serves all
ROOT = Path(__file__).parents[1]
BUILT = ("build", "dist", "*.egg-info", ".*", "__pycache__", "checkpoints", "demo", "*.so")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a build folder behind, and puts what lies in one into the next wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(*BUILT))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    without_cuda = {**os.environ, "TODO_ATTN_CUDA": "0"}  # which takes longer, and is built by others
    command += ["--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(command, env=without_cuda, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_no_other(wheel):
    trees = {"todo_attn": ROOT / "todo_attn", "todo_attn/kernels": ROOT / "kernels"}
    expected = {f"{name}/{p.relative_to(tree)}" for name, tree in trees.items() for p in tree.rglob("*.py")}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")} == expected


def test_sdist_can_be_tested_and_built(tmp_path):
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns(*BUILT))
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "source", check=True, capture_output=True)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ("Makefile", "constraints.txt", "kernels/pack.py", "tests/conftest.py", "tests/ops/test_attention.py")
    assert names.issuperset(
        (*wanted, "docs/design.md", "benchmarks/unet.py", "todo_attn/bench/harness.py", "examples/landscapes/train.py")
    )
    assert names.issuperset(("examples/landscapes/pipeline/model_index.json", "integrations/comfyui/nodes.py"))


def test_wheel_holds_the_package_and_no_top_level_kernels(wheel):
    """``kernels`` at the top level would hide another package of that name, which diffusers imports."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"todo_attn"}
    for name in ("py.typed", "kernels/attention.py", "ops/attention.py", "diffusers/processor.py", "cli/__init__.py"):
        assert f"todo_attn/{name}" in names
    for name in ("model_index.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json"):
        assert f"todo_attn/landscapes/{name}" in names
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 24e6


def test_the_page_of_an_installed_wheel(wheel, tmp_path):
    """Its template is data of the package."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from todo_attn.compare.page import Page, build_page\nprint(build_page(Page('A title', '')))"
    out = run(code, path=tmp_path)
    assert "<h1>A title</h1>" in out and "--paper" in out and "aria-valuetext" in out


def run(code, *, path):
    """Run ``code`` where todo_attn is what ``path`` holds, outside the checkout."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = """
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_installed_wheel_works_without_diffusers_and_triton(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = BLOCK.format(blocked=("diffusers", "triton")) + (
        "import torch, todo_attn\n"
        f"assert todo_attn.__file__.startswith({str(tmp_path)!r}), todo_attn.__file__\n"
        "x = torch.randn(1, 64, 2, 8)\n"
        "print(todo_attn.ops.downsampled_attention(x, x, x, (8, 8), 2).shape)\n"
        "print(todo_attn.ToDoConfig())\n"
        "print(todo_attn.example_pipeline())\n"
        "try:\n    todo_attn.apply_todo\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    out = run(code, path=tmp_path)
    assert "torch.Size([1, 64, 2, 8])" in out
    assert f"\n{tmp_path / 'todo_attn' / 'landscapes'}\n" in out
    assert (tmp_path / "todo_attn/landscapes/model_index.json").is_file()
    assert "pip install 'todo_attn[diffusers]'" in out


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "c++") is None or libraries._processor_unavailable_reason() is not None,
    reason="needs a C++ compiler and AVX2",
)
def test_an_installed_wheel_brings_its_library(wheel, tmp_path):
    """Installed alone into an empty folder, used from there."""
    assert "-cp310-abi3-" in wheel.name
    names = [name for name in zipfile.ZipFile(wheel).namelist() if "_C_" in name]
    assert names == ["todo_attn/_C_cpu.abi3.so"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    install = [*pip, "install", "--no-deps", "--target", str(tmp_path), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        "import torch\nfrom todo_attn.ops import libraries, tokens\n"
        "libraries.load()\n"
        f"assert libraries.__file__.startswith({str(tmp_path)!r}), libraries.__file__\n"
        "assert libraries.unavailable_reason('cpu') is None, libraries.unavailable_reason('cpu')\n"
        f"assert any(path.startswith({str(tmp_path)!r}) for path in torch.ops.loaded_libraries)\n"
        "x = torch.arange(8.0).view(1, 4, 2)\n"
        "print(tokens.gather_tokens(x, torch.tensor([[3, 0]])).tolist())\n"
    )
    assert run(code, path=tmp_path) == "[[[6.0, 7.0], [0.0, 1.0]]]\n"


def test_the_example_pipeline_of_a_checkout():
    out = run("import todo_attn\nprint(todo_attn.example_pipeline())", path=ROOT)
    assert (Path(out.strip()) / "model_index.json").samefile(ROOT / "examples/landscapes/pipeline/model_index.json")


def test_import_is_light():
    """No diffusers, no kernels, no compiler, no CUDA context."""
    code = (
        "import todo_attn, torch\n"
        "heavy = ('diffusers', 'transformers', 'triton', 'todo_attn.kernels', 'todo_attn.diffusers', 'kernels')\n"
        "print([name for name in heavy if name in sys.modules], torch.cuda.is_initialized())\n"
    )
    assert run(code, path=ROOT).strip() == "[] False"


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md", "examples/landscapes/README.md"])
def test_a_pipeline_loads_as_the_pages_say_without_a_warning(page):
    """With the shipped pipeline in the place of the page's; a newer diffusers warns of the older name of dtype."""
    import diffusers

    import todo_attn

    if version.parse(diffusers.__version__) < version.parse("0.40"):
        pytest.skip("the older name is the only one")
    (line,) = (line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "from_pretrained(" in line)
    call = re.sub(r'"[^"]+"', "example_pipeline()", line.partition(" = ")[2])
    name = call.partition(".")[0]
    names = {"torch": torch, "todo_attn": todo_attn, "example_pipeline": todo_attn.example_pipeline}
    names[name] = getattr(diffusers, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = eval(call, names)
    assert pipe.unet.dtype == (torch.float16 if "float16" in line else torch.float32)


def test_unknown_names_raise():
    import todo_attn

    with pytest.raises(AttributeError, match="nothing_here"):
        todo_attn.nothing_here  # noqa: B018
    assert {"ToDoConfig", "ToDoProcessor", "apply_todo", "remove_todo", "ops", "__version__"} <= set(dir(todo_attn))


def test_an_nvcc_that_knows_none_of_the_architectures_leaves_the_cuda_library_out(tmp_path):
    """One too old for --list-gpu-arch, say; the architectures asked for by name are another matter."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)

    def setup(**environment):
        return subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=ROOT,
            env=os.environ | {"NVCC": str(nvcc)} | environment,
            capture_output=True,
            text=True,
        )

    assert setup().returncode == 0 and "no CUDA library" in setup().stderr
    wrong = setup(TODO_ATTN_CUDA_ARCHS="hopper")
    assert wrong.returncode != 0 and "TODO_ATTN_CUDA_ARCHS must be like" in wrong.stderr
    assert "got 'hopper'" in wrong.stderr
