"""Reads what a compiled kernel costs from its machine code, with the disassembler that comes with Triton.

Clocks follow from what an SM finishes in one (``RATES``). On Hopper, per SM sub-partition and warp instruction: an
fp32 FMA, ADD or MUL 1, an integer multiply-add 2 of the same pipe, min/max, logic, select, shift and conversion on the
ALU 2, a special function (exp2, and conversions between integer and float) 8, issuing anything 1; a wgmma of M64 x N x
K16 takes the SM's tensor cores N/2. The pipes run side by side, so the busiest bounds a loop from below, and tensor +
busiest other is the time without overlap.

Sources of the rates. Lanes: "Throughput of Native Arithmetic Instructions" in NVIDIA's CUDA C++ Programming Guide
and, from CUDA 13 on, its Best Practices Guide. Multiply-adds: NVIDIA's peak fp16 rate with fp32 sums over SMs and boost
clock: A100 312 T, 108 SMs, 1.41 GHz; RTX A6000 154.8 T, 84, 1.80; H100 SXM 989 T, 132, 1.83; B200 2250 T, 148, 1.85;
RTX PRO 6000 (Blackwell) 504 T, 188, 2.62. sm_89's is that of Ada's professional cards. GeForce cards of sm_86, sm_89
and sm_120 have half of it (RTX 3090 71 T, 82, 1.70; RTX 4090 165 T, 128, 2.52; RTX 5090 209.5 T, 170, 2.41): their
tensor clocks are twice those printed.

Assumptions, the same for all architectures: packing two floats to fp16 or bf16 is an ALU instruction (the guide has 16
lanes for some conversions to 16 bits); integer additions have 64 lanes (128 on sm_120 by the guide); a maximum of three
(sm_100) costs as much as one of two. The work of one warp of a program (on sm_100 all matrix instructions) is counted
as if every warp did it. Shared memory moves 128 bytes a clock, without bank conflicts: what threads load, store and
copy to it. Matrix instructions that read it by themselves do so within their time: a wgmma of two operands there from
N = 64 on. Of shuffles and tensor memory, only the clock to issue them is counted.

Waiting is not in the clocks. :func:`ahead` says instead how long before its wait a copy to shared memory is issued.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_FMA = ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2")
_WGMMA = ("HGMMA", "UTCHMMA", "UTCQMMA")
_MMA = ("HMMA", *_WGMMA)
_SPECIAL = ("MUFU", "F2F", "I2F", "F2I", "FRND")
_ALU = (
    "FMNMX", "F2FP", "LOP3", "IADD", "SEL", "FSEL", "ISETP", "FSETP", "PRMT", "SHF", "LEA", "VIADD", "VIMNMX", "IMNMX",
    "MOV", "HMNMX", "PLOP3", "SGXT", "FSET", "I2FP", "BMSK",
)  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What an SM finishes in a clock: multiply-adds of fp16 or bf16 with fp32 sums, and lanes of other instructions."""

    tensor: int
    fma: int = 128  # fp32 FMA, ADD, MUL
    maximum: int = 64  # fp32 min and max
    alu: int = 64  # all else on the ALU, and integer multiply-adds
    special: int = 16


RATES = {
    80: Rates(tensor=1024, fma=64),
    86: Rates(tensor=512),
    89: Rates(tensor=512),
    90: Rates(tensor=2048),
    100: Rates(tensor=4096, maximum=128),
    120: Rates(tensor=512),
}
_SHARED = ("LDS", "LDSM", "STS", "STSM", "LDGSTS")
_SHARED_BYTES = 128  # that shared memory moves in a clock
_LANES = 128  # of the four sub-partitions: an instruction of a warp takes _LANES / rate clocks


