"""What a compiled kernel costs, read from its machine code with the disassembler that Triton brings.

Clocks are those of Hopper, per SM sub-partition and warp instruction: an fp32 FMA, ADD or MUL 1, an integer
multiply-add 2 of the same pipe, min/max, logic, select, shift and conversion on the ALU 2, a special function (exp2,
and conversions between integer and float) 8, issuing anything 1; a wgmma of M64 x N x K16 takes the SM's tensor cores
N/2. The pipes run side by side, so the busiest bounds a loop from below, and tensor + busiest other is what no overlap
gives.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FMA = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2")
_WGMMA = ("HGMMA", "UTCHMMA", "UTCQMMA")
_SPECIAL = ("MUFU", "F2F", "I2F", "F2I", "FRND")
_ALU = (
    "FMNMX", "F2FP", "LOP3", "IADD", "SEL", "FSEL", "ISETP", "FSETP", "PRMT", "SHF", "LEA", "VIADD", "VIMNMX", "IMNMX",
    "MOV", "HMNMX", "PLOP3", "SGXT", "FSET", "I2FP", "BMSK",
)  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """Registers per thread, stack in bytes, and how many instructions spill or multiply matrices.

    ``wgmma``: those that read shared memory by themselves (Hopper and later). ``mma``: of any kind.
    """

    registers: int
    stack: int
    spills: int
    wgmma: int
    mma: int


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: Path) -> tuple[list[str], dict[str, int]]:
    """The instructions in order, and where each label stands."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in _tool("nvdisasm", "-c", str(cubin)).splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
    return code, labels


def _name(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def usage(cubin: Path) -> Usage:
    """What the whole kernel uses."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {cubin}")
    names = [_name(i) for i in disassemble(cubin)[0]]
    return Usage(
        registers=int(found[1]),
        stack=int(found[2]),
        spills=sum(n.split(".")[0] in ("LDL", "STL") for n in names),
        wgmma=sum(n.startswith(_WGMMA) for n in names),
        mma=sum(n.startswith(("HMMA", *_WGMMA)) for n in names),
    )


def hot_loop(cubin: Path) -> list[str]:
    """The instructions of the innermost loop with the most wgmma.

    Raises:
        ValueError: no loop holds one.
    """
    code, labels = disassemble(cubin)
    loops = []
    for end, instruction in enumerate(code):
        jump = re.search(r"BRA(?:\.\S+)?\s+(?:!?U?P\d+,\s*)?`\((\.L_x_\d+)\)", instruction)
        start = labels.get(jump[1], end + 1) if jump else end + 1
        if start <= end and (matrix := sum(_name(i).startswith("HGMMA") for i in code[start : end + 1])):
            loops.append((start, end, matrix))
    # A jump back from the far end of the code (a barrier's retry) makes a "loop" around the loop: leave those out.
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        raise ValueError(f"{cubin} has no loop with wgmma")
    start, end, _ = max(inner, key=lambda loop: loop[2])
    return code[start : end + 1]


def clocks_per_score(cubin: Path, block_m: int, block_n: int, num_warps: int) -> dict[str, float | bool]:
    """SM clocks per query-key pair, by pipe, of the hot loop; its bound, and its time were nothing overlapped.

    "serialised": the loop waits after every wgmma, so that its bound means nothing.
    """
    count: Counter[str] = Counter()
    tensor = 0.0
    for instruction in hot_loop(cubin):
        name = _name(instruction)
        base = name.split(".")[0]
        count["issue"] += 1
        if name.startswith("HGMMA"):
            shape = re.search(r"\.\d+x(\d+)x\d+", name)
            assert shape is not None, name
            tensor += int(shape[1]) / 2
            count["wgmma"] += 1
        elif name.startswith("WARPGROUP.DEPBAR"):
            count["wait"] += 1
        elif base in _SPECIAL:
            count["special"] += 1
        elif base.startswith("IMAD"):
            count["imad"] += 1
        elif base.startswith(_FMA):
            count["fma"] += 1
        elif base.startswith(_ALU):
            count["alu"] += 1
    weight = num_warps / 4 / (block_m * block_n)
    pipes = {
        "tensor": tensor * weight,
        "mufu": 8 * count["special"] * weight,
        "fma": max(count["fma"] + count["imad"], 2 * count["imad"]) * weight,
        "alu": 2 * count["alu"] * weight,
        "issue": count["issue"] * weight,
    }
    other = max(v for k, v in pipes.items() if k != "tensor")
    return {
        **{k: round(v, 4) for k, v in pipes.items()},
        "bound": round(max(pipes["tensor"], other), 4),
        "no_overlap": round(pipes["tensor"] + other, 4),
        "serialised": count["wait"] >= count["wgmma"],
    }
