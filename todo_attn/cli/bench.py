"""``todo-attn bench``: the short form of the kernel benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import machine
from ..bench import cases, kernels, report
from ..config.dtypes import DTYPES
from ..options.methods import SettingError
from ..options.settings import check_area, resolved_device

if TYPE_CHECKING:
    from ..models.architectures import Architecture

_SHORT = {name: short for short, name in DTYPES.items()}


def bench(
    device: str,
    dtype: str,
    model: str,
    height: int | None,
    width: int | None,
    show: Callable[[list[dict[str, Any]]], None],
    architecture: Architecture | None = None,
) -> dict[str, Any]:
    """Time the self-attentions of an image under ToDo, and DaTo's ops at its finest level, against their peers.

    Args:
        device: "auto" (a GPU if torch sees one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (fp16 on CUDA, else fp32), fp32, fp16, bf16, or torch's name for one of these.
        model: "sd15" or "sdxl", or the name of ``architecture`` in the rows.
        height, width: in pixels. If only one is given, the image is square; if none, 2048 on a GPU and 768 on a CPU.
        show: called with the rows of each case as soon as they are measured.
        architecture: the UNet, if ``model`` is not "sd15" or "sdxl".

    Returns:
        ``rows``, as :func:`todo_attn.bench.harness.compare` makes them; ``notes``, sentences about what ToDo leaves as
        it is, what is slower, and whether the machine is too busy for a result; and ``machine``.

    Raises:
        ArgumentError: an argument does not fit. Nothing is timed then.
    """
    resolved = torch.device(resolved_device(device, mps=False))
    gpu = resolved.type == "cuda"
    if height is None:
        height = width if width is not None else 2048 if gpu else 768
    if width is None:
        width = height
    check_area(height, width)
    dtype = ("fp16" if gpu else "fp32") if dtype == "auto" else _SHORT.get(dtype, dtype)
    batch = 2 if gpu else 1
    levels = None if architecture is None else heads(architecture)
    pixels_per_latent = cases.PIXELS_PER_LATENT if architecture is None else architecture.pixels_per_latent
    chosen = cases.short(model, height, width, batch, dtype, levels, pixels_per_latent)
    if not gpu:
        machine.keep_freed_memory()
    rows = []
    for new in kernels.run(chosen, resolved, kernels.rounds_for(resolved)):
        show(new)
        rows += new
    notes = report.slower(rows) + report.noisy(rows)
    if not any(case.benchmark == "attention" for case in chosen):
        size = f"{width}x{height}"
        notes.insert(0, f"ToDo changes nothing at {size}: no self-attention of {model} has more than 4096 keys there")
    return {"rows": rows, "notes": notes, "machine": machine.describe(resolved)}


def heads(architecture: Architecture) -> dict[int, tuple[int, int]]:
    """(heads, head_dim) of each level's self-attention."""
    from ..diffusers.levels import heads_by_level
    from ..models.unets import on_meta

    try:
        levels = heads_by_level(on_meta(architecture.config))
    except ValueError as error:
        raise SettingError("model", f"has a UNet that cannot be made: {error}") from error
    if not levels:
        raise SettingError("model", f"must have a UNet with self-attention, and {architecture.name!r} has none")
    return levels
