"""Shared by the tests of the ops."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _WatchTensors(TorchDispatchMode):
    """Within, ``largest`` is the number of elements of the largest tensor that an op has returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture
def watch_tensors():
    return _WatchTensors
