"""Where a method errs: the error of each self-attention and of one prediction, on the latents of a dense run.

A dense run keeps the UNet's inputs at a few timesteps. Each case then makes the prediction from the same latents twice.
The first gives the error of the prediction. In the second, each transformer block's output is replaced by the dense
one, so that every self-attention gets the dense input and its error is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.fidelity import intervals
from benchmarks.fidelity.cases import Case, bind_checked
from benchmarks.fidelity.store import Images, Size
from todo_attn.compare.run import quiet, take_shot, told_once
from todo_attn.diffusers.levels import transformers_by_level
from todo_attn.options.settings import CompareSettings

BENCHMARK = "fidelity-layers"
PREDICTION = "prediction"
_Call = tuple[tuple[Any, ...], dict[str, Any]]


def fits(case: Case) -> bool:
    """Whether one call of ``case`` stands by itself: it reuses nothing, and has dense's timesteps and size."""
    return not case.is_cached and case.step_share == 1 and case.smaller == 1


@dataclass
class Dense:
    """A dense call: the input, the sum after self-attention, and the output of each block; the prediction."""

    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    sums: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    prediction: Tensor = field(default_factory=lambda: torch.empty(0))


class LayerErrors:
    """Errors of a pipeline's self-attentions at one size; the pipeline is left as it was found.

    Args:
        pipe: a text-to-image pipeline with a UNet.
        settings: steps and guidance.
        images: prompts and seeds.
        size: (height, width) in pixels.
        moments: how many timesteps of a run, evenly spaced.
    """

    def __init__(self, pipe: Any, settings: CompareSettings, images: Images, size: Size, moments: int) -> None:
        assert settings.steps is not None
        self.pipe, self.images, self.size, self.moments, self.steps = pipe, images, size, moments, settings.steps
        self.settings = replace(settings, height=size[0], width=size[1])
        names = {module: name for name, module in pipe.unet.named_modules()}
        transformers: list[tuple[int, Any]] = transformers_by_level(pipe.unet)
        self.blocks: dict[nn.Module, tuple[int, str]] = {
            block: (level, names[block])
            for level, transformer in transformers
            for block in transformer.transformer_blocks
        }

    def rows(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """A row for each case, timestep and layer, averaged over the images, and one for the prediction."""
        found: dict[tuple[str, float, int | None, str], list[float]] = {}
        with torch.no_grad(), quiet(self.pipe), told_once():
            for index in range(len(self.images)):
                for call in self._dense_calls(index):
                    timestep = float(torch.as_tensor(call[0][1]).flatten()[0])
                    dense = self._dense(call)
                    for case in cases:
                        for (level, layer), error in self._errors(case, call, dense).items():
                            found.setdefault((case.name, timestep, level, layer), []).append(error)
        return [
            {
                "benchmark": BENCHMARK,
                "case": case,
                "height": self.size[0],
                "width": self.size[1],
                "timestep": timestep,
                "level": level,
                "layer": layer,
                "images": len(errors),
                "error": (interval := intervals.of_mean(np.array(errors))) and interval.to_dict(),
            }
            for (case, timestep, level, layer), errors in found.items()
        ]

    def _dense_calls(self, index: int) -> list[_Call]:
        """The UNet's arguments at the chosen moments of a dense run."""
        calls: list[_Call] = []

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            calls.append((args, kwargs))

        prompt, seed = self.images[index]
        handle = self.pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            take_shot(self.pipe, self.settings, prompt, seed, self.steps, _go_on, label="dense", number=index)
        finally:
            handle.remove()
        middles = (np.arange(self.moments) + 0.5) / self.moments
        return [calls[i] for i in np.unique((middles * len(calls)).astype(int))]

    def _dense(self, call: _Call) -> Dense:
        dense = Dense()

        def enter(block: Any, args: Any, kwargs: Any) -> None:
            dense.inputs[block] = args[0] if args else kwargs["hidden_states"]

        def leave(block: Any, args: Any, output: Tensor) -> None:
            dense.outputs[block] = output

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leave).remove)
            stack.enter_context(self._sums_into(dense.sums))
            dense.prediction = self._predict(call)
        return dense

    def _errors(self, case: Case, call: _Call, dense: Dense) -> dict[tuple[int | None, str], float]:
        """Relative errors: of each layer, and of the prediction."""
        bound = bind_checked(case, self.pipe, self.steps)
        with bound.applied():
            prediction = self._predict(call)
        sums: dict[nn.Module, Tensor] = {}
        with bound.applied(), ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_hook(lambda block, args, output: dense.outputs[block]).remove)
            stack.enter_context(self._sums_into(sums))
            self._predict(call)
        # The blocks' inputs are equal, so the sums differ by the attentions' outputs alone.
        found: dict[tuple[int | None, str], float] = {
            place: _ratio(sums[block] - dense.sums[block], dense.sums[block] - dense.inputs[block])
            for block, place in self.blocks.items()
        }
        found[None, PREDICTION] = _ratio(prediction - dense.prediction, dense.prediction)
        return found

    @contextmanager
    def _sums_into(self, sums: dict[nn.Module, Tensor]) -> Iterator[None]:
        """Keep the sum of block input and self-attention, which is what the next norm of each block gets."""
        with ExitStack() as stack:
            for block in self.blocks:
                norm: Any = next(
                    n for n in (getattr(block, "norm2", None), getattr(block, "norm3", None)) if n is not None
                )

                def keep(module: Any, args: Any, block: nn.Module = block) -> None:
                    sums[block] = args[0]

                stack.callback(norm.register_forward_pre_hook(keep).remove)
            yield

    def _predict(self, call: _Call) -> Tensor:
        args, kwargs = call
        output = self.pipe.unet(*args, **kwargs)
        return output[0]


def _ratio(difference: Tensor, reference: Tensor) -> float:
    return float(difference.double().norm() / reference.double().norm())


def _go_on(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    return values


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """For each case, its layers by timestep; a level's own rows are together, the prediction is last."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        same = [row for row in rows if row["case"] == case]
        times = sorted({row["timestep"] for row in same}, reverse=True)
        table = Table(title=f"{case}: relative error at {same[0]['width']} x {same[0]['height']}")
        for heading in ("level", "layer", *(f"t = {time:g}" for time in times)):
            table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
        places = dict.fromkeys((row["level"], row["layer"]) for row in same)
        for level, layer in sorted(places, key=lambda place: place[0] or np.inf):
            by_time = {row["timestep"]: row["error"] for row in same if (row["level"], row["layer"]) == (level, layer)}
            table.add_row(str(level or ""), layer, *(_cell(by_time.get(time)) for time in times))
        found.append(table)
    return found


def _cell(error: dict[str, float] | None) -> str:
    return "-" if error is None else f"{error['value']:.2%}"
