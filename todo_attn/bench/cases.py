"""What is timed: the shapes of Stable Diffusion's UNets, the most important ones first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import torch

from ..config.checks import ArgumentError
from ..config.dtypes import DTYPES
from ..config.modes import coarse_grid
from ..config.todo import ToDoConfig

BENCHMARKS = ("attention", "training", "gather", "scatter", "recover", "match_tokens", "plan_pruning")
_MOVING = ("gather", "scatter", "recover")
SIZES = (512, 768, 1024, 1536, 2048, 4096)
# (heads, head dim) of the self-attention at each level: the side, in latent pixels, that one token stands for. The
# UNets themselves are in models/architectures.py, which needs diffusers; a test compares the two.
MODELS: dict[str, dict[int, tuple[int, int]]] = {
    "sd15": {1: (8, 40), 2: (8, 80), 4: (8, 160), 8: (8, 160)},
    "sdxl": {2: (10, 64), 4: (20, 64)},
}
PIXELS_PER_LATENT = 8
PRUNE_RATIO, PATCH = 0.4, (2, 2)  # DaTo's


class Peers(NamedTuple):
    """The peers of an attention, and the other forms of ours that are timed with it."""

    peers: tuple[str, ...]
    forms: tuple[str, ...] = ()
    best_only: bool = False  # only the fastest peer gets a row


SDPA = ("sdpa-flash", "sdpa-efficient", "sdpa-cudnn")
FLASH = ("fa3", "fa4")  # in place of torch's sdpa-flash
PEERS = {
    "all": Peers((*SDPA, *FLASH, "dense", "flex", "sage", "published"), ("todo-packed", "todo-coarse")),
    "sdpa": Peers(SDPA, ("todo-packed",)),
    "dense": Peers((*SDPA, "dense")),
    "best": Peers(SDPA, best_only=True),
}
_NEEDS_FACTOR = {"dense", "published", "todo-coarse"}  # the same as SDPA, or as ToDo, at factor 1


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Args:
        benchmark: one of :data:`BENCHMARKS`.
        model: a key of :data:`MODELS`, or any name if there are ``levels``.
        height, width: of the image, in pixels; multiples of ``pixels_per_latent``.
        level: a key of ``MODELS[model]`` or ``levels``.
        batch: of a call; twice the number of images under guidance.
        dtype: a key of :data:`~todo_attn.config.dtypes.DTYPES`.
        peers: a key of :data:`PEERS`; "attention" only.
        residual: whether a residual is added; "recover" only.
        max_kv_tokens: ToDo's cap on keys; the factor is the smallest within it.
        levels: (heads, head dim) of each level's self-attention; None is ``MODELS[model]``.
        pixels_per_latent: of the model's VAE.
    """

    benchmark: str
    model: str
    height: int
    width: int
    level: int
    batch: int
    dtype: str
    peers: str = "all"
    residual: bool = False
    max_kv_tokens: int = ToDoConfig.max_kv_tokens
    levels: Mapping[int, tuple[int, int]] | None = field(default=None, hash=False)
    pixels_per_latent: int = PIXELS_PER_LATENT

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width in tokens; the convolution of a level rounds an odd side up."""
        height, width = (-(-side // (self.pixels_per_latent * self.level)) for side in (self.height, self.width))
        return height, width

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def heads(self) -> int:
        return (self.levels or MODELS[self.model])[self.level][0]

    @property
    def head_dim(self) -> int:
        return (self.levels or MODELS[self.model])[self.level][1]

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, DTYPES[self.dtype])

    @property
    def factor(self) -> tuple[float, float]:
        return ToDoConfig(max_kv_tokens=self.max_kv_tokens).factor_for(self.grid, self.level)

    @property
    def coarse(self) -> tuple[int, int]:
        return coarse_grid(self.grid, self.factor)

    @property
    def keys(self) -> int:
        return math.prod(self.coarse)

    @property
    def bases(self) -> int:
        return (self.grid[0] // PATCH[0]) * (self.grid[1] // PATCH[1])

    @property
    def pruned(self) -> int:
        return math.floor(PRUNE_RATIO * self.tokens)

    @property
    def kept(self) -> int:
        return self.tokens - self.pruned

    @property
    def candidates(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """For an attention: the peers, and the forms of ours, that make a difference at this shape."""
        chosen = PEERS[self.peers]
        drop = _NEEDS_FACTOR if self.factor == (1, 1) else set()
        peers, forms = (tuple(name for name in names if name not in drop) for names in (chosen.peers, chosen.forms))
        return peers, forms

    @property
    def best_only(self) -> bool:
        """Whether only the fastest rival gets a row."""
        if self.benchmark == "attention":
            return PEERS[self.peers].best_only
        return self.benchmark in (*_MOVING, "training")

    @property
    def rows(self) -> int:
        """The number of rows."""
        if self.benchmark == "attention":
            return 1 if self.best_only else sum(map(len, self.candidates))
        if self.benchmark == "training":
            return 1 if self.factor == (1, 1) else 2  # against the fastest rival and dense
        return 2  # against the fastest rival and a copy, or two ways to match

    def describe(self) -> dict[str, Any]:
        """The ``case`` of its rows."""
        shape = {name: getattr(self, name) for name in ("model", "height", "width", "level", "batch", "dtype")}
        shape |= {"grid": list(self.grid), "tokens": self.tokens}
        if self.benchmark in ("attention", "training"):
            factor = list(self.factor)
            return shape | {"heads": self.heads, "head_dim": self.head_dim, "factor": factor, "keys": self.keys}
        shape |= {"channels": self.channels}
        if self.benchmark == "recover":
            shape |= {"residual": self.residual}
        if self.benchmark == "match_tokens":
            return shape | {"queries": self.tokens - self.bases, "keys": self.bases}
        return shape | {"kept": self.kept}


def plan(device: torch.device) -> list[Case]:
    """Cases of at most 68 rows, those with a target first; on a CPU a few that take about a minute."""
    return _on_cpu() if device.type == "cpu" else _on_gpu()


def _on_gpu() -> list[Case]:
    finest = Case("attention", "sd15", 2048, 2048, 1, 2, "fp16")
    xl = replace(finest, model="sdxl", level=2)
    moving = replace(finest, benchmark="gather", batch=8)  # more than 100 MB read and written
    match = Case("match_tokens", "sd15", 512, 512, 1, 2, "fp16")
    large = replace(match, height=1024, width=1024)
    best = replace(finest, peers="best")
    best_xl = replace(xl, peers="best")
    training = replace(finest, benchmark="training", height=768, width=768)
    return [
        finest,
        replace(finest, level=2, peers="sdpa"),
        replace(finest, level=4, peers="sdpa"),
        xl,
        replace(xl, level=4, peers="sdpa"),
        moving,
        replace(moving, benchmark="scatter"),
        replace(moving, benchmark="recover"),
        replace(moving, benchmark="recover", residual=True),
        match,
        large,
        replace(match, benchmark="plan_pruning"),
        replace(large, benchmark="plan_pruning"),
        training,
        replace(training, model="sdxl", level=2, height=1536, width=1536, dtype="bf16"),
        replace(best, height=1024, width=1024),
        replace(best, height=1536, width=1536),
        replace(best, dtype="bf16"),
        replace(best, height=1152),
        replace(best, height=4096, width=4096),
        replace(best_xl, dtype="bf16"),
        replace(best_xl, height=1152),
        replace(best_xl, height=1024, width=1024),
        replace(best_xl, height=4096, width=4096),
        replace(best_xl, level=4, height=4096, width=4096),
        replace(best, height=768, width=768),
        replace(best, height=512, width=512),
        replace(best, batch=1),
        replace(best, batch=8),
    ]


def _on_cpu() -> list[Case]:
    finest = Case("attention", "sd15", 768, 768, 1, 1, "fp32")
    moving = replace(finest, benchmark="gather", batch=2)
    match = Case("match_tokens", "sd15", 512, 512, 1, 1, "fp32")
    return [
        finest,
        replace(finest, height=576, width=1024, peers="best"),
        moving,
        replace(moving, benchmark="scatter"),
        replace(moving, benchmark="recover"),
        replace(moving, benchmark="recover", residual=True),
        match,
        replace(match, benchmark="plan_pruning"),
    ]


def full(device: torch.device) -> list[Case]:
    """The cases of :func:`plan`, then every size, 1:1 and 16:9, batch, half dtype and level against every peer.

    The ops on tokens only at the model's finest level, which is the one that DaTo prunes.
    """
    first = plan(device)
    done = {case for case in first if case.peers == "all"}
    return [*first, *(case for case in _every() if case not in done)]


def _every() -> Iterator[Case]:
    for size, wide, batch, dtype, model in product(SIZES, (False, True), (2, 1, 8), ("fp16", "bf16"), MODELS):
        height = size * 9 // 16 if wide else size
        for level in MODELS[model]:
            yield Case("attention", model, height, size, level, batch, dtype)
        for benchmark in BENCHMARKS[1:]:
            case = Case(benchmark, model, height, size, min(MODELS[model]), batch, dtype)
            yield case
            if benchmark == "recover":
                yield replace(case, residual=True)


def short(
    model: str,
    height: int,
    width: int,
    batch: int,
    dtype: str,
    levels: Mapping[int, tuple[int, int]] | None = None,
    pixels_per_latent: int = PIXELS_PER_LATENT,
) -> list[Case]:
    """The self-attentions of an image at which ToDo acts, and DaTo's ops at the finest level.

    Arguments, and what is raised, are those of :func:`attentions`.
    """
    attention = attentions(model, height, width, batch, dtype, levels, pixels_per_latent)
    finest = replace(attention[0], benchmark="gather", peers="all")
    moving = [finest, replace(finest, benchmark="recover", residual=True)]
    return [*(case for case in attention if case.factor != (1, 1)), *moving, replace(finest, benchmark="match_tokens")]


def attentions(
    model: str,
    height: int,
    width: int,
    batch: int,
    dtype: str,
    levels: Mapping[int, tuple[int, int]] | None = None,
    pixels_per_latent: int = PIXELS_PER_LATENT,
) -> list[Case]:
    """The self-attention of each level, the finest first; arguments are those of :class:`Case`.

    Raises:
        ArgumentError: ``model``, ``height``, ``width`` or ``dtype`` does not fit.
    """
    known_models = MODELS if levels is None else {model: levels}
    for name, value, known in (("model", model, known_models), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ArgumentError(name, f"must be one of {', '.join(known)}, got {value}")
    least = 8 * pixels_per_latent
    for name, side in (("height", height), ("width", width)):
        if side < least or side % pixels_per_latent:
            raise ArgumentError(name, f"must be a multiple of {pixels_per_latent} pixels, at least {least}, got {side}")
    first = Case("attention", model, height, width, 1, batch, dtype, "dense")
    first = replace(first, levels=levels, pixels_per_latent=pixels_per_latent)
    return [replace(first, level=level) for level in sorted(known_models[model])]
