"""status(): what ToDo does in each self-attention of a model and why, and what DaTo does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .dato.status import DaToStatus, dato_status
from .levels import self_attentions, transformers_by_level
from .models import models_of
from .patches import has_tgate
from .state import ATTRIBUTE, AttentionState, TakesPlan

# What sets a processor, by a part of the name of its class.
_PUT_BY = {
    "Sliced": "attention slicing",
    "XFormers": "xFormers",
    "Fused": "fuse_qkv_projections",
    "CustomDiffusion": "Custom Diffusion's weights",
    "PAG": "perturbed-attention guidance",
    "IPAdapter": "an IP-Adapter",
}


@dataclass(frozen=True)
class LayerStatus:
    """One self-attention over an image.

    Args:
        name: of the module, prefixed with that of its model if there are several models.
        level: the side, in latent pixels, of the square that one token stands for.
        state: "coarse" or "dense" in the last call; "not called yet" if there was no call since ToDo was applied;
            "off" if ToDo is not there.
        grid: (height, width) in tokens in the last call; None if there was none.
        factor: (height, width) in tokens per key along each axis in the last call; None if there was none.
        why: the reason why it is not coarse; "" if it is.
    """

    name: str
    level: int
    state: str
    grid: tuple[int, int] | None
    factor: tuple[float, float] | None
    why: str


@dataclass(frozen=True)
class Status:
    """What ToDo and DaTo did in the last call of a pipeline or model; ``print`` shows it as a table.

    Args:
        layers: the self-attentions, in the order of a call.
        dato: what DaTo did; None if it is not on.
    """

    layers: tuple[LayerStatus, ...]
    dato: DaToStatus | None = None

    def __str__(self) -> str:
        return "\n\n".join([_todo_text(self.layers), str(self.dato or "DaTo: off")])


def status(pipe_or_model: Any) -> Status:
    """Whether ToDo and DaTo are on, and what they did in the last call; ``print(status(pipe))`` is a table.

    It changes nothing and reads nothing from the device. A pipeline's ControlNets are included. The last call is the
    last one that began, whether or not it ended.

    Args:
        pipe_or_model: a pipeline or model, as for :func:`todo_attn.apply_todo`.

    Returns:
        A :class:`~todo_attn.diffusers.status.Status`: ``layers``, ``dato``, and the table as its text.

    Raises:
        ArgumentError: ``pipe_or_model`` is neither a pipeline with a ``unet`` nor a model.
    """
    models, controlnets = models_of(pipe_or_model)
    several = len(models) + len(controlnets) > 1
    layers = []
    for number, model in enumerate((*models, *controlnets)):
        prefix = f"{type(model).__name__}[{number}]." if several else ""
        names = {module: name for name, module in model.named_modules()}
        for level, transformer in transformers_by_level(model):
            layers += [_layer(prefix + names[attn], level, attn) for attn in self_attentions(transformer)]
    return Status(tuple(layers), next(filter(None, map(dato_status, models)), None))


def _layer(name: str, level: int, attn: Any) -> LayerStatus:
    state: AttentionState | None = getattr(attn, ATTRIBUTE, None)
    processor = attn.processor
    if not isinstance(processor, TakesPlan):
        return LayerStatus(name, level, "off", None, None, _why_off(processor, state))
    if has_tgate(attn):
        why = "T-GATE replaced the attention's forward: use one or the other"
        return LayerStatus(name, level, "off", None, None, why)
    if state is None or (plan := state.transformer.plan) is None:
        why = "its first call outside of torch.compile finds the grid" if state is None else ""
        return LayerStatus(name, level, "not called yet", None, None, why)
    why = _why_dense(state)
    factor = (1, 1) if why else state.transformer.factor_for(plan.grid)
    return LayerStatus(name, level, "dense" if why else "coarse", plan.grid, factor, why)


def _why_off(processor: object, state: AttentionState | None) -> str:
    name = type(processor).__name__
    if state is None:
        return f"{name} is there, and apply_todo was not called or was taken off"
    if state.original is processor:
        return f"{name} is there again, as before apply_todo"
    by = next((f", of {what}," for part, what in _PUT_BY.items() if part in name), "")
    return f"{name}{by} replaced ToDo's processor: call apply_todo after it"


def _why_dense(state: AttentionState) -> str:
    transformer = state.transformer
    config, plan = transformer.config, transformer.plan
    assert plan is not None
    if transformer.misfit:
        return "another number of tokens than the grid has: something merges or drops them before"
    if why := transformer.model.call.why_not(config):
        return why
    if plan.coarse == plan.grid:
        named = config.factor == "auto"
        return f"{config.max_kv_tokens} tokens or fewer" if named else "factor 1 at this size and level"
    return "an attention mask was given" if transformer.masked else ""


def _todo_text(layers: Sequence[LayerStatus]) -> str:
    """A row for each layer; equal layers of a transformer share one."""
    if not layers:
        return "ToDo: no self-attention over an image (Transformer2DModel) here"
    counts = Counter(layer.state for layer in layers)
    total = ", ".join(f"{number} {state}" for state, number in counts.most_common())
    rows: list[tuple[str, ...]] = [("self-attention", "level", "in the last call", "grid", "factor", "why")]
    for (_, *same), group in groupby(layers, key=_row_key):
        blocks = list(group)
        name = blocks[0].name if len(blocks) == 1 else f"{blocks[0].name} and {len(blocks) - 1} more"
        rows.append((name, *same))
    return f"ToDo, in {len(layers)} self-attentions: {total}\n{_aligned(rows)}"


def _row_key(layer: LayerStatus) -> tuple[str, ...]:
    transformer = layer.name.partition(".transformer_blocks.")[0]
    pairs = ("x".join(f"{side:g}" for side in pair) if pair else "-" for pair in (layer.grid, layer.factor))
    return (transformer, str(layer.level), layer.state, *pairs, layer.why)


def _aligned(rows: Iterable[tuple[str, ...]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
