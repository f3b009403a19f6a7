"""Which methods, options and sizes the UNet benchmark runs, all checked before any weight is drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import typer

from benchmarks.options import check_among, naming_options
from todo_attn.config.dato import DaToConfig
from todo_attn.config.schedule import names as published
from todo_attn.models.architectures import PIXELS_PER_LATENT
from todo_attn.options.methods import KINDS, MethodOptions

DENSE = "dense"
CACHED = ("dato", "todo+dato", "deepcache")  # a call reuses results of an earlier one
PEERS = ("tome", "deepcache")  # packages of others, which may be missing
_DEFAULTS = MethodOptions()
Size = tuple[int, int]  # height, width in pixels


class Contender(NamedTuple):
    """A method, one of :data:`todo_attn.options.methods.KINDS`, with its options and its name in the rows."""

    name: str
    kind: str
    options: MethodOptions


@dataclass(frozen=True)
class Choice:
    """The methods, and values of their options; each value is another contender.

    Args:
        kinds: of :data:`todo_attn.options.methods.KINDS`.
        caps, factors: ToDo's; its defaults if both are empty.
        schedules: DaTo's, names or JSON files.
        prune_ratio: DaTo's; None is the schedule's own, or 0.4.
        intervals: DeepCache's.
    """

    kinds: Sequence[str]
    caps: Sequence[int] = ()
    factors: Sequence[str] = ()
    schedules: Sequence[str] = ("coco",)
    prune_ratio: float | None = None
    intervals: Sequence[int] = (3, 5)

    def contenders(self) -> list[Contender]:
        """All methods but dense.

        Raises:
            typer.BadParameter: a value does not fit; the message names its option.
        """
        with naming_options():
            todos, datos = self._todos(), self._datos()
            of_kind = {
                "todo": todos,
                "tome": {"tome": _DEFAULTS},
                "dato": datos,
                "todo+dato": {
                    f"{todo}+{dato}": replace(options, factor=coarse.factor, max_kv_tokens=coarse.max_kv_tokens)
                    for todo, coarse in todos.items()
                    for dato, options in datos.items()
                },
                "deepcache": {f"deepcache-{i}": MethodOptions(cache_interval=i) for i in self.intervals},
            }
        return [
            Contender(name, kind, options)
            for kind, named in of_kind.items()
            if kind in self.kinds
            for name, options in named.items()
        ]

    def _todos(self) -> dict[str, MethodOptions]:
        default = _DEFAULTS.max_kv_tokens
        named = {"todo" if cap == default else f"todo-kv{cap}": MethodOptions(max_kv_tokens=cap) for cap in self.caps}
        named |= {f"todo-{factor}": MethodOptions(factor=factor) for factor in self.factors}
        return named or {"todo": _DEFAULTS}

    def _datos(self) -> dict[str, MethodOptions]:
        default = self.prune_ratio in (None, DaToConfig.prune_ratio)
        ratio = "" if default else f"-{self.prune_ratio:g}"
        return {
            f"dato-{schedule if schedule in published() else Path(schedule).stem}{ratio}": MethodOptions(
                schedule=schedule, prune_ratio=self.prune_ratio
            )
            for schedule in self.schedules
        }


def plan(device: torch.device, calls: int, sizes: Sequence[Size], choice: Choice) -> list[tuple[Size, list[Contender]]]:
    """The contenders at each size; by default, sizes that show differences in a reasonable time."""
    if not sizes and calls == 1 and device.type == "cpu":
        if not (choice.caps or choice.factors):  # the cap of 1024 keys at 1024 px only
            both = replace(choice, caps=(_DEFAULTS.max_kv_tokens, 1024))
            return [((1024, 1024), both.contenders()), ((2048, 2048), choice.contenders())]
        sides: Sequence[int] = (1024,)
    elif device.type == "cpu":
        sides = (512,)
    else:
        sides = (1024, 1536, 2048) if calls == 1 else (512, 1024, 2048)
    return [(size, choice.contenders()) for size in sizes or [(side, side) for side in sides]]


def calls_of(calls: int | None, kinds: Collection[str], device: torch.device) -> int:
    """The number of calls in a run: as given, or by the methods and the device.

    Raises:
        typer.BadParameter: too few for a method that reuses results of an earlier call.
    """
    cached = [kind for kind in CACHED if kind in kinds]
    if calls is None:
        return 1 if not cached else 10 if device.type == "cpu" else 50
    if calls < 2 and cached:
        raise typer.BadParameter(f"--calls must be at least 2 for {', '.join(cached)}, got {calls}")
    return calls


def kinds_of(methods: str) -> list[str]:
    """The methods in ``--methods``, always with dense first.

    Raises:
        typer.BadParameter: one is unknown, or there is only dense.
    """
    given = [text.strip() for text in methods.split(",")]
    check_among("methods", given, KINDS)
    kinds = [DENSE, *(kind for kind in KINDS if kind in given and kind != DENSE)]
    if kinds == [DENSE]:
        others = ", ".join(kind for kind in KINDS if kind != DENSE)
        raise typer.BadParameter(f"--methods must have one of {others}: nothing is timed without its peer")
    return kinds


def parse_size(text: str) -> Size:
    """ "1024" or "1280x720" (width x height) as (height, width).

    Raises:
        typer.BadParameter: anything else.
    """
    width, _, height = text.partition("x")
    height = height or width
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"--size must be as 1024 or 1280x720, got {text!r}")
    return int(height), int(width)


def check_sizes(sizes: Sequence[Size]) -> None:
    """Refuse sizes that are not whole latents.

    Raises:
        typer.BadParameter: with the wrong value.
    """
    for side in (side for size in sizes for side in size):
        if side < 1 or side % PIXELS_PER_LATENT:
            raise typer.BadParameter(f"sizes must be multiples of {PIXELS_PER_LATENT} pixels, got {side}")
