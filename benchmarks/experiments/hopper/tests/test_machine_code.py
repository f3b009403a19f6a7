"""What the compiler must have put into the Hopper candidate for it to be right, and no simulation shows.

In the PTX: every release of a slot comes after ``wgmma.wait_group 0`` and after that a barrier of the warpgroup, with
no wgmma between (one thread arrives for 128); the stores of Q are followed by the proxy fence, and then a barrier,
before any wgmma.

In the machine code, of every wgmma: until a wait that covers its group, no other instruction touches its accumulators,
and none writes the registers that it reads P from. Walked once in the listing's order, across labels; each step ends
with nothing in flight, so no loop's back edge matters.
"""

import re

import pytest

from benchmarks import sass

EVENTS = (
    ("wgmma", r"wgmma\.mma_async"),
    ("wait", r"wgmma\.wait_group\S* +0"),
    ("some", r"wgmma\.wait_group"),
    ("bar", r"bar\.sync"),
    ("release", r"mbarrier\.arrive\.shared"),
    ("fence", r"fence\.proxy\.async"),
    ("store", r"(st\.shared|stmatrix)(?!.*\[global_smem\+)"),  # those at a fixed place start the partitions
)


def events(ptx):
    """[(event, line), ...] in the order of the PTX's lines."""
    found = ((next((name for name, p in EVENTS if re.search(p, line)), None), line) for line in ptx.splitlines())
    return [event for event in found if event[0]]


def order(ptx):
    """How many releases were looked at, and which of them, and which wgmmas, come before what they must come after."""
    names = [name for name, _ in events(ptx)]
    wrong = []
    for at, name in enumerate(names):
        before = names[:at][::-1]
        if name == "release" and (
            before[0] != "bar" or "wait" not in before or "wgmma" in before[: before.index("wait")]
        ):
            wrong.append(f"a release after {before[:4]}")
        if name == "wgmma" and "store" in before:
            since = before[: before.index("store")]
            if "wgmma" not in since and ("fence" not in since or "bar" not in since[: since.index("fence")]):
                wrong.append(f"a wgmma after a store and {since}")
    return names.count("release"), wrong


def registers(operand, width):
    """R24 of a width -> {24, ...}."""
    found = re.match(r"R(\d+)", operand)
    return set(range(int(found[1]), int(found[1]) + width)) if found else set()


WIDE = {"64": 2, "128": 4, "WIDE": 2}  # registers that an operand names, by a part of the instruction's name


def touched(instruction):
    """(written, read) registers of an instruction that is no wgmma; where in doubt, as many as it may be."""
    name, _, rest = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    stores = name.startswith(("ST", "BRA", "SYNCS", "UTMA", "BAR"))
    width = max((n for part, n in WIDE.items() if part in name.split(".")), default=1)
    written, read = set(), set()
    for place, operand in enumerate(re.split(r",(?![^\[]*\])", rest)):
        address = "[" in operand
        for found in re.finditer(r"(?<![U\w])R(\d+)", operand):
            first = int(found[1])
            wide = set(range(first, first + (2 if address and not stores else width)))
            if place == 0 and not stores and not address:
                written |= wide
            else:
                read |= wide if address or name.startswith(("ST", "LD", "IMAD.WIDE", "MOV.64")) else {first}
    return written, read


def hazards(code):
    """How many wgmmas were looked at, and what touches registers that one in flight reads or writes."""
    groups, wrong, count = [[]], [], 0  # the last group is being issued
    for instruction in code:
        if wgmma := re.search(r"HGMMA\.64x(\d+)x16\S*\s+(.*)", instruction):
            count += 1
            first, second = [o.strip() for o in wgmma[2].split(",")][:2]
            p = registers(second, 4)  # nothing where both operands are in shared memory
            wrong += [instruction for group in groups for accumulators, _ in group if p & accumulators]
            groups[-1].append((registers(first, int(wgmma[1]) // 2), p))
            if "gsb0" in instruction:
                groups.append([])
        elif wait := re.search(r"WARPGROUP\.DEPBAR\S*\s+gsb0, 0x(\w+)", instruction):
            del groups[: max(0, len(groups) - 1 - int(wait[1], 16))]
        else:
            written, read = touched(instruction)
            for accumulators, p in (one for group in groups for one in group):
                if (written | read) & accumulators or written & p:
                    wrong.append(instruction)
    return count, wrong


@pytest.mark.parametrize("head_dim", [40, 80])
def test_slots_are_given_back_and_queries_read_behind_a_barrier(compiled, head_dim):
    ptx = compiled[head_dim][1].with_suffix(".ptx").read_text()
    releases, wrong = order(ptx)
    assert releases >= 2 * 5 and wrong == []  # two consumers: before the loop, twice in it, after it twice
    for event in ("bar", "fence", "wait"):  # that this can fail
        kept = [line for line in ptx.splitlines() if not re.search(dict(EVENTS)[event], line)]
        assert order("\n".join(kept))[1] != [], event


@pytest.mark.parametrize("head_dim", [40, 80])
def test_nothing_touches_what_a_wgmma_in_flight_uses(compiled, head_dim):
    row, cubin = compiled[head_dim]
    code, _ = sass.disassemble(cubin)
    count, wrong = hazards(code)
    assert count >= 2 * row["wgmma"] and wrong == []
    assert hazards([i for i in code if "WARPGROUP.DEPBAR" not in i])[1] != []  # it does find such
