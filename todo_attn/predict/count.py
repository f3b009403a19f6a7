"""What a run costs: the operations of each kind of call, counted on the real UNet without its weights or any memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models import UNet2DConditionModel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .. import logs
from ..config.checks import ArgumentError
from ..config.dato import DaToConfig
from ..config.schedule import FULL, REUSE, SHALLOW
from ..config.todo import ToDoConfig
from ..diffusers.apply import apply_todo, remove_todo
from ..diffusers.dato import apply_dato, remove_dato
from ..diffusers.levels import self_attentions, transformers_by_level
from ..models.architectures import PIXELS_PER_LATENT
from ..models.unets import on_meta
from ..ops import flops  # noqa: F401  (what this package's own attention costs)
from .model import Work

# A run of this schedule has one call of each kind.
_EACH_KIND = SHALLOW + REUSE
_ALL_TIMESTEPS = (0, 1000)
_TEXT_TOKENS = 77


@dataclass(frozen=True)
class CallCost:
    """Operations of one call of the UNet, two for a multiplication with its addition.

    ``dense`` is without DaTo; ``full``, ``shallow`` and ``reuse`` are the kinds that a schedule writes 2, 1 and 0.
    """

    dense: int
    full: int
    shallow: int
    reuse: int

    def of(self, kind: str) -> int:
        """Of a call that a schedule writes "2", "1" or "0"."""
        return {FULL: self.full, SHALLOW: self.shallow, REUSE: self.reuse}[kind]


@dataclass(frozen=True)
class Cost:
    """Operations of a run.

    Args:
        kinds: what each call is, as a schedule writes it, the first call included.
        operations: of each call.
        dense: of one call without DaTo.
    """

    kinds: str
    operations: tuple[int, ...]
    dense: int

    @property
    def total(self) -> int:
        """Of the whole run."""
        return sum(self.operations)

    @property
    def dense_total(self) -> int:
        """Of as many calls without DaTo."""
        return self.dense * len(self.operations)

    @property
    def speedup(self) -> float:
        """How many times fewer operations than the dense run."""
        return self.dense_total / self.total

    @property
    def saving(self) -> float:
        """The share of the dense run's operations that is saved."""
        return 1 - self.total / self.dense_total


def count(
    unet: UNet2DConditionModel | Mapping[str, Any],
    height: int,
    width: int,
    config: DaToConfig,
    calls: int,
    batch: int = 2,
    pixels_per_latent: int = PIXELS_PER_LATENT,
) -> Cost:
    """The operations of a run under DaTo, for pictures of ``height`` x ``width`` pixels.

    Args:
        unet: a UNet, on any device ("meta" will do), or its configuration, which is all that is looked at.
        height, width: in pixels, multiples of ``pixels_per_latent``.
        config: with a schedule for another number of calls, it is resampled.
        calls: how often the run calls the UNet.
        batch: of one call; 2 is one picture with guidance.

    Raises:
        ValueError: as :func:`count_call`; or ``calls`` is not an integer of at least 1.
    """
    kinds = FULL + config.schedule_for(calls)
    ratios = [config.ratio_for(call, calls) for call in range(calls)]
    costs = {
        ratio: count_call(unet, height, width, replace(config, prune_ratio=ratio), batch, pixels_per_latent)
        for ratio in {ratios[call] for call in range(calls) if call == 0 or kinds[call] != REUSE}
    }
    first = costs[ratios[0]]
    operations = tuple(costs.get(ratio, first).of(kind) for kind, ratio in zip(kinds, ratios, strict=True))
    return Cost(kinds, operations, first.dense)


def run_cost(call: CallCost, digits: str) -> Cost:
    """The operations of a run of ``digits``, and the first call, whose calls of one kind all cost the same."""
    kinds = FULL + digits
    return Cost(kinds, tuple(map(call.of, kinds)), call.dense)


def count_call(
    unet: UNet2DConditionModel | Mapping[str, Any],
    height: int,
    width: int,
    config: DaToConfig | None = None,
    batch: int = 2,
    pixels_per_latent: int = PIXELS_PER_LATENT,
    watch: Callable[[int, int], None] | None = None,
) -> CallCost:
    """The operations of a call of each kind, as torch counts them while the UNet runs on shapes alone.

    Matrix products, convolutions, attention and the search for similar tokens are counted; what is done once per
    element is not.

    Args:
        unet, height, width, batch, pixels_per_latent: as in :func:`count`.
        config: what is pruned, and ToDo (as if it acted at every timestep); its schedule is not looked at. None is
            ``DaToConfig()``.
        watch: called with how many of how many calls have been counted.

    Raises:
        ValueError: an argument that does not fit; a ratio per call; a UNet without self-attention, or one that needs
            inputs other than text, sizes and class labels.
    """
    config = DaToConfig() if config is None else config
    dense, dato = count_work(unet, height, width, [config], batch, pixels_per_latent, watch)
    return CallCost(dense.full.operations, *(work.operations for work in dato))


class CallWork(NamedTuple):
    """The work of one call of each kind; what has no such kind has its full call in their place."""

    full: Work
    shallow: Work
    reuse: Work

    def of(self, kind: str) -> Work:
        """Of a call that a schedule writes "2", "1" or "0"."""
        return self[(FULL, SHALLOW, REUSE).index(kind)]


