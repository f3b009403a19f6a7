"""What ``todo-attn schedules`` prints, as plain data: schedules and what they save on a UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..config import schedule
from ..config.checks import ArgumentError
from ..config.dato import DaToConfig
from ..options.methods import SettingError
from ..options.settings import check_steps

if TYPE_CHECKING:
    from ..models.architectures import Architecture

_BATCH = 2  # an image with guidance


def build_listing(
    architecture: Architecture,
    height: int | None,
    width: int | None,
    steps: int,
    schedules: Iterable[schedule.Schedule],
    watch: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Each of ``schedules`` with its source, and its operations on ``architecture``; ``json.dumps`` takes it.

    Args:
        architecture: the UNet.
        height, width: in pixels; None is what the UNet was trained for.
        steps: of the scheduler, one fewer than the calls of the UNet, as with PNDM.
        schedules: resampled to ``steps``; with their own prune ratio and ToDo if they have them.
        watch: called with the number of calls counted so far, and of all.

    Raises:
        SettingError: a size or number of steps that does not fit, or a UNet that cannot be counted.
    """
    from ..models.architectures import chosen_size
    from ..predict.count import RunCounter, count_work

    check_steps("steps", steps)
    height, width = chosen_size(architecture, height, width)
    config = DaToConfig()
    try:
        dense, dato = count_work(
            architecture.config, height, width, [config], _BATCH, architecture.pixels_per_latent, watch
        )
    except ValueError as error:
        raise SettingError("model", f"cannot be counted: {error}") from error
    rows = []
    for published in schedules:
        digits = schedule.resample(published.digits, steps)
        kinds = schedule.FULL + digits
        if published.prune_ratio is None and published.todo is None:
            run = sum(dato.of(kind).operations for kind in kinds)
        else:
            counter = RunCounter(architecture.config, height, width, _BATCH, architecture.pixels_per_latent)
            try:
                run = counter.operations(DaToConfig.from_schedule(published), len(kinds))
            except ArgumentError as error:  # a level of its ToDo that the UNet lacks
                raise SettingError("name", f"must fit the model: {error}") from error
        dense_run = dense.full.operations * len(kinds)
        rows.append(
            {
                "name": published.name,
                "digits": digits,
                "prune_ratio": published.prune_ratio,
                "todo": None if published.todo is None else published.todo.to_dict(),
                **{name: kinds.count(kind) for kind, name in schedule.KINDS.items()},
                "operations": run,
                "speedup": dense_run / run,
                "saving": 1 - run / dense_run,
                "source": published.source,
                "published": {
                    "digits": published.digits,
                    "steps": published.steps,
                    "scheduler": published.scheduler,
                    "speedup": published.published_speedup,
                },
            }
        )
    return {
        "model": architecture.name,
        "height": height,
        "width": width,
        "batch": _BATCH,
        "steps": steps,
        "calls": steps + 1,
        "prune_ratio": config.prune_ratio,
        "operations_per_call": {"dense": dense.full.operations}
        | {name: dato.of(kind).operations for kind, name in schedule.KINDS.items()},
        "schedules": rows,
    }
