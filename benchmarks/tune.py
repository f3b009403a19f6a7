"""The attention kernel in other configurations against the shipped ones, at the shapes that have a target.

python -m benchmarks.tune                                every head dim
python -m benchmarks.tune --head-dim 40 --head-dim 64    some
python -m benchmarks.tune --minutes 4 --out rows.jsonl   starts no head dim after four minutes

Compiled code shows what a loop costs, but only a GPU shows how well its parts overlap. Each row is another
configuration (``contender``) against the shipped one (``baseline``). Both are checked first and timed in one run, with
the packing of keys and values. todo_attn/bench/candidates.py has what is tried; docs/kernel-notes.md says why. Exits
with 1 if the result of the shipped kernel was wrong. ``todo-attn tune`` times the same, and keeps the best.

All of it takes less than 12 minutes. First every kernel is compiled, up to eight at a time: 27 programs of the
attention, 4 to 6 s each, and those that pack. Each of the four head dims is then drawn, has its oracle, and is timed
for 6 s: about 25 s.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import RESULTS
from benchmarks import kernels as benchmark
from benchmarks.options import check_among, checked_out, chosen_device
from todo_attn import machine
from todo_attn.bench import attention, candidates
from todo_attn.bench.cases import Case
from todo_attn.bench.compiling import Launch, compile_all
from todo_attn.bench.kernels import MakeTrial
from todo_attn.bench.trial import Trial
from todo_attn.kernels import configs

_FINEST = Case("attention", "sd15", 2048, 2048, 1, 2, "fp16")
CASES = {
    40: _FINEST,
    64: replace(_FINEST, model="sdxl", level=2),
    80: replace(_FINEST, level=2),
    160: replace(_FINEST, level=4),
}
_HOPPER = (9, 0)  # whose configurations are tried if there is no GPU


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _HOPPER


def shipped(case: Case, device: torch.device) -> Launch:
    """The kernel as it is shipped, whatever was tuned on this machine."""
    return Launch(case, configs.attention_config(_capability(device), case.head_dim, half=case.dtype != "fp32"))


def variants(case: Case, device: torch.device) -> dict[str, Launch]:
    """The other ways to launch the kernel at the head dim of ``case``, by name."""
    capability = _capability(device)
    _, *others = candidates.of_attention(capability, case.head_dim)
    calls = {str(config): Launch(case, config) for config in others}
    usual = configs.tiles(capability, case.head_dim)
    if usual.v != usual.k:  # P V as one product of 64 columns, or as 32 + 16
        calls["P V as Q K"] = replace(shipped(case, device), tile=replace(usual, v=usual.k))
    return calls


def trial(case: Case, device: torch.device, without: Container[Launch] = ()) -> Trial:
    """Every variant, except those in ``without``, against the shipped kernel.

    Raises:
        RuntimeError: there is no other.
    """
    others = {name: launch for name, launch in variants(case, device).items() if launch not in without}
    if not others:
        raise RuntimeError("no other configuration compiles for this device")
    return attention.trial(case, device, {"todo": shipped(case, device), **others})


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
    failed: set[Launch] = set()

    def compile_them(cases: Sequence[Case], device: torch.device) -> None:
        named = {
            launch: f"{case.head_dim}, {name}"
            for case in cases
            for name, launch in {"shipped": shipped(case, device), **variants(case, device)}.items()
        }
        for launch, error in zip(named, compile_all(_capability(device), list(named)), strict=True):
            if error:
                typer.echo(f"{named[launch]}: not timed, {error}", err=True)
                failed.add(launch)

    run(partial(trial, without=failed), head_dim, size, device, minutes, out, as_json, compile_them)


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
