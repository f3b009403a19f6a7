"""Which tokens the coarse grid takes, against ``torch.nn.functional.interpolate`` itself."""

import pytest
import torch
import torch.nn.functional as F

from todo_attn import ops
from todo_attn.ops import reference
from todo_attn.ops.downsample import _float32, _source_index

INTERPOLATE = {"nearest": "nearest", "nearest-exact": "nearest-exact", "mean": "area"}


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_index_is_interpolates_for_every_size(mode):
    """Every size up to 256 and coarse size; float32 rounding makes some differ from integer arithmetic.

    Each index differs from the one before, on which the gradient relies.
    """
    odd_ones = 0
    for size in range(1, 257):
        line = torch.arange(size, dtype=torch.float32).view(1, 1, size)
        for coarse in range(1, size + 1):
            expected = F.interpolate(line, size=coarse, mode=mode).view(-1).long()
            actual = _source_index(size, coarse, mode == "nearest-exact", torch.device("cpu"))
            assert torch.equal(actual, expected), (size, coarse)
            assert (actual.diff() > 0).all()
            twice = 2 * torch.arange(coarse) + (mode == "nearest-exact")
            odd_ones += not torch.equal(expected, (twice * size // (2 * coarse)).clamp_max(size - 1))
    assert odd_ones > 0, "the sizes where float32 differs from integer arithmetic are among those tried"


def test_float32_rounding():
    for numerator in range(1, 700):
        for denominator in (1, 3, 7, 26, 106, 511):
            expected = torch.tensor(numerator / denominator, dtype=torch.float64).float().item()
            assert _float32(numerator / denominator) == expected


@pytest.mark.parametrize("mode", list(INTERPOLATE))
@pytest.mark.parametrize(
    ("grid", "factor"),
    [
        *[((8, 8), 2), ((9, 7), 2), ((65, 65), 2), ((106, 62), (4, 8)), ((5, 13), (5, 1)), ((3, 4), (3, 4))],
        *[((6, 6), 1), ((96, 96), 1.5), ((65, 37), 1.5), ((9, 14), (1.5, 2)), ((11, 10), 1.1), ((7, 13), (2.75, 13.0))],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_reference(mode, grid, factor, dtype):
    # Strided on purpose: a slice of a transposed buffer.
    x = torch.randn(24, grid[0] * grid[1], 3).to(dtype).permute(2, 1, 0)[..., ::2]
    actual = ops.downsample_tokens(x, grid, factor, mode=mode)
    assert actual.dtype == dtype
    if mode == "mean":
        exact = reference.downsample_tokens(x.double(), grid, factor, mode=mode)
        bound = (reference.downsample_tokens(x, grid, factor, mode=mode).double() - exact).abs().max()
        eps = torch.finfo(dtype).eps * exact.abs().max()
        assert (actual.double() - exact).abs().max() <= max(2 * bound, eps)
    else:
        assert torch.equal(actual, reference.downsample_tokens(x, grid, factor, mode=mode))


def test_reference_is_interpolate():
    """The oracle itself, against one plain call on an image."""
    image = torch.randn(2, 5, 11, 14, dtype=torch.float64)
    for mode, name in INTERPOLATE.items():
        expected = F.interpolate(image.float(), size=(5, 4), mode=name).flatten(2).transpose(1, 2)
        actual = reference.downsample_tokens(image.float().flatten(2).transpose(1, 2), (11, 14), (2, 3), mode=mode)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("factor", [1, 1.0, 1.25, 1.5, 1.6, 2, 2.5, 3, 3.3, 10], ids=str)
@pytest.mark.parametrize("grid", [(96, 96), (64, 80), (65, 37), (11, 10)], ids=str)
def test_as_the_published_code_does(grid, factor):
    """It divides each side by the factor, drops the fraction, and interpolates an image of the tokens to that size."""
    image = torch.randn(2, 3, *grid)
    size = [int(side / factor) for side in grid]
    for mode, name in INTERPOLATE.items():
        expected = F.interpolate(image, size=size, mode=name)
        actual = ops.downsample_tokens(image.flatten(2).transpose(1, 2), grid, factor, mode=mode)
        expected = expected.flatten(2).transpose(1, 2)
        if mode == "mean":
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_published_modes_with_other_names(factor):
    """What each is here, where the factor divides the grid; "avg_pool" has the window of the rows on both axes."""
    grid = (60, 120)
    image = torch.randn(2, 3, *grid, dtype=torch.float64)
    size = [side // factor for side in grid]

    def ours(mode):
        tokens = ops.downsample_tokens(image.flatten(2).transpose(1, 2), grid, factor, mode=mode)
        return tokens.transpose(1, 2).unflatten(2, size)

    def close(a, b):
        return (a - b).abs().max() < 1e-12

    assert torch.equal(ours("area"), ours("mean")) and close(ours("area"), F.interpolate(image, size=size, mode="area"))
    window = grid[0] // size[0]
    assert close(ours("mean"), F.avg_pool2d(image, window, window))
    bilinear, bicubic = (F.interpolate(image, size=size, mode=mode) for mode in ("bilinear", "bicubic"))
    odd = factor % 2 == 1
    assert [close(ours(mode), bilinear) for mode in INTERPOLATE] == [False, odd, factor == 2]
    assert [close(ours(mode), bicubic) for mode in INTERPOLATE] == [False, odd, False]
    assert not any(close(ours(mode), F.max_pool2d(image, window, window)) for mode in INTERPOLATE)


def test_published_averages_differ_if_the_factor_does_not_divide_the_grid():
    """Pooling leaves the last row and column out; the windows of area overlap."""
    image = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    mean = ops.downsample_tokens(image.flatten(2).transpose(1, 2), (9, 9), 2, mode="area").transpose(1, 2)
    assert (mean - F.interpolate(image, size=(4, 4), mode="area").flatten(2)).abs().max() < 1e-12
    assert (mean - F.avg_pool2d(image, 2, 2).flatten(2)).abs().max() > 0.1


def test_a_fraction_equal_to_an_integer_is_that_integer():
    x = torch.randn(1, 77, 4)
    for mode in INTERPOLATE:
        fraction, integer = (ops.downsample_tokens(x, (7, 11), factor, mode=mode) for factor in (2.0, 2))
        assert torch.equal(fraction, integer)


def test_factor_one_is_the_input():
    x = torch.randn(2, 12, 4)
    assert ops.downsample_tokens(x, (3, 4)) is x


@pytest.mark.parametrize("mode", list(INTERPOLATE))
def test_gradient(mode):
    x = torch.randn(2, 7 * 9, 3, dtype=torch.float64, requires_grad=True)
    for factor in ((2, 3), (1.5, 2)):
        torch.autograd.gradcheck(lambda t, factor=factor: ops.downsample_tokens(t, (7, 9), factor, mode=mode), x)


def test_selection_commutes_with_projection():
    """What lets the processor take tokens before ``to_k`` and ``to_v``."""
    x, linear = torch.randn(2, 48, 8), torch.nn.Linear(8, 6)
    before = linear(ops.downsample_tokens(x, (6, 8), 2))
    after = ops.downsample_tokens(linear(x), (6, 8), 2)
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


def test_empty_batch():
    assert ops.downsample_tokens(torch.randn(0, 12, 4), (3, 4), 2).shape == (0, 2, 4)


@pytest.mark.parametrize("factor", [2, 1.5])
@pytest.mark.parametrize("mode", list(INTERPOLATE))
def test_traces_in_one_graph_at_changing_sizes(mode, factor):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, g: ops.downsample_tokens(x, g, factor, mode=mode), backend="eager", fullgraph=True
    )
    for grid in [(8, 8), (9, 7), (13, 21), (10, 21)]:
        x = torch.randn(1, grid[0] * grid[1], 4)
        expected = reference.downsample_tokens(x, grid, factor, mode=mode)
        torch.testing.assert_close(compiled(x, grid), expected, rtol=0, atol=1e-6 if mode == "mean" else 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 12)}, "x must have shape"),
        ({"x": [1.0]}, "x must be a torch.Tensor"),
        ({"x": torch.zeros(2, 12, 4, dtype=torch.int64)}, "x must be of dtype"),
        ({"grid": (3, 5)}, "grid must match the tokens of x"),
        ({"grid": 12}, "grid must be a pair"),
        ({"grid": (0, 4)}, "grid must be at least"),
        ({"grid": (3.0, 4.0)}, "grid must be a pair"),
        ({"factor": 0}, "factor must be at least 1"),
        ({"factor": -2}, "factor must be at least 1"),
        ({"factor": 4}, "factor must not exceed the grid"),
        ({"factor": 0.99}, "factor must be at least 1"),
        ({"factor": (1.5, 0.5)}, "factor must be at least 1"),
        ({"factor": 3.5}, "factor must not exceed the grid"),
        ({"factor": float("nan")}, "factor must be a finite number"),
        ({"factor": (2, float("inf"))}, "factor must be a finite number"),
        ({"factor": True}, "factor must be a finite number"),
        ({"factor": "2"}, "factor must be a finite number"),
        ({"factor": None}, "factor must be a finite number"),
        ({"factor": (1, 2, 3)}, "factor must be a finite number"),
        ({"mode": "bilinear"}, "mode must be one of"),
        ({"mode": ""}, "mode must be one of"),
        ({"mode": None}, "mode must be one of"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(2, 12, 4), "grid": (3, 4), "factor": 2, "mode": "nearest"} | change
    with pytest.raises(ValueError, match=message):
        ops.downsample_tokens(arguments["x"], arguments["grid"], arguments["factor"], mode=arguments["mode"])
