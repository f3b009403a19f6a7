"""``todo-attn tune``: what it keeps and prints, what it refuses, and what doctor says; the GPU and its clock are ours.

tests/cli/test_tune_on_stand_in.py has the real launcher.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import stand_in
from todo_attn import machine
from todo_attn.bench import candidates, harness, tuning
from todo_attn.ops import backends, matching
from todo_attn.ops.reference import downsampled_attention

pytest.importorskip("triton")
platformdirs = pytest.importorskip("platformdirs")

from todo_attn.kernels import configs, launch, match, tuned  # noqa: E402
from todo_attn.kernels.configs import KernelConfig  # noqa: E402

CPU = torch.device("cpu")
SHIPPED, FAST, FASTER = KernelConfig(128, 256, 8, 3, True), KernelConfig(64, 64, 4, 3), KernelConfig(64, 64, 4, 2)
SLOW = KernelConfig(128, 64, 8, 3)
MATCH = KernelConfig(128, 128, 8, 4)  # shipped
SECONDS = {SHIPPED: 4.0, MATCH: 4.0, FAST: 2.0, FASTER: 1.0, SLOW: 5.0}
TUNE = ("tune", "--device", "cpu")  # which passes for a GPU
ARGUMENTS = (*TUNE, "--height", 64, "--model", "sdxl")  # one head dim, 64


class Machine:
    """A GPU that computes by torch. A launch takes the seconds of its configuration, or raises its error."""

    def __init__(self):
        self.now, self.seconds, self.errors, self.wrong, self.compiled = 0.0, dict(SECONDS), {}, set(), []

    def launched(self, config):
        if error := self.errors.get(config):
            raise error
        self.now += self.seconds[config]

    def attention(self, query, key, value, grid, coarse, mode, scale, config=None, tile=None):
        self.launched(config)
        factor = grid[0] // coarse[0], grid[1] // coarse[1]
        out = downsampled_attention(query.float(), key.float(), value.float(), grid, factor, mode=mode, scale=scale)
        return out.to(query.dtype) + (config in self.wrong)

    def match(self, x, query_index, key_index, config=None):
        self.launched(config)
        return matching._match_in_blocks(x, query_index, key_index)

    def compile_all(self, capability, launches, watch):
        self.compiled += [(capability, each.case.benchmark, each.config) for each in launches]
        for _ in launches:
            watch()
        return [None] * len(launches)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The CPU passes for an H200; its user's cache folder is ``tmp_path`` / "cache"."""
    gpu = Machine()
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    monkeypatch.setattr(tuned, "gpu_of", lambda device: tuned.Gpu("NVIDIA H200", (9, 0), 227 << 10))
    monkeypatch.setattr(machine, "driver", lambda index=0: "580.1")
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(configs, "CPU_CAPABILITY", (9, 0))
    monkeypatch.setattr(backends, "choose", stand_in.choose)
    monkeypatch.setattr(harness, "stamp", lambda device: gpu.now)
    monkeypatch.setattr(launch, "attention", gpu.attention)
    monkeypatch.setattr(match, "match", gpu.match)
    monkeypatch.setattr(tuning, "compile_all", gpu.compile_all)
    monkeypatch.setattr(candidates, "of_attention", lambda *_: [SHIPPED, SLOW, FAST, FASTER])
    monkeypatch.setattr(candidates, "of_match", lambda *_: [MATCH, FAST, SLOW])
    tuned.forget()
    yield gpu
    tuned.forget()


def files(folder):
    return [path.name for path in sorted(folder.rglob("*")) if path.is_file()]


def test_the_fastest_is_kept_and_said(run, gpu, tmp_path):
    ran = run(*ARGUMENTS)
    assert ran.code == 0, ran.err
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["64", "128x256x8x3:poly", "64x64x4x2", "4.00x"] in rows
    assert ["matching", "128x128x8x4", "64x64x4x3", "2.00x"] in rows
    assert "note:" not in ran.out
    assert f"kept in {tmp_path / 'cache' / 'tuned' / 'nvidia-h200-sm90.json'}" in ran.out.replace("\n", "")
    found = tuned.tuned(CPU)
    assert found.attention == {64: FASTER} and found.match == FAST
    assert gpu.compiled[:4] == [((9, 0), "attention", config) for config in (SHIPPED, SLOW, FAST, FASTER)]


