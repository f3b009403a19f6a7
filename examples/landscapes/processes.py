"""The processes of one training run, which torchrun starts; one process without it.

Every process draws the same batch from the seed and the step, and computes its part. The mean of their gradients is
that of the whole batch, so all of them keep the same weights. The first one writes the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes, if torchrun started any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def part(batch):
    """This process's part of a batch, a tensor or a list. Batches must divide by the number of processes."""
    if len(batch) % world():
        raise ValueError(f"a batch of {len(batch)} must divide by the number of processes, which is {world()}")
    return batch[rank() :: world()]


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Give all processes the mean of their gradients."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def any_of(mine: bool) -> bool:
    """Whether it is so for any process; all of them get the same answer."""
    if world() == 1:
        return mine
    found = torch.tensor(float(mine))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def wait() -> None:
    """Wait for the others."""
    if world() > 1:
        dist.barrier()
