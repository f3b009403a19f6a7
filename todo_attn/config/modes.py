"""How coarse tokens may be taken. Here, without torch, for the configuration and for the ops alike."""

from typing import Literal, TypeAlias, get_args

Mode: TypeAlias = Literal["nearest", "nearest-exact", "mean"]
MODES: tuple[Mode, ...] = get_args(Mode)