def test_as_json_and_once_more(run, gpu, tmp_path):
    first = json.loads(run(*ARGUMENTS, "--json").out)
    attention, matched = first["rows"]
    assert (attention["kernel"], attention["head_dim"], matched["kernel"], matched["head_dim"]) == (
        *("attention", 64),
        *("match", None),
    )
    assert attention["before"] == str(SHIPPED) and attention["kept"] == str(FASTER) and attention["ratio"] == 4
    assert [(each["config"], each["seconds"]) for each in attention["tried"]] == [
        (str(config), SECONDS[config]) for config in (SHIPPED, SLOW, FAST, FASTER)
    ]
    assert attention["case"]["tokens"] == 16 and first["notes"] == first["wrong"] == []
    assert Path(first["file"]).is_file() and first["machine"]["torch"] == torch.__version__
    again = json.loads(run(*ARGUMENTS, "--json").out)["rows"]
    assert [(row["before"], row["kept"], row["ratio"]) for row in again] == [
        (str(c), str(c), 1) for c in (FASTER, FAST)
    ]


def test_what_is_hardly_faster_is_not_kept(run, gpu):
    gpu.seconds = {SHIPPED: 4.0, MATCH: 4.0, FAST: 3.96, FASTER: 3.95, SLOW: 5.0}
    rows = json.loads(run(*ARGUMENTS, "--json").out)["rows"]
    assert [(row["kept"], row["ratio"]) for row in rows] == [(str(SHIPPED), 1), (str(MATCH), 1)]
    assert tuned.tuned(CPU).attention == {64: SHIPPED} and tuned.tuned(CPU).match == MATCH, "it was tuned"


def test_what_is_faster_in_some_rounds_only_is_not_kept(run, gpu):
    class Uneven(dict):
        rounds = 0

        def __getitem__(self, config):
            self.rounds += config == FASTER
            return super().__getitem__(config) * (10 if config == FASTER and self.rounds % 3 == 0 else 1)

    gpu.seconds = Uneven(SECONDS)
    assert json.loads(run(*ARGUMENTS, "--json").out)["rows"][0]["kept"] == str(FAST)


def test_a_wrong_result_is_not_timed_and_not_kept(run, gpu):
    gpu.wrong = {FASTER}
    ran = run(*ARGUMENTS)
    assert ran.code == 0, ran.err
    assert "note: head dim 64, 64x64x4x2: ValueError: wrong result, not timed: off by" in ran.out
    assert tuned.tuned(CPU).attention == {64: FAST}


def test_a_wrong_result_of_the_configuration_in_use_is_a_failure(run, gpu):
    gpu.wrong = {SHIPPED}
    ran = run(*ARGUMENTS)
    assert ran.code == 1
    said = "todo-attn: error: head dim 64, 128x256x8x3:poly: ValueError: wrong result, not timed: off by"
    assert ran.err.splitlines()[-1].startswith(said)
    assert ["64", "128x256x8x3:poly", "64x64x4x2", "-"] in [line.split() for line in ran.out.splitlines()]
    assert tuned.tuned(CPU).attention == {64: FASTER}


def test_what_does_not_compile_or_launch_is_left_out(run, gpu, monkeypatch):
    gpu.errors = {FASTER: RuntimeError("out of resource: shared memory")}
    broken = {SLOW: "its compilation ended with -11"}
    monkeypatch.setattr(
        tuning, "compile_all", lambda _, launches, watch: [broken.get(each.config) for each in launches]
    )
    found = json.loads(run(*ARGUMENTS, "--json").out)
    assert found["notes"] == [
        "head dim 64, 128x64x8x3: its compilation ended with -11",
        "head dim 64, 64x64x4x2: RuntimeError: out of resource: shared memory",
        "matching, 128x64x8x3: its compilation ended with -11",
    ]
    assert tuned.tuned(CPU).attention == {64: FAST}


def test_if_nothing_runs_nothing_is_written(run, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "compile_all", lambda _, launches, watch: ["Failed to find C compiler"] * len(launches))
    ran = run(*ARGUMENTS)
    assert (ran.code, ran.out) == (1, "")
    said = "no configuration could be timed: head dim 64, 128x256x8x3:poly: Failed to find C compiler\n"
    assert ran.err == f"todo-attn: error: {said}"
    assert files(tmp_path) == []


