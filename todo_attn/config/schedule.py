"""Cache schedules of DaTo: which calls of the UNet are computed in full, which in part, and which not at all.

A schedule is a string of digits, one for each call of the UNet after the first, which is always full: "2" full, "1"
shallow (the last resnet and attention of the UNet, the rest from the cache), "0" the previous output again. Files are
plain JSON, and every value is checked; the published schedules are in ``published.json``, and in ``found/`` those that
``todo-attn search`` found on the pipeline that comes with the package. No torch, no diffusers.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from .checks import ArgumentError, arguments_of, check_at_least, check_ratios, checked_ratio, is_int, is_number
from .todo import ToDoConfig

FULL, SHALLOW, REUSE = "2", "1", "0"
KINDS = {FULL: "full", SHALLOW: "shallow", REUSE: "reuse"}  # in words
VERSION = 1
FEWEST_CALLS = 12  # of the UNet; with fewer, a schedule hardly pays
_PUBLISHED, _FOUND = Path(__file__).parent / "published.json", Path(__file__).parent / "found"
_NUMBERED = re.compile(r"run\d+-\d+")


def check_digits(value: object, name: str = "digits") -> str:
    """Return ``value`` if it is a schedule's digits.

    Raises:
        ArgumentError: of the argument ``name``: it is no string, is empty, or has a character other than "0", "1" and
            "2".
    """
    if not isinstance(value, str):
        raise ArgumentError(name, f"must be a string of the digits 0, 1 and 2, got {value!r}")
    if not value:
        raise ArgumentError(name, "must have a digit for each call after the first, got an empty string")
    for position, digit in enumerate(value):
        if digit not in KINDS:
            raise ArgumentError(name, f"must be of the digits 0, 1 and 2, got {digit!r} at position {position}")
    return value


@dataclass(frozen=True)
class Schedule:
    """A cache schedule and where it comes from.

    Args:
        digits: one per call of the UNet after the first.
        name: short; empty if it has none.
        source: who made it and for what.
        steps: of the scheduler that it was made for, if known.
        scheduler: its name, such as "PNDM", which calls the UNet once more than it has steps.
        published_speedup: operations of the dense run over those of the code it was published with, for Stable
            Diffusion 1.5 at 512 x 512 with nothing pruned. That code's shallow calls compute the middle block too and
            throw it away; what this package's calls cost is counted by :mod:`todo_attn.predict.count`.
        prune_ratio, todo: of the :class:`~todo_attn.DaToConfig` that the schedule is a part of; None leaves them to
            whoever uses it.
        provenance: how it was found, as plain data.

    Raises:
        ArgumentError: an argument that does not fit.
    """

    digits: str
    name: str = ""
    source: str = ""
    steps: int | None = None
    scheduler: str | None = None
    published_speedup: float | None = None
    prune_ratio: float | Sequence[float] | None = None
    todo: ToDoConfig | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_digits(self.digits)
        for key in ("name", "source"):
            if not isinstance(getattr(self, key), str):
                raise ArgumentError(key, f"must be a string, got {getattr(self, key)!r}")
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise ArgumentError("scheduler", f"must be a string or None, got {self.scheduler!r}")
        if self.steps is not None and not (is_int(self.steps) and self.steps >= 1):
            raise ArgumentError("steps", f"must be an integer of at least 1 or None, got {self.steps!r}")
        if self.published_speedup is not None and not (
            is_number(self.published_speedup) and self.published_speedup > 0
        ):
            raise ArgumentError(
                "published_speedup", f"must be a number above 0 or None, got {self.published_speedup!r}"
            )
        if self.prune_ratio is not None:
            ratio = checked_ratio(self.prune_ratio)
            check_ratios(ratio, self.digits, "digits")
            object.__setattr__(self, "prune_ratio", ratio)
        if self.todo is not None and not isinstance(self.todo, ToDoConfig):
            raise ArgumentError("todo", f"must be a ToDoConfig or None, got {self.todo!r}")
        if not isinstance(self.provenance, Mapping):
            raise ArgumentError("provenance", f"must be a mapping, got {self.provenance!r}")

    @property
    def calls(self) -> int:
        """How many calls of the UNet it is for, the first one included."""
        return len(self.digits) + 1

    @property
    def full(self) -> int:
        """Full calls, the first one included."""
        return self.digits.count(FULL) + 1

    @property
    def shallow(self) -> int:
        """Shallow calls."""
        return self.digits.count(SHALLOW)

    @property
    def reuse(self) -> int:
        """Calls that return the previous output."""
        return self.digits.count(REUSE)

    @property
    def made_for(self) -> str:
        """ " calls, 50 steps of PNDM", as far as it is known."""
        steps = "" if self.steps is None else f", {self.steps} steps"
        return f" calls{steps}" + ("" if self.scheduler is None else f" of {self.scheduler}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``json.dumps`` takes. Fields that are None or empty are left out."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.prune_ratio, tuple):
            data["prune_ratio"] = list(self.prune_ratio)
        if self.todo is not None:
            data["todo"] = self.todo.to_dict()
        return {key: value for key, value in data.items() if value is not None and value not in ("", {})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """The schedule that :meth:`to_dict` gave.

        Raises:
            ArgumentError: ``data`` is not a mapping, or has no digits, an unknown key or a value that does not fit.
        """
        arguments = arguments_of(cls, data)
        if "digits" not in arguments:
            raise ArgumentError("data", f"must have digits, got only {list(data)}")
        if isinstance(arguments.get("todo"), Mapping):
            arguments["todo"] = ToDoConfig.from_dict(arguments["todo"])
        return cls(**arguments)


def dumps(schedule: Schedule) -> str:
    """A file's text, as :func:`loads` reads it."""
    return json.dumps({"version": VERSION, **schedule.to_dict()}, indent=2) + "\n"


