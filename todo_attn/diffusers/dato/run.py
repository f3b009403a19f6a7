"""One image's way through the UNet: which call of which run this is, and so how much of the UNet it computes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F

from ...dato_config import DaToConfig
from ...logs import logger
from ...schedule import FULL, REUSE


class Run:
    """What a UNet under DaTo carries from call to call; a new run forgets everything of the last one.

    Two ways to tell a new run. With a pipeline, its scheduler's ``timesteps``: ``set_timesteps`` makes another tensor,
    and a loop over the same one once more goes back in it. Without, or in a loop over another scheduler's, the timestep
    that the UNet is given: numbers and CPU tensors rise where a run starts; a timestep on a device is not read, and
    belongs to the run as long as it is the next element of the same tensor. A call that never ended (an exception, an
    interrupt) ends its run, and so does another shape, dtype or device.
    """

    def __init__(self, config: DaToConfig, pipe: Any | None = None) -> None:
        self.config = config
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._timesteps: torch.Tensor | None = None  # the scheduler's, held so that no other takes its place in memory
        self._last: tuple[Any, float | None] | None = None  # the last call's timestep, and its value where it was read
        self._said: set[str] = set()
        self._generators: dict[torch.device, torch.Generator] = {}
        self.reset()

    def reset(self) -> None:
        """The next call starts a run."""
        self.kind = FULL
        self.ratio = 0.0  # the share of tokens that the call prunes
        self.call = -1  # the running or last one, from 0
        self.hidden: torch.Tensor | None = None  # what a shallow call starts from
        self._running = False
        self._calls: int | None = None  # of this run, where it is known
        self._digits: str | None = None
        self._inputs: tuple[Any, ...] | None = None
        self._output: torch.Tensor | None = None
        self._before: torch.Tensor | None = None  # the output before that; None where there is no difference to take
        self._pooled: dict[tuple[int, int], torch.Tensor] = {}
        self._generators.clear()

    def begin(self, sample: torch.Tensor, timestep: Any) -> None:
        """Before a call of the UNet: decide its ``kind`` and ``ratio``."""
        inputs = (sample.shape, sample.dtype, sample.device)
        # Both are asked, because both remember what they saw.
        new_run = self._starts_run(timestep)
        if new_run or self._running or inputs != self._inputs:
            self.reset()
            self._inputs = inputs
            self._calls = self._count_calls(timestep)
            self._digits = self._schedule()
        self.call += 1
        self.kind = self._next_kind()
        self.ratio = self.config.ratio_for(self.call, self._calls)
        self._pooled = {}
        self._running = True

    def end(self, output: torch.Tensor) -> torch.Tensor:
        """After the call: what the UNet returns."""
        self._running = False
        if self.kind == REUSE:
            assert self._output is not None
            self._before = None  # the same twice tells nothing
            return self._output.clone()
        self._before = self._output
        self._output = output.detach().clone()  # a scheduler may write into it, and so does a CUDA graph
        return output

    @property
    def pipe(self) -> Any | None:
        """The pipeline whose scheduler is asked, where there is one still."""
        return None if self._pipe is None else self._pipe()

    def guidance_pairs(self, batch: int) -> bool:
        """Whether the batch is two halves of the same images, without and with their prompts."""
        guided = getattr(self.pipe, "do_classifier_free_guidance", True)
        if hasattr(self.pipe, "image_guidance_scale") or getattr(self.pipe, "do_perturbed_attention_guidance", False):
            guided = False  # three parts, not two halves
        return self.config.align_guidance and bool(guided) and batch % 2 == 0

    def score(self, batch: int, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """How telling each token is (DaTo, section 3.2): (batch, N) fp32 for the first ``batch`` samples.

        The difference of the last two outputs, and noise; noise alone where there is no difference.
        """
        if device not in self._generators:
            where = "cpu" if device.type == "meta" else device
            self._generators[device] = torch.Generator(where).manual_seed(self.config.seed)
        noise = torch.randn((batch, grid[0] * grid[1]), generator=self._generators[device], device=device)
        if self._output is None or self._before is None:
            return noise
        if grid not in self._pooled:
            # Offloading may hand outputs back on another device than the blocks run on.
            change = (self._output.float() - self._before.float()).abs().mean(1, keepdim=True).to(device)
            self._pooled[grid] = F.adaptive_avg_pool2d(change, grid).flatten(1)
        return self.config.dynamics_weight * self._pooled[grid][:batch] + self.config.noise_weight * noise

    def _next_kind(self) -> str:
        if self._digits is None or self.call == 0:
            return FULL
        if self.call > len(self._digits):
            self._say("run", f"this run is longer than its schedule of {len(self._digits)}: it goes on in full")
            return FULL
        return self._digits[self.call - 1]

    def _schedule(self) -> str | None:
        digits = self.config.cache_schedule
        if digits is None or self._calls is None or len(digits) == self._calls - 1:
            return digits
        self._say(
            f"resampled {self._calls}",
            f"the schedule is for {len(digits) + 1} calls of the UNet, and this run has {self._calls}: it is resampled",
        )
        return self.config.schedule_for(self._calls)

    def _say(self, key: str, what: str) -> None:
        if key not in self._said:
            self._said.add(key)
            logger.warning("DaTo: %s.", what)

    def _starts_run(self, timestep: Any) -> bool:
        value = _value(timestep)
        last, self._last = self._last, (timestep, value)
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        timesteps = timesteps if isinstance(timesteps, torch.Tensor) else None
        if last is None or timesteps is not self._timesteps:
            self._timesteps = timesteps
            return True
        before, value_before = last
        if timesteps is not None and _shares(timestep, timesteps):
            return not _shares(before, timesteps) or timestep.storage_offset() <= before.storage_offset()
        if value is not None and value_before is not None:
            return value > value_before
        if timesteps is not None and not _is_element(timestep):
            return False  # a copy, made on the device: only set_timesteps tells
        return not (_shares(timestep, before) and timestep.storage_offset() == before.storage_offset() + 1)

    def _count_calls(self, timestep: Any) -> int | None:
        """How many calls the run has. An image-to-image run starts late: at the scheduler's begin index."""
        timesteps = self._timesteps
        if timesteps is None:
            return None
        if _shares(timestep, timesteps):
            first = timestep.storage_offset() - timesteps.storage_offset()
        else:
            first = getattr(getattr(self.pipe, "scheduler", None), "begin_index", None) or 0
        return max(1, len(timesteps) - first)


def _shares(one: Any, other: Any) -> bool:
    """Whether both are tensors in the same memory."""
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    return one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _value(timestep: Any) -> float | None:
    """The timestep; None for one on a device, where reading it would wait for everything before."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.max()) if timestep.device.type == "cpu" else None
    return float(timestep)


def _is_element(timestep: Any) -> bool:
    """Whether it is a view into a longer tensor, and no copy of one number."""
    if not isinstance(timestep, torch.Tensor):
        return False
    return timestep.untyped_storage().nbytes() > timestep.numel() * timestep.element_size()
