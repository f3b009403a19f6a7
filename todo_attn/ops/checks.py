"""Argument checks: each raises an ``ArgumentError``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import modes
from ..config.checks import ArgumentError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.int32, torch.int64)


def tensor(name: str, x: object, dims: str, dtypes: Sequence[torch.dtype]) -> torch.Tensor:
    """``x`` must be a strided tensor with one of ``dtypes`` and as many dimensions as ``dims`` ("B, N, C") has."""
    if not isinstance(x, torch.Tensor):
        raise ArgumentError(name, f"must be a torch.Tensor of shape ({dims}), got {type(x).__name__}")
    if x.dim() != dims.count(",") + 1:
        raise ArgumentError(name, f"must have shape ({dims}), got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ArgumentError(name, f"must be of dtype {names}, got {str(x.dtype).removeprefix('torch.')}")
    return x


def same_device(name: str, x: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """``x`` must be on the device of ``like``."""
    if x.device != like.device:
        raise ArgumentError(name, f"must be on the device of {like_name}, {like.device}, got {x.device}")


def same(name: str, x: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """``x`` must share the dtype and the device of ``like``."""
    if x.dtype != like.dtype:
        raise ArgumentError(name, f"must have the dtype of {like_name}, {like.dtype}, got {x.dtype}")
    same_device(name, x, like_name, like)


def tokens(name: str, x: object) -> torch.Tensor:
    """``x`` must be a (B, N, C) tensor of a float dtype."""
    return tensor(name, x, "B, N, C", FLOATS)


def channels(name: str, x: torch.Tensor) -> None:
    """``x`` (B, N, C) must have a channel."""
    if x.shape[2] < 1:
        raise ArgumentError(name, f"must have at least one channel, got shape {tuple(x.shape)}")


def index(name: str, value: object, dims: str, like_name: str, like: torch.Tensor) -> torch.Tensor:
    """``value`` must be an int32 or int64 (B, ...) tensor on the device of ``like`` and with its batch."""
    value = tensor(name, value, dims, INDICES)
    same_device(name, value, like_name, like)
    if value.shape[0] != like.shape[0]:
        raise ArgumentError(
            name, f"must have the batch of {like_name}, {like.shape[0]}, got shape {tuple(value.shape)}"
        )
    return value


def in_range(name: str, index: torch.Tensor, tokens: int) -> None:
    """On the CPU raises IndexError for an ``index`` outside of [0, ``tokens``); elsewhere a device assert has to."""
    if index.numel() == 0:
        return
    if tokens == 0:
        raise IndexError(f"{name} must lie in [0, 0), an empty range, got {index.numel()} indices")
    if index.device.type == "cpu":
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= tokens:
            raise IndexError(f"{name} must lie in [0, {tokens}), got {low if low < 0 else high}")


def shape(name: str, x: torch.Tensor, expected: tuple[int, ...], why: str) -> None:
    """``x`` must have the ``expected`` shape, which is that of ``why``."""
    if tuple(x.shape) != expected:
        raise ArgumentError(name, f"must have shape {expected}, {why}, got {tuple(x.shape)}")


def writable(name: str, x: torch.Tensor) -> None:
    """No two elements of ``x`` may share memory along an expanded dimension."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ArgumentError(
            name, f"must not be expanded, as it is written to, got strides {x.stride()} for {tuple(x.shape)}"
        )


def _is_int(x: object) -> bool:
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def _height_and_width(name: str, value: object) -> tuple[int, int]:
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_int, value))):
        raise ArgumentError(name, f"must be a pair of integers (height, width), got {value!r}")
    height, width = value
    if height < 1 or width < 1:
        raise ArgumentError(name, f"must be at least (1, 1), got {(height, width)}")
    return height, width


def grid(value: object, tokens: int, of: str) -> tuple[int, int]:
    """``value`` must be (height, width) of at least 1 each, with as many positions as ``of`` has tokens."""
    height, width = _height_and_width("grid", value)
    if height * width != tokens:
        raise ArgumentError(
            "grid",
            f"must match the tokens of {of}: {height} * {width} = {height * width} positions, got {tokens} tokens",
        )
    return height, width


def _is_finite(x: object) -> bool:
    return _is_int(x) or (isinstance(x, float) and abs(x) < float("inf"))


def coarse_grid(factor: object, grid: tuple[int, int]) -> tuple[int, int]:
    """The coarse grid; ``factor`` must be a number or a pair of them, from 1 up to the grid's own height and width."""
    pair = factor if isinstance(factor, (tuple, list)) else (factor, factor)
    if not (len(pair) == 2 and all(map(_is_finite, pair))):
        raise ArgumentError("factor", f"must be a finite number or a pair of them (height, width), got {factor!r}")
    fh, fw = pair
    if fh < 1 or fw < 1:
        raise ArgumentError("factor", f"must be at least 1, got {factor!r}")
    if fh > grid[0] or fw > grid[1]:
        raise ArgumentError("factor", f"must not exceed the grid {grid}, got {factor!r}")
    return modes.coarse_grid(grid, (fh, fw))


def patch(value: object) -> tuple[int, int]:
    """``value`` must be (height, width) of at least 1 each; it may exceed a grid, which then has no whole patch."""
    return _height_and_width("patch", value)


def scale(value: object, head_dim: int) -> float:
    """``value`` must be None (head_dim ** -0.5) or a finite number; 0.0 is a value."""
    if value is None:
        return float(head_dim) ** -0.5
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
        raise ArgumentError("scale", f"must be None or a finite number, got {value!r}")
    return float(value)
