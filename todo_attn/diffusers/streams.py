"""Which stream a call of a model belongs to. This logic needs no model, and reads no tensor's values.

A *stream* is the calls that follow one image, or one batch of images, from step to step: the same timesteps, prompt
embeddings and shape. Guidance in one batched call is one stream, guidance in two calls a step is two, and requests that
alternate on a UNet have one each. What DaTo keeps between calls belongs to a stream.

Tensors are identified by their memory. A stream holds the tensors that identify it, so no other tensor can get their
memory. A timestep that is an element of the scheduler's tensor thus tells the step and the run. A plain number tells
neither: an interrupted run and the start of another image at a lower timestep would look alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

# How many streams are kept. A run that was abandoned holds its memory until this many others were called after it.
_MOST = 16

# Whatever else is the same in all calls of a stream: for DaTo the shape, dtype and device of the sample.
Inputs: TypeAlias = tuple[Any, ...]


class Stream:
    """One stream: its place in its run, and what DaTo keeps for it."""

    def __init__(self, timestep: Any, prompt: Any, inputs: Inputs) -> None:
        self.timestep = timestep  # of the last call
        self.prompt = prompt
        self.inputs = inputs
        self.owner: weakref.ref[Any] | None = None  # the calling pipeline, if it is known
        self.position: int | None = None  # of the last call in the tensor of timesteps; None if it is not known
        self.index = 0  # of the last call in its run, from 0
        self.calls: int | None = None  # how many the run has; None if it is not known
        self.running = False  # a call has begun and not ended
        self.repeated = False  # it was called more than once at ``position``
        self.gaps = 0  # how many calls in a row skipped elements of the timesteps
        self.forget()

    def forget(self) -> None:
        """Start a new run: its first call is computed in full."""
        self.fresh = True
        self.joined = False  # another stream was at this step already
        self.digits: str | None = None  # the schedule of its run; None computes every call in full
        self.paired = False  # the batch has two halves: the same images without and with their prompts
        self.release()

    def release(self) -> None:
        """Free every tensor that was computed."""
        self.hidden: torch.Tensor | None = None  # what a shallow call starts from
        self.shapes: list[Any] = []  # of the outputs of the cached blocks, as expanded one-element tensors
        self.output: torch.Tensor | None = None
        self.before: torch.Tensor | None = None  # the output before ``output``
        self.generators: dict[torch.device, torch.Generator] = {}

    @property
    def finished(self) -> bool:
        """Whether the last call was the last of its run."""
        return self.calls is not None and self.index >= self.calls - 1

    def expect(self, announced: int | None) -> None:
        """The run has the calls that are left in the timesteps, or fewer if its pipeline ``announced`` fewer."""
        known = (elements_from(self.timestep), announced)
        self.calls = min((calls for calls in known if calls is not None), default=None)

    def is_for(self, timestep: Any, prompt: Any, inputs: Inputs) -> bool:
        return self.inputs == inputs and _same(self.prompt, prompt) and self.is_along(timestep)

    def is_along(self, timestep: torch.Tensor) -> bool:
        """Whether ``timestep`` is an element of the same timesteps."""
        return shares_memory(timestep, self.timestep)


class Streams:
    """The streams of one UNet. ``say(key, what)`` logs, once for each ``key``, what cannot be known."""

    def __init__(self, say: Callable[[str, str], None]) -> None:
        self._streams: list[Stream] = []  # the most recently called is the last
        self._say = say

    def of(self, timestep: Any, prompt: Any, inputs: Inputs) -> Stream:
        """The stream of a call, advanced to this call; ``fresh`` if the call must not use what is kept.

        A stream continues with the next element of its timesteps. It starts a new run at any other element, and after a
        call that never ended. Two calls at the same element with the same prompt may be two images or a restart: both
        are fresh, and so is the call after them. A timestep that is not an element of a longer tensor has no place in a
        run: its stream is new, has no ``position``, and is not kept.
        """
        position = position_of(timestep)
        if position is None:
            return Stream(timestep, prompt, inputs)
        along = [stream for stream in self._streams if stream.is_along(timestep)]
        stream = next((s for s in along if s.is_for(timestep, prompt, inputs)), None)
        step = _step(along, stream, position)
        if stream is None:
            self._warn_of_prompt(along, position)
            self._drop_of_other_timesteps(prompt, inputs, position)
            stream = Stream(timestep, prompt, inputs)
        else:
            self._streams.remove(stream)
            self._advance(stream, position)
        if stream.fresh:
            stream.index, stream.calls = step or (0, None)
            stream.joined = any(other is not stream and other.position == position for other in along)
        stream.timestep, stream.position = timestep, position
        self._streams.append(stream)
        if len(self._streams) > _MOST:
            del self._streams[0]
            self._say(
                "many",
                f"more than {_MOST} runs are under way. The least recently called is forgotten: if it is called again, "
                "it starts anew, in full",
            )
        return stream

    def drop(self, stream: Stream) -> None:
        """Forget ``stream``, whose run has ended."""
        self._streams = [other for other in self._streams if other is not stream]

    def give_to(self, stream: Stream, pipe: Any) -> None:
        """``pipe`` starts a run with ``stream``: forget its unfinished runs, which it cannot continue."""
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

    def _warn_of_prompt(self, along: list[Stream], position: int) -> None:
        """Warn if a new stream at ``position`` may be the continuation of another with other prompt embeddings."""
        positions = {stream.position for stream in along}
        if position not in positions and position - 1 in positions:
            self._say(
                "prompt",
                "in the middle of a run the prompt embeddings (encoder_hidden_states) are another tensor than before, "
                "so the call is computed in full. If a loop makes them anew in every step, make them once, before it",
            )

    def _drop_of_other_timesteps(self, prompt: Any, inputs: Inputs, position: int) -> None:
        """A loop that makes the timesteps anew for every call leaves a stream at each step, which none can continue."""
        behind = [s for s in self._streams if s.inputs == inputs and _same(s.prompt, prompt)]
        behind = [s for s in behind if s.position in (position - 1, position - 2)]
        if len({s.position for s in behind}) == 2:
            self._streams = [s for s in self._streams if s not in behind]
            self._say(
                "timesteps",
                "the timesteps are another tensor in every call, so every call is computed in full. If a loop converts "
                "or copies them in every step, do it once, before it",
            )

    def _advance(self, stream: Stream, position: int) -> None:
        """Continue ``stream`` at ``position``, or start a new run there."""
        assert stream.position is not None
        gap = position - stream.position
        again = gap == 0 and not stream.running
        if again and stream.index:  # at index 0 it is another image of one step, and full anyway
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
    """Index and number of calls, from the call's own stream or another at this step or the one before.

    None if the call starts a run. So the two streams of guidance in two calls a step have their full calls at the same
    steps, even if one of them joins late.
    """
    for other in reversed(along):
        assert other.position is not None
        gap = position - other.position
        if gap >= 0 and (other is stream or gap <= 1):
            return other.index + gap, other.calls
    return None


def position_of(timestep: Any) -> int | None:
    """The place of ``timestep`` in its tensor, without reading it; None if it is not an element of a longer one."""
    return int(timestep.storage_offset()) if is_element(timestep) else None


def elements_from(timestep: Any) -> int | None:
    """How many elements the tensor has from ``timestep`` on; None if it is not an element of a longer one."""
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
