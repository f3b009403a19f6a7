"""How many coarse tokens there are, and how they are taken; without torch, for configurations and ops alike."""

from typing import Literal, TypeAlias, get_args

from .checks import ArgumentError

Mode: TypeAlias = Literal["nearest", "nearest-exact", "mean"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Names in the published code: one that means the same, and those that mean the same in some cases only.
PublishedMode: TypeAlias = Literal["area"]
_SAME: dict[str, Mode] = {"area": "mean"}
_SIMILAR = {
    "avg_pool": "'mean' is the same if the factor divides both sides of the grid",
    "bilinear": "if the factor divides both sides of the grid, 'mean' is the same at 2, 'nearest-exact' if it is odd",
    "bicubic": "'nearest-exact' is the same if the factor is odd and divides both sides of the grid",
}


def check_mode(value: object) -> Mode:
    """The one of :data:`MODES` that ``value`` names; "area" is the published name of "mean"."""
    for mode in MODES:
        if value == mode:
            return mode
    if isinstance(value, str) and value in _SAME:
        return _SAME[value]
    hint = f" ({_SIMILAR[value]})" if isinstance(value, str) and value in _SIMILAR else ""
    raise ArgumentError("mode", f"must be one of {', '.join(map(repr, MODES))}, got {value!r}{hint}")


def coarse_grid(grid: tuple[int, int], factor: tuple[float, float]) -> tuple[int, int]:
    """Height and width in coarse tokens: those of ``grid`` by those of ``factor``, rounded down."""
    (gh, gw), (fh, fw) = grid, factor
    # By integers as far as possible, which tracers follow best.
    return int(gh / fh) if isinstance(fh, float) else gh // fh, int(gw / fw) if isinstance(fw, float) else gw // fw
