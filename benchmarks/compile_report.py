"""Compiles every kernel for every architecture, without a GPU, and prints what the compiled code uses.

python -m benchmarks.compile_report --arch 90 --dtype fp16 --dump build/cubins
python -m benchmarks.compile_report --arch 90 --head-dim 40 --settings 128x64x4x2 --settings 128x256x8x2:poly

The second command compiles the attention kernel with other tiles than the shipped ones; with ``--kernel query_grad``
or ``--kernel key_grad`` one of its backward.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

os.environ["TRITON_INTERPRET"] = "0"  # interpreted kernels cannot be compiled

import torch
import triton
import typer
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from benchmarks import sass
from benchmarks.options import check_among, make_dump_folder
from todo_attn.bench.launched import Launched, launched
from todo_attn.config.dtypes import DTYPES
from todo_attn.config.modes import MODES
from todo_attn.kernels import backward, configs, launch, match

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = (8, 24, 40, 64, 80, 96, 128, 160, 256)
CHANNELS = (20, 320, 1280)
BACKWARD = ("query_grad", "key_grad")
KERNELS = ("attention", *BACKWARD, "pack", "match", "rows")

_BATCH, _HEADS, _COARSE = 2, 8, (16, 32)  # 512 keys: whole tiles of every configuration


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    ``mode``: of the packing kernel; of attention "plain", "tail" (the last tile is partial), "large-scale" (a scale
    above 0.69) or "lse" (for the backward). ``head_dim``: for the match kernel and the one that packs its rows, the
    channels. ``config``: for attention and its backward, other than the shipped.
    """

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    mode: str
    config: configs.KernelConfig | None = None

    @property
    def name(self) -> str:
        # Some file systems refuse a colon in a name.
        other = f"-{self.config}".replace(":", "-") if self.config else ""
        return f"{self.kernel}-sm{self.arch}-{self.dtype}-d{self.head_dim}-{self.mode}{other}"


def parsed(text: str) -> configs.KernelConfig:
    """QUERIES x KEYS x WARPS x STAGES, as 128x64x4x2.

    Then ":poly" for one exp2 in eight by polynomial, and ":ws" for warp specialization (sm_100).

    Raises:
        typer.BadParameter: ``text`` is anything else, or no such kernel can be compiled.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)(:poly)?(:ws)?", text)
    if found:
        queries, keys, warps, stages = (int(number) for number in found.groups()[:4])
        config = configs.KernelConfig(queries, keys, warps, stages, found[5] is not None, found[6] is not None)
        if config.problem is None:
            return config
    raise typer.BadParameter(
        "--settings must be QUERIESxKEYSxWARPSxSTAGES, as 128x64x4x2 or 128x256x8x2:poly: powers of two from 16 to "
        f"512, a power of two up to 32, 1 to 8; got {text!r}"
    )


def variants(
    arches: Sequence[int],
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    channels: Sequence[int],
    others: Sequence[configs.KernelConfig] = (),
) -> Iterator[Variant]:
    """Every kernel in every mode. "tail" is another attention kernel only for head dims without a ones column.

    With ``others`` only attention and its backward, in each of these configurations.
    """
    for arch in arches:
        for dtype in dtypes:
            for head_dim in head_dims:
                for config in others or (None,):
                    yield Variant("attention", arch, dtype, head_dim, "plain", config)
                    if not configs.tiles(divmod(arch, 10), head_dim).ones:
                        yield Variant("attention", arch, dtype, head_dim, "tail", config)
                    yield Variant("attention", arch, dtype, head_dim, "large-scale", config)
                    if dtype != "fp32":
                        yield Variant("attention", arch, dtype, head_dim, "lse", config)
                        yield Variant("query_grad", arch, dtype, head_dim, "plain", config)
                        yield Variant("query_grad", arch, dtype, head_dim, "tail", config)
                        yield Variant("key_grad", arch, dtype, head_dim, "plain", config)
                if others:
                    continue
                for mode in MODES:
                    yield Variant("pack", arch, dtype, head_dim, mode)
            for count in [] if others else channels:
                yield Variant("match", arch, dtype, count, "plain")
                yield Variant("rows", arch, dtype, count, "plain")


def launches(variant: Variant) -> list[Launched]:
    """What the launcher of a variant compiles, on tensors with the strides of an attention processor's."""
    call = attention if variant.kernel in ("attention", "pack", *BACKWARD) else _match
    return launched(variant.arch, lambda: call(variant))


def attention(variant: Variant) -> None:
    """Queries, keys and values are views into (B, N, H*D), as a linear layer returns them."""
    mode = variant.mode if variant.kernel == "pack" else "nearest"
    coarse = (_COARSE[0], _COARSE[1] - 1) if variant.mode == "tail" else _COARSE
    grid = (2 * coarse[0], 2 * coarse[1]) if mode == "mean" else coarse

    def tokens(count: int) -> torch.Tensor:
        flat = torch.empty(_BATCH, count, _HEADS * variant.head_dim, dtype=getattr(torch, DTYPES[variant.dtype]))
        return flat.unflatten(2, (_HEADS, variant.head_dim))

    key, value = tokens(grid[0] * grid[1]), tokens(grid[0] * grid[1])
    scale = 1.0 if variant.mode == "large-scale" else variant.head_dim**-0.5
    query = tokens(1024)
    lse = torch.empty(_BATCH, _HEADS, query.shape[1])
    if variant.kernel in BACKWARD:
        config = configs.BackwardConfig(variant.config, variant.config) if variant.config else None
        grad, out = tokens(1024), torch.empty_like(query)
        backward.attention_backward(grad, query, key, value, out, lse, grid, coarse, mode, scale, config)
        return
    wanted = lse if variant.mode == "lse" else None
    launch.attention(query, key, value, grid, coarse, mode, scale, variant.config, lse=wanted)