def test_no_memory_is_one_line(run, gpu, tmp_path):
    gpu.errors = dict.fromkeys(SECONDS, torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    ran = run(*ARGUMENTS)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("todo-attn: error: out of memory: a smaller --height and --width")
    assert files(tmp_path) == []


def test_ctrl_c_leaves_what_was_there(run, gpu, tmp_path):
    assert run(*ARGUMENTS).code == 0
    (path,) = (tmp_path / "cache").rglob("*.json")
    before = path.read_bytes()
    gpu.errors = {FAST: KeyboardInterrupt()}
    assert run(*ARGUMENTS) == (130, "", "todo-attn: error: interrupted\n")
    assert path.read_bytes() == before and files(tmp_path) == [path.name]


def test_every_head_dim_of_a_model_at_its_finest_level(gpu, sd_folder, run, monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "tune", lambda device, chosen, watch: asked.extend(chosen) or 1 / 0)
    for model in ("sd15", sd_folder):
        with pytest.raises(ZeroDivisionError):
            run(*TUNE, "--model", model, "--height", 128, "--width", 256)
    shapes = [(each.head_dim, each.case.level, each.case.heads, each.case.tokens) for each in asked]
    assert shapes[:4] == [(40, 1, 8, 512), (80, 2, 8, 128), (160, 4, 8, 32), (None, 1, 8, 512)]
    assert shapes[4:] == [(8, 1, 4, 512), (16, 2, 4, 128), (None, 1, 4, 512)]
    assert all(each.case.dtype == "fp16" and each.case.batch == 2 for each in asked)


def test_reset_forgets(run, gpu, tmp_path):
    assert run(*ARGUMENTS).code == 0
    (path,) = (tmp_path / "cache").rglob("*.json")
    ran = run(*TUNE, "--reset")
    assert ran == (0, f"forgotten: {path}\n", "")
    assert not path.exists() and tuned.tuned(CPU).attention == {}
    assert run(*TUNE, "--reset") == (0, f"this GPU was not tuned: there is no {path}\n", "")
    assert json.loads(run(*TUNE, "--reset", "--json").out) == {"forgotten": False, "file": str(path)}


# What is refused, before anything is computed.


def test_without_a_gpu_it_is_said_before_anything(run, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path))
    said = "todo-attn: error: tune needs an NVIDIA GPU, and {}; `todo-attn doctor` says what is here\n"
    for more in ((), ("--reset",), ("--model", "./nothing")):
        assert run("tune", *more) == (1, "", said.format("torch sees none here"))
    assert run("tune", "--device", "cpu") == (1, "", said.format("--device cpu is none"))
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (("--device", "mps"), "--device must be auto, cpu, cuda or cuda:N"),
        (("--model", "./nothing"), "--model must be sd15, sdxl, or a folder or Hub id of a pipeline with a UNet"),
        (("--height", "100"), "--height must be a multiple of 8 pixels, at least 64, got 100"),
        (("--width", "20"), "--height must be a multiple of 8 pixels, at least 64, got 20"),
        (("--height", "65536", "--width", "65536"), "--height times the width must be at most"),
    ],
)
def test_bad_input_is_one_line(run, gpu, tmp_path, arguments, message):
    ran = run(*TUNE, *arguments)
    assert (ran.code, ran.out, files(tmp_path)) == (2, "", [])
    line, end = ran.err.split("\n")
    assert end == "" and line.startswith(f"todo-attn: error: {message}")
    assert not gpu.compiled


def test_a_model_that_the_kernels_do_not_serve_is_refused(run, gpu, tmp_path):
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        block_out_channels=(24,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
        norm_num_groups=2,
    ).save_pretrained(tmp_path / "unet")
    ran = run(*TUNE, "--model", tmp_path)
    said = (
        f"--model must have a head dim that the kernels serve, a multiple of 8 up to 256, and {str(tmp_path)!r} has 12"
    )
    assert (ran.code, ran.out, ran.err) == (2, "", f"todo-attn: error: {said}\n")


def test_without_triton(run, gpu, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tuned, "gpu_of", lambda device: tuned.Gpu("NVIDIA H200", (9, 0), 227 << 10))
    monkeypatch.setattr(backends, "triton_unavailable_reason", lambda *_: "Triton is not installed")
    ran = run(*ARGUMENTS)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "todo-attn: error: tune needs Triton: Triton is not installed\n"


def test_a_cache_folder_that_cannot_be_written(run, gpu, tmp_path):
    (tmp_path / "cache").touch()
    ran = run(*ARGUMENTS)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("todo-attn: error: the cache folder cannot be written: ")
    assert not gpu.compiled


# What doctor says.


def test_doctor_says_whether_the_gpu_was_tuned(run, gpu, monkeypatch):
    path = tuned.save(CPU, tuned.Tuned({40: FAST, 64: FAST}, FAST))
    measured = tuned.tuned(CPU).measured
    monkeypatch.setattr(backends, "choose", lambda *_: "torch")
    found = json.loads(run("doctor", "--json").out)
    row = {"device": "cpu", "file": str(path), "head_dims": [40, 64], "match": True, "measured": measured}
    assert found["tuning"] == [row]
    assert f"tuned cpu: head dim 40, 64 and matching, {measured}" in " ".join(run("doctor").out.split())
    tuned.reset(CPU)
    ran = run("doctor")
    assert ran.code == 0
    text = " ".join(ran.out.split())
    assert "tuned cpu: no; `todo-attn tune` looks for faster configurations, in about a minute" in text


def test_doctor_says_nothing_of_it_without_a_gpu(run):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert json.loads(run("doctor", "--json").out)["tuning"] == []
    assert os.linesep + "tuned" not in run("doctor").out
