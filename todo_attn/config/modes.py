"""How many coarse tokens there are, and how they are taken; without torch, for configurations and ops alike."""

from typing import Literal, TypeAlias, get_args

from .checks import ArgumentError

Mode: TypeAlias = Literal["nearest", "nearest-exact", "mean"]
MODES: tuple[Mode, ...] = get_args(Mode)


def check_mode(value: object) -> str:
    """``value``, which must be one of :data:`MODES`."""
    if not isinstance(value, str) or value not in MODES:
        raise ArgumentError("mode", f"must be one of {', '.join(map(repr, MODES))}, got {value!r}")
    return value


def coarse_grid(grid: tuple[int, int], factor: tuple[float, float]) -> tuple[int, int]:
    """Height and width in coarse tokens: those of ``grid`` by those of ``factor``, rounded down."""
    (gh, gw), (fh, fw) = grid, factor
    # By integers as far as possible, which tracers follow best.
    return int(gh / fh) if isinstance(fh, float) else gh // fh, int(gw / fw) if isinstance(fw, float) else gw // fw
