"""Compile the Hopper candidate for sm_90 without a GPU: what it uses, and what the loop of a consumer costs.

python -m benchmarks.experiments.hopper.static                      as it would be launched
python -m benchmarks.experiments.hopper.static --head-dim 40 --all  every configuration that is worth a measurement
python -m benchmarks.experiments.hopper.static --dump build/cubins  and the machine code

Each consumer has a copy of the loop; one copy is counted. A trip is two steps, 64 queries by 2 * block_n keys, done by
4 warps, one on each SM sub-partition. Columns as in ``python -m benchmarks.compile_report``, and

- "used": registers that each partition's code names, the consumers', then the producer's. They hold 240 and 24 (two
  consumers) or 160 and 32 (three); "registers" is only what the program starts with.
- "exp2": how many a trip has; "under_qk": between the issue of the next tile's Q K^T and its wait; "under_pv": of
  those, behind the issue of P V's first half.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

os.environ["TRITON_INTERPRET"] = "0"  # interpreted kernels cannot be compiled

import torch
import triton
import typer
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from benchmarks import sass
from benchmarks.experiments.hopper.kernel import attention_kernel
from benchmarks.experiments.hopper.launch import OPTIONS, RUNS, Run, configuration, layout, plan
from benchmarks.options import check_among, make_dump_folder
from todo_attn.kernels.launch import tiles

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def source(head_dim: int, dtype: str, run: Run) -> GluonASTSource:
    """The kernel as it is launched on contiguous tensors."""
    tile = tiles((9, 0), head_dim)
    constants = {"PLAN": plan(head_dim, tile, run), "stride_qd": 1, "stride_od": 1}
    names: list[str] = attention_kernel.arg_names
    types = dict.fromkeys(constants, "constexpr") | dict.fromkeys(("query", "out"), f"*{dtype}")
    for name, columns in zip(("key_a", "key_b", "value_a", "value_b"), (*tile.k, *tile.v), strict=True):
        columns = columns or max(tile.k)
        types[name] = f"tensordesc<{dtype}[{run.block_n}, {columns}],{layout(DTYPES[dtype], run, columns)!r}>"
    for name in names:
        types.setdefault(name, "fp32" if name.startswith("log2") else "i32")
    whole = [n for n in names if n in ("query", "out", "rows") or (n.startswith("stride") and n not in constants)]
    return GluonASTSource(
        attention_kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
    )


def used(code: list[str]) -> str:
    """The registers that each partition names, between two changes of their number: "187/191+9"."""
    marks = [i for i, instruction in enumerate(code) if "USETMAXREG" in instruction]
    consumers, producer = [], 0
    for start, end in zip(marks, [*marks[1:], len(code)], strict=True):
        part = code[start:end]
        most = 0
        for instruction in part:
            numbers = [int(n) + 1 for n in re.findall(r"(?<![U\w])R(\d+)", instruction)]
            if shape := re.search(r"HGMMA\.64x(\d+)x\S+ R(\d+)", instruction):
                numbers.append(int(shape[2]) + int(shape[1]) // 2)
            most = max(most, *numbers, 0)
        if any("HGMMA" in instruction for instruction in part):
            consumers.append(most)
        elif any("UTMALDG" in instruction for instruction in part):
            producer = most
    return "/".join(map(str, sorted(consumers))) + f"+{producer}"


def overlap(loop: list[str]) -> dict[str, int]:
    """How many exp2 a loop has, and how many of them are under its matrix products."""
    every = under_qk = under_pv = 0
    flying = late = False
    for instruction in loop:
        if "HGMMA" in instruction:
            # P V reads P from registers, Q K^T reads two descriptors.
            late = late or bool(re.search(r"HGMMA\S*\s+R\d+,\s*R\d+", instruction))
            flying = True
        elif "WARPGROUP.DEPBAR" in instruction:
            flying = late = False
        elif "MUFU.EX2" in instruction:
            every += 1
            under_qk += flying
            under_pv += late
    return {"exp2": every, "under_qk": under_qk, "under_pv": under_pv}


def report(head_dim: int, dtype: str, run: Run, dump: Path | None = None) -> dict[str, Any]:
    """Compile one variant: a row of the table.

    Raises:
        RuntimeError: the loop found in the machine code does not have the wgmmas of two tiles.
    """
    ast = source(head_dim, dtype, run)
    compiled = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
    row: dict[str, Any] = {"head_dim": head_dim, "dtype": dtype, **asdict(run)}
    tile = tiles((9, 0), head_dim)
    with TemporaryDirectory() as folder:
        flags = "".join(name[0] for name in ("ahead", "halves") if row[name])
        name = f"hopper-{dtype}-d{head_dim}-n{run.block_n}-s{run.stages}-c{run.consumers}-{flags}"
        cubin = (dump or Path(folder)) / f"{name}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        if dump:
            cubin.with_suffix(".ptx").write_text(compiled.asm["ptx"])
        use = asdict(sass.usage(cubin))
        row |= {k: use[k] for k in ("registers", "stack", "spills")} | {"shared": compiled.metadata.shared}
        row["used"] = used(sass.disassemble(cubin)[0])
        loop = sass.hot_loop(cubin)
        wgmma = sum("HGMMA" in instruction for instruction in loop)
        expected = 2 * (sum(tile.k) // 16 + run.block_n // 16 * (2 if tile.v[1] else 1))
        if wgmma != expected:
            raise RuntimeError(f"{name}: the loop of a consumer should have {expected} wgmmas, found one with {wgmma}")
        row |= {"wgmma": wgmma, "waits": sum("WARPGROUP.DEPBAR" in instruction for instruction in loop)}
        row["spills_in_loop"] = sum(bool(re.search(r"\b(LDL|STL)\b", instruction)) for instruction in loop)
        row |= overlap(loop)
        row |= sass.clocks_per_score(cubin, 90, 64, 2 * run.block_n, 4, sum(tile.k) + sum(tile.v))
    return row


def main(
    head_dim: Annotated[list[int] | None, typer.Option(help=f"{', '.join(map(str, RUNS))}; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp16 or bf16; repeatable. fp16 unless given.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every configuration to measure, not only the one chosen.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Write machine code and PTX into this folder.")] = None,
) -> None:
    """Registers, spills, overlap and clocks per score of the Hopper candidate; no GPU need be here."""
    for number in head_dim or ():
        try:
            configuration(number)
        except ValueError as error:
            raise typer.BadParameter(str(error).replace("head_dim", "--head-dim")) from error
    check_among("dtype", dtype or (), DTYPES)
    if dump:
        make_dump_folder(dump)
    rows = []
    for kind in dtype or ["fp16"]:
        for number in head_dim or RUNS:
            others = RUNS.get(number, []) if every else []
            rows += [report(number, kind, run, dump) for run in dict.fromkeys([configuration(number), *others])]
    if as_json:
        json.dump(rows, sys.stdout, indent=1)
    else:
        print(f"Triton {triton.__version__}")
        print(tabulate(rows, headers="keys", disable_numparse=True))


if __name__ == "__main__":
    typer.run(main)
