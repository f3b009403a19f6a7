"""The Hopper candidate's own source in a model of Hopper's asynchrony, against the oracle; and that this can fail."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.experiments.hopper import simulator
from benchmarks.experiments.hopper.simulator import MachineError
from todo_attn.config.modes import coarse_grid
from todo_attn.ops import reference

pytest.importorskip("triton")

from benchmarks.experiments.hopper import launch
from benchmarks.experiments.hopper.launch import Run

FOLDER = Path(launch.__file__).parent
SOURCES = {f"benchmarks.experiments.hopper.{name}": FOLDER / f"{name}.py" for name in ("step", "kernel")}
BOUND = 2.0  # times the error of torch's own attention in the same dtype
NONE = {"ahead": False, "halves": False}


@dataclass(frozen=True)
class Case:
    """Shapes, configurations, and how many programs share the work of a persistent kernel."""

    head_dim: int
    run: Run
    grid: tuple[int, int]
    factor: tuple[int, int] = (1, 1)
    dtype: torch.dtype = torch.float16
    tokens: int = 0  # as many as the grid has, unless given
    batch: int = 1
    heads: int = 1
    scale: float | None = None
    programs: int = 1
    mode: str = "nearest"
    strided: bool = False


def simulated(monkeypatch, edits=None):
    """``launch``, with a simulated kernel under it, and the kernel; packing runs where Triton's kernels can."""
    kernel = simulator.kernel("attention_kernel", SOURCES, edits)
    monkeypatch.setattr(launch, "attention_kernel", kernel)
    if torch.cuda.is_available():

        def pack(key, value, *rest):
            key, value = key.cuda(), value.cuda()
            return lambda *_: tuple(t.cpu() for t in launch_pack(key, value, *rest)(key, value))

        launch_pack = launch.Pack
        monkeypatch.setattr(launch, "Pack", pack)
    return kernel


def error(case: Case, kernel, seed: int) -> float:
    """The kernel's error over that of torch's own attention; infinite where it is not finite.

    ``seed``: of the numbers, and of the order in which things happen.
    """
    torch.manual_seed(seed)
    kernel.seed = seed
    tokens = case.tokens or case.grid[0] * case.grid[1]
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    query = (torch.randn(case.batch, tokens, case.heads, case.head_dim + 8 * case.strided) * 2).to(case.dtype)
    query = query[..., : case.head_dim]
    shape = (case.batch, case.grid[0] * case.grid[1], case.heads, case.head_dim)
    key, value = (torch.randn(shape).to(case.dtype) for _ in "kv")
    small = coarse_grid(case.grid, case.factor)
    got = launch.launch(query, key, value, case.grid, small, case.mode, scale, case.run, processors=case.programs)
    wide = (query.double(), key.double(), value.double())
    exact = reference.downsampled_attention(*wide, case.grid, case.factor, mode=case.mode, scale=scale)
    coarse = [
        reference.downsample_tokens(t.flatten(2), case.grid, case.factor, mode=case.mode).unflatten(2, t.shape[2:])
        for t in (key, value)
    ]
    own = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (query, *coarse)), scale=scale
    ).transpose(1, 2)
    least = 1e-6 * exact.norm()  # torch may be exact
    ratio = float((got.double() - exact).norm() / (own.double() - exact).norm().clamp_min(least))
    return ratio if torch.isfinite(got).all() else float("inf")


BF16 = torch.bfloat16
CASES = {
    "40": Case(40, Run(128, 4), (23, 31)),
    "40, bf16": Case(40, Run(128, 4), (23, 31), dtype=BF16, heads=2),
    "40, two programs": Case(40, Run(128, 4), (21, 20), batch=2, tokens=200, heads=2, programs=2),
    "40, three programs, two slots": Case(40, Run(128, 2), (17, 33), tokens=300, heads=3, programs=3),
    "40, three consumers": Case(40, Run(128, 4, 3), (29, 30), heads=2, programs=2),
    "40, three consumers, not ahead": Case(40, Run(128, 4, 3, ahead=False), (19, 27), heads=2, dtype=BF16),
    "40, a program a block": Case(40, Run(64, 4, persistent=False), (13, 27), tokens=300, heads=2),
    "40, one key": Case(40, Run(128, 4), (1, 1), tokens=70),
    "40, one token": Case(40, Run(64, 2), (9, 11), tokens=1, heads=2),
    "40, mean": Case(40, Run(64, 4, halves=False), (27, 26), (2, 2), mode="mean"),
    "40, negative scale": Case(40, Run(128, 4), (20, 20), scale=-0.3),
    "40, scale 0": Case(40, Run(128, 4, 3), (20, 20), scale=0.0),
    "64": Case(64, Run(128, 4), (25, 31), heads=2),
    "64, nothing overlaps": Case(64, Run(128, 4, **NONE), (22, 19), heads=2, programs=2),
    "64, three consumers, strided": Case(64, Run(64, 4, 3), (17, 19), strided=True, dtype=BF16),
    "64, keys end a tile": Case(64, Run(64, 4), (16, 16), scale=0.6),
    "80": Case(80, Run(64, 4), (21, 19), heads=2, programs=2, strided=True),
    "80, bf16, three consumers": Case(80, Run(64, 4, 3, **NONE), (20, 23), dtype=BF16),
    "80, factor 2": Case(80, Run(128, 2, halves=False), (37, 30), (2, 2), tokens=333, programs=3),
    "160": Case(160, Run(64, 4), (15, 17), heads=2),
    "160, bf16, not ahead": Case(160, Run(64, 2, ahead=False), (15, 17), (1, 2), dtype=BF16, tokens=200, scale=-0.1),
}


