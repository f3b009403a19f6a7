"""What a run costs: the operations of each kind of call, counted on the real UNet without its weights or any memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..dato_config import DaToConfig
from ..ops import flops  # noqa: F401  (what this package's own attention costs)
from ..schedule import FULL, REUSE, SHALLOW
from .architectures import PIXELS_PER_LATENT
from .dato import apply_dato

_TEXT_TOKENS = 77
# A run of this schedule has one call of each kind.
_EACH_KIND = SHALLOW + REUSE
_ALL_TIMESTEPS = (0, 1000)


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
    if isinstance(config.prune_ratio, tuple):
        raise ValueError(f"config must have one prune_ratio for all calls, got {len(config.prune_ratio)}")
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int) or value < 1 or value % pixels_per_latent:
            raise ValueError(f"{name} must be a positive multiple of {pixels_per_latent}, in pixels, got {value!r}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an integer of at least 1, got {batch!r}")
    todo = None if config.todo is None else replace(config.todo, timestep_range=_ALL_TIMESTEPS)
    config = replace(config, cache_schedule=_EACH_KIND, todo=todo)
    counted: list[int] = []
    # Tensors that have a shape and no memory. Attention by its two products: torch has no formula for the fused
    # kernels of the CPU, on which these tensors pretend to be.
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model = UNet2DConditionModel.from_config(getattr(unet, "config", unet)).eval()
        inputs = _inputs(model, batch, height // pixels_per_latent, width // pixels_per_latent)
        for call in range(4):
            if call == 1:
                apply_dato(model, config)
            with FlopCounterMode(display=False) as counter:
                model(timestep=999 - call, **inputs)  # falling, so that it is one run
            counted.append(counter.get_total_flops())
            if watch is not None:
                watch(call + 1, 4)
    return CallCost(*counted)


def _inputs(unet: UNet2DConditionModel, batch: int, height: int, width: int) -> dict[str, Any]:
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
        raise ValueError(
            f"unet must have no addition_embed_type but 'text' and 'text_time', got {config.addition_embed_type!r}"
        )
    if config.num_class_embeds is not None and config.class_embed_type is None:
        inputs["class_labels"] = torch.zeros(batch, dtype=torch.long)
    elif config.class_embed_type is not None:
        raise ValueError(f"unet must have no class_embed_type, got {config.class_embed_type!r}")
    return inputs
