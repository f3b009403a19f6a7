"""What ToDo is asked to do, as validated plain data. No diffusers, no torch: it reads and writes JSON as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Literal, NoReturn, TypeAlias

from .checks import ArgumentError, arguments_of, check_at_least, is_int, is_number
from .modes import Mode, PublishedMode, check_mode

FINEST = "finest"
# The timesteps a diffusers model is trained on; a range that holds them all needs no timestep.
_ALL_TIMESTEPS = (0, 1000)
_ALL_STEPS = (0.0, 1.0)
# Levels are int or "finest". But a variable that is a dict[int, int] is no Mapping[int | str, int] to a type checker.
Factor: TypeAlias = Literal["auto"] | float | Mapping[Any, float]


class _Factors(dict[int | str, float]):
    """The factor by level: an immutable dict, which can be hashed."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a ToDoConfig cannot be changed, nor its factor: make another")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:  # pickle and copy would set item by item
        return type(self), (dict(self),)


@dataclass(frozen=True)
class ToDoConfig:
    """Token Downsampling (ToDo, arXiv 2402.13573): which self-attentions read a coarser grid of keys, and how coarse.

    A *level* is named by the side, in latent pixels, that one token stands for: 1, 2, 4, 8, or "finest" for the
    model's finest level with self-attention (Stable Diffusion 1.5 has levels 1, 2, 4, 8; SDXL has 2 and 4).

    Args:
        factor: tokens per coarse token along each axis, at least 1, which is dense. It may be a fraction: a side of the
            coarse grid is a side of the grid divided by the factor, rounded down. A number is for every level;
            ``{level: number}`` for those levels, the others dense; "auto" takes, at every level and size, the smallest
            integer with at most ``max_kv_tokens`` coarse tokens. A factor beyond the grid is cut down to the grid's
            side; one that reaches it leaves a single row or column of keys, and the first call warns. All other
            arguments are keyword-only.
        max_kv_tokens: the most keys that "auto" leaves.
        mode: how coarse tokens are taken, "nearest", "nearest-exact" or "mean": see
            :func:`todo_attn.ops.downsample_tokens`. "area", the published name of "mean", becomes "mean".
        timestep_range: (low, high), in timesteps of the model (0 to 1000, not fractions). ToDo acts when
            low <= t <= high, for every sample of the batch. A range that holds 0 to 1000 acts always and never reads
            the timestep; a narrower one waits for the device once per call of the model if the timestep is a device
            tensor. ``torch.compile`` then makes two graphs of the model, and with ``fullgraph`` it must be given the
            model itself. ``torch.jit.trace`` and ``torch.export`` cannot record it, and one model cannot follow it in
            several threads at once.
        steps: (low, high), a share of the calls of the model in a run, 0 <= low < high <= 1. ToDo acts in call i of n,
            counted from 0, if low <= i / n < high, and if the timestep is in ``timestep_range``: (0.0, 0.7) are the
            first 70 %. The n calls are those that run, after ``strength`` and ``denoising_end``; a second-order
            scheduler makes two calls a step. No timestep is read: the timesteps must be elements of one tensor, such as
            ``scheduler.timesteps``. With any other timestep, such as a number, ToDo is off and a warning is logged
            once. The limits of a narrower ``timestep_range`` with tracers and threads hold here too.

    Raises:
        ArgumentError: an argument that does not fit.
    """

    factor: Factor = "auto"
    _: KW_ONLY
    max_kv_tokens: int = 4096
    mode: Mode | PublishedMode = "nearest"
    timestep_range: tuple[float, float] = _ALL_TIMESTEPS
    steps: tuple[float, float] = _ALL_STEPS

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", _checked_factor(self.factor))
        check_at_least(1, "max_kv_tokens", self.max_kv_tokens)
        object.__setattr__(self, "mode", check_mode(self.mode))
        object.__setattr__(self, "timestep_range", _checked_range(self.timestep_range))
        object.__setattr__(self, "steps", _checked_steps(self.steps))

    @classmethod
    def paper(cls, height: int, width: int) -> ToDoConfig:
        """The published settings for an image of ``height`` x ``width`` pixels.

        At the finest level sqrt(height * width) / 512, rounded, halves up (2 at 1024 x 1024, 3 at 1280 x 1280, 4 at
        2048 x 2048), and at least 1; all other levels dense.

        Raises:
            ArgumentError: ``height`` or ``width`` is not a positive integer.
        """
        for name, value in (("height", height), ("width", width)):
            if not is_int(value) or value < 1:
                raise ArgumentError(name, f"must be a positive integer, in pixels, got {value!r}")
        rounded = (math.isqrt(4 * height * width) + 512) // 1024  # floor(sqrt(height * width) / 512 + 1 / 2), exactly
        return cls(factor={FINEST: max(1, rounded)})

    @property
    def every_timestep(self) -> bool:
        """Whether ToDo acts at every timestep, so that none has to be read."""
        return self.timestep_range[0] <= _ALL_TIMESTEPS[0] and self.timestep_range[1] >= _ALL_TIMESTEPS[1]

    @property
    def every_step(self) -> bool:
        """Whether ToDo acts in all of a run, so that no place in it has to be known."""
        return self.steps == _ALL_STEPS

    def factor_for(
        self, grid: tuple[int, int], level: int | None = None, *, finest: bool = False
    ) -> tuple[float, float]:
        """The factor (fh, fw) along each axis for a self-attention on ``grid`` = (height, width) tokens.

        Args:
            grid: height and width in tokens, at least 1 each.
            level: the level of that self-attention; None if it is unknown (a ``{level: number}`` factor then acts
                only through "finest").
            finest: whether that is the model's finest level with self-attention.

        Returns:
            At least (1, 1) and at most ``grid``; (1, 1) is dense.

        Raises:
            ArgumentError: ``grid`` is not a pair of at least (1, 1).
        """
        if not (isinstance(grid, Sequence) and len(grid) == 2 and min(grid) >= 1):
            raise ArgumentError("grid", f"must be a pair (height, width) of at least 1 each, got {grid!r}")
        height, width = grid
        if self.factor == "auto":
            factor: float = 1
            while (height // min(factor, height)) * (width // min(factor, width)) > self.max_kv_tokens:
                factor += 1
        elif isinstance(self.factor, _Factors):
            default = self.factor.get(FINEST, 1) if finest else 1
            factor = default if level is None else self.factor.get(level, default)
        else:
            assert isinstance(self.factor, (int, float))
            factor = self.factor
        return min(factor, height), min(factor, width)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``json.dumps`` takes; :meth:`from_dict` reads it back, JSON's string keys included."""
        factor = dict(self.factor) if isinstance(self.factor, dict) else self.factor
        data = asdict(self) | {"factor": factor, "timestep_range": list(self.timestep_range), "steps": list(self.steps)}
        if self.every_step:  # results that were written before there was a choice stay the same
            del data["steps"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ToDoConfig:
        """The configuration that :meth:`to_dict` gave, also after a round trip through JSON.

        Raises:
            ArgumentError: ``data`` is not a mapping, or has an unknown key or a value that does not fit.
        """
        arguments = arguments_of(cls, data)
        factor = arguments.get("factor")
        if isinstance(factor, Mapping):  # JSON knows only string keys
            arguments["factor"] = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in factor.items()}
        return cls(**arguments)


def _checked_factor(factor: object) -> Literal["auto"] | float | _Factors:
    """``factor``, a whole number as an int; of a mapping a frozen copy, so that no later change passes unchecked."""
    if isinstance(factor, Mapping):
        for level, value in factor.items():
            if level != FINEST and not (is_int(level) and level >= 1):
                raise ArgumentError(
                    "factor", f"must map levels, integers of at least 1 or {FINEST!r}, got level {level!r}"
                )
            if not is_number(value) or value < 1:
                raise ArgumentError("factor", f"of level {level!r} must be a number of at least 1, got {value!r}")
        return _Factors({level: _whole(value) for level, value in factor.items()})
    if isinstance(factor, str) and factor == "auto":
        return "auto"
    if isinstance(factor, (int, float)) and is_number(factor) and factor >= 1:
        return _whole(factor)
    raise ArgumentError("factor", f"must be 'auto', a number of at least 1 or {{level: number}}, got {factor!r}")


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _checked_range(value: object) -> tuple[float, float]:
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))):
        raise ArgumentError("timestep_range", f"must be a pair of finite numbers (low, high), got {value!r}")
    low, high = value
    if low > high:
        raise ArgumentError("timestep_range", f"must have low <= high, got {(low, high)!r}")
    first, last = _ALL_TIMESTEPS
    if high < first or low > last:
        raise ArgumentError("timestep_range", f"must reach into the timesteps {first} to {last}, got {(low, high)!r}")
    if low >= 0 and high <= 1:
        raise ArgumentError(
            "timestep_range",
            f"must be in timesteps of the model, {first} to {last}, and not in fractions, got {(low, high)!r}",
        )
    return low, high


def _checked_steps(value: object) -> tuple[float, float]:
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))):
        raise ArgumentError("steps", f"must be a pair of numbers (low, high), got {value!r}")
    low, high = value
    if not 0 <= low < high <= 1:
        raise ArgumentError("steps", f"must be a share of the run, 0 <= low < high <= 1, got {(low, high)!r}")
    return low, high


def in_steps(steps: tuple[float, float], call: int, calls: int) -> bool:
    """Whether ``call``, counted from 0, of ``calls`` is in the share ``steps`` of a run."""
    low, high = steps
    return low <= call / calls < high
