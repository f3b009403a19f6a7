"""timestep_range: when ToDo acts, how the timestep may come, and that the full range never waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from todo_attn import ToDoConfig, apply_todo


@pytest.fixture
def outputs(unet, call):
    """(dense, ToDo at factor 2), at timestep t."""

    def outputs(timestep):
        dense = call(unet, timestep=timestep)
        apply_todo(unet, ToDoConfig(factor=2))
        return dense, call(unet, timestep=timestep)

    return outputs


@pytest.mark.parametrize(
    ("timestep", "acts"),
    [
        (199, False),
        (200, True),
        (500, True),
        (600, True),
        (600.5, False),
        (torch.tensor(200), True),
        (torch.tensor(601), False),
        (torch.tensor(599.9), True),
        (torch.tensor([300, 300]), True),
        (torch.tensor([100, 100]), False),
        (torch.tensor([300, 700]), False),  # every sample must be in the range
    ],
    ids=str,
)
@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_it_acts_inside_the_range(unet, call, outputs, timestep, acts, keyword):
    dense, todo = outputs(timestep)
    assert not torch.equal(dense, todo)
    apply_todo(unet, ToDoConfig(factor=2, timestep_range=(200, 600)))
    if keyword:
        forward = unet.forward
        unet.forward = lambda sample, timestep=None, encoder_hidden_states=None: forward(
            sample, timestep, encoder_hidden_states
        )
        generator = torch.Generator().manual_seed(0)
        sample, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 5, 8, generator=generator)
        with torch.no_grad():
            actual = unet(sample=sample, timestep=timestep, encoder_hidden_states=text).sample
    else:
        actual = call(unet, timestep=timestep)
    assert torch.equal(actual, todo if acts else dense)


def test_the_decision_is_of_the_running_call(unet, call):
    apply_todo(unet, ToDoConfig(factor=2, timestep_range=(0, 500)))
    first = call(unet, timestep=501)
    low = call(unet, timestep=499)
    assert torch.equal(call(unet, timestep=501), first)
    assert torch.equal(call(unet, timestep=499), low)


class NoHostSync(TorchDispatchMode):
    """Raises if a tensor's value is read on the host, or a tensor changes its device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "equal", "nonzero", "is_nonzero", "_to_copy") and (
            name != "_to_copy" or (kwargs or {}).get("device") is not None
        ):
            raise AssertionError(f"host sync: {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [(16, 16), (13, 9)], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
def test_the_full_range_never_reads_the_timestep(unet, call, mode, size):
    timestep = torch.tensor([500, 500])
    apply_todo(unet, ToDoConfig(factor=3, mode=mode))
    expected = call(unet, size, timestep=timestep)
    with NoHostSync():
        actual = call(unet, size, timestep=timestep)
    assert torch.equal(actual, expected)


def test_a_narrower_range_does(unet, call):
    """Shows that the check above can fail."""
    apply_todo(unet, ToDoConfig(factor=3, timestep_range=(1, 999)))
    with NoHostSync(), pytest.raises(AssertionError, match="host sync"):
        call(unet, timestep=torch.tensor([500, 500]))


@pytest.mark.parametrize("size", [(16, 16), (13, 9)], ids=str)
def test_the_full_range_runs_on_tensors_without_values(unet, size):
    """On the meta device any read of a value raises."""
    apply_todo(unet.to("meta"), ToDoConfig(factor=2))
    with torch.no_grad(), torch.device("meta"):
        out = unet(torch.empty(2, 4, *size), torch.empty(2), torch.empty(2, 5, 8)).sample
    assert out.shape == (2, 4, *size)
