"""The operations of each kind of call, counted while the UNet runs on shapes: without its weights or any memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models import UNet2DConditionModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .. import logs
from ..config.checks import ArgumentError, check_at_least
from ..config.dato import DaToConfig
from ..config.schedule import FULL, KINDS, REUSE, SHALLOW
from ..config.todo import ToDoConfig
from ..diffusers.apply import apply_todo, remove_todo
from ..diffusers.dato import apply_dato, remove_dato
from ..diffusers.levels import self_attentions, transformers_by_level
from ..models.architectures import PIXELS_PER_LATENT
from ..models.unets import empty_inputs, on_meta
from ..ops import flops  # noqa: F401  (what this package's own attention costs)
from .model import Work

# A run of this schedule has one call of each kind.
_EACH_KIND = SHALLOW + REUSE


class CallWork(NamedTuple):
    """The work of one call of each kind; a UNet without DaTo does the same in all three."""

    full: Work
    shallow: Work
    reuse: Work

    def of(self, kind: str) -> Work:
        """Of a call that a schedule writes "2", "1" or "0"."""
        return getattr(self, KINDS[kind])


def count_work(
    unet: UNet2DConditionModel | Mapping[str, Any],
    height: int,
    width: int,
    configs: Sequence[ToDoConfig | DaToConfig],
    batch: int = 2,
    pixels_per_latent: int = PIXELS_PER_LATENT,
    watch: Callable[[int, int], None] | None = None,
) -> list[CallWork]:
    """The work of the UNet as it is, then under each of ``configs``.

    Matrix products, convolutions, attention and the search for similar tokens are counted; elementwise operations are
    not.

    Args:
        unet: a UNet on any device, "meta" included, or its configuration, which is all that is read.
        height, width: in pixels, multiples of ``pixels_per_latent``.
        configs: each counted with ToDo at every timestep, and DaTo with one call of each kind, whatever its schedule.
        batch: of one call; 2 is one image with guidance.
        watch: called with the number of calls counted so far, and of all.

    Raises:
        ArgumentError: an argument that does not fit; a ratio per call; a UNet without self-attention, or one that needs
            inputs other than text, sizes and class labels.
    """
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1 or value % pixels_per_latent:
            raise ArgumentError(name, f"must be a positive multiple of {pixels_per_latent}, in pixels, got {value!r}")
    check_at_least(1, "batch", batch)
    configs = [in_one_run(config) for config in configs]
    calls = [1, *(1 if isinstance(config, ToDoConfig) else 3 for config in configs)]
    found: list[CallWork] = []
    done = 0
    # On "meta" tensors have a shape and no memory.
    with torch.device("meta"), torch.no_grad(), logs.silent():
        model = on_meta(unet if isinstance(unet, Mapping) else unet.config)
        inputs = empty_inputs(model, batch, height // pixels_per_latent, width // pixels_per_latent)
        for config, count in zip([None, *configs], calls, strict=True):
            if isinstance(config, DaToConfig):
                apply_dato(model, config)
            elif config is not None:
                apply_todo(model, config)
            works = []
            for timestep in torch.arange(count, 0, -1, device="cpu"):
                with tallied() as work:
                    model(timestep=timestep, **inputs)
                works.append(work())
                done += 1
                if watch is not None:
                    watch(done, sum(calls))
            found.append(CallWork(*works * (3 // count)))
            remove_dato(model)
            remove_todo(model)
    return found


class RunCounter:
    """Counts the operations of whole runs of one UNet at one size; each kind of call is counted once.

    Args:
        unet, height, width, batch, pixels_per_latent: as :func:`count_work`.

    Raises:
        ArgumentError: as :func:`count_work`.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel | Mapping[str, Any],
        height: int,
        width: int,
        batch: int = 2,
        pixels_per_latent: int = PIXELS_PER_LATENT,
    ) -> None:
        self._given = (unet, height, width), (batch, pixels_per_latent)
        (dense,) = self._count()
        self._dense = dense.full.operations
        self._works: dict[DaToConfig, CallWork] = {}

    def dense(self, calls: int) -> int:
        """Operations of a dense run of ``calls`` calls."""
        return calls * self._dense

    def operations(self, config: DaToConfig, calls: int) -> int:
        """Operations of a run of ``calls`` calls under ``config``, whose schedule and ratios are fitted to them."""
        fitted = config.for_calls(calls)
        alone = replace(fitted, cache_schedule=None)
        each = [replace(alone, prune_ratio=fitted.ratio_for(call)) for call in range(calls)]
        new = [config for config in dict.fromkeys(each) if config not in self._works]
        if new:
            self._works |= zip(new, self._count(*new)[1:], strict=True)
        kinds = FULL + fitted.schedule_for(calls)
        return sum(self._works[config].of(kind).operations for config, kind in zip(each, kinds, strict=True))

    def _count(self, *configs: DaToConfig) -> list[CallWork]:
        of, (batch, pixels_per_latent) = self._given
        return count_work(*of, configs, batch, pixels_per_latent)


