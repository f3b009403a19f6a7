"""The oracle: every op of :mod:`todo_attn.ops` in plain torch, with the same arguments.

Simple rather than fast. Tests call it with float64 tensors and compare the kernels with its results. It shares no code
with the ops: ``torch.nn.functional.interpolate`` itself downsamples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_INTERPOLATE_MODE = {"nearest": "nearest", "nearest-exact": "nearest-exact", "mean": "area"}


def downsample_tokens(
    x: torch.Tensor, grid: tuple[int, int], factor: float | tuple[float, float] = 1, *, mode: str = "nearest"
) -> torch.Tensor:
    """``x`` (B, gh*gw, C) -> (B, int(gh / fh) * int(gw / fw), C). ToDo, section 3.2.

    The nearest modes interpolate the token indices in float32, because the scale of ``interpolate`` is a float32
    whatever the dtype of ``x``. "mean" is ``interpolate(mode="area")``.
    """
    gh, gw = grid
    fh, fw = factor if isinstance(factor, tuple) else (factor, factor)
    size = (int(gh / fh), int(gw / fw))
    if mode == "mean":
        image = x.transpose(1, 2).unflatten(2, (gh, gw))
        return F.interpolate(image, size=size, mode="area").flatten(2).transpose(1, 2)
    # One axis at a time, so that indices stay far below 2^24, up to which float32 is exact.
    rows = torch.arange(gh, dtype=torch.float32).view(1, 1, gh, 1)
    columns = torch.arange(gw, dtype=torch.float32).view(1, 1, 1, gw)
    row = F.interpolate(rows, size=(size[0], 1), mode=_INTERPOLATE_MODE[mode]).long().view(-1, 1)
    column = F.interpolate(columns, size=(1, size[1]), mode=_INTERPOLATE_MODE[mode]).long().view(1, -1)
    return x[:, (row * gw + column).flatten().to(x.device)]


def downsampled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: tuple[int, int],
    factor: float | tuple[float, float] = 1,
    *,
    mode: str = "nearest",
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(Q K'^T * scale) V' with K', V' on the coarser grid and all N x M scores in memory. ToDo, equation 2.

    ``query`` (B, N, H, D), ``key`` and ``value`` (B, gh*gw, H, D) -> (B, N, H, D).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (
        downsample_tokens(t.flatten(2), grid, factor, mode=mode).unflatten(2, t.shape[2:]) for t in (key, value)
    )
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), value)


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x`` (B, N, C), ``index`` (B, K) -> ``x[b, index[b, k]]`` (B, K, C)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index.long()]


def scatter_tokens(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` (B, N, C) with ``source`` (B, K, C) at ``index`` (B, K), which is unique within a row."""
    out = x.clone()
    out[torch.arange(x.shape[0], device=x.device)[:, None], index.long()] = source
    return out


def scatter_tokens_(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor) -> None:
    """:func:`scatter_tokens` into ``x`` itself."""
    x.copy_(scatter_tokens(x, index, source))


def recover_tokens(y: torch.Tensor, source: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """``y`` (B, K, C), ``source`` (B, N) -> ``y[b, source[b, n]]`` (+ ``residual``) (B, N, C)."""
    out = gather_tokens(y, source)
    return out if residual is None else out + residual


def select_base_tokens(score: torch.Tensor, grid: tuple[int, int], patch: tuple[int, int] = (2, 2)) -> torch.Tensor:
    """``score`` (B, N) -> (B, Nb) int64: the first highest of each whole patch; NaN counts as highest."""
    (height, width), (ph, pw) = grid, patch
    bases = []
    for scores in score.tolist():
        for top in range(0, height - ph + 1, ph):
            for left in range(0, width - pw + 1, pw):
                inside = [(top + dy) * width + left + dx for dy in range(ph) for dx in range(pw)]
                bases.append(max(inside, key=lambda i: (math.isnan(scores[i]), scores[i])))
    patches = (height // ph) * (width // pw)
    return torch.tensor(bases, dtype=torch.int64, device=score.device).view(score.shape[0], patches)


def match_tokens(
    x: torch.Tensor, query_index: torch.Tensor, key_index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar of ``x[key_index]`` for each of ``x[query_index]``, by cosine similarity. DaTo, section 3.2.

    ``x`` (B, N, C), ``query_index`` (B, Q), ``key_index`` (B, K) -> position (B, Q) int64, similarity (B, Q) float32.
    All Q x K x C products are in memory; summed element by element, so that equal tokens have equal similarities.
    """
    length = x.norm(dim=-1, keepdim=True)
    unit = torch.where(length > 0, x / torch.where(length > 0, length, 1), 0)
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    query, key = unit[batch, query_index.long()], unit[batch, key_index.long()]
    similarity, position = (query[:, :, None] * key[:, None]).sum(-1).max(dim=-1)
    return position, similarity.float()


def plan_pruning(
    x: torch.Tensor,
    score: torch.Tensor,
    grid: tuple[int, int],
    ratio: float,
    patch: tuple[int, int] = (2, 2),
) -> tuple[torch.Tensor, torch.Tensor]:
    """DaTo's choice (section 3.2), token by token in plain Python.

    ``x`` (B, N, C), ``score`` (B, N) -> kept (B, K) ascending token indices, source (B, N) positions into ``kept``.
    """
    (height, width), (ph, pw) = grid, patch
    all_kept, all_source = [], []
    for tokens, scores in zip(x, score.tolist(), strict=True):
        number = torch.arange(len(tokens), device=x.device)[None]
        bases = []
        for top in range(0, height - ph + 1, ph):
            for left in range(0, width - pw + 1, pw):
                inside = [(top + dy) * width + left + dx for dy in range(ph) for dx in range(pw)]
                bases.append(max(inside, key=lambda i: scores[i]))  # the first of equal scores
        others = [i for i in range(len(tokens)) if i not in bases]
        similarity: list[float] = []
        if bases and others:
            similarity = match_tokens(tokens[None], number[:, others], number[:, bases])[1][0].tolist()
        order = sorted(zip(others, similarity, strict=False), key=lambda pair: -pair[1])  # stable
        gone = [i for i, _ in order[: int(ratio * len(tokens))]]
        kept = [i for i in range(len(tokens)) if i not in gone]
        source = {i: position for position, i in enumerate(kept)}
        for i in gone:
            source[i] = int(match_tokens(tokens[None], number[:, [i]], number[:, kept])[0])
        all_kept.append(kept)
        all_source.append([source[i] for i in range(len(tokens))])
    return torch.tensor(all_kept, device=x.device), torch.tensor(all_source, device=x.device)
