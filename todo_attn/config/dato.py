"""What DaTo is asked to do, as validated plain data. No diffusers, no torch: it reads and writes JSON as it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any

from . import schedule
from .checks import ArgumentError, arguments_of, check_at_least, check_ratios, checked_ratio, is_int, is_number
from .todo import ToDoConfig

_FLAGS = ("align_guidance", "prune_cross_attention", "prune_feed_forward")
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class DaToConfig:
    """Dynamics-aware token pruning and feature caching (DaTo, arXiv 2501.00375): what each call of the UNet leaves out.

    Args:
        prune_ratio: the share of tokens, at least 0 and below 1, taken out of the self-attentions of the model's
            finest level; or one ratio per call of the UNet (in a run of another length, each call takes the ratio of
            the nearest moment). At most 1 - 1 / (patch height * width) on a grid that the patch divides, and more on
            others, whose edges have no base token: :func:`todo_attn.ops.plan_pruning` checks that at the call. A ratio
            that no grid allows is refused here. All other arguments are keyword-only.
        cache_schedule: a digit per call of the UNet after the first, which is always full: "2" full, "1" shallow, "0"
            the previous output again (:mod:`todo_attn.config.schedule`). None computes every call in full.
        patch: (height, width) in tokens of the patches, each of which keeps one base token.
        noise_weight, dynamics_weight: a token's score is dynamics_weight * (how much the prediction changed there) +
            noise_weight * noise; the highest of a patch is its base. At least 0; only their proportion matters.
        align_guidance: whether both halves of a batch under guidance use the base tokens of the first half.
        prune_cross_attention, prune_feed_forward: whether pruned tokens are taken out of those too.
        todo: a :class:`~todo_attn.ToDoConfig`: the kept tokens attend to its coarser grid of keys.
        seed: of the noise, from 0 to 2**63 - 1.

    Raises:
        ArgumentError: an argument that does not fit; or ``prune_ratio`` has another number of ratios than the run of
            ``cache_schedule`` has calls.
    """

    prune_ratio: float | Sequence[float] = 0.4
    _: KW_ONLY
    cache_schedule: str | None = None
    patch: tuple[int, int] = (2, 2)
    noise_weight: float = 0.1
    dynamics_weight: float = 0.1
    align_guidance: bool = True
    prune_cross_attention: bool = False
    prune_feed_forward: bool = False
    todo: ToDoConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ratio = checked_ratio(self.prune_ratio)
        object.__setattr__(self, "prune_ratio", ratio)
        if self.cache_schedule is not None:
            schedule.check_digits(self.cache_schedule, "cache_schedule")
        object.__setattr__(self, "patch", _checked_patch(self.patch))
        _check_room(ratio, self.patch)
        for name in ("noise_weight", "dynamics_weight"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ArgumentError(name, f"must be a finite number of at least 0, got {value!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(name, f"must be True or False, got {getattr(self, name)!r}")
        if self.todo is not None and not isinstance(self.todo, ToDoConfig):
            raise ArgumentError("todo", f"must be a ToDoConfig or None, got {self.todo!r}")
        if not is_int(self.seed) or not 0 <= self.seed <= _MAX_SEED:
            raise ArgumentError("seed", f"must be an integer from 0 to {_MAX_SEED}, got {self.seed!r}")
        if self.cache_schedule is not None:
            check_ratios(ratio, self.cache_schedule, "cache_schedule")

    @property
    def computes_everything(self) -> bool:
        """Whether it prunes nothing and computes every call in full; its ToDo may still act."""
        ratios = self.prune_ratio if isinstance(self.prune_ratio, tuple) else (self.prune_ratio,)
        return not any(ratios) and set(self.cache_schedule or "") <= {schedule.FULL}

    @classmethod
    def preset(cls, name: str, steps: int = 50, **overrides: Any) -> DaToConfig:
        """A schedule of the package, resampled to ``steps`` steps of the scheduler.

        Args:
            name: one of :func:`todo_attn.config.schedule.names`, such as "coco", or a schedule's JSON file.
            steps: at least 1. The schedule gets one digit per step, for a scheduler that calls the UNet once more than
                it has steps, such as PNDM, for which the published ones were made.
            overrides: other arguments of ``DaToConfig``, in place of those of the schedule's file too.

        Raises:
            ArgumentError: no such schedule, ``steps`` is not a positive integer, or an argument does not fit.
        """
        check_at_least(1, "steps", steps)
        if "cache_schedule" in overrides:
            raise ArgumentError("cache_schedule", "must not be given: it is what the preset says")
        return replace(cls.from_schedule(schedule.load(name)).for_calls(steps + 1), **overrides)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], calls: int | None = None, **overrides: Any) -> DaToConfig:
        """The configuration in a schedule's JSON file, as :meth:`from_schedule`.

        Args:
            path: such as ``todo-attn search`` writes; or the name of a schedule of the package.
            calls: of the UNet in a run: a file for another number of calls is refused. None takes any file, and a run
                of another length resamples it.
            overrides: other arguments of ``DaToConfig``, in place of the file's too.

        Raises:
            ArgumentError: there is no such file, it is for another number of calls, or an argument does not fit.
            ValueError: the file cannot be read or is no schedule: its path and what is wrong.
        """
        found = schedule.load(path)
        if calls is not None and calls != found.calls:
            made = f"{os.fspath(path)!r} is for {found.calls}{found.made_for}"
            raise ArgumentError("path", f"must be a schedule for the {calls} calls of this run, and {made}")
        return replace(cls.from_schedule(found), **overrides)

    @classmethod
    def from_schedule(cls, found: schedule.Schedule) -> DaToConfig:
        """The configuration of a schedule: its digits, and its prune ratio and ToDo if it has them."""
        ratio = cls.prune_ratio if found.prune_ratio is None else found.prune_ratio
        return cls(ratio, cache_schedule=found.digits, todo=found.todo)

    def schedule_for(self, calls: int) -> str:
        """The digits for a run of ``calls`` calls of the UNet: ``calls - 1`` of them, all "2" without a schedule.

        Raises:
            ArgumentError: ``calls`` is not an integer of at least 1.
        """
        check_at_least(1, "calls", calls)
        if self.cache_schedule is None:
            return schedule.FULL * (calls - 1)
        return schedule.resample(self.cache_schedule, calls - 1)

    def for_calls(self, calls: int) -> DaToConfig:
        """The same for a run of ``calls`` calls: its schedule, and ratios per call, are fitted to them.

        Raises:
            ArgumentError: ``calls`` is not an integer of at least 1.
        """
        digits, ratio = self.cache_schedule, self.prune_ratio
        if digits is not None:
            digits = self.schedule_for(calls) or None  # a single call has nothing to reuse
        if isinstance(ratio, tuple):
            ratio = tuple(self.ratio_for(call, calls) for call in range(calls))
        return replace(self, cache_schedule=digits, prune_ratio=ratio)

    def ratio_for(self, call: int, calls: int | None = None) -> float:
        """The share of tokens that call number ``call`` of a run prunes.

        Args:
            call: from 0. Calls after the last have its ratio.
            calls: of the run, to which ratios per call are fitted; None takes them as they are.

        Raises:
            ArgumentError: ``call`` is not an integer of at least 0, or ``calls`` of at least 1.
        """
        check_at_least(0, "call", call)
        if calls is not None:
            check_at_least(1, "calls", calls)
        ratios = self.prune_ratio
        if isinstance(ratios, (int, float)):
            return ratios
        last = len(ratios) - 1
        if calls is None:
            return ratios[min(call, last)]
        # The first and the last call take the first and the last ratio, those between the nearest.
        return ratios[(2 * min(call, calls - 1) * last + calls - 1) // (2 * (calls - 1)) if calls > 1 else 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``json.dumps`` takes; :meth:`from_dict` reads it back."""
        ratio = list(self.prune_ratio) if isinstance(self.prune_ratio, tuple) else self.prune_ratio
        todo = None if self.todo is None else self.todo.to_dict()
        return asdict(self) | {"prune_ratio": ratio, "patch": list(self.patch), "todo": todo}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DaToConfig:
        """The configuration that :meth:`to_dict` gave, also after a round trip through JSON.

        Raises:
            ArgumentError: ``data`` is not a mapping, or has an unknown key or a value that does not fit.
        """
        arguments = arguments_of(cls, data)
        if isinstance(arguments.get("todo"), Mapping):
            arguments["todo"] = ToDoConfig.from_dict(arguments["todo"])
        return cls(**arguments)


def _checked_patch(value: object) -> tuple[int, int]:
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(is_int(x) and x >= 1 for x in value)):
        raise ArgumentError("patch", f"must be a pair of integers of at least 1 (height, width), got {value!r}")
    height, width = value
    return height, width


def _check_room(ratio: float | tuple[float, ...], patch: tuple[int, int]) -> None:
    """Most can be pruned on a grid of one whole patch and the widest edges that hold no second one."""
    tokens = (2 * patch[0] - 1) * (2 * patch[1] - 1)
    most = (tokens - 1) / tokens
    highest = max(ratio) if isinstance(ratio, tuple) else ratio
    if highest > most:
        raise ArgumentError(
            "prune_ratio",
            f"must be at most {most:.6g}, the most that any grid leaves beside the base tokens of patches "
            f"of {patch}, got {highest!r}",
        )
