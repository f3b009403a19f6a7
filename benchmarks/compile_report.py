"""Compiles every kernel for every architecture, without a GPU, and prints what the compiled code uses.

python -m benchmarks.compile_report --arch 90 --dtype fp16 --dump build/cubins
python -m benchmarks.compile_report --arch 90 --head-dim 40 --settings 128x64x4x2 --settings 128x256x8x2:poly

The second command compiles the attention kernel with other tiles than the shipped ones.
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

import triton
import typer
from tabulate import tabulate
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass
from benchmarks.options import check_among, make_dump_folder
from todo_attn.config.dtypes import DTYPES
from todo_attn.config.modes import MODES
from todo_attn.kernels import attention, configs, launch, match, pack

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HEAD_DIMS = (8, 24, 40, 64, 80, 96, 128, 160, 256)
CHANNELS = (20, 320, 1280)
KERNELS = ("attention", "pack", "match", "rows")

# The arguments of all kernels by name: pointers to the dtype of the variant; pointers to other types, fp32 scalars.
_POINTERS = ("query", "key", "value", "out", "packed_key", "packed_value", "x", "packed")
_TYPES = {
    **dict.fromkeys(("index", "position"), "*i64"),
    **dict.fromkeys(("reciprocal", "query_reciprocal", "key_reciprocal", "similarity"), "*fp32"),
    **dict.fromkeys(("log2_scale", "log2_power", "scale_y", "scale_x", "sign"), "fp32"),
}


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    ``mode``: of the packing kernel; of attention "plain", "tail" (the last tile is partial) or "large-scale" (a scale
    above 0.69). ``head_dim``: for the match kernel and the one that packs its rows, the channels. ``config``: for the
    attention kernel, other than the shipped.
    """

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    mode: str
    config: configs.KernelConfig | None = None

    @property
    def name(self) -> str:
        other = f"-{spelled(self.config)}" if self.config else ""
        return f"{self.kernel}-sm{self.arch}-{self.dtype}-d{self.head_dim}-{self.mode}{other}"


def spelled(config: configs.KernelConfig) -> str:
    """``config`` as ``--settings`` takes it, but with "-poly" for ":poly", which some file systems refuse in a name."""
    return f"{config.block_m}x{config.block_n}x{config.num_warps}x{config.num_stages}{'-poly' * config.polynomial}"


