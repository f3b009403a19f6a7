"""What ToDo and DaTo would gain on this machine, for a UNet and a size: predicted, and on request measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import logs
from ..compare_methods import SettingError
from ..compare_settings import DTYPES, CompareSettings
from ..config import ToDoConfig
from ..dato_config import DaToConfig
from ..roofline import WORTH, Rates, Work, gain
from ..schedule import FULL
from ..versions import device_name
from . import advice
from .architectures import Architecture, chosen_size
from .cost import CallWork, count_work
from .levels import self_attentions, transformers_by_level
from .probes import measure_rates
from .timing import time_calls
from .unets import on_meta


def build_advice(
    architecture: Architecture,
    settings: CompareSettings,
    *,
    measured: bool = False,
    watch: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Every method of ``settings`` on ``architecture``, at its size, on its device; ``json.dumps`` takes it.

    Predicted: the operations counted while the UNet runs on shapes, over what the machine does of each kind in a
    second, which is found by running some. Measured: calls of the UNet, in turns with dense ones. DaTo's gain is that
    of a run, over all its calls.

    Args:
        architecture: the UNet.
        settings: its methods "todo", "dato", "todo+dato", their options, the size (None: the model's normal one),
            device and dtype, and steps: of the scheduler, one fewer than the calls of the UNet, as with PNDM.
        measured: whether to time the UNet too; a name alone gets random weights, on which time does not depend.
        watch: called with what is being done.

    Raises:
        SettingError: a size that does not fit, or a UNet that cannot be counted, loaded or called.
    """
    height, width = chosen_size(architecture, settings.height, settings.width)
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    batch = 1 if device.type == "cpu" else 2
    assert settings.steps is not None
    calls = settings.steps + 1
    configs: dict[str, ToDoConfig | DaToConfig] = {}
    for method in settings.parsed_methods():
        if method.kind == "todo":
            configs[method.label] = settings.todo_config(method, height, width)
        elif method.kind in ("dato", "todo+dato"):
            configs[method.label] = settings.dato_config(method, calls, height, width)

    watch("counting the operations of a call of each kind")
    try:
        with logs.silent():
            works = count_work(
                architecture.config, height, width, list(configs.values()), batch, architecture.pixels_per_latent
            )
    except ValueError as error:
        raise SettingError("model", f"cannot be counted: {error}") from error
    dense = works[0].full
    shell = on_meta(architecture.config)
    latents = height // architecture.pixels_per_latent, width // architecture.pixels_per_latent
    attention = advice.self_attention_work(shell, latents, batch)
    watch("finding out how fast this machine is")
    rates = measure_rates(device, dtype, *_finest_heads(shell), batch)
    found: dict[str, dict[str, float]] = {}
    if measured:
        watch("timing the UNet")
        found = time_calls(architecture, device, dtype, latents, batch, configs, rates.seconds(dense))

    share = rates.computing(attention) / rates.seconds(dense)
    rows = [
        _row(label, config, dense, work, rates, share, found)
        for (label, config), work in zip(configs.items(), works[1:], strict=True)
    ]
    return {
        "model": architecture.name,
        "height": height,
        "width": width,
        "batch": batch,
        "calls": calls,
        "device": device_name(device),
        "dtype": settings.dtype,
        "rates": rates.to_dict(),
        "dense": {
            "operations": dense.operations,
            "launches": dense.launches,
            "predicted_seconds": rates.seconds(dense),
            "measured_seconds": found["dense"][FULL] if found else None,
            "self_attention_share": share,
        },
        "methods": rows,
    }


def advice_lines(found: dict[str, Any]) -> list[str]:
    """What :func:`build_advice` found, for a person."""
    dense, rates = found["dense"], found["rates"]
    seconds = f"{dense['predicted_seconds']:.3g} s predicted"
    if dense["measured_seconds"] is not None:
        seconds += f", {dense['measured_seconds']:.3g} s measured"
    lines = [
        f"{found['model']} at {found['width']} x {found['height']}, batch {found['batch']}, {found['dtype']}, on "
        f"{found['device']}",
        f"dense: {dense['operations'] / 1e9:,.1f}e9 operations a call, {seconds}; self-attention takes "
        f"{dense['self_attention_share']:.0%} of the time",
        *(f"{row['method']}: {row['verdict']}" for row in found["methods"]),
        f"predicted: operations counted on this UNet, over what this machine just did in a second: "
        f"{rates['attention'] / 1e9:,.1f}e9 of attention, {rates['other'] / 1e9:,.1f}e9 of all else, and "
        f"{rates['launch'] * 1e6:.3g} microseconds to start an operation",
    ]
    if dense["measured_seconds"] is None:
        lines.append("--measure times the UNet itself")
    return lines


def _row(
    label: str,
    config: ToDoConfig | DaToConfig,
    dense: Work,
    work: CallWork,
    rates: Rates,
    share: float,
    found: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """One method: seconds are of one call, on average over a run."""
    kinds = FULL + (config.cache_schedule or "") if isinstance(config, DaToConfig) else FULL
    calls = len(kinds)
    predicted = [rates.seconds(work.of(kind)) for kind in kinds]
    by_time = gain([rates.seconds(dense)] * calls, predicted)
    by_count = gain([dense.operations] * calls, [work.of(kind).operations for kind in kinds])
    measured, by_clock = None, None
    if found:
        seconds = [found[label][kind] for kind in kinds]
        measured, by_clock = sum(seconds) / calls, gain([found["dense"][FULL]] * calls, seconds)
    decisive = by_time if by_clock is None else by_clock
    gains = f"{by_time:.2f}x predicted" + ("" if by_clock is None else f", {by_clock:.2f}x measured")
    helps = decisive >= WORTH and by_count > 1  # a clock is noisy, a count is not
    if helps:
        verdict = f"{gains} ({by_count:.2f} times fewer operations)"
    else:
        reason = _reason(config, dense, work, rates, share, by_count, by_time)
        verdict = f"this will not help here: {reason} ({gains})"
    return {
        "method": label,
        "config": config.to_dict(),
        "operations_gain": by_count,
        "predicted_seconds": sum(predicted) / calls,
        "predicted_gain": by_time,
        "measured_seconds": measured,
        "measured_gain": by_clock,
        "helps": helps,
        "verdict": verdict,
    }


def _reason(
    config: ToDoConfig | DaToConfig,
    dense: Work,
    work: CallWork,
    rates: Rates,
    share: float,
    by_count: float,
    by_time: float,
) -> str:
    """Why there is next to nothing to gain."""
    if isinstance(config, ToDoConfig) and work.full.attention == dense.attention:
        if config.factor != "auto":
            return "the factor is 1 at every level, so nothing is downsampled"
        most = f"max_kv_tokens={config.max_kv_tokens}"
        return f"nothing is downsampled, no level having more than {most} tokens at this size"
    if by_time >= WORTH:
        return "timed, it does not gain what the operations promise"
    if by_count >= WORTH and rates.overlaps and rates.starting(dense) > rates.computing(dense):
        return "starting the operations one by one takes longer than computing them; torch.compile helps first"
    if isinstance(config, ToDoConfig):
        return f"self-attention takes only {share:.0%} of the time at this size"
    return f"what it leaves out is only {1 - 1 / by_count:.0%} of the operations"


def _finest_heads(unet: torch.nn.Module) -> tuple[int, int]:
    """Heads and head dim of the finest self-attention."""
    _, transformer = min(transformers_by_level(unet), key=lambda pair: pair[0])
    attn: Any = self_attentions(transformer)[0]
    return attn.heads, attn.inner_dim // attn.heads
