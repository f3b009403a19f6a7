"""What the high-water mark counts, and what it does not."""

import os

import pytest
import torch

from todo_attn import peak_memory
from todo_attn.peak_memory import watch_peak

CPU = torch.device("cpu")
MIB = 2**20
ABOUT = 1  # MiB: the kernel counts pages by processor, and adds them up now and then
# Asked of the system and not of what is tested.
can_measure = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not tell")


def hold(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB, dtype=torch.uint8)


@can_measure
def test_counts_what_was_held_at_once():
    peak = watch_peak(CPU)
    first = hold(64)
    del first
    second = hold(96)
    del second
    third = hold(16)
    assert 96 - ABOUT <= peak() / MIB < 96 + 8
    del third


@can_measure
def test_what_came_before_does_not_count():
    kept, freed = hold(64), [torch.ones(MIB // 16) for _ in range(256)]  # small buffers, which the allocator keeps
    del freed
    peak = watch_peak(CPU)
    held = hold(32)
    assert 32 - ABOUT <= peak() / MIB < 32 + 8
    again = [torch.ones(MIB // 16) for _ in range(256)]  # 64 MiB in all
    assert 96 - ABOUT <= peak() / MIB < 96 + 8
    del kept, held, again


@pytest.mark.parametrize("present", [False, True], ids=["no /proc", "not allowed"])
def test_none_where_it_cannot_be_told(tmp_path, monkeypatch, present):
    if present:
        (tmp_path / "clear_refs").mkdir()  # which no process can write to, whoever runs it
    monkeypatch.setattr(peak_memory, "_PROCESS", tmp_path)
    assert watch_peak(CPU)() is None


def test_none_on_other_devices():
    assert watch_peak(torch.device("mps"))() is None


@pytest.mark.gpu
def test_cuda_counts_what_torch_held():
    kept = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
    peak = watch_peak(kept.device)
    held = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    del held
    assert 40 * MIB <= peak() < 64 * MIB
