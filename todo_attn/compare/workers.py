"""The processes of one run: ``accelerate launch`` starts several, plain Python one."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

_PATIENCE = timedelta(days=7)  # shards may end hours apart


@dataclass(frozen=True)
class Shard:
    """The part of one process."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """Its indexes among ``count``."""
        return range(self.rank, count, self.world)


@dataclass(frozen=True)
class Workers:
    """This process among all.

    Args:
        device: its device; each process has a GPU of its own if there are enough.
        shard: its part.
        wait: returns after all processes have called it.
        gather: the lists of all processes as one, in every process.
    """

    device: torch.device
    shard: Shard = field(default_factory=Shard)
    wait: Callable[[], object] = int
    gather: Callable[[list[Any]], list[Any]] = list

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.shard.rank == 0

    @classmethod
    def joined(cls, device: str) -> Workers:
        """The processes that accelerate has started; ``device`` is "cpu", "cuda" or another of torch's."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(torch.device(device))
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
        # A process that ends with its threads running may abort, and then the launcher ends all others.
        atexit.register(state.destroy_process_group)
        shard = Shard(state.process_index, state.num_processes)
        return cls(state.device, shard, state.wait_for_everyone, gather_object)


def set_threads(threads: int | None, workers: Workers) -> None:
    """Set torch's threads; None is 1 for each of several processes on a CPU, else torch's own number.

    Processes that all took every core would wait for each other. And the number of threads decides the order of sums,
    so that one process gives the images of two to the last bit only with as many threads each.
    """
    if threads is None and workers.device.type == "cpu" and workers.shard.world > 1:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
