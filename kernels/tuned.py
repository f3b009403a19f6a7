"""The launch configurations that ``todo-attn tune`` found to be the fastest on a GPU of this machine.

The launchers ask :func:`attention_config` and :func:`match_config`: what was tuned for this GPU, else the tables of
``configs.py``. Tuned configurations are in a file of the user's cache folder. It is read once in a process for each
device, at the first launch there. A file that is damaged, that was made for another driver or version, or that names a
configuration which does not fit the GPU is ignored, and the log says so in one line.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import machine
from ..logs import logger, one_line, silent
from . import configs
from .configs import KernelConfig

_FORMAT = 1
_SHARED_MEMORY = 227 << 10  # the most that a program may have on any GPU so far, in bytes
_MOST_ROWS = 256  # of a tile that is copied by descriptor


@dataclass(frozen=True)
class Gpu:
    """A GPU's name, its compute capability (major, minor), and the shared memory that a program may have, in bytes."""

    name: str
    capability: tuple[int, int]
    shared_memory: int


@dataclass(frozen=True)
class Tuned:
    """Configurations for fp16 and bf16: of attention by head dim, and of the match kernel; ``measured``: when."""

    attention: Mapping[int, KernelConfig] = field(default_factory=dict)
    match: KernelConfig | None = None
    measured: str = ""


_known: dict[torch.device, Tuned] = {}
_given_up: set[tuple[torch.device, int | None]] = set()  # device and head_dim, None for the match kernel
_lock = threading.Lock()


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU that can be tuned; None if ``device`` is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", _SHARED_MEMORY)
    return Gpu(properties.name, (properties.major, properties.minor), shared)


def path_of(device: torch.device) -> Path:
    """The file for GPUs of the name and compute capability of ``device``; it need not exist.

    Raises:
        ValueError: ``device`` is no NVIDIA GPU.
    """
    import platformdirs

    gpu = _gpu(device)
    major, minor = gpu.capability
    name = f"{machine.slug_of({'device': gpu.name, 'cuda': True})}-sm{major}{minor}.json"
    return Path(platformdirs.user_cache_dir("todo_attn", appauthor=False)) / "tuned" / name


def tuned(device: torch.device) -> Tuned:
    """What was tuned for ``device``; empty if nothing was."""
    found = _known.get(device)
    if found is None:
        with _lock:
            if device not in _known:
                _known[device] = _read(device)
            found = _known[device]
    return found


def attention_config(x: torch.Tensor) -> KernelConfig:
    """For tensors like ``x``, (B, N, H, D): tuned, or the row of :func:`.configs.attention_config`."""
    half = x.dtype != torch.float32
    found = tuned(x.device).attention.get(x.shape[3]) if half else None
    return found or configs.attention_config(configs.capability(x), x.shape[3], half)


def match_config(x: torch.Tensor) -> KernelConfig:
    """For tensors like ``x``: tuned, or the row of :func:`.configs.match_config`."""
    half = x.dtype != torch.float32
    found = tuned(x.device).match if half else None
    return found or configs.match_config(configs.capability(x), half)


def give_up(device: torch.device, dtype: torch.dtype, head_dim: int | None, error: Exception) -> bool:
    """Return to the tables of ``configs.py`` after a launch has failed; False if its configuration was not tuned.

    ``head_dim``: of attention; None is the match kernel.
    """
    if dtype == torch.float32:
        return False
    with _lock:
        if (device, head_dim) in _given_up:  # by another thread, whose launch failed at the same time
            return True
        found = _known.get(device, Tuned())
        failed = found.match if head_dim is None else found.attention.get(head_dim)
        if failed is None:
            return False
        others = {each: config for each, config in found.attention.items() if each != head_dim}
        match = None if head_dim is None else found.match
        _known[device] = replace(found, attention=others, match=match)
        _given_up.add((device, head_dim))
    kernel = "matching" if head_dim is None else f"head_dim {head_dim}"
    logger.warning("%s: the tuned %s for %s failed and is ignored: %s", device, failed, kernel, one_line(error))
    return True


def forget() -> None:
    """Have the files read again at the next launch."""
    with _lock:
        _known.clear()
        _given_up.clear()


