"""The methods of a comparison and their options, as validated plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

from ..config.checks import ArgumentError
from ..config.dato import DaToConfig
from ..config.modes import Mode
from ..config.schedule import names as schedule_names
from ..config.todo import FINEST, Factor, ToDoConfig

# Each kind of method, and what its variant (after a colon) sets; None if it has no variants.
KINDS = {
    "dense": None,
    "todo": "FACTOR",
    "tome": "RATIO",
    "dato": "SCHEDULE",
    "todo+dato": "SCHEDULE",
    "deepcache": "INTERVAL",
}
METHODS_TEXT = ", ".join(kind if variant is None else f"{kind}, {kind}:{variant}" for kind, variant in KINDS.items())
NO_SCHEDULE = "none"
MAX_RATIO = 0.75  # tomesd and DaTo's default patch leave one token of each 2 x 2
_ANY_SIZE = (512, 512)  # whether a factor is valid does not depend on the image size


class SettingError(ArgumentError):
    """A setting of a command that cannot be used."""

    exit_code = 2  # of the command


class UnreachableError(SettingError):
    """A setting that names something on a network that cannot be reached."""

    exit_code = 1


@dataclass(frozen=True)
class Method:
    """One way to make an image: its kind, one of ``KINDS``, and its variant as written (None: the options apply)."""

    kind: str
    variant: str | None = None

    @property
    def label(self) -> str:
        return self.kind if self.variant is None else f"{self.kind}:{self.variant}"


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Which methods, and what each does; an option of ``todo-attn compare`` for each argument.

    Args:
        methods: comma-separated names, "dense" among them; a name with a colon is a variant: "todo:FACTOR",
            "tome:RATIO", "dato:SCHEDULE", "todo+dato:SCHEDULE" and "deepcache:INTERVAL".
        factor, max_kv_tokens, mode: of :class:`~todo_attn.ToDoConfig`, for "todo" and "todo+dato"; see
            :func:`parse_factor`.
        tome_ratio: the share of tokens that "tome" merges, above 0 and at most 0.75.
        schedule: of "dato" and "todo+dato": a name in :func:`todo_attn.config.schedule.names`, a JSON file, or "none"
            to prune alone. A variant is such a name, or "none".
        prune_ratio: the share of tokens that "dato" and "todo+dato" prune, from 0 to 0.75; None is what the schedule
            says, and 0.4 if it does not. Likewise, a schedule's file may have ToDo's factors: "todo+dato" takes them
            unless ``factor``, ``max_kv_tokens`` or ``mode`` is given.
        cache_interval: "deepcache" computes every n-th call of the UNet in full; n, at least 1.

    Raises:
        SettingError: the first argument that does not fit.
    """

    methods: str = "dense,todo"
    factor: str = "auto"
    max_kv_tokens: int = 4096
    mode: str = "nearest"
    tome_ratio: float = 0.5
    schedule: str = "coco"
    prune_ratio: float | None = None
    cache_interval: int = 3

    def __post_init__(self) -> None:
        for kind in KINDS:
            self._check(Method(kind))
        self.parsed_methods()

    def parsed_methods(self) -> list[Method]:
        """The methods in order.

        Raises:
            SettingError: an unknown or repeated method, a bad variant, or no "dense".
        """
        methods: list[Method] = []
        for text in self.methods.split(","):
            kind, colon, variant = text.strip().partition(":")
            if kind not in KINDS or (colon and KINDS[kind] is None):
                problem = f"must be a comma-separated list of {METHODS_TEXT}, got {text.strip()!r}"
                raise SettingError("methods", problem)
            method = Method(kind, variant if colon else None)
            if method in methods:
                raise SettingError("methods", f"must name each method once, got {method.label!r} twice")
            self._check(method)
            methods.append(method)
        if Method("dense") not in methods:
            raise SettingError("methods", f"must have 'dense', to compare the others with, got {self.methods!r}")
        return methods

    def _check(self, method: Method) -> None:
        if method.kind == "todo":
            self.todo_config(method, *_ANY_SIZE)
        elif method.kind == "tome":
            self.tome_ratio_of(method)
        elif method.kind in ("dato", "todo+dato"):
            self.dato_config(method, 2, *_ANY_SIZE)
        elif method.kind == "deepcache":
            self.cache_interval_of(method)

    def todo_config(self, method: Method, height: int, width: int) -> ToDoConfig:
        """The configuration of "todo" or "todo:FACTOR", at an image size in pixels."""
        mode = cast(Mode, self.mode)  # which ToDoConfig checks
        try:
            factor = parse_factor(self.factor if method.variant is None else method.variant, height, width)
            return ToDoConfig(factor=factor, max_kv_tokens=self.max_kv_tokens, mode=mode)
        except ArgumentError as error:  # of a variant only its factor: the options were checked first
            raise refusal(method, error.argument, error.problem) from None

    def dato_config(self, method: Method, calls: int, height: int, width: int) -> DaToConfig:
        """The configuration of "dato" or "todo+dato", with or without a schedule's name.

        Args:
            calls: of the UNet for one image, at least 1; the schedule is resampled to them.
            height, width: of the image, in pixels.
        """
        if self.prune_ratio is not None and not 0 <= self.prune_ratio <= MAX_RATIO:
            raise SettingError("prune_ratio", f"must be from 0 to {MAX_RATIO}, got {self.prune_ratio}")
        config = self._config_of(method).for_calls(calls)
        if self.prune_ratio is not None:
            config = replace(config, prune_ratio=self.prune_ratio)
        ratio = config.prune_ratio
        most = ratio if isinstance(ratio, float) else max(ratio)
        if most > MAX_RATIO:
            raise SettingError("schedule", f"must have prune ratios of at most {MAX_RATIO}, got {most}")
        if self._gives_todo(method, config):
            config = replace(config, todo=self.todo_config(Method("todo"), height, width))
        return config

    def _gives_todo(self, method: Method, config: DaToConfig) -> bool:
        """Whether ToDo beside DaTo is that of the options, and not of ``config``, which is the schedule's."""
        given = any(getattr(self, name) != getattr(MethodOptions, name) for name in ("factor", "max_kv_tokens", "mode"))
        return method.kind == "todo+dato" and (config.todo is None or given)

    def factor_refused(self, method: Method, problem: str) -> SettingError:
        """The error about ToDo's factor in ``method``, which names the option or the schedule that has it."""
        if method.kind == "todo":
            return refusal(method, "factor", problem)
        if self._gives_todo(method, self._config_of(method)):
            return SettingError("factor", problem)
        return refusal(method, "schedule", f"must fit the model: factor {problem}")

    def _config_of(self, method: Method) -> DaToConfig:
        """What the schedule says, before resampling."""
        if (method.variant or self.schedule) == NO_SCHEDULE:
            return DaToConfig()
        if method.variant is not None and method.variant not in schedule_names():
            some = ", ".join(map(repr, schedule_names()[:3]))
            problem = f"must be one that todo-attn schedules lists, such as {some}, got {method.variant!r}"
            raise refusal(method, "schedule", problem)
        try:
            return DaToConfig.from_file(self.schedule if method.variant is None else method.variant)
        except ValueError as error:
            problem = f"must be a file with a schedule: {error}"
            if isinstance(error, ArgumentError) and error.argument not in ("prune_ratio", "todo"):  # no such file
                problem = error.problem
            raise SettingError("schedule", problem) from None

    def tome_ratio_of(self, method: Method) -> float:
        """The ratio of "tome" or "tome:RATIO"."""
        try:
            ratio = self.tome_ratio if method.variant is None else float(method.variant)
        except ValueError:
            ratio = math.nan
        if not 0 < ratio <= MAX_RATIO:
            raise refusal(method, "tome_ratio", f"must be above 0 and at most {MAX_RATIO}, got {ratio}")
        return ratio

    def cache_interval_of(self, method: Method) -> int:
        """The interval of "deepcache" or "deepcache:INTERVAL"."""
        text = str(self.cache_interval) if method.variant is None else method.variant
        if not (text.isdecimal() and int(text) >= 1):
            raise refusal(method, "cache_interval", f"must be an integer of at least 1, got {text}")
        return int(text)