def loads(text: str) -> Schedule:
    """The schedule in the text of a JSON file.

    Raises:
        ValueError: ``text`` is not JSON, of another version, or no schedule: what was wrong.
    """
    return Schedule.from_dict(_versioned(text))


def save(schedule: Schedule, path: str | os.PathLike[str]) -> None:
    """Write ``schedule`` to ``path`` as JSON.

    Raises:
        ArgumentError: ``schedule`` is not a :class:`Schedule`.
    """
    if not isinstance(schedule, Schedule):
        raise ArgumentError("schedule", f"must be a Schedule, got {schedule!r}")
    Path(path).write_text(dumps(schedule), encoding="utf-8")


def load(source: str | os.PathLike[str]) -> Schedule:
    """A schedule of the package by its name, or the schedule in a JSON file.

    Args:
        source: a name in :func:`names`, which comes first, or else a path.

    Raises:
        ArgumentError: ``source`` is neither a name nor a path.
        ValueError: the file cannot be read or is no schedule: its path and what is wrong.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentError("schedule", f"must be a name or a file, got {source!r}")
    if isinstance(source, str) and source in names():
        return _shipped()[source]
    path = Path(source)
    if isinstance(source, str) and not path.exists():
        near = difflib.get_close_matches(source, names(), n=3) or names()[:4]
        raise ArgumentError(
            "schedule", f"must be a file or a name such as {', '.join(map(repr, near))}, got {source!r}"
        )
    try:
        return loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a schedule: {error}") from error


def names() -> list[str]:
    """The names of the schedules of the package: the published ones, those without a number first; those found here."""
    return list(_shipped())


def named() -> list[str]:
    """Those of :func:`names` with a name such as "coco", not the number of a search's result, such as "run0-02"."""
    return [name for name in names() if not _NUMBERED.fullmatch(name)]


def resample(digits: str, length: int) -> str:
    """``digits`` for another number of calls: the same kinds at about the same moments, in the same shares.

    Each new call covers a stretch of old calls, and adds that stretch to what is due of each kind. It is full if at
    least half a full call is due; otherwise shallow or reuse, whichever has more due (shallow on a tie). So:

    - the same length gives the same digits;
    - at every moment of the run, the full calls so far differ by at most half a call from the old schedule's share, and
      the shallow and reuse calls by at most 1.25, so that neither the cost nor the moments drift;
    - while the old schedule lacks a kind, so does the new one, up to those 1.25 calls.

    Args:
        digits: a schedule.
        length: how many digits, 0 or more.

    Raises:
        ArgumentError: ``digits`` is no schedule, or ``length`` is not an integer of at least 0.
    """
    check_digits(digits)
    check_at_least(0, "length", length)
    # Counted in units of 1 / len(digits) of a call, so that all numbers are integers: an old call is `length` units, a
    # new one len(digits).
    unit, due, resampled = len(digits), dict.fromkeys(KINDS, 0), []
    for start in range(0, length * unit, unit):
        stop = start + unit
        for old in range(start // length, -(-stop // length)):
            due[digits[old]] += min(stop, (old + 1) * length) - max(start, old * length)
        kind = FULL if 2 * due[FULL] >= unit else max((SHALLOW, REUSE), key=due.__getitem__)
        due[kind] -= unit
        resampled.append(kind)
    return "".join(resampled)


@cache
def _shipped() -> dict[str, Schedule]:
    published = _versioned(_PUBLISHED.read_text(encoding="utf-8"))["schedules"]
    found = (loads(file.read_text(encoding="utf-8")) for file in sorted(_FOUND.glob("*.json")))
    return _by_name([*map(Schedule.from_dict, published), *found])


def _by_name(schedules: Iterable[Schedule]) -> dict[str, Schedule]:
    found: dict[str, Schedule] = {}
    for schedule in schedules:
        if not schedule.name or schedule.name in found:
            raise ArgumentError("name", f"must be there and be the only one, got {schedule.name!r}")
        found[schedule.name] = schedule
    return found


def _versioned(text: str) -> dict[str, Any]:
    """The object in ``text`` without its version."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it must be JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"it must be a JSON object, got {type(data).__name__}")
    if data.get("version") != VERSION or isinstance(data["version"], bool):
        raise ArgumentError("version", f"must be {VERSION}, got {data.get('version')!r}")
    del data["version"]
    return data
