"""What ``todo-attn bench`` does: the kernel benchmark's short form for the machine at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .bench import cases, kernels, machine, report
from .compare_settings import resolved_device

_SHORT = {str(dtype).removeprefix("torch."): name for name, dtype in cases.DTYPES.items()}


def bench(
    device: str,
    dtype: str,
    model: str,
    height: int | None,
    width: int | None,
    show: Callable[[list[dict[str, Any]]], None],
) -> dict[str, Any]:
    """Time a picture's self-attentions under ToDo, and DaTo's ops at its finest level, against their peers.

    Args:
        device: "auto" (a GPU where torch sees one), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (fp16 on CUDA, else fp32), fp32, fp16, bf16, or torch's name of one of these.
        model: "sd15" or "sdxl".
        height, width: in pixels; with one of them a square, with none 2048 on a GPU and 768 on a CPU.
        show: is given the rows of each case as soon as they are measured.

    Returns:
        ``rows``, as :func:`todo_attn.bench.harness.compare` makes them, and ``notes``, sentences: where ToDo does
        nothing, and where it is not the faster one.

    Raises:
        ValueError: an argument that does not fit, naming it; nothing has been timed then.
    """
    where = torch.device(resolved_device(device, mps=False))
    gpu = where.type == "cuda"
    if height is None:
        height = width if width is not None else 2048 if gpu else 768
    if width is None:
        width = height
    dtype = ("fp16" if gpu else "fp32") if dtype == "auto" else _SHORT.get(dtype, dtype)
    chosen = cases.short(model, height, width, batch=2 if gpu else 1, dtype=dtype)
    if not gpu:
        machine.keep_freed_memory()
    rows = []
    for new in kernels.run(chosen, where, kernels.rounds_for(where)):
        show(new)
        rows += new
    notes = report.slower(rows)
    if not any(case.benchmark == "attention" for case in chosen):
        size = f"{width}x{height}"
        notes.insert(0, f"ToDo changes nothing at {size}: no self-attention of {model} has more than 4096 keys there")
    return {"rows": rows, "notes": notes, "machine": machine.describe(where)}
