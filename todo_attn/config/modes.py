"""The ways to take coarse tokens; without torch, for configurations and ops alike."""

from typing import Literal, TypeAlias, get_args

Mode: TypeAlias = Literal["nearest", "nearest-exact", "mean"]
MODES: tuple[Mode, ...] = get_args(Mode)
