"""What can run on this machine, what cannot, and why; each op is run against its oracle."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from . import ops
from .kernels import tuned
from .logs import one_line, silent
from .machine import device_name, driver, machine, versions
from .ops import backends, libraries, reference

# The largest error that passes, with outputs of about 1: a few roundings of the dtype.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_GRID, _FACTOR, _HEADS, _HEAD_DIM = (12, 10), 2, 2, 40


def examine() -> dict[str, Any]:
    """Everything ``todo-attn doctor`` shows, as plain data.

    Returns:
        ``ok``, whether what is installed works; ``problems``, one line for each thing that does not; ``versions``;
        ``machine``; ``cuda``; ``tuning``, what ``todo-attn tune`` found for each GPU; ``ops``, a row per op, device
        and dtype; ``diffusers``, whether ToDo works in it. What is not installed is no problem; the rows say so.
    """
    rows = [row for device in _devices() for row in (*_op_rows(device), *_token_rows(device))]
    diffusers = _check_diffusers()
    problems = [
        f"{row['op']} on {row['device']} in {row['dtype']} by {check['backend']}: {check['problem']}"
        for row in rows
        for check in row["checks"]
        if check["problem"]
    ]
    if diffusers["problem"]:
        problems.append(f"ToDo in diffusers: {diffusers['problem']}")
    return {
        "ok": not problems,
        "problems": problems,
        "versions": versions(),
        "machine": machine(),
        "cuda": _cuda(),
        "tuning": _tuning(),
        "ops": rows,
        "diffusers": diffusers,
    }


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return devices


def _cuda() -> dict[str, Any]:
    """torch's CUDA build, the driver, the GPUs; ``why_not`` says why torch has no GPU, or is None."""
    gpus = []
    reason = None
    if torch.cuda.is_available():
        for device in (d for d in _devices() if d.type == "cuda"):
            major, minor = torch.cuda.get_device_capability(device)
            memory = torch.cuda.get_device_properties(device).total_memory
            gpus.append({"name": device_name(device), "capability": f"{major}.{minor}", "memory_bytes": memory})
    elif torch.version.cuda is None:
        reason = "this torch is built without CUDA"
    else:
        reason = "torch has CUDA but sees no GPU that it can use"
    return {"torch_cuda": torch.version.cuda, "driver": driver(), "gpus": gpus, "why_not": reason}


def _tuning() -> list[dict[str, Any]]:
    """What was tuned for each GPU; ``file`` is None if nothing was."""
    rows = []
    for device in _devices():
        if tuned.gpu_of(device) is None:
            continue
        found = tuned.tuned(device)
        file = str(tuned.path_of(device)) if found.attention or found.match else None
        what = {"head_dims": sorted(found.attention), "match": found.match is not None, "measured": found.measured}
        rows.append({"device": str(device), "file": file, **what})
    return rows


def _op_rows(device: torch.device) -> list[dict[str, Any]]:
    """A row per op and dtype: the backend of "auto", why it is not Triton, and a check of each backend that can run."""
    rows = []
    for dtype in _TOLERANCE:
        columns = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
        _try_triton(device, dtype)
        reason = backends.triton_unavailable_reason(device, dtype, _HEAD_DIM)
        chosen = backends.choose("auto", device, dtype, _HEAD_DIM)
        checks = [
            _check(name, dtype, partial(_attention_error, device, dtype, name))
            for name in (["torch"] if reason else ["torch", "triton"])
        ]
        if reason is None and chosen == "torch":
            reason = "only by backend='triton', torch being faster or exacter"
        rows.append(
            {"op": "downsampled_attention", **columns, "backend": chosen, "why_not_triton": reason, "checks": checks}
        )
        checks = [_check("torch", dtype, partial(_downsample_error, device, dtype))]
        rows.append(
            {"op": "downsample_tokens", **columns, "backend": "torch", "why_not_triton": None, "checks": checks}
        )
        chosen, reason = backends.choose("auto", device, dtype), backends.triton_unavailable_reason(device, dtype)
        checks = [_check(chosen, dtype, partial(_match_error, device, dtype))]
        rows.append({"op": "match_tokens", **columns, "backend": chosen, "why_not_triton": reason, "checks": checks})
    return rows


def _try_triton(device: torch.device, dtype: torch.dtype) -> None:
    """Run each op by Triton, if it may run, so that :mod:`todo_attn.ops.fallback` knows whether it can."""
    with silent(), suppress(Exception):  # what else is wrong shows in the checks
        if backends.triton_unavailable_reason(device, dtype, _HEAD_DIM) is None:
            _attention_error(device, dtype, "triton")
    with silent(), suppress(Exception):
        if backends.triton_unavailable_reason(device, dtype) is None:
            _match_error(device, dtype)