def parsed(text: str) -> configs.KernelConfig:
    """QUERIES x KEYS x WARPS x STAGES, as 128x64x4x2, and ":poly" for one exp2 in eight by polynomial.

    Raises:
        typer.BadParameter: ``text`` is anything else, or no such kernel can be compiled.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)(:poly)?", text)
    numbers = [int(n) for n in found.groups()[:4]] if found else [0, 0, 0, 0]
    queries, keys, warps, stages = numbers
    tile = all(16 <= n <= 512 and n & (n - 1) == 0 for n in (queries, keys))
    if found is None or not tile or warps not in (1, 2, 4, 8, 16, 32) or not 1 <= stages <= 8:
        raise typer.BadParameter(
            "--settings must be QUERIESxKEYSxWARPSxSTAGES, as 128x64x4x2 or 128x256x8x2:poly: powers of two from 16 to "
            f"512, a power of two up to 32, 1 to 8; got {text!r}"
        )
    return configs.KernelConfig(queries, keys, warps, stages, polynomial=found[5] is not None)


def variants(
    arches: Sequence[int],
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    channels: Sequence[int],
    others: Sequence[configs.KernelConfig] = (),
) -> Iterator[Variant]:
    """Every kernel in every mode. "tail" is another attention kernel only for head dims without a ones column.

    With ``others`` only the attention kernel, in each of these configurations.
    """
    for arch in arches:
        for dtype in dtypes:
            for head_dim in head_dims:
                for config in others or (None,):
                    yield Variant("attention", arch, dtype, head_dim, "plain", config)
                    if not configs.tiles(head_dim).ones:
                        yield Variant("attention", arch, dtype, head_dim, "tail", config)
                    yield Variant("attention", arch, dtype, head_dim, "large-scale", config)
                if others:
                    continue
                for mode in MODES:
                    yield Variant("pack", arch, dtype, head_dim, mode)
            for count in [] if others else channels:
                yield Variant("match", arch, dtype, count, "plain")
                yield Variant("rows", arch, dtype, count, "plain")


def source(variant: Variant) -> tuple[ASTSource, dict[str, object], configs.KernelConfig | None]:
    """The kernel as launched on contiguous tensors, its compiler options, and its configuration."""
    capability, half = divmod(variant.arch, 10), variant.dtype != "fp32"
    tile = configs.tiles(variant.head_dim) if variant.kernel in ("attention", "pack") else None
    config = None
    types: dict[str, str] = {}
    kernel: Any
    constants: dict[str, Any]
    if variant.kernel == "attention":
        assert tile is not None
        config = variant.config or configs.attention_config(capability, variant.head_dim, half)
        kernel, options = attention.attention_kernel, config.options
        tail, large_scale = variant.mode == "tail", variant.mode == "large-scale"
        constants = launch.constants(
            variant.head_dim, tile, config, configs.has_tma(capability), tail=tail, large_scale=large_scale
        )
        for name, columns in zip(("key_a", "key_b", "value_a", "value_b"), (*tile.k, *tile.v), strict=True):
            types[name] = f"tensordesc<{variant.dtype}[{config.block_n}, {columns or max(tile.k)}]>"
    elif variant.kernel == "pack":
        assert tile is not None
        window = 2 if variant.mode == "mean" else 1
        kernel, options = pack.pack_kernel, pack.OPTIONS
        constants = pack.constants(variant.head_dim, tile, variant.mode, window, window)
    elif variant.kernel == "match":
        config = configs.match_config(capability, half)
        kernel, options = match.match_kernel, config.options
        constants = match.match_constants(variant.head_dim, half, config)
    else:
        kernel, options = match.rows_kernel, match.OPTIONS
        constants = match.rows_constants(variant.head_dim, half, rescale=variant.dtype != "fp16")
    names = kernel.arg_names
    innermost = ("stride_qd", "stride_kd", "stride_vd", "stride_od", "stride_xc", "stride_ik")
    constants = constants | {name: 1 for name in names if name in innermost}
    attributes = {}
    for i, name in enumerate(names):
        if name in constants:
            types[name] = "constexpr"
        elif name in _POINTERS:
            types[name] = f"*{variant.dtype}"
        else:
            types.setdefault(name, _TYPES.get(name, "i32"))
        whole = name.endswith("rows") or name.startswith("stride")
        if types[name].startswith("*") or (whole and types[name] == "i32"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    ast = ASTSource(
        kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    return ast, options, config


def report(variant: Variant, dump: Path | None = None) -> dict[str, Any]:
    """Compile one variant: registers, stack, spills, shared memory (bytes); clocks per score by pipe.

    Clocks are for fp16 and bf16: of attention, and on sm_90 of the match kernel (whose loop over channels is not
    unrolled elsewhere).
    """
    ast, options, config = source(variant)
    tile = configs.tiles(variant.head_dim) if variant.kernel == "attention" else None
    compiled = triton.compile(ast, target=GPUTarget("cuda", variant.arch, 32), options=options)
    row: dict[str, Any] = {**asdict(variant), **options}
    del row["config"]  # in single columns, the shipped ones too
    if config is not None:
        row |= {"block_m": config.block_m, "block_n": config.block_n, "polynomial": config.polynomial}
    with TemporaryDirectory() as folder:
        cubin = (dump or Path(folder)) / f"{variant.name}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        row |= {**asdict(sass.usage(cubin)), "shared": compiled.metadata.shared}
        if config is not None and variant.dtype != "fp32" and (tile or variant.arch == 90):
            columns = sum(tile.k) + sum(tile.v) if tile else 0
            row |= sass.clocks_per_score(cubin, variant.arch, config.block_m, config.block_n, config.num_warps, columns)
        if dump and variant.kernel == "attention":
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
            help="Only attention, in this configuration: QUERIESxKEYSxWARPSxSTAGES, as 128x64x4x2 or 128x256x8x2:poly; "
            "repeatable."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Write each attention kernel there, with its row.")] = None,
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
    if others and kernel not in ("attention", "all"):
        raise typer.BadParameter(f"--settings are the attention kernel's, got --kernel {kernel}")
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
