"""The candidates of the UNet benchmark: each method on a module tree of its own over the same weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

import todo_attn
from benchmarks import models
from benchmarks.unet_oracle import against_oracle
from benchmarks.unet_peers import apply_deepcache, apply_tome
from benchmarks.unet_plan import Contender
from todo_attn import DaToConfig, ToDoConfig
from todo_attn.bench.harness import Candidate, Sample, nothing
from todo_attn.bench.unet import CallTimes, Run
from todo_attn.config.schedule import FULL, SHALLOW
from todo_attn.diffusers.levels import transformers_by_level
from todo_attn.models.unets import twin
from todo_attn.options.methods import Method

# Puts a method on a UNet, and gives what is to be called and what frees memory after a run.
Apply = Callable[[UNet2DConditionModel], tuple[Callable[..., Any], Callable[[], object]]]


@dataclass
class UNetCandidate(Candidate):
    """A candidate that also tells how long each kind of call took in its last run."""

    times: CallTimes = field(default_factory=lambda: CallTimes(FULL))


class Candidates:
    """Makes candidates over the same weights, inputs and timesteps.

    A candidate under ToDo is held against the oracle as it is built.

    Args:
        unet: stays as it is.
        height, width: of the picture, in pixels.
        batch: of each call.
        calls: in a run.
        warmup: the first so many runs of each candidate are short, and in the last of them its self-attention is timed.
        compiled: through ``torch.compile``.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        height: int,
        width: int,
        batch: int,
        calls: int = 1,
        warmup: int = 0,
        compiled: bool = False,
    ) -> None:
        self.unet, self.height, self.width = unet, height, width
        self.inputs = models.inputs(unet, height, width, batch)
        self.timesteps = models.timesteps(unet.device, calls)
        self.calls, self.warmup, self.compiled = calls, warmup, compiled

    def dense(self) -> UNetCandidate:
        """diffusers' own attention, and nothing left out."""
        return self._candidate("dense", self._whole(nothing), {"processor": AttnProcessor2_0.__name__})

    def of(self, contender: Contender) -> UNetCandidate:
        """The candidate of any other method."""
        name, method, options = contender.name, Method(contender.kind), contender.options
        if contender.kind == "todo":
            return self.todo(name, options.todo_config(method, self.height, self.width))
        if contender.kind == "tome":
            return self._tome(name, options.tome_ratio_of(method))
        if contender.kind == "deepcache":
            return self._deepcache(name, options.cache_interval_of(method))
        return self.dato(name, options.dato_config(method, self.calls, self.height, self.width), options.schedule)

    def todo(self, name: str, config: ToDoConfig) -> UNetCandidate:
        """ToDo."""
        apply = self._whole(lambda model: todo_attn.apply_todo(model, config))
        return self._candidate(name, apply, {"config": config.to_dict()}, todo=config)

    def dato(self, name: str, config: DaToConfig, schedule: str | None = None) -> UNetCandidate:
        """DaTo, and ToDo with it where ``config`` says so; its digits must be for just these calls."""
        apply = self._whole(lambda model: todo_attn.apply_dato(model, config), after=todo_attn.reset_dato)
        kinds = FULL + config.schedule_for(self.calls)
        return self._candidate(name, apply, {"schedule": schedule, "config": config.to_dict()}, kinds, config.todo)

    def _tome(self, name: str, ratio: float) -> UNetCandidate:
        # tomesd's own default is level 1, where SDXL has no attention.
        finest = min(level for level, _ in transformers_by_level(self.unet))
        options = {"ratio": ratio, "max_downsample": finest, "use_rand": not self.compiled}
        return self._candidate(name, self._whole(lambda model: apply_tome(model, options)), options)

    def _deepcache(self, name: str, interval: int) -> UNetCandidate:
        options = {"cache_interval": interval, "cache_branch_id": 0}
        kinds = "".join(SHALLOW if call % interval else FULL for call in range(self.calls))

        def apply(model: UNet2DConditionModel) -> tuple[Callable[..., Any], Callable[[], object]]:
            return model, apply_deepcache(model, self.timesteps, options, self.compiled)

        return self._candidate(name, apply, options, kinds)

    def _whole(self, patch: Callable[[Any], object], after: Callable[[Any], object] = nothing) -> Apply:
        """``patch`` on the UNet, which is then called, or compiled, as a whole; ``after`` each run."""

        def apply(model: UNet2DConditionModel) -> tuple[Callable[..., Any], Callable[[], object]]:
            patch(model)
            return torch.compile(model, dynamic=False) if self.compiled else model, lambda: after(model)

        return apply

    def _candidate(
        self, name: str, apply: Apply, info: dict[str, Any], kinds: str | None = None, todo: ToDoConfig | None = None
    ) -> UNetCandidate:
        times = CallTimes(kinds or FULL * self.calls)

        def build() -> Run:
            model = twin(self.unet)
            model.set_attn_processor(AttnProcessor2_0())
            call, after = apply(model)
            share = not self.compiled
            run = Run(model, self.inputs, self.timesteps, times, call, after, info, self.warmup, share)
            if todo is not None:
                with against_oracle(model, todo):  # a wrong attention is not timed
                    run.rehearse()
            return run

        return UNetCandidate(name, build, info, times=times)


def check_output(baseline: torch.Tensor, output: torch.Tensor) -> None:
    """An output that no image could come from is not worth timing."""
    if output.shape != baseline.shape:
        raise ValueError(f"output must have the shape {tuple(baseline.shape)}, got {tuple(output.shape)}")
    if not output.isfinite().all():
        raise ValueError("output must be finite")


def checked(meter: Callable[[Callable[..., Any]], Sample]) -> Callable[[Callable[..., Any]], Sample]:
    """``meter``, whose every sample must end in a finite output: warm-up, which is checked too, is shorter."""

    def take(call: Callable[..., Any]) -> Sample:
        sample = meter(call)
        check_output(sample.output, sample.output)
        return sample

    return take


def check_exact(unet: UNet2DConditionModel, kinds: Sequence[str]) -> None:
    """Told to leave nothing out, ToDo and DaTo are dense: a run ends in the same bits on a CPU, elsewhere near them.

    Args:
        unet: stays as it is.
        kinds: of "todo", "dato" and "todo+dato", those to check; others are passed over.

    Raises:
        RuntimeError: one of them is not.
    """
    candidates = Candidates(unet, 128, 128, batch=2, calls=3)
    idle = ToDoConfig(factor=1)
    exact = {
        "todo": candidates.todo("ToDo with factor 1", idle),
        "dato": candidates.dato("DaTo that prunes and caches nothing", DaToConfig(prune_ratio=0)),
        "todo+dato": candidates.dato("ToDo+DaTo that leaves nothing out", DaToConfig(prune_ratio=0, todo=idle)),
    }
    log = logging.getLogger("todo_attn")
    level = log.level
    log.setLevel(logging.ERROR)  # that factor 1 changes nothing is the point here
    try:
        dense = candidates.dense().build()()
        outputs = {candidate.name: candidate.build()() for kind, candidate in exact.items() if kind in kinds}
    finally:
        log.setLevel(level)
    for name, output in outputs.items():
        error = ((output - dense).float().norm() / dense.float().norm()).item()
        # Another attention kernel moved such an output by 2 (half precision) to 14 (fp32) times its dtype's precision.
        if not (torch.equal(output, dense) if unet.device.type == "cpu" else error < 32 * torch.finfo(unet.dtype).eps):
            raise RuntimeError(f"{name} differs from dense attention by {error:.2g} of its norm")
