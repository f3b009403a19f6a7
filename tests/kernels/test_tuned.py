"""What ``todo-attn tune`` keeps: used by the launchers, and ignored with one line if it does not apply here."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import stand_in
from todo_attn import machine, ops
from todo_attn.bench import candidates
from todo_attn.ops import backends, fallback

pytest.importorskip("triton")
platformdirs = pytest.importorskip("platformdirs")
from triton.runtime.errors import OutOfResources  # noqa: E402

from todo_attn.kernels import configs, launch, plan, tuned  # noqa: E402
from todo_attn.kernels.configs import KernelConfig  # noqa: E402
from todo_attn.kernels.tuned import Gpu, Tuned  # noqa: E402

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
H200 = Gpu("NVIDIA H200", (9, 0), 227 << 10)
SMALL, MATCH = KernelConfig(128, 64, 4, 3, polynomial=True), KernelConfig(128, 64, 4, 4)
# Shared memory that a program may have, by compute capability.
GPUS = [(8, 0, 163), (8, 6, 99), (8, 9, 99), (9, 0, 227), (10, 0, 227), (10, 3, 227), (12, 0, 99), (13, 7, 99)]


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch, tmp_path):
    """The CPU passes for an H200 whose user has an empty cache folder."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(tuned, "gpu_of", lambda device: H200)
    monkeypatch.setattr(machine, "driver", lambda index=0: "580.1")
    monkeypatch.setattr(configs, "CPU_CAPABILITY", (9, 0))
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def said(caplog):
    """The package's own log lines."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "todo_attn"]


def tokens(head_dim=40, dtype=torch.float16):
    return torch.zeros(1, 12, 2, head_dim, dtype=dtype)


def shipped(x):
    return configs.attention_config((9, 0), x.shape[3], x.dtype != torch.float32)


def edited(change):
    """A file of ours after ``change`` of its data."""
    path = tuned.save(CPU, Tuned({40: SMALL}, MATCH))
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def test_what_was_kept_is_used(said):
    x = tokens()
    assert tuned.attention_config(x) == shipped(x) and tuned.tuned(CPU) == Tuned()
    path = tuned.save(CPU, Tuned({40: SMALL}, MATCH))
    assert path.name == "nvidia-h200-sm90.json"
    assert tuned.attention_config(x) == tuned.attention_config(x.bfloat16()) == SMALL != shipped(x)
    assert tuned.match_config(x) == MATCH
    for other in (tokens(64), x.float()):
        assert tuned.attention_config(other) == shipped(other)
    assert tuned.match_config(x.float()) == configs.match_config((9, 0), half=False)
    assert tuned.tuned(CPU).measured and not said()


def test_the_launcher_uses_it(monkeypatch):
    launched = []

    class Attend:
        def __init__(self, query, keys, config, *rest):
            launched.append(config)

        def __call__(self, query, key, value, lse):
            return query

    monkeypatch.setattr(launch, "Attend", Attend)
    monkeypatch.setattr(plan, "_plans", {})
    tuned.save(CPU, Tuned({40: SMALL}))
    x = tokens().to("cuda" if torch.cuda.is_available() else "cpu")
    launch.attention(x, x, x, (3, 4), (3, 4), "nearest", 1.0)
    launch.attention(x, x, x, (3, 4), (3, 4), "nearest", 1.0, MATCH)
    assert launched == [SMALL, MATCH]


def test_head_dims_of_another_model_are_kept():
    tuned.save(CPU, Tuned({40: SMALL, 80: MATCH}, MATCH))
    path = tuned.save(CPU, Tuned({64: SMALL, 80: SMALL}))
    assert tuned.tuned(CPU).attention == {40: SMALL, 64: SMALL, 80: SMALL} and tuned.tuned(CPU).match == MATCH
    assert os.listdir(path.parent) == [path.name]


def test_a_file_of_another_driver_is_replaced(monkeypatch, said):
    tuned.save(CPU, Tuned({40: SMALL}))
    monkeypatch.setattr(machine, "driver", lambda index=0: "590.2")
    tuned.save(CPU, Tuned({64: SMALL}))
    assert tuned.tuned(CPU).attention == {64: SMALL} and not said()


def test_the_file_is_read_once(monkeypatch):
    tuned.save(CPU, Tuned({40: SMALL}))
    read, calls = tuned._read, []
    monkeypatch.setattr(tuned, "_read", lambda device: calls.append(device) or read(device))
    threads = [threading.Thread(target=lambda: tuned.attention_config(tokens())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tuned.attention_config(tokens()) == SMALL and calls == [CPU]


def test_nothing_is_looked_up_on_import_or_without_a_gpu():
    code = (
        "import sys, torch, todo_attn, todo_attn.kernels.tuned as tuned\n"
        "x = torch.randn(1, 12, 2, 40)\n"
        "todo_attn.ops.downsampled_attention(x, x, x, (3, 4), backend='triton')\n"
        "print('platformdirs' in sys.modules, tuned._known)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "platformdirs" not in done.stdout.split()[0] and done.stdout.startswith("False"), done.stderr


@pytest.mark.parametrize("name", ["gpu", "capability", "driver", "triton", "todo_attn"])
def test_a_foreign_file_is_ignored_with_one_line(said, name):
    path = edited(lambda data: data["made_for"].update({name: "another"}))
    assert all(tuned.attention_config(tokens()) == shipped(tokens()) for _ in range(3))
    assert tuned.match_config(tokens()) == configs.match_config((9, 0), half=True)
    (line,) = said()
    assert line.startswith(f"{path} is ignored: it was made for {name} another, and here is ")
    assert line.endswith("; run `todo-attn tune` again")


DAMAGED = {
    "empty": b"",
    "half": b'{"format": 1, "made_for": {"gpu": "NV',
    "a list": b"[]",
    "null": b"null",
    "no text": b"\xff\xfe\x00",
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_line(said, name):
    path = tuned.save(CPU, Tuned({40: SMALL}))
    path.write_bytes(DAMAGED[name])
    assert all(tuned.attention_config(tokens()) == shipped(tokens()) for _ in range(3))
    (line,) = said()
    assert line.startswith(f"{path} is ignored: ") and "\n" not in line


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format=2),
        lambda data: data.pop("made_for"),
        lambda data: data.pop("match"),
        lambda data: data.update(attention=[]),
        lambda data: data["attention"].update(forty=asdict(SMALL)),
        lambda data: data["attention"]["40"].pop("block_m"),
        lambda data: data["attention"]["40"].update(block_k=64),
    ],
)
def test_a_file_of_another_shape_is_ignored_with_one_line(said, change):
    edited(change)
    assert all(tuned.attention_config(tokens()) == shipped(tokens()) for _ in range(2))
    assert len(said()) == 1


REFUSED = {
    "block_m must be a power of two from 16 to 512, got 100": {"block_m": 100},
    "block_n must be a power of two from 16 to 512, got 8": {"block_n": 8},
    "block_n must be at most 256, got 512": {"block_n": 512, "num_stages": 1},
    "num_warps must be a power of two up to 32, got 3": {"num_warps": 3},
    "num_stages must be from 1 to 8, got 0": {"num_stages": 0},
    "block_m must be an integer, got '128'": {"block_m": "128"},
    "num_warps must be an integer, got True": {"num_warps": True},
    "polynomial must be true or false, got 'no'": {"polynomial": "no"},
    "warp_specialize needs compute capability 10.x": {"warp_specialize": True},
    "128x256x4x8:poly needs at least 471040 bytes of shared memory, and a program may have 232448": {
        "block_n": 256,
        "num_stages": 8,
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_configuration_that_does_not_fit_is_refused_before_a_launch(said, reason):
    edited(lambda data: data["attention"]["40"].update(REFUSED[reason]))
    assert tuned.attention_config(tokens()) == shipped(tokens())
    assert tuned.match_config(tokens()) != MATCH, "one that fits in such a file is not used either"
    (line,) = said()
    assert f"its configuration for head_dim 40 does not fit this GPU: {reason};" in line


@pytest.mark.parametrize("head_dim", ["7", "264", "-8", "0"])
def test_a_head_dim_that_there_is_not_is_refused(said, head_dim):
    edited(lambda data: data["attention"].update({head_dim: asdict(SMALL)}))
    assert tuned.tuned(CPU) == Tuned() and "head_dim must be a multiple of 8 from 8 to 256" in said()[0]


def test_the_match_kernel_is_checked_too(said):
    edited(lambda data: data["match"].update(block_m=512, block_n=512))
    assert tuned.match_config(tokens()) == configs.match_config((9, 0), half=True)
    assert "its configuration for matching does not fit this GPU: 512x512x4x4 needs at least" in said()[0]


@pytest.mark.parametrize(("major", "minor", "kib"), GPUS)
def test_every_shipped_configuration_fits(major, minor, kib):
    gpu = Gpu("a GPU", (major, minor), kib << 10)
    for head_dim in range(8, 257, 8):
        config = configs.attention_config(gpu.capability, head_dim, half=True)
        assert tuned.problem(config, gpu, head_dim) is None
    assert tuned.problem(configs.match_config(gpu.capability, half=True), gpu, None) is None


@pytest.mark.parametrize(("major", "minor", "kib"), GPUS)
def test_the_candidates_are_a_handful_of_others(major, minor, kib):
    gpu = Gpu("a GPU", (major, minor), kib << 10)
    for head_dim in (*range(8, 257, 8), None):
        if head_dim is None:
            first, *others = candidates.of_match(gpu.capability)
            assert first == configs.match_config(gpu.capability, half=True)
        else:
            first, *others = candidates.of_attention(gpu.capability, head_dim)
            assert first == configs.attention_config(gpu.capability, head_dim, half=True)
        assert 1 <= len(set(others)) == len(others) <= 7 and first not in others
        fit = [tuned.problem(config, gpu, head_dim) is None for config in others]
        assert any(fit) and (all(fit) or head_dim not in (40, 64, 80, 160, None))


def test_without_platformdirs_nothing_was_tuned(monkeypatch, said):
    tuned.save(CPU, Tuned({40: SMALL}))
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert tuned.attention_config(tokens()) == shipped(tokens()) and not said()


def test_an_interrupt_while_writing_leaves_the_file_as_it_was(monkeypatch):
    path = tuned.save(CPU, Tuned({40: SMALL}))
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tuned.save(CPU, Tuned({64: SMALL}))
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_reset_forgets():
    path = tuned.save(CPU, Tuned({40: SMALL}))
    assert tuned.attention_config(tokens()) == SMALL
    assert tuned.reset(CPU) and not path.exists() and not tuned.reset(CPU)
    assert tuned.attention_config(tokens()) == shipped(tokens())


# A launch that fails with a tuned configuration.


@pytest.fixture
def failing(monkeypatch):
    """failing(configs) has launches in these fail, on a CPU that passes for a GPU; returns the launches so far."""
    monkeypatch.setattr(fallback, "_failures", {})
    monkeypatch.setattr(backends, "choose", stand_in.choose)

    def failing(bad):
        tried = []

        def attention(query, key, value, grid, coarse, mode, scale, lse=None):
            tried.append(tuned.attention_config(key))
            if tried[-1] in bad:
                raise OutOfResources(300000, 232448, "shared memory")
            return query + 1

        monkeypatch.setattr(launch, "attention", attention)
        tuned.save(CPU, Tuned({40: SMALL, 64: SMALL}))
        return tried

    return failing


def test_a_tuned_configuration_that_fails_is_given_up_for_the_shipped_one(failing, said):
    tried, x = failing([SMALL]), tokens()
    outs = [ops.downsampled_attention(x, x, x, (3, 4)) for _ in range(2)]
    assert all(torch.equal(out, x + 1) for out in outs)
    assert tried == [SMALL, shipped(x), shipped(x)]
    assert fallback.reason(CPU, x.dtype, 40) is None
    (line,) = said()
    assert line.startswith("cpu: the tuned 128x64x4x3:poly for head_dim 40 failed and is ignored: OutOfResources: ")
    assert tuned.tuned(CPU).attention == {64: SMALL}


def test_if_the_shipped_one_fails_too_torch_serves(failing, said):
    x = tokens()
    tried = failing([SMALL, shipped(x)])
    for _ in range(2):
        out = ops.downsampled_attention(x, x, x, (3, 4))
        assert torch.equal(out, ops.downsampled_attention(x, x, x, (3, 4), backend="torch"))
    assert tried == [SMALL, shipped(x)] and len(said()) == 2
    assert "shared memory" in fallback.reason(CPU, x.dtype, 40)


def test_another_thread_that_failed_at_the_same_time_tries_again(failing):
    failing([SMALL])
    tuned.attention_config(tokens())
    error = RuntimeError("both launched it")
    assert tuned.give_up(CPU, torch.float16, 40, error) and tuned.give_up(CPU, torch.float16, 40, error)
    assert not tuned.give_up(CPU, torch.float32, 64, error) and not tuned.give_up(CPU, torch.float16, 80, error)
    assert not tuned.give_up(CPU, torch.float16, None, error)


def test_names_of_configurations():
    plain = KernelConfig(128, 256, 8, 3)
    assert str(plain) == "128x256x8x3"
    assert str(replace(plain, polynomial=True, warp_specialize=True)) == "128x256x8x3:poly:ws"