def _token_rows(device: torch.device) -> list[dict[str, Any]]:
    """A row per op that moves tokens, for all dtypes at once: by the compiled library or by torch."""
    reason = libraries.unavailable_reason(device.type, device.index)
    backend = {"cpu": "C++", "cuda": "CUDA"}[device.type] if reason is None else "torch"
    columns = {"device": str(device), "dtype": "any", "backend": backend, "why_not_compiled": reason}
    return [
        {"op": op, **columns, "checks": [_check(backend, torch.float32, partial(_move_error, device, op))]}
        for op in ("gather_tokens", "scatter_tokens", "recover_tokens", "select_base_tokens")
    ]


def _check(backend: str, dtype: torch.dtype, error_of: Callable[[], float]) -> dict[str, Any]:
    """Run one op; ``problem`` is None if the result is right."""
    try:
        error = error_of()
    except Exception as raised:  # of any kind: it is reported, and the examination goes on
        return {"backend": backend, "max_error": None, "problem": one_line(raised)}
    right = error <= _TOLERANCE[dtype]  # False for NaN
    problem = None if right else f"wrong by {error:.3g}; up to {_TOLERANCE[dtype]:.3g} would be rounding"
    return {"backend": backend, "max_error": error if error == error else None, "problem": problem}


def _tokens(dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """Random tokens on the CPU, where the oracle runs: some devices have no float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, _GRID[0] * _GRID[1], _HEADS, _HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def _attention_error(device: torch.device, dtype: torch.dtype, backend: str) -> float:
    tokens = _tokens(dtype, 3)
    query, key, value = (t.to(device) for t in tokens)
    out = ops.downsampled_attention(query, key, value, _GRID, _FACTOR, backend=backend)
    query, key, value = (t.double() for t in tokens)
    right = reference.downsampled_attention(query, key, value, _GRID, _FACTOR)
    return (out.cpu().double() - right).abs().max().item()


def _downsample_error(device: torch.device, dtype: torch.dtype) -> float:
    x = _tokens(dtype, 1)[0].flatten(2)
    errors = []
    for mode in ("nearest", "nearest-exact", "mean"):
        out = ops.downsample_tokens(x.to(device), _GRID, _FACTOR, mode=mode).cpu()
        right = reference.downsample_tokens(x.double(), _GRID, _FACTOR, mode=mode)
        errors.append((out.double() - right).abs().max())
    return torch.stack(errors).max().item()  # NaN if any is


def _match_error(device: torch.device, dtype: torch.dtype) -> float:
    x = _tokens(dtype, 1)[0].flatten(2)
    number = torch.arange(x.shape[1]).unsqueeze(0)
    queries, keys = number[:, ::2], number[:, 1::2]
    _, out = ops.match_tokens(x.to(device), queries.to(device), keys.to(device))
    _, right = reference.match_tokens(x.double(), queries, keys)
    return (out.cpu().double() - right).abs().max().item()


def _move_error(device: torch.device, op: str) -> float:
    """0 or infinity: moved values must be right to the last bit, and so must the one sum with a residual."""
    for dtype in _TOLERANCE:
        x = _tokens(dtype, 1)[0].flatten(2)
        index = torch.arange(x.shape[1]).unsqueeze(0).flip(1)[:, ::3]
        arguments: tuple[Any, ...] = {
            "gather_tokens": (x, index),
            "scatter_tokens": (x, index, -x[:, : index.shape[1]]),
            "recover_tokens": (x, index, x[:, : index.shape[1]]),
            "select_base_tokens": (x[..., 0], _GRID),
        }[op]
        right = getattr(reference, op)(*arguments)
        moved = (a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)
        if not torch.equal(getattr(ops, op)(*moved).cpu(), right):
            return float("inf")
    return 0.0


def _check_diffusers() -> dict[str, Any]:
    """Whether diffusers is there and ToDo works in it: ``installed``, ``why_not``, ``problem``."""
    if importlib.util.find_spec("diffusers") is None:
        reason = "diffusers is not installed: pip install 'todo_attn[diffusers]'"
        return {"installed": False, "why_not": reason, "problem": None}
    try:
        problem = _try_processor()
    except Exception as raised:  # as in _check
        problem = one_line(raised)
    return {"installed": True, "why_not": None, "problem": problem}


def _try_processor() -> str | None:
    """Put ToDo on a tiny UNet and take it off again; returns what is wrong, or None."""
    from diffusers import UNet2DConditionModel

    from . import ToDoConfig, apply_todo, remove_todo
    from .models.unets import SMALLEST

    with torch.random.fork_rng(devices=[]), torch.no_grad(), silent():
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel(**SMALLEST)
        inputs = torch.randn(1, 4, 8, 12), 10, torch.randn(1, 3, 8)
        before = unet(*inputs).sample
        apply_todo(unet, ToDoConfig(factor=1))
        same = unet(*inputs).sample
        apply_todo(unet, ToDoConfig(factor=2))
        coarser = unet(*inputs).sample
        remove_todo(unet)
        after = unet(*inputs).sample
    if not torch.allclose(same, before, atol=1e-5):
        return "factor 1 does not give what the model gives without ToDo"
    if torch.equal(coarser, before) or not coarser.isfinite().all():
        return "factor 2 changes nothing or gives numbers that are not finite"
    if not torch.equal(after, before):
        return "remove_todo does not give the model back as it was"
    return None