def multiply_adds(found: Launched) -> int:
    """Of attention or its backward for a query and a key, padding included."""
    if found.kernel == "attention":
        return sum(found.constant(name) for name in ("K_A", "K_B", "V_A", "V_B"))
    products = {"query_grad": 3, "key_grad": 4}[found.kernel]
    return products * (found.constant("D_A") + found.constant("D_B"))


def _match(variant: Variant) -> None:
    """Half of 1024 tokens as queries, half as keys."""
    x = torch.empty(_BATCH, 1024, variant.head_dim, dtype=getattr(torch, DTYPES[variant.dtype]))
    index = torch.empty(_BATCH, 512, dtype=torch.int64)
    match.match(x, index, index.clone())


def report(variant: Variant, dump: Path | None = None) -> dict[str, Any]:
    """Compile one variant: registers, stack, spills, shared memory (bytes); clocks per score by pipe.

    Clocks are for attention and its backward in fp16 and bf16. Of the match kernel in these dtypes, only how far ahead
    it copies: its loop takes a tile of keys in several trips.
    """
    found = next(each for each in launches(variant) if each.kernel == variant.kernel)
    compiled = triton.compile(found.source, target=GPUTarget("cuda", variant.arch, 32), options=found.options)
    row: dict[str, Any] = {**asdict(variant), **found.options}
    del row["config"]  # in single columns, the shipped ones too
    attends = variant.kernel in ("attention", *BACKWARD)
    tiles = ("BLOCK_M", "BLOCK_N") if attends or variant.kernel == "match" else ()
    row |= {name.lower(): found.constant(name) for name in tiles}
    with TemporaryDirectory() as folder:
        cubin = (dump or Path(folder)) / f"{variant.name}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        row |= {**asdict(sass.usage(cubin)), "shared": compiled.metadata.shared}
        if variant.kernel == "attention":
            row["polynomial"] = found.constant("POLYNOMIAL")
        if variant.kernel == "match" and variant.dtype != "fp32":
            row["ahead"] = sass.ahead(cubin)
        if attends and variant.dtype != "fp32":
            shape = (row["block_m"], row["block_n"], row["num_warps"], multiply_adds(found))
            row |= sass.clocks_per_score(cubin, variant.arch, *shape)
        if dump and attends:
            cubin.with_suffix(".json").write_text(json.dumps(row, indent=1) + "\n")
        elif dump:
            cubin.unlink()
    return row


def main(
    arch: Annotated[list[int] | None, typer.Option(help="Compute capability, as 90; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp16, bf16 or fp32; repeatable.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head dim; repeatable.")] = None,
    channels: Annotated[list[int] | None, typer.Option(help="Channels of the match kernel; repeatable.")] = None,
    kernel: Annotated[str, typer.Option(help=f"{', '.join(KERNELS)} or all.")] = "all",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            help="Only attention, or the --kernel of its backward, in this configuration: "
            "QUERIESxKEYSxWARPSxSTAGES, as 128x64x4x2 or 128x256x8x2:poly; "
            ":ws for warp specialization on sm_100; repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    dump: Annotated[
        Path | None, typer.Option(help="Write attention and its backward there, each with its row.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Compilations at a time.")] = os.cpu_count() or 1,
) -> None:
    """Registers, spills, shared memory and clocks per score of every kernel; the GPUs need not be here."""
    check_among("arch", arch or (), ARCHITECTURES)
    check_among("dtype", dtype or (), DTYPES)
    check_among("kernel", [kernel], (*KERNELS, "all"))
    for value in head_dim or ():
        if value % 8 or not 8 <= value <= 256:
            raise typer.BadParameter(f"--head-dim must be a multiple of 8 from 8 to 256, got {value}")
    for value in channels or ():
        if value < 1:
            raise typer.BadParameter(f"--channels must be at least 1, got {value}")
    others = list(dict.fromkeys(parsed(text) for text in settings or ()))
    if others and kernel == "all":
        kernel = "attention"
    if others and kernel not in ("attention", *BACKWARD):
        raise typer.BadParameter(f"--settings are for attention, {' and '.join(BACKWARD)}, got --kernel {kernel}")
    if any(config.polynomial for config in others) and "fp32" in (dtype or ()):
        raise typer.BadParameter("--settings with :poly must be compiled with --dtype fp16 or bf16, got fp32")
    if jobs < 1:
        raise typer.BadParameter(f"--jobs must be at least 1, got {jobs}")
    if dump:
        make_dump_folder(dump)
    dtypes = dtype or [d for d in DTYPES if d != "fp32" or not others]  # other tiles are for tensor cores
    every = variants(arch or ARCHITECTURES, dtypes, head_dim or HEAD_DIMS, channels or CHANNELS, others)
    todo = [variant for variant in every if kernel in ("all", variant.kernel)]
    with ProcessPoolExecutor(jobs) as pool:
        rows = list(tqdm(pool.map(report, todo, [dump] * len(todo)), total=len(todo), desc="compiling"))
    if as_json:
        json.dump(rows, sys.stdout, indent=1)
    else:
        print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    typer.run(main)
