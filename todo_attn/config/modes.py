"""The ways to take coarse tokens; without torch, for configurations and ops alike."""

from typing import Literal, TypeAlias, get_args

from .checks import ArgumentError

Mode: TypeAlias = Literal["nearest", "nearest-exact", "mean"]
MODES: tuple[Mode, ...] = get_args(Mode)


def check_mode(value: object) -> str:
    """``value``, which must be one of :data:`MODES`."""
    if not isinstance(value, str) or value not in MODES:
        raise ArgumentError("mode", f"must be one of {', '.join(map(repr, MODES))}, got {value!r}")
    return value
