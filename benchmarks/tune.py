"""The attention kernel in other configurations against the shipped ones, at the shapes that have a target.

python -m benchmarks.tune                                every head dim
python -m benchmarks.tune --head-dim 40 --head-dim 64    some
python -m benchmarks.tune --minutes 4 --out rows.jsonl   starts no head dim after four minutes

Compiled code shows what a loop costs, but only a GPU shows how well its parts overlap. Each row is another
configuration (``contender``) against the shipped one (``baseline``). Both are checked first and timed in one run, with
the packing of keys and values. ``ALTERNATIVES`` has what is tried; docs/kernel-notes.md says why. Exits with 1 if the
result of the shipped kernel was wrong.

All of it takes less than 12 minutes. First every kernel is compiled, as many at a time as there are processors: 27
programs of the attention and 9 that pack, 4 to 6 s each, are 20 s on 16. Each of the four head dims is then drawn, has
its oracle, and is timed for 6 s: about 25 s.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import triton
import typer
from triton.backends.compiler import GPUTarget

from benchmarks import RESULTS
from benchmarks import kernels as benchmark
from benchmarks.options import check_among, checked_out, chosen_device
from todo_attn import machine
from todo_attn.bench import attention
from todo_attn.bench.cases import Case
from todo_attn.bench.kernels import MakeTrial
from todo_attn.bench.peers import Call, Inputs
from todo_attn.bench.trial import Trial
from todo_attn.kernels.configs import KernelConfig, tiles
from todo_attn.kernels.launch import attention as downsampled_attention

# On Hopper. Queries and keys per tile, warps, stages; polynomial for one exp2 in eight.
_SMALL = [
    KernelConfig(128, 256, 8, 2, polynomial=True),  # copies as late as they may be
    KernelConfig(128, 256, 8, 3, polynomial=False),
    KernelConfig(128, 128, 8, 3, polynomial=True),
    KernelConfig(128, 64, 4, 3, polynomial=True),
    KernelConfig(128, 64, 4, 4, polynomial=True),
    KernelConfig(256, 64, 8, 3, polynomial=True),
    KernelConfig(64, 128, 4, 3, polynomial=True),
]
ALTERNATIVES: dict[int, list[KernelConfig]] = {
    40: _SMALL,
    64: _SMALL,
    80: [
        KernelConfig(128, 128, 8, 2),
        KernelConfig(128, 128, 8, 4),
        KernelConfig(128, 64, 8, 4),
        KernelConfig(128, 64, 4, 3),
        KernelConfig(64, 64, 4, 3),
    ],
    160: [
        KernelConfig(128, 128, 8, 2),
        KernelConfig(128, 64, 8, 2),
        KernelConfig(128, 64, 8, 4),
        KernelConfig(64, 64, 4, 3),
    ],
}

_FINEST = Case("attention", "sd15", 2048, 2048, 1, 2, "fp16")
CASES = {
    40: _FINEST,
    64: replace(_FINEST, model="sdxl", level=2),
    80: replace(_FINEST, level=2),
    160: replace(_FINEST, level=4),
}


def variants(case: Case) -> dict[str, Call]:
    """The other ways to launch the kernel at the head dim of ``case``, by name."""
    usual = tiles((9, 0), case.head_dim)
    calls = {
        _name(config): call(case, partial(downsampled_attention, config=config))
        for config in ALTERNATIVES[case.head_dim]
    }
    if usual.v != usual.k:  # P V as one product of 64 columns, or as 32 + 16
        calls["P V as Q K"] = call(case, partial(downsampled_attention, tile=replace(usual, v=usual.k)))
    return calls


def _name(config: KernelConfig) -> str:
    polynomial = ", polynomial" * config.polynomial
    return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages{polynomial}"


def call(case: Case, attend: Callable[..., torch.Tensor]) -> Call:
    scale = case.head_dim**-0.5
    return lambda x: attend(x.query, x.key, x.value, case.grid, case.factor, "nearest", scale)


def trial(case: Case, device: torch.device) -> Trial:
    """Every variant against the shipped kernel."""
    return attention.trial(case, device, variants(case))


HeadDims = Annotated[list[int] | None, typer.Option(help=f"Of {', '.join(map(str, CASES))}; repeatable.")]
Size = Annotated[int, typer.Option(min=64, help="Of the image, in pixels; a multiple of 64.")]
Device = Annotated[str, typer.Option(help="cuda; cpu only under TRITON_INTERPRET=1.")]
Minutes = Annotated[float, typer.Option(min=0, help="Start no head dim after that.")]
Out = Annotated[Path | None, typer.Option(help="Rows go there; benchmarks/results/tune-DEVICE.jsonl.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the rows as JSON, no table.")]


def main(
    head_dim: HeadDims = None,
    size: Size = 2048,
    device: Device = "cuda",
    minutes: Minutes = float("inf"),
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time the attention kernel's other configurations against the shipped, alternating in one run."""
    run(trial, head_dim, size, device, minutes, out, as_json, compile_all)


def compile_all(cases: Sequence[Case], device: torch.device) -> None:
    """Compile what the cases will launch into Triton's cache, side by side, each in a process of its own."""
    major, minor = torch.cuda.get_device_capability(device)
    tasks = [(10 * major + minor, case, name) for case in cases for name in (None, *variants(case))]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*tasks, strict=True)))


def _compile(arch: int, case: Case, name: str | None) -> None:
    """Compile one variant of :func:`variants`, or the shipped kernel for None, as it is launched on such tensors."""
    from benchmarks.launched import launched

    shape = (case.batch, case.tokens, case.heads, case.head_dim)
    query = torch.empty(shape, dtype=case.torch_dtype)  # never touched, so it takes no memory
    inputs = Inputs(0, query, query, query, query, query)
    attend = variants(case)[name] if name else call(case, downsampled_attention)
    for each in launched(arch, lambda: attend(inputs)):
        # One that does not compile fails where it is timed, and its row says why.
        with suppress(Exception):
            triton.compile(each.source, target=GPUTarget("cuda", arch, 32), options=each.options)


def run(
    make: MakeTrial,
    head_dim: list[int] | None,
    size: int,
    device: str,
    minutes: float,
    out: Path | None,
    as_json: bool,
    prepare: Callable[[Sequence[Case], torch.device], None] | None = None,
) -> None:
    """Time the candidates that ``make`` gives for each head dim; write and print the rows.

    ``prepare``: called first, on a GPU.
    """
    resolved = chosen_device(device)
    check_among("head-dim", head_dim or (), CASES)
    if size % 64:
        raise typer.BadParameter(f"--size must be a multiple of 64, got {size}")
    chosen = [replace(CASES[each], height=size, width=size) for each in head_dim or CASES]
    path = checked_out(out or RESULTS / f"tune-{machine.slug(resolved)}.jsonl")
    if prepare is not None and resolved.type == "cuda":
        prepare(chosen, resolved)
    benchmark.run(chosen, resolved, path, minutes, as_json, make=make)


if __name__ == "__main__":
    typer.run(main)