@dataclass(frozen=True)
class Usage:
    """Registers per thread, stack in bytes, and how many instructions spill, multiply matrices or access memory badly.

    ``wgmma``: those that read shared memory by themselves (Hopper and later). ``mma``: of any kind. ``narrow``: loads
    and stores of global memory by one or two bytes.
    """

    registers: int
    stack: int
    spills: int
    wgmma: int
    mma: int
    narrow: int


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: Path) -> tuple[list[str], dict[str, int]]:
    """The instructions in order, and where each label stands."""
    return _disassembled(cubin, cubin.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # usage and clocks ask for the same file
def _disassembled(cubin: Path, written: int) -> tuple[list[str], dict[str, int]]:
    code: list[str] = []
    labels: dict[str, int] = {}
    # Without its analysis of branches, which takes half of the time and changes no line.
    for line in _tool("nvdisasm", "-ndf", "-c", str(cubin)).splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
    return code, labels


def _name(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def usage(cubin: Path) -> Usage:
    """What the kernel uses."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {cubin}")
    names = [_name(i) for i in disassemble(cubin)[0]]
    return Usage(
        registers=int(found[1]),
        stack=int(found[2]),
        spills=sum(n.split(".")[0] in ("LDL", "STL") for n in names),
        wgmma=sum(n.startswith(_WGMMA) for n in names),
        mma=sum(n.startswith(_MMA) for n in names),
        narrow=sum(bool(re.match(r"(LDG|STG)\b.*\.[US](8|16)\b", n)) for n in names),
    )


def hot_loop(cubin: Path) -> list[str]:
    """The instructions of the innermost loop with the most matrix instructions.

    Raises:
        ValueError: no loop holds one.
    """
    start, end = _hot_loop(cubin, _MMA)
    return disassemble(cubin)[0][start : end + 1]


def _work(cubin: Path) -> list[str]:
    """The instructions of a trip: of the hot loop, and of that with exp2 if other warps compute it (sm_100)."""
    loop = hot_loop(cubin)
    if any(_name(i).startswith("UTC") for i in loop) and not any(_name(i) == "MUFU.EX2" for i in loop):
        with suppress(ValueError):  # a product of matrices without exp2
            start, end = _hot_loop(cubin, ("MUFU.EX2",))
            return loop + disassemble(cubin)[0][start : end + 1]
    return loop


def _hot_loop(cubin: Path, kind: tuple[str, ...]) -> tuple[int, int]:
    """The first and the last instruction of the innermost loop with the most instructions of a kind.

    Raises:
        ValueError: no loop holds one.
    """
    code, labels = disassemble(cubin)
    loops = []
    for end, instruction in enumerate(code):
        jump = re.search(r"BRA(?:\.\S+)?\s+(?:!?U?P\d+,\s*)?`\((\.L_x_\d+)\)", instruction)
        start = labels.get(jump[1], end + 1) if jump else end + 1
        if start <= end and (count := sum(_name(i).startswith(kind) for i in code[start : end + 1])):
            loops.append((start, end, count))
    # The retry of a barrier is behind the end of the code and jumps back. It looks like a loop around the real loop, or
    # around a part of it, but is none.
    last = next((i for i, instruction in enumerate(code) if _name(instruction) == "EXIT"), len(code))
    loops = [loop for loop in loops if loop[1] < last] or loops
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        raise ValueError(f"{cubin} has no loop with {' or '.join(kind)}")
    start, end, _ = max(inner, key=lambda loop: loop[2])
    return start, end


def ahead(cubin: Path) -> float | None:
    """Trips of the hot loop between the issue of a copy to shared memory and its wait, the least of all its copies.

    None if the loop waits for no copy: other warps issue them (warp specialization), or each load is waited for.

    Raises:
        ValueError: no loop holds a matrix instruction.
    """
    first, last = _hot_loop(cubin, _MMA)
    code = disassemble(cubin)[0]
    before, loop = code[:first], code[first : last + 1]
    trips = _ahead_by_threads(loop) + _ahead_by_descriptor(before, loop)
    return round(min(trips), 2) if trips else None


def _ahead_by_threads(loop: list[str]) -> list[float]:
    """Of each wait: it leaves at most so many of the last groups of copies unfinished."""
    issued = [i for i, instruction in enumerate(loop) if _name(instruction) == "LDGDEPBAR"]
    trips = []
    for at, instruction in enumerate(loop):
        if issued and (wait := re.match(r"DEPBAR\.LE SB0, 0x([0-9a-f]+)", instruction)):
            # The newest group that has to be there, counted from the first of this trip; negative in trips before it.
            group = sum(i < at for i in issued) - 1 - int(wait[1], 16)
            earlier, which = divmod(group, len(issued))
            trips.append(-earlier + (at - issued[which]) / len(loop))
    return trips


def _ahead_by_descriptor(before: list[str], loop: list[str]) -> list[float]:
    """Of each barrier, which is known by its address: the copy announces its bytes there, and the wait asks it."""
    copies = sum(_name(instruction).startswith("UTMALDG") for instruction in loop)
    if not copies:
        return []
    issued: dict[str | None, int] = {}
    waited: dict[str | None, int] = {}
    for at, instruction in enumerate(loop):
        if barrier := re.search(r"SYNCS\.(ARRIVE\.TRANS64|PHASECHK)\S*\s.*\[UR\d+(\+0x[0-9a-f]+)?\]", instruction):
            (issued if barrier[1] == "ARRIVE.TRANS64" else waited)[barrier[2]] = at
    earlier = sum(_name(instruction).startswith("UTMALDG") for instruction in before) / copies
    return [earlier + (waited[barrier] - at) / len(loop) for barrier, at in issued.items() if barrier in waited]


def _multiply_adds(name: str) -> int:
    """Multiply-adds of one instruction: of a warp for mma.sync, of a warpgroup (four warps) for wgmma.

    Raises:
        ValueError: its name has no known shape.
    """
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return int(shape[1]) * int(shape[2]) * int(shape[3])
    if shape := re.match(r"HMMA\.(16)(8)(8|16)\b", name):
        return int(shape[1]) * int(shape[2]) * int(shape[3])
    raise ValueError(f"the shape of {name} is not known")


def clocks_per_score(
    cubin: Path, arch: int, block_m: int, block_n: int, num_warps: int, columns: int
) -> dict[str, float | bool | None]:
    """SM clocks per query-key pair of the hot loop by pipe, its bound, and its time without overlap.

    ``columns``: multiply-adds per pair, padding included, for code whose matrix instructions do not show their shape
    (sm_100). "serialised": the loop waits after every wgmma, so that the bound does not apply (sm_90 only). "ahead":
    trips of the loop between the issue of a copy and its wait; "ahead_clocks": the same, if every trip takes the bound.

    Raises:
        ValueError: no loop holds a matrix instruction, or one is of an unknown shape.
    """
    rates = RATES[arch]
    count: Counter[str] = Counter()
    products = 0.0
    moved = 0  # bytes of shared memory, by a warp
    for instruction in _work(cubin):
        name = _name(instruction)
        base = name.split(".")[0]
        count["issue"] += 1
        moved += _shared_bytes(instruction)
        if base.startswith("UTC"):
            count["tcgen05"] += base.endswith("MMA")
        elif name.startswith("HGMMA"):
            products += _multiply_adds(name) / 4
            count["wgmma"] += 1
        elif name.startswith("HMMA"):
            products += _multiply_adds(name)
        elif name.startswith("WARPGROUP.DEPBAR"):
            count["wait"] += 1
        elif base in _SPECIAL:
            count["special"] += 1
        elif base.startswith("IMAD"):
            count["imad"] += 1
        elif base.startswith(_FMA):
            count["fma"] += 2 if base.endswith("2") and base.startswith("F") else 1  # FFMA2: two floats a lane
        elif base.startswith("FMNMX"):
            count["maximum"] += 1
        elif base.startswith(_ALU):
            count["alu"] += 1
    scores = block_m * block_n
    weight = num_warps / 4 / scores
    fma = _LANES / rates.fma
    pipes = {
        "tensor": (columns if count["tcgen05"] else products * num_warps / scores) / rates.tensor,
        "mufu": _LANES / rates.special * count["special"] * weight,
        "fma": max(fma * (count["fma"] + count["imad"]), _LANES / rates.alu * count["imad"]) * weight,
        "alu": (_LANES / rates.alu * count["alu"] + _LANES / rates.maximum * count["maximum"]) * weight,
        "issue": count["issue"] * weight,
        "smem": moved * num_warps / scores / _SHARED_BYTES,
    }
    other = max(v for k, v in pipes.items() if k != "tensor")
    return {
        **{k: round(v, 4) for k, v in pipes.items()},
        "bound": round(max(pipes["tensor"], other), 4),
        "no_overlap": round(pipes["tensor"] + other, 4),
        "serialised": 0 < count["wgmma"] <= count["wait"],
        "ahead": (trips := ahead(cubin)),
        # While this program has the SM for itself and every pipe runs as it should: the least there can be.
        "ahead_clocks": None if trips is None else round(trips * max(pipes["tensor"], other) * scores),
    }


def _shared_bytes(instruction: str) -> int:
    """The bytes that an instruction moves in shared memory for one warp."""
    base, *kinds = _name(instruction).split(".")
    if base not in _SHARED:
        return 0
    if base in ("LDSM", "STSM"):  # 8 x 8 matrices of 2 bytes
        return 128 * int(kinds[-1]) if kinds[-1] in ("2", "4") else 128
    return 4 * int(kinds[-1]) if kinds and kinds[-1] in ("64", "128") else 128