@pytest.mark.usefixtures("bf16_in_the_interpreter")
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_torch(name, monkeypatch):
    kernel = simulated(monkeypatch)
    assert error(CASES[name], kernel, seed=1) < BOUND


# The module, then what is replaced there and by what.
STEP, HOPPER = SOURCES
STEP_WAITS = "    mbarrier.wait(full.index(slot), (unit & PLAN.stages) // PLAN.stages)\n    if PLAN.ahead"
RELEASES = "    mbarrier.arrive(empty.index(slot))  # by one"
MUTANTS = {
    "a consumer's parity turned": (STEP, STEP_WAITS, STEP_WAITS.replace("PLAN.stages)\n", "PLAN.stages ^ 1)\n")),
    "the producer's parity turned": (HOPPER, "((unit & STAGES) // STAGES) ^ 1)", "(unit & STAGES) // STAGES)"),
    "a consumer does not wait for a unit": (STEP, STEP_WAITS, "    if PLAN.ahead"),
    "the producer does not wait": (HOPPER, "mbarrier.wait(empty.index(slot), ((unit & STAGES) // STAGES) ^ 1)", "pass"),
    "outputs are not waited for": (STEP, "warpgroup_mma_wait(0, deps=[acc_a])", "acc_a"),
    "one group too many in flight": (STEP, "warpgroup_mma_wait((2 if", "warpgroup_mma_wait(1 + (2 if"),
    "a slot given back before its values are read": (
        STEP,
        RELEASES,
        "    #",
        "    if PLAN.halves:\n        H: gl",
        RELEASES + "\n    if PLAN.halves:\n        H: gl",
    ),
    "the first unit is not given back": (HOPPER, "        mbarrier.arrive(empty.index(slot))\n", ""),
    "one arrival frees a slot": (HOPPER, "count=CONSUMERS)", "count=1)"),
    "a block has a unit less": (HOPPER, "range(tiles + 1)", "range(tiles)"),
    "too few bytes expected": (HOPPER, "(bar, K_BYTES + V_BYTES)", "(bar, K_BYTES)"),
    "values of the next tile": (HOPPER, "[row - PLAN.block_n, 0]", "[row, 0]"),
    "the mask left out": (HOPPER, "True, not PLAN.ones)", "True, False)"),
    "an odd tile left out": (HOPPER, "if tiles % 2 == 0:", "if tiles % 2 == 2:"),
    "older outputs not rescaled": (STEP, "    acc_a = _rescale(acc_a, alpha)\n", ""),
    "the left half's values twice": (STEP, "v_a.slice(H, H)", "v_a.slice(0, H)"),
}
# Even and odd numbers of tiles, more units than slots, two blocks and more of one program, with and without ones.
SMALL = [
    Case(40, Run(64, 2), (12, 21), tokens=150, heads=2),
    Case(64, Run(64, 2), (9, 37), tokens=150, heads=2),
    Case(40, Run(64, 4, 3), (19, 20), tokens=200),
]


def mutation(name: str) -> dict[str, list[tuple[str, str]]]:
    module, *texts = MUTANTS[name]
    return {module: list(zip(texts[::2], texts[1::2], strict=True))}


def caught(kernel) -> str | None:
    for seed in (1, 2, 3):
        for case in SMALL:
            try:
                if not error(case, kernel, seed) < BOUND:
                    return "a wrong result"
            except MachineError as fault:
                return str(fault)
    return None


def test_the_small_cases_find_nothing_in_the_kernel_as_it_is(monkeypatch):
    assert caught(simulated(monkeypatch)) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_bug_is_found(name, monkeypatch):
    assert caught(simulated(monkeypatch, mutation(name))) is not None


def test_the_same_seed_meets_the_same_fault(monkeypatch):
    kernels = [simulated(monkeypatch, mutation("the producer does not wait")) for _ in range(2)]
    first, second = map(caught, kernels)
    assert first == second


def test_no_stand_in_is_left_behind():
    before = dict(sys.modules)
    simulator.kernel("attention_kernel", SOURCES)
    assert {name for name, module in sys.modules.items() if before.get(name) is not module} == set()


def test_an_edit_of_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"hopper\.step must have 'nothing of the kind'"):
        simulator.kernel("attention_kernel", SOURCES, {STEP: [("nothing of the kind", "")]})