def refusal(method: Method, option: str, problem: str) -> SettingError:
    """The error about the variant of ``method``, or about ``option`` if it has none."""
    if method.variant is None:
        return SettingError(option, problem)
    return SettingError("methods", f"has {method.label!r}, whose {str(KINDS[method.kind]).lower()} {problem}")


def parse_factor(text: str, height: int, width: int) -> Factor:
    """ToDoConfig's factor, from its form on the command line.

    "auto"; "paper" (the published factor for ``height`` x ``width`` pixels); a number for every level, such as "2" or
    "1.5"; or LEVEL=FACTOR pairs joined by "+", such as "1=4+2=1.5" or "finest=2".

    Raises:
        ArgumentError: anything else.
    """
    if text == "auto":
        return "auto"
    if text == "paper":
        return ToDoConfig.paper(height, width).factor
    if "=" not in text and (number := _factor(text)) is not None:
        return number
    levels: dict[int | str, float] = {}
    for pair in text.split("+"):
        level, _, value = pair.partition("=")
        factor = _factor(value)
        known = level == FINEST or (level.isdecimal() and int(level) >= 1)
        if not known or factor is None:
            raise ArgumentError(
                "factor",
                "must be auto, paper, a number of at least 1, or LEVEL=FACTOR pairs joined by + "
                f"such as 1=4+2=2, got {text!r}",
            )
        key: int | str = level if level == FINEST else int(level)
        if key in levels:
            raise ArgumentError("factor", f"must be pairs with each level once, got {level} twice in {text!r}")
        levels[key] = factor
    return levels


def _factor(text: str) -> float | None:
    """A number of at least 1, in digits with or without a decimal point; None if ``text`` is none."""
    whole, point, rest = text.partition(".")
    if not whole.isdecimal() or (point and not rest.isdecimal()):
        return None
    factor = float(text) if point else int(text)
    return factor if factor >= 1 else None
