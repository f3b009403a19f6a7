"""The packing kernel alone, bit for bit against the oracle, in rows poisoned with NaN."""

import pytest
import torch

from todo_attn.ops import reference

pytest.importorskip("triton")

from todo_attn.kernels.configs import tiles
from todo_attn.kernels.pack import Pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("bf16_in_the_interpreter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "mean"])
@pytest.mark.parametrize(
    ("grid", "factor"),
    [((9, 12), 1.5), ((7, 11), (1.5, 2)), ((10, 3), (1.1, 1)), ((5, 13), 2.75), ((6, 8), 2)],
    ids=str,
)
def test_rows(grid, factor, mode, dtype):
    """Small integers, whose means are exact before the last rounding."""
    head_dim, heads, tokens = 40, 2, grid[0] * grid[1]
    # Token strides of an odd number of elements.
    wide = torch.randint(-9, 10, (2, 2, tokens, heads * head_dim + 1), device=DEVICE).to(dtype)
    key, value = wide[..., 1:].unflatten(3, (heads, head_dim))
    exact = [
        reference.downsample_tokens(t.double().flatten(2), grid, factor, mode=mode).to(dtype).unflatten(2, (heads, -1))
        for t in (key, value)
    ]
    fh, fw = factor if isinstance(factor, tuple) else (factor, factor)
    coarse = (int(grid[0] / fh), int(grid[1] / fw))
    keys, rows = exact[0].shape[1], 96
    tile = tiles((9, 0), head_dim)
    pack = Pack(key, value, grid, coarse, mode, False, rows, tile)
    packed = [
        torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for shape in (pack._key_shape, pack._value_shape)
    ]
    pack._launch(key, value, *packed)
    got = [t.view(2, heads, rows, -1).transpose(1, 2) for t in packed]
    for actual, expected in zip(got, exact, strict=True):
        assert torch.equal(actual[:, :keys, :, :head_dim], expected)
    assert torch.equal(got[0][:, keys:, :, :head_dim], exact[0][:, -1:].expand(-1, rows - keys, -1, -1))
    assert not got[0][..., head_dim:].any()
    assert not got[1][:, keys:].any()
    assert torch.equal(got[1][:, :keys, :, head_dim:].sum(-1), torch.full_like(got[1][:, :keys, :, 0], tile.ones))
