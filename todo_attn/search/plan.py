"""What a search is asked to do, beside the images: validated plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..config.checks import is_int, is_number
from ..config.dato import DaToConfig
from ..config.schedule import Schedule
from ..options.methods import MAX_RATIO, SettingError
from .fidelity import METRICS

COSTS = {"operations": "operations of the UNet", "seconds": "seconds of an image"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is searched, what is measured, and for how long.

    Args:
        metric: of fidelity to dense: a name in ``todo_attn.search.fidelity.METRICS``, or ``module:function``. Such
            a function gets (image, dense, prompt), two arrays (height, width, 3) uint8 and a string, and returns a
            number, where higher is better.
        features: for "perceptual": ``module:function`` that returns a feature network
            (``todo_attn.compare.features``).
        cost: "operations", counted, or "seconds", measured: the median of the images.
        prune_ratios: shares of tokens that DaTo may prune, from 0 to 0.75; one is fixed, of several the search chooses.
        prune_per_call: whether each call has a ratio of its own.
        todo_factors: factors that ToDo may have at each level of the UNet; 1 is dense. One is fixed, of several the
            search chooses for each level.
        population: candidates of a generation, at least 4. The first one also has those that are known from elsewhere.
        generations: at least 1.
        minutes: after so many the search ends with what it has, above 0; None lets it do all generations. The same
            search goes on from there.
        search_seed: of the search; the images have their own.
        start: schedules to begin with, each for the calls of this search.

    Raises:
        ArgumentError: the first argument that does not fit.
    """

    metric: str = "psnr"
    features: str | None = None
    cost: str = "operations"
    prune_ratios: tuple[float, ...] = (DaToConfig.prune_ratio,)  # type: ignore[assignment]
    prune_per_call: bool = False
    todo_factors: tuple[int, ...] = (1,)
    population: int = 24
    generations: int = 20
    minutes: float | None = None
    search_seed: int = 0
    start: tuple[Schedule, ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS and ":" not in self.metric:
            known = ", ".join(METRICS)
            raise SettingError("metric", f"must be one of {known}, or MODULE:FUNCTION, got {self.metric!r}")
        if self.cost not in COSTS:
            raise SettingError("cost", f"must be one of {', '.join(COSTS)}, got {self.cost!r}")
        _check_choices("prune_ratios", f"numbers from 0 to {MAX_RATIO}", self.prune_ratios, _is_ratio)
        _check_choices("todo_factors", "integers of at least 1", self.todo_factors, lambda x: is_int(x) and x >= 1)
        for name in ("prune_ratios", "todo_factors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.prune_per_call and len(self.prune_ratios) < 2:
            raise SettingError("prune_per_call", f"must have several prune ratios to choose from, got {_text(self)}")
        for name, least in (("population", 4), ("generations", 1), ("search_seed", 0)):
            value = getattr(self, name)
            if not is_int(value) or value < least:
                raise SettingError(name, f"must be an integer of at least {least}, got {value!r}")
        if self.minutes is not None and not (is_number(self.minutes) and self.minutes > 0):
            raise SettingError("minutes", f"must be a number above 0, got {self.minutes!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what decides the candidates and their figures, so not for how long."""
        data = asdict(self)
        del data["generations"], data["minutes"]
        return data | {
            "prune_ratios": list(self.prune_ratios),
            "todo_factors": list(self.todo_factors),
            "start": [schedule.to_dict() for schedule in self.start],
        }


def _is_ratio(x: Any) -> bool:
    return is_number(x) and 0 <= x <= MAX_RATIO


def _text(plan: Plan) -> str:
    return ", ".join(map(str, plan.prune_ratios))


def _check_choices(name: str, what: str, values: tuple[Any, ...], fits: Callable[[Any], bool]) -> None:
    if not isinstance(values, (tuple, list)):
        raise SettingError(name, f"must be a tuple of {what}, got {values!r}")
    if not values or not all(map(fits, values)) or len(set(values)) < len(values):
        raise SettingError(name, f"must be {what}, each once, got {', '.join(map(str, values)) or 'none'}")
