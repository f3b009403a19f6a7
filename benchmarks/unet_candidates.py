"""The candidates of the UNet benchmark: each method on a module tree of its own over the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

import todo_attn
from benchmarks import models
from benchmarks.unet_oracle import against_oracle
from benchmarks.unet_plan import Contender
from todo_attn import DaToConfig, ToDoConfig, logs
from todo_attn.bench.harness import Candidate, Sample, nothing
from todo_attn.bench.unet import CallTimes, Run
from todo_attn.compare.peers import DeepCache, apply_tome, tome_options
from todo_attn.config.schedule import FULL, SHALLOW
from todo_attn.models.architectures import PIXELS_PER_LATENT
from todo_attn.models.unets import twin
from todo_attn.options.methods import Method
from todo_attn.predict.timing import random_inputs

# Puts a method on a UNet, and returns what frees its memory after a run.
Patch = Callable[[UNet2DConditionModel], Callable[[], object]]


@dataclass
class UNetCandidate(Candidate):
    """A candidate that also has the times of each kind of call."""

    times: CallTimes = field(default_factory=lambda: CallTimes(FULL))


class Candidates:
    """Makes candidates over the same weights, inputs and timesteps.

    A candidate under ToDo is compared with the reference as it is built.

    Args:
        unet: stays as it is.
        height, width: of the image, in pixels.
        batch: of each call.
        calls: in a run.
        warmup: how many runs of each candidate, from the first on, are short; the last of them measures the share of
            self-attention.
        compiled: whether to use ``torch.compile``.
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
        self.inputs = random_inputs(unet, batch, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        self.timesteps = models.timesteps(unet.device, calls)
        self.calls, self.warmup, self.compiled = calls, warmup, compiled

    def dense(self) -> UNetCandidate:
        """diffusers' own attention; every call is computed in full."""
        return self._candidate("dense", lambda model: nothing, {"processor": AttnProcessor2_0.__name__})

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

        def patch(model: UNet2DConditionModel) -> Callable[[], object]:
            todo_attn.apply_todo(model, config)
            return nothing

        return self._candidate(name, patch, {"config": config.to_dict()}, todo=config)

    def dato(self, name: str, config: DaToConfig, schedule: str | None = None) -> UNetCandidate:
        """DaTo, with ToDo if ``config`` has it; its schedule must be for this number of calls."""

        def patch(model: UNet2DConditionModel) -> Callable[[], object]:
            todo_attn.apply_dato(model, config)
            return lambda: todo_attn.reset_dato(model)

        kinds = FULL + config.schedule_for(self.calls)
        return self._candidate(name, patch, {"schedule": schedule, "config": config.to_dict()}, kinds, config.todo)

    def _tome(self, name: str, ratio: float) -> UNetCandidate:
        options = tome_options(self.unet, ratio) | {"use_rand": not self.compiled}

        def patch(model: UNet2DConditionModel) -> Callable[[], object]:
            apply_tome(model, options, for_good=True)
            return nothing

        return self._candidate(name, patch, options)

    def _deepcache(self, name: str, interval: int) -> UNetCandidate:
        options = {"cache_interval": interval, "cache_branch_id": 0}
        kinds = "".join(SHALLOW if call % interval else FULL for call in range(self.calls))

        def patch(model: UNet2DConditionModel) -> Callable[[], object]:
            # On the CPU, so that its search for the timestep does not wait for a device.
            scheduler = SimpleNamespace(timesteps=self.timesteps.cpu())
            deepcache = DeepCache(SimpleNamespace(unet=model, scheduler=scheduler), options)
            deepcache.apply()
            if self.compiled:
                deepcache.compile()
            deepcache.free()
            return deepcache.free

        return self._candidate(name, patch, options, kinds, compile_whole=False)

    def _candidate(
        self,
        name: str,
        patch: Patch,
        info: dict[str, Any],
        kinds: str | None = None,
        todo: ToDoConfig | None = None,
        compile_whole: bool = True,
    ) -> UNetCandidate:
        times = CallTimes(kinds or FULL * self.calls)

        def build() -> Run:
            model = twin(self.unet)
            model.set_attn_processor(AttnProcessor2_0())
            after = patch(model)
            call = torch.compile(model, dynamic=False) if self.compiled and compile_whole else model
            share = not self.compiled
            run = Run(model, self.inputs, self.timesteps, times, call, after, info, self.warmup, share)
            if todo is not None:
                with against_oracle(model, todo):  # a wrong attention is not timed
                    run.rehearse()
            return run

        return UNetCandidate(name, build, info, times=times)


def check_output(baseline: torch.Tensor, output: torch.Tensor) -> None:
    """Refuse an output that cannot be right, so that it is not timed.

    Raises:
        ValueError: its shape is not the baseline's, or it is not finite.
    """
    if output.shape != baseline.shape:
        raise ValueError(f"output must have the shape {tuple(baseline.shape)}, got {tuple(output.shape)}")
    if not output.isfinite().all():
        raise ValueError("output must be finite")


def checked(meter: Callable[[Callable[..., Any]], Sample]) -> Callable[[Callable[..., Any]], Sample]:
    """``meter``, with the output of every sample checked: the warm-up runs are too short to show all errors."""

    def take(call: Callable[..., Any]) -> Sample:
        sample = meter(call)
        check_output(sample.output, sample.output)
        return sample

    return take


def check_exact(unet: UNet2DConditionModel, kinds: Sequence[str]) -> None:
    """Check that ToDo and DaTo equal dense attention if they leave nothing out: bit for bit on a CPU, closely on a GPU.

    Args:
        unet: stays as it is.
        kinds: which of "todo", "dato" and "todo+dato" to check; others are ignored.

    Raises:
        RuntimeError: one of them differs.
    """
    candidates = Candidates(unet, 128, 128, batch=2, calls=3)
    idle = ToDoConfig(factor=1)
    exact = {
        "todo": candidates.todo("ToDo with factor 1", idle),
        "dato": candidates.dato("DaTo that prunes and caches nothing", DaToConfig(prune_ratio=0)),
        "todo+dato": candidates.dato("ToDo+DaTo that leaves nothing out", DaToConfig(prune_ratio=0, todo=idle)),
    }
    with logs.silent():  # that nothing is left out is intended here
        dense = candidates.dense().build()()
        outputs = {candidate.name: candidate.build()() for kind, candidate in exact.items() if kind in kinds}
    for name, output in outputs.items():
        error = ((output - dense).float().norm() / dense.float().norm()).item()
        # Another attention kernel was seen to change an output by 2 (half precision) to 14 (fp32) times eps.
        if not (torch.equal(output, dense) if unet.device.type == "cpu" else error < 32 * torch.finfo(unet.dtype).eps):
            raise RuntimeError(f"{name} differs from dense attention by {error:.2g} of its norm")
