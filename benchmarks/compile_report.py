"""Compile every kernel for every architecture, without a GPU, and print what the compiled code uses.

python -m benchmarks.compile_report --arch 90 --dtype fp16 --dump build/cubins
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

os.environ["TRITON_INTERPRET"] = "0"  # interpreted kernels cannot be compiled

import triton
import typer
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from todo_attn.kernels import attention, launch, pack
from todo_attn.modes import MODES

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = (8, 24, 40, 64, 80, 96, 128, 160, 256)
DTYPES = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Variant:
    """One kernel to compile: ``mode`` is that of the packing kernel, or "tail" for an attention with a masked tile."""

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.kernel}-sm{self.arch}-{self.dtype}-d{self.head_dim}-{self.mode}"


def variants(arches: list[int], dtypes: list[str], head_dims: list[int]) -> Iterator[Variant]:
    """Both kernels at every mode; a masked last tile is a second attention kernel where there is no ones column."""
    for arch in arches:
        for dtype in dtypes:
            for head_dim in head_dims:
                yield Variant("attention", arch, dtype, head_dim, "plain")
                if not launch.tiles(head_dim).ones:
                    yield Variant("attention", arch, dtype, head_dim, "tail")
                for mode in MODES:
                    yield Variant("pack", arch, dtype, head_dim, mode)


def source(variant: Variant) -> tuple[ASTSource, dict[str, object], launch.Settings]:
    """The kernel as it is launched on contiguous (B, N, H, D) tensors."""
    tile = launch.tiles(variant.head_dim)
    run = launch.settings(divmod(variant.arch, 10), variant.head_dim, half=variant.dtype != "fp32")
    types: dict[str, str] = {}
    if variant.kernel == "attention":
        kernel = attention.attention_kernel
        constants = attention.constants(variant.head_dim, tile, run, tail=variant.mode == "tail")
        for name, columns in zip(("key_a", "key_b", "value_a", "value_b"), (*tile.k, *tile.v), strict=True):
            types[name] = f"tensordesc<{variant.dtype}[{run.block_n}, {columns or max(tile.k)}]>"
        options = run.options
    else:
        kernel = pack.pack_kernel
        window = 2 if variant.mode == "mean" else 1
        constants = pack.constants(variant.head_dim, tile, variant.mode, window, window)
        options = pack.OPTIONS
    constants |= {name: 1 for name in kernel.arg_names if name.startswith("stride") and name.endswith("d")}
    pointers = ("query", "key", "value", "out", "packed_key", "packed_value")
    floats = ("log2_scale", "scale_y", "scale_x", "sign")
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in pointers:
            types[name] = f"*{variant.dtype}"
        elif name in floats:
            types[name] = "fp32"
        else:
            types.setdefault(name, "i32")
        if name in pointers or name == "rows" or (types[name] == "i32" and name.startswith("stride")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    ast = ASTSource(
        kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs=attributes,
    )
    return ast, options, run


def report(variant: Variant, dump: Path | None = None) -> dict[str, Any]:
    """Compile one variant: registers, stack, spills, shared memory (bytes), and on sm_90 clocks per score by pipe."""
    ast, options, run = source(variant)
    compiled = triton.compile(ast, target=GPUTarget("cuda", variant.arch, 32), options=options)
    row: dict[str, Any] = {**asdict(variant), **options}
    if variant.kernel == "attention":
        row |= {"block_m": run.block_m, "block_n": run.block_n}
    with TemporaryDirectory() as folder:
        cubin = (dump or Path(folder)) / f"{variant.name}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        row |= {**asdict(sass.usage(cubin)), "shared": compiled.metadata.shared}
        if variant.kernel == "attention" and variant.arch == 90 and variant.dtype != "fp32":
            row |= sass.clocks_per_score(cubin, run.block_m, run.block_n, run.num_warps)
        if dump and variant.kernel == "attention":
            cubin.with_suffix(".json").write_text(json.dumps(row, indent=1) + "\n")
    return row


def main(
    arch: Annotated[list[int] | None, typer.Option(help="Compute capability, as 90; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp16, bf16 or fp32; repeatable.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head dim; repeatable.")] = None,
    kernel: Annotated[str, typer.Option(help="attention, pack or all.")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Write the cubins there, with a row beside each.")] = None,
    jobs: Annotated[int, typer.Option(help="Compilations at a time.")] = os.cpu_count() or 1,
) -> None:
    """Registers, spills, shared memory and clocks per score of every kernel; the GPUs need not be here."""
    if unknown := set(arch or ()) - set(ARCHITECTURES):
        raise typer.BadParameter(f"--arch must be among {ARCHITECTURES}, got {unknown}")
    if wrong := set(dtype or ()) - set(DTYPES):
        raise typer.BadParameter(f"--dtype must be among {DTYPES}, got {wrong}")
    for value in head_dim or ():
        if value % 8 or not 8 <= value <= 256:
            raise typer.BadParameter(f"--head-dim must be a multiple of 8 from 8 to 256, got {value}")
    if kernel not in ("attention", "pack", "all"):
        raise typer.BadParameter(f"--kernel must be attention, pack or all, got {kernel!r}")
    if dump:
        dump.mkdir(parents=True, exist_ok=True)
    todo = [
        v
        for v in variants(arch or list(ARCHITECTURES), dtype or list(DTYPES), head_dim or list(HEAD_DIMS))
        if kernel in ("all", v.kernel)
    ]
    with ProcessPoolExecutor(jobs) as pool:
        rows = list(tqdm(pool.map(report, todo, [dump] * len(todo)), total=len(todo), desc="compiling"))
    if as_json:
        json.dump(rows, sys.stdout, indent=1)
    else:
        print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    typer.run(main)
