"""To which stream a call of the UNet belongs: host logic alone, without a UNet, and no tensor is read for it.

A *stream* is the calls that follow one image, or one batch of images, from step to step: the same timesteps, the same
prompt embeddings, the same shape. Guidance in one batched call is one stream, guidance in two calls a step is two, and
requests that take turns on a UNet have one each. What DaTo keeps from call to call belongs to a stream.

Tensors are told apart by the memory that they lie in, and a stream holds those it is known by, so that no other tensor
can take their place there. A timestep that is an element of the scheduler's tensor so tells which step it is, and of
which run. One that is not, a plain number say, tells neither: a run that was broken off and another image that starts
lower would look like one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

# Runs that were given up keep their memory until this many others have been called since.
_MOST = 16

# What tells a stream from others of the same timesteps and prompt: shape, dtype and device of the sample.
Inputs: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]


class Stream:
    """One stream: where it is, and what DaTo keeps of it."""

    def __init__(self, timestep: Any, prompt: Any, inputs: Inputs) -> None:
        self.timestep = timestep  # of the last call
        self.prompt = prompt
        self.inputs = inputs
        self.owner: weakref.ref[Any] | None = None  # the pipeline that calls, if it is known
        self.position: int | None = None  # of the last call among its timesteps; None if that is not known
        self.index = 0  # of the last call, among the ``calls`` of its run
        self.calls: int | None = None  # None if that is not known
        self.running = False  # in a call that has not ended
        self.repeated = False  # called more than once at ``position``
        self.gaps = 0  # how often in a row a call was at an element further on than the next
        self.forget()

    def forget(self) -> None:
        """Start anew: the next call is computed in full."""
        self.fresh = True
        self.joined = False  # another stream was at this step before
        self.digits: str | None = None  # the schedule of its run; None computes every call in full
        self.paired = False  # whether the batch is two halves of the same images, without and with their prompts
        self.release()

    def release(self) -> None:
        """Keep no tensor of what was computed."""
        self.hidden: torch.Tensor | None = None  # what a shallow call starts from
        self.shapes: list[Any] = []  # what the blocks that are left out return, as tensors of one element, expanded
        self.output: torch.Tensor | None = None
        self.before: torch.Tensor | None = None  # the output before that
        self.generators: dict[torch.device, torch.Generator] = {}

    @property
    def finished(self) -> bool:
        """Whether the last call was the last of its run."""
        return self.calls is not None and self.index >= self.calls - 1

    def is_for(self, timestep: Any, prompt: Any, inputs: Inputs) -> bool:
        return self.inputs == inputs and _same(self.prompt, prompt) and self.is_along(timestep)

    def is_along(self, timestep: torch.Tensor) -> bool:
        """Whether ``timestep`` is an element of the same timesteps."""
        return shares_memory(timestep, self.timestep)


class Streams:
    """The streams of one UNet. ``say(key, what)`` is told what cannot be known, and what is done then."""

    def __init__(self, say: Callable[[str, str], None]) -> None:
        self._streams: list[Stream] = []  # the one called last is the last
        self._say = say

    def of(self, timestep: Any, prompt: Any, inputs: Inputs) -> Stream:
        """The stream that a call belongs to, moved on to this call; ``fresh`` if nothing that is kept may serve it.

        A stream goes on with the next element of its timesteps. Anything else starts it anew: an element that is not
        the next, or a call that never ended. Two calls at the same element with the same prompt may be two images, or
        one that starts over: both are fresh, and so is the call after them. A timestep that is not an element of a
        longer tensor cannot be placed: its stream is new, has no ``position``, and is not kept.
        """
        position = position_of(timestep)
        if position is None:
            return Stream(timestep, prompt, inputs)
        along = [stream for stream in self._streams if stream.is_along(timestep)]
        stream = next((s for s in along if s.is_for(timestep, prompt, inputs)), None)
        step = _step(along, stream, position)
        if stream is None:
            self._meet(along, position)
            stream = Stream(timestep, prompt, inputs)
        else:
            self._streams.remove(stream)
            self._move(stream, position)
        if stream.fresh:
            stream.index, stream.calls = step or (0, None)
            stream.joined = any(other is not stream and other.position == position for other in along)
        stream.timestep, stream.position = timestep, position
        self._streams.append(stream)
        if len(self._streams) > _MOST:
            del self._streams[0]
            self._say(
                "many",
                f"more than {_MOST} runs are under way. The one that was called least lately is forgotten, and starts "
                "anew, in full, when it is called again",
            )
        return stream

    def drop(self, stream: Stream) -> None:
        """Forget ``stream``, whose run has ended."""
        self._streams = [other for other in self._streams if other is not stream]

    def give_to(self, stream: Stream, pipe: Any) -> None:
        """``pipe`` makes ``stream``, which starts a run: what it has not finished before, it never will."""
        stream.owner = weakref.ref(pipe)
        self._streams = [
            other
            for other in self._streams
            if other.owner is None or other.owner() is not pipe or other.is_along(stream.timestep)
        ]

    def clear(self) -> None:
        self._streams = []

    def __len__(self) -> int:
        return len(self._streams)

    def _meet(self, along: list[Stream], position: int) -> None:
        """A stream is new: say so if another stood a call before it, whose continuation it may be."""
        positions = {stream.position for stream in along}
        if position not in positions and position - 1 in positions:
            self._say(
                "prompt",
                "in the middle of a run the prompt embeddings (encoder_hidden_states) are another tensor than before, "
                "so the call is computed in full. If a loop makes them anew in every step, make them once, before it",
            )

    def _move(self, stream: Stream, position: int) -> None:
        """Decide whether ``stream`` goes on at ``position``; otherwise it starts anew."""
        assert stream.position is not None
        gap = position - stream.position
        again = gap == 0 and not stream.running
        if again and stream.index:  # in a run of one step each is another image, and full in any case
            self._say(
                "repeated",
                "the UNet is called more than once at a timestep with the same prompt embeddings: which call goes "
                "on from which cannot be known, so they are computed in full",
            )
        stream.gaps = stream.gaps + 1 if gap > 1 else 0
        if stream.gaps == 2:
            self._say(
                "gaps",
                "the timesteps are not taken one after the other from their tensor, so every call is computed in "
                "full. If they are a view of every n-th element, pass timesteps.contiguous()",
            )
        if gap == 1 and not (stream.running or stream.repeated):
            stream.index += 1
            stream.fresh = False
        else:
            stream.forget()
        stream.repeated = again


def _step(along: list[Stream], stream: Stream | None, position: int) -> tuple[int, int | None] | None:
    """Which call of how many this is, by its own stream or another that is at this step or the one before.

    None if it starts a run. So guidance in two calls a step has both computed in full at the same steps, also if one of
    them joins late.
    """
    for other in reversed(along):
        assert other.position is not None
        gap = position - other.position
        if gap >= 0 and (other is stream or gap <= 1):
            return other.index + gap, other.calls
    return None


def position_of(timestep: Any) -> int | None:
    """The place of ``timestep`` in its tensor; None if it is not an element of a longer one. Nothing is read."""
    return int(timestep.storage_offset()) if is_element(timestep) else None


def elements_from(timestep: Any) -> int | None:
    """How many elements its tensor has from ``timestep`` on; None if it is not an element of a longer one."""
    if not is_element(timestep):
        return None
    return int(timestep.untyped_storage().nbytes() // timestep.element_size() - timestep.storage_offset())


def is_element(timestep: Any) -> bool:
    """Whether it is one element of a longer tensor, as in ``for t in scheduler.timesteps``, expanded or not."""
    if not isinstance(timestep, torch.Tensor):
        return False
    if any(size > 1 and stride > 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
        return False
    return timestep.untyped_storage().nbytes() > timestep.element_size()


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.device == other.device and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _same(one: Any, other: Any) -> bool:
    """Whether both are the same part of the same tensor, or the same object."""
    if one is other:
        return True
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    return (
        one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and one.storage_offset() == other.storage_offset()
        and one.device.type != "meta"
        and shares_memory(one, other)
    )
