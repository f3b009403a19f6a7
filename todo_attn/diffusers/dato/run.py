"""The running call of a UNet under DaTo: which call of which run it is, and how much of the UNet it computes."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...config.dato import DaToConfig
from ...config.schedule import FULL, REUSE
from ...logs import logger
from ..caller import calling_pipeline
from ..patches import keeps_attention_maps
from ..streams import Stream, Streams


class Run:
    """The running call of a UNet under DaTo, as its hooks see it. Its stream holds what is kept between calls.

    ``kind``, ``ratio`` and ``hidden`` are plain attributes, because compiled graphs read them.
    """

    def __init__(self, config: DaToConfig) -> None:
        self.config = config
        self._said: set[str] = set()
        # Without a schedule every call is computed in full, and there is nothing to warn of.
        self.streams = Streams(self.say if config.cache_schedule is not None else lambda key, what: None)
        self.reset()

    def reset(self) -> None:
        """Forget every stream: the next call starts a run."""
        self.streams.clear()
        self.kind = FULL
        self.ratio = 0.0  # the share of tokens that the call prunes
        self.hidden: torch.Tensor | None = None  # what a shallow call starts from
        self._stream: Stream | None = None
        self._pooled: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def called(self) -> bool:
        """Whether there was a call since the last reset."""
        return self._stream is not None

    @property
    def stream(self) -> Stream:
        """The stream of the running call, or of the last one."""
        assert self._stream is not None
        return self._stream

    def begin(self, unet: nn.Module, sample: torch.Tensor, timestep: Any, prompt: Any) -> Stream:
        """Before a call of the UNet: decide its ``kind`` and ``ratio``."""
        stream = self.streams.of(timestep, prompt, (sample.shape, sample.dtype, sample.device))
        if stream.fresh:
            self._start(stream, unet)
        self._stream, self.hidden = stream, stream.hidden
        self.kind = FULL if stream.fresh or stream.digits is None else stream.digits[stream.index - 1]
        self.ratio = self.config.ratio_for(stream.index, stream.calls)
        self._pooled = {}
        stream.running = True
        return stream

    def end(self, output: torch.Tensor) -> torch.Tensor:
        """After a call that computed ``output``: what the UNet returns, which is an earlier output if it reuses one."""
        stream = self.stream
        stream.running = False
        stream.before = stream.output
        if self.kind == REUSE:
            assert stream.output is not None
            output = stream.output.clone()
        else:
            stream.output = output.detach().clone()  # a scheduler or a CUDA graph may overwrite the original
            stream.hidden = self.hidden
        if stream.finished or stream.position is None:  # no call continues one that cannot be placed
            self.streams.drop(stream)
            stream.release()
            self.hidden = None
        return output

    def score(self, batch: int, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """The score of each token (DaTo, section 3.2): (batch, N) fp32.

        The weighted sum of the difference of the last two outputs and noise; noise alone before there are two outputs.
        After a call that reused an output the difference is 0, as published. All samples get the same noise, so that an
        image does not depend on the rest of its batch. With guidance in one batch, the first half's scores are used for
        both halves.
        """
        stream = self.stream
        images = batch // 2 if stream.paired else batch
        if stream.output is None or stream.before is None:
            return self._noise(stream, grid, device).repeat(batch, 1)
        if grid not in self._pooled:
            # With offloading, outputs may be on another device than the blocks.
            change = (stream.output.float() - stream.before.float()).abs().mean(1, keepdim=True).to(device)
            self._pooled[grid] = F.adaptive_avg_pool2d(change, grid).flatten(1)
        score = self.config.dynamics_weight * self._pooled[grid][:images]
        if self.config.noise_weight != 0:
            score = score + self.config.noise_weight * self._noise(stream, grid, device)
        return torch.cat((score, score)) if stream.paired else score

    def _noise(self, stream: Stream, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """(1, N) fp32, the next from the stream's generator."""
        if device not in stream.generators:
            generator = torch.Generator("cpu" if device.type == "meta" else device)  # there is none for meta
            stream.generators[device] = generator.manual_seed(self.config.seed)
        return torch.randn((1, grid[0] * grid[1]), generator=stream.generators[device], device=device)

    def _start(self, stream: Stream, unet: nn.Module) -> None:
        """Start ``stream``: ask the calling pipeline, and fit the schedule to the calls that will come."""
        caller = calling_pipeline(unet)
        # A loop of the user's own does not say; most have both halves in one batch. In a guided pipeline, a second call
        # at the same step is not for guidance.
        guided = True if caller is None else caller.guided and not stream.joined
        stream.paired = self.config.align_guidance and guided and stream.inputs[0][0] % 2 == 0
        if stream.calls is None:
            stream.expect(None if caller is None else caller.calls)
        if stream.position is None:
            if stream.calls != 1:  # a run of one call loses nothing
                self.say(
                    "unplaced",
                    "the timestep is not an element of a longer tensor, so which call of which run this is cannot be "
                    "known. It is taken for the first of a run: computed in full, its tokens chosen by noise alone. "
                    "Pass the elements of scheduler.timesteps",
                )
            return
        if caller is not None and stream.owner is None:
            self.streams.give_to(stream, caller.pipe)
        stream.digits = self.config.cache_schedule
        if stream.digits is None:
            return
        if keeps_attention_maps(unet):
            stream.digits = None
            self.say(
                "maps", "an attention processor keeps its maps for the pipeline, so every call is computed in full"
            )
        elif stream.calls is not None and stream.calls != len(stream.digits) + 1:
            self.say(
                f"resampled {stream.calls}",
                f"the schedule is for {len(stream.digits) + 1} calls of the UNet, and is resampled for the "
                f"{stream.calls} of this run",
                logging.INFO,
            )
            stream.digits = self.config.schedule_for(stream.calls)

    def say(self, key: str, what: str, level: int = logging.WARNING) -> None:
        """Log ``what``, once for each ``key``."""
        if key not in self._said:
            self._said.add(key)
            logger.log(level, "DaTo: %s.", what)
