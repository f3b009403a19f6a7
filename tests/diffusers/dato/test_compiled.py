"""torch.compile(unet): what a call computes is decided outside of the graphs, so their number does not grow."""

import pytest
import torch
import torch._dynamo.testing

from todo_attn.dato_config import DaToConfig
from todo_attn.diffusers.dato import apply_dato


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_same_outputs_and_no_new_graph_after_the_first_images(make_unet, calls):
    config, counter = DaToConfig(prune_ratio=0.0, cache_schedule="210"), torch._dynamo.testing.CompileCounter()
    unet, eager = make_unet("small"), make_unet("small")
    apply_dato(eager, config)
    compiled = torch.compile(unet, backend=counter)
    apply_dato(compiled, config)
    expected, graphs = calls(eager, 4, size=(8, 8)), []
    for _ in range(3):
        outputs = calls(compiled, 4, size=(8, 8))
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(outputs, expected, strict=True))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[2] == graphs[1]
