"""The error about an argument, and checks of plain data from arguments and from JSON."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any


class ArgumentError(ValueError):
    """An argument that cannot be used. ``str()`` is "max_kv_tokens must be an integer of at least 1, got 0".

    Attributes:
        argument: its name, "max_kv_tokens".
        problem: what it must be and what it was, "must be an integer of at least 1, got 0".
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument, self.problem = argument, problem

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


def is_int(x: object) -> bool:
    """Whether ``x`` is an integer, and not a bool."""
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x: object) -> bool:
    """Whether ``x`` is a finite number within the range of a float, and not a bool."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def check_at_least(least: int, argument: str, value: object) -> None:
    """Refuse a ``value`` that is not an integer of at least ``least``."""
    if not isinstance(value, int) or not is_int(value) or value < least:
        raise ArgumentError(argument, f"must be an integer of at least {least}, got {value!r}")


def checked_ratio(value: object) -> float | tuple[float, ...]:
    """``value`` as a prune ratio, or as one for each call."""

    def checked(x: object) -> float:
        if not isinstance(x, (int, float)) or not is_number(x) or not 0 <= x < 1:
            raise ArgumentError(
                "prune_ratio", f"must be at least 0 and below 1, or a sequence of such numbers, got {x!r}"
            )
        return float(x)

    if not isinstance(value, Sequence) or isinstance(value, str):
        return checked(value)
    if not value:
        raise ArgumentError("prune_ratio", "must have a number for each call, got none")
    return tuple(map(checked, value))


def check_ratios(ratio: float | tuple[float, ...] | None, digits: str, name: str) -> None:
    """Refuse ratios per call that are not as many as the calls of ``digits``, which are called ``name``."""
    if isinstance(ratio, tuple) and len(ratio) != len(digits) + 1:
        raise ArgumentError(
            "prune_ratio",
            f"must have a ratio for each of the {len(digits) + 1} calls of {name} (its digits and the first call), "
            f"got {len(ratio)}",
        )


def arguments_of(cls: type, data: object) -> dict[str, Any]:
    """``data`` as arguments of the dataclass ``cls``.

    Raises:
        ArgumentError: it is not a mapping, or has an unknown key.
    """
    if not isinstance(data, Mapping):
        raise ArgumentError("data", f"must be a mapping of {cls.__name__}'s arguments, got {type(data).__name__}")
    known = cls.__dataclass_fields__  # type: ignore[attr-defined]
    unknown = [key for key in data if key not in known]
    if unknown:
        raise ArgumentError("data", f"must have only the keys {', '.join(known)}, got {unknown}")
    return dict(data)