def count_self_attention(
    unet: UNet2DConditionModel | Mapping[str, Any],
    height: int,
    width: int,
    batch: int = 2,
    pixels_per_latent: int = PIXELS_PER_LATENT,
) -> Work:
    """The work of all self-attentions in a dense call, projections included; arguments as :func:`count_work`."""
    total, before = Work(), Work()
    with torch.device("meta"), torch.no_grad():
        model = on_meta(unet if isinstance(unet, Mapping) else unet.config)
        inputs = empty_inputs(model, batch, height // pixels_per_latent, width // pixels_per_latent)
        with tallied() as work:

            def enter(*_: Any) -> None:
                nonlocal before
                before = work()

            def leave(*_: Any) -> None:
                nonlocal total
                total = total + work() - before

            for _, transformer in transformers_by_level(model):
                for attn1 in self_attentions(transformer):
                    attn1.register_forward_pre_hook(enter)
                    attn1.register_forward_hook(leave)
            model(timestep=999, **inputs)
    return total


def in_one_run(config: ToDoConfig | DaToConfig) -> ToDoConfig | DaToConfig:
    """``config`` with ToDo in every call, and DaTo with a run of one call of each kind.

    Raises:
        ArgumentError: a ratio per call.
    """
    if isinstance(config, ToDoConfig):
        return _in_every_call(config)
    if isinstance(config.prune_ratio, tuple):
        raise ArgumentError("config", f"must have one prune_ratio for all calls, got {len(config.prune_ratio)}")
    todo = None if config.todo is None else _in_every_call(config.todo)
    return replace(config, cache_schedule=_EACH_KIND, todo=todo)


def _in_every_call(config: ToDoConfig) -> ToDoConfig:
    return replace(config, timestep_range=ToDoConfig.timestep_range, steps=ToDoConfig.steps)


@contextmanager
def tallied() -> Iterator[Callable[[], Work]]:
    """Count what runs on the device "meta" inside the block; gives a function that returns the work so far."""
    with _Tally() as tally, _AttentionTally(tally):
        yield tally.work


class _Tally(TorchDispatchMode):
    """Counts the operations started within it: how many, and their work by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0
        self._launches = 0
        self._counter = FlopCounterMode(display=False)

    def __enter__(self) -> _Tally:
        self._counter.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._counter.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._launches += not (func.is_view or func is torch.ops.aten._unsafe_view.default)
        return func(*args, **(kwargs or {}))

    def work(self) -> Work:
        by_op = self._counter.get_flop_counts()["Global"]
        attention = self.attention + sum(by_op.get(op, 0) for op in _ATTENTION)
        everything = self.attention + self._counter.get_total_flops()
        return Work(attention, everything - attention, self._launches)


# Attention that is not scaled_dot_product_attention: the products of diffusers' AttnProcessor, and this package's op.
_ATTENTION = (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.todo_attn.downsampled_attention)


class _AttentionTally(TorchFunctionMode):
    """Counts attention as one operation, as it is on every device but "meta", where torch would decompose it."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args  # (B, H, N or M, D)
        batch, heads, tokens, width = query.shape
        self.tally.attention += 2 * batch * heads * tokens * key.shape[2] * (width + value.shape[3])
        return query.new_empty(batch, tokens, heads, value.shape[3]).transpose(1, 2)