def count_work(
    unet: UNet2DConditionModel | Mapping[str, Any],
    height: int,
    width: int,
    configs: Sequence[ToDoConfig | DaToConfig],
    batch: int = 2,
    pixels_per_latent: int = PIXELS_PER_LATENT,
    watch: Callable[[int, int], None] | None = None,
) -> list[CallWork]:
    """As :func:`count_call`, attention apart from the rest: of the UNet as it is, then under each of ``configs``."""
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1 or value % pixels_per_latent:
            raise ArgumentError(name, f"must be a positive multiple of {pixels_per_latent}, in pixels, got {value!r}")
    if not isinstance(batch, int) or batch < 1:
        raise ArgumentError("batch", f"must be an integer of at least 1, got {batch!r}")
    configs = [in_one_run(config) for config in configs]
    calls = [1, *(1 if isinstance(config, ToDoConfig) else 3 for config in configs)]
    found: list[CallWork] = []
    done = 0
    # On "meta" tensors have a shape and no memory.
    with torch.device("meta"), torch.no_grad(), logs.silent():
        model = on_meta(unet if isinstance(unet, Mapping) else unet.config)
        inputs = call_inputs(model, batch, height // pixels_per_latent, width // pixels_per_latent)
        for config, count in zip([None, *configs], calls, strict=True):
            if isinstance(config, DaToConfig):
                apply_dato(model, config)
            elif config is not None:
                apply_todo(model, config)
            works = []
            for timestep in torch.arange(count, 0, -1, device="cpu"):
                with _Tally() as tally, _AttentionTally(tally):
                    model(timestep=timestep, **inputs)
                works.append(tally.work())
                done += 1
                if watch is not None:
                    watch(done, sum(calls))
            found.append(CallWork(*works * (3 // count)))
            remove_dato(model)
            remove_todo(model)
    return found


def count_self_attention(
    unet: UNet2DConditionModel | Mapping[str, Any],
    height: int,
    width: int,
    batch: int = 2,
    pixels_per_latent: int = PIXELS_PER_LATENT,
) -> Work:
    """Of all self-attentions over the image in a dense call, projections included; arguments as :func:`count_call`."""
    total, before = Work(), Work()
    with torch.device("meta"), torch.no_grad():
        model = on_meta(unet if isinstance(unet, Mapping) else unet.config)
        inputs = call_inputs(model, batch, height // pixels_per_latent, width // pixels_per_latent)
        with _Tally() as tally, _AttentionTally(tally):

            def enter(*_: Any) -> None:
                nonlocal before
                before = tally.work()

            def leave(*_: Any) -> None:
                nonlocal total
                total = total + tally.work() - before

            for _, transformer in transformers_by_level(model):
                for attn1 in self_attentions(transformer):
                    attn1.register_forward_pre_hook(enter)
                    attn1.register_forward_hook(leave)
            model(timestep=999, **inputs)
    return total


def in_one_run(config: ToDoConfig | DaToConfig) -> ToDoConfig | DaToConfig:
    """With ToDo at every timestep, and DaTo in a run of one call of each kind.

    Raises:
        ValueError: a ratio per call.
    """
    if isinstance(config, ToDoConfig):
        return replace(config, timestep_range=_ALL_TIMESTEPS)
    if isinstance(config.prune_ratio, tuple):
        raise ArgumentError("config", f"must have one prune_ratio for all calls, got {len(config.prune_ratio)}")
    todo = None if config.todo is None else replace(config.todo, timestep_range=_ALL_TIMESTEPS)
    return replace(config, cache_schedule=_EACH_KIND, todo=todo)


class _Tally(TorchDispatchMode):
    """Counts what is started within, and the operations of it by torch's own formulas."""

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


# What attention is made of where it is not one call: the products of diffusers' AttnProcessor, and of this package.
_ATTENTION = (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.todo_attn.downsampled_attention)


class _AttentionTally(TorchFunctionMode):
    """Takes attention for one operation, as it is on every device but "meta", where torch would take it to pieces."""

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


def call_inputs(unet: UNet2DConditionModel, batch: int, height: int, width: int) -> dict[str, Any]:
    """Arguments of a call, but for the timestep; ``height`` and ``width`` in latents."""
    config: Any = unet.config
    text = config.encoder_hid_dim or config.cross_attention_dim
    text = text if isinstance(text, int) else text[0]
    inputs: dict[str, Any] = {
        "sample": torch.empty(batch, config.in_channels, height, width),
        "encoder_hidden_states": torch.empty(batch, _TEXT_TOKENS, text),
    }
    if config.addition_embed_type == "text_time":
        sizes = 6
        pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(batch, pooled),
            "time_ids": torch.empty(batch, sizes),
        }
    elif config.addition_embed_type not in (None, "text"):  # "text" is made of the encoder's states
        raise ArgumentError(
            "unet", f"must have no addition_embed_type but 'text' and 'text_time', got {config.addition_embed_type!r}"
        )
    if config.num_class_embeds is not None and config.class_embed_type is None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    elif config.class_embed_type is not None:
        raise ArgumentError("unet", f"must have no class_embed_type, got {config.class_embed_type!r}")
    return inputs