def problem(config: KernelConfig, gpu: Gpu, head_dim: int | None) -> str | None:
    """Why ``config`` cannot run on ``gpu``, as half a sentence; None if it fits, as far as is known before compilation.

    ``head_dim``: of attention; None is the match kernel.
    """
    if reason := config.problem:
        return reason
    if config.warp_specialize and gpu.capability[0] != 10:
        return "warp_specialize needs compute capability 10.x"
    # The least that is known of the buffers: where a product reads them itself, one for each stage.
    buffers = config.num_stages if gpu.capability[0] in (9, 10) else max(1, config.num_stages - 1)
    if head_dim is None:
        if config.polynomial or config.warp_specialize:
            return "the match kernel has neither polynomial nor warp_specialize"
        shared = buffers * (config.block_m + config.block_n) * 128  # 128 bytes of channels at a time
    else:
        if head_dim % 8 or not 8 <= head_dim <= 256:
            return f"head_dim must be a multiple of 8 from 8 to 256, got {head_dim}"
        tile = configs.tiles(gpu.capability, head_dim)
        shared = buffers * config.block_n * (sum(tile.k) + sum(tile.v)) * 2
        if gpu.capability[0] == 9:  # wgmma reads queries from shared memory too
            shared += config.block_m * sum(tile.k) * 2
        if configs.has_tma(gpu.capability, half=True) and config.block_n > _MOST_ROWS:
            return f"block_n must be at most {_MOST_ROWS}, got {config.block_n}"
    if shared > gpu.shared_memory:
        return f"{config} needs at least {shared} bytes of shared memory, and a program may have {gpu.shared_memory}"
    return None


def save(device: torch.device, new: Tuned) -> Path:
    """Add ``new`` to the file of ``device``'s GPU, in one step: an interrupt leaves the file as it was.

    Raises:
        OSError: the file cannot be written.
    """
    gpu = _gpu(device)
    path = path_of(device)
    with silent():
        before = _read(device)
    attention = {**before.attention, **new.attention}
    match = new.match or before.match
    data = {
        "format": _FORMAT,
        "made_for": _made_for(gpu),
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "attention": {str(head_dim): asdict(config) for head_dim, config in sorted(attention.items())},
        "match": None if match is None else asdict(match),
    }
    with _temporary(path) as name:
        Path(name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(name, path)
    forget()
    return path


def check_writable(device: torch.device) -> None:
    """Refuse a cache folder that :func:`save` could not write to.

    Raises:
        OSError: it cannot be written.
    """
    with _temporary(path_of(device)):
        pass


def reset(device: torch.device) -> bool:
    """Forget what was tuned for ``device``'s GPU; returns whether there was a file.

    Raises:
        OSError: the file cannot be deleted.
    """
    forget()
    path = path_of(device)
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def _gpu(device: torch.device) -> Gpu:
    gpu = gpu_of(device)
    if gpu is None:
        raise ValueError(f"device must be an NVIDIA GPU, got {str(device)!r}")
    return gpu


@contextmanager
def _temporary(path: Path) -> Iterator[str]:
    """The name of a new file beside ``path``, which is gone afterwards unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(handle)
    try:
        yield name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _made_for(gpu: Gpu) -> dict[str, str | None]:
    """What a configuration was timed with; with anything else, another may be faster."""
    import triton

    return {
        "gpu": gpu.name,
        "capability": "{}.{}".format(*gpu.capability),
        "driver": machine.driver(),
        "triton": triton.__version__,
        "todo_attn": machine.versions()["todo_attn"],
    }


def _read(device: torch.device) -> Tuned:
    """What the file of ``device``'s GPU says, or nothing; never raises, because a launch depends on it."""
    gpu = gpu_of(device)
    if gpu is None:
        return Tuned()
    try:
        path = path_of(device)
    except ModuleNotFoundError:  # platformdirs, without which nothing was tuned here
        return Tuned()
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")), gpu) if path.is_file() else Tuned()
    except Exception as error:
        reason = str(error) if isinstance(error, _ForeignError) else one_line(error)
        logger.warning("%s is ignored: %s; run `todo-attn tune` again", path, reason)
        return Tuned()


class _ForeignError(ValueError):
    """A sound file that does not apply here."""


def _parsed(data: Any, gpu: Gpu) -> Tuned:
    """The configurations in ``data``, for ``gpu``.

    Raises:
        Exception: it is not what :func:`save` writes, was not made for this machine, or does not fit the GPU.
    """
    if data["format"] != _FORMAT:
        raise _ForeignError(f"its format is {data['format']!r}, not {_FORMAT}")
    for name, here in _made_for(gpu).items():
        if here is None:  # nvidia-smi did not answer
            continue
        if (made := data["made_for"][name]) != here:
            raise _ForeignError(f"it was made for {name} {made}, and here is {here}")
    attention = {int(head_dim): KernelConfig(**values) for head_dim, values in data["attention"].items()}
    match = None if data["match"] is None else KernelConfig(**data["match"])
    for head_dim, config in (*attention.items(), *([(None, match)] if match else [])):
        if reason := problem(config, gpu, head_dim):
            kernel = "matching" if head_dim is None else f"head_dim {head_dim}"
            raise _ForeignError(f"its configuration for {kernel} does not fit this GPU: {reason}")
    return Tuned(attention, match, str(data["measured"]))
