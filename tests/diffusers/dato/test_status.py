"""What status says about DaTo."""

import torch

from todo_attn import DaToConfig, apply_dato, remove_dato, reset_dato, status


@torch.no_grad()
def test_each_call_of_a_run(unet, inputs):
    assert status(unet).dato is None
    assert str(status(unet)).endswith("\n\nDaTo: off")
    apply_dato(unet, DaToConfig(prune_ratio=0.25, cache_schedule="1021"))
    assert str(status(unet)).endswith("\n\nDaTo: not called yet")
    given, seen = inputs(unet, (8, 8)), []
    for timestep in torch.tensor([900, 700, 500, 300, 100]):
        unet(given.sample, timestep, **given.kwargs)
        seen.append(status(unet).dato)
    assert [s.kind for s in seen] == ["full", "shallow", "reuse", "full", "shallow"]
    assert [(s.call, s.calls) for s in seen] == [(i, 5) for i in range(1, 6)]
    assert [s.prune_ratio for s in seen] == [0.25, 0.25, 0.0, 0.25, 0.25]  # a reuse call computes nothing
    assert [s.streams for s in seen] == [1, 1, 1, 1, 0]  # nothing is kept of a run that has ended
    assert str(seen[1]).startswith("DaTo, in the last call: shallow, call 2 of 5, 0.25 of the tokens pruned\n")
    assert "schedule 1021; kept for calls to come: 1 run" in str(seen[1])
    reset_dato(unet)
    assert status(unet).dato.kind == "not called yet"
    remove_dato(unet)
    assert status(unet).dato is None


@torch.no_grad()
def test_without_a_schedule_and_with_numbers(pipe, inputs):
    apply_dato(pipe)
    given = inputs(pipe.unet, (8, 8))
    pipe.unet(given.sample, 500, **given.kwargs)
    text = str(status(pipe))
    assert "full, call 1, 0.4 of the tokens pruned\nno schedule: every call is full" in text
