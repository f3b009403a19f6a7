"""The model of time: the seconds of a call, from its counted operations and the machine's rates. Plain arithmetic.

Attention and all other operations run at different rates, often several times apart, so they are counted apart. A call
also takes the time to launch its operations one by one, which is what limits a small model on a fast GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WORTH = 1.05  # a smaller gain is not worth a change


@dataclass(frozen=True)
class Work:
    """What one call computes. A multiplication with its addition counts as two operations.

    Args:
        attention: operations of attention's two products, queries with keys and scores with values.
        other: operations of all other products: convolutions, linear layers (attention's own projections too), the
            search for similar tokens.
        launches: operations on tensors that are launched, all but views.
    """

    attention: int = 0
    other: int = 0
    launches: int = 0

    @property
    def operations(self) -> int:
        """Of both kinds together."""
        return self.attention + self.other

    def __add__(self, more: Work) -> Work:
        return Work(self.attention + more.attention, self.other + more.other, self.launches + more.launches)

    def __sub__(self, less: Work) -> Work:
        return Work(self.attention - less.attention, self.other - less.other, self.launches - less.launches)


@dataclass(frozen=True)
class Rates:
    """How fast a machine is, as measured.

    Args:
        attention, other: operations per second of each part of :class:`Work`. Elementwise operations (norms,
            activations) are not counted, so ``other`` is below the machine's peak.
        launch: seconds to launch one operation.
        overlaps: whether operations are launched while the device computes, as on a GPU.
    """

    attention: float
    other: float
    launch: float = 0.0
    overlaps: bool = False

    def __post_init__(self) -> None:
        for name in ("attention", "other"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 operations a second, got {getattr(self, name)!r}")
        if not self.launch >= 0:
            raise ValueError(f"launch must be at least 0 seconds, got {self.launch!r}")

    def computing(self, work: Work) -> float:
        """Seconds to compute the operations."""
        return work.attention / self.attention + work.other / self.other

    def starting(self, work: Work) -> float:
        """Seconds to launch them."""
        return work.launches * self.launch

    def seconds(self, work: Work) -> float:
        """Seconds of one call."""
        parts = self.computing(work), self.starting(work)
        return max(parts) if self.overlaps else sum(parts)


def gain(dense: Sequence[float], other: Sequence[float]) -> float:
    """The ratio of ``dense`` to ``other``, each summed over the calls of a run.

    Raises:
        ValueError: one of them sums to 0.
    """
    if not (sum(dense) and sum(other)):
        raise ValueError(f"dense and other must sum to more than 0, got {sum(dense)} and {sum(other)}")
    return sum(dense) / sum(other)


def rates_from_share(work: Work, self_attention: Work, seconds: float, share: float) -> Rates:
    """The two rates that explain a measured call in which self-attention took ``share`` of the time.

    Args:
        work: of the whole call.
        self_attention: of its self-attentions, projections included.
        seconds: the call took.
        share: of ``seconds`` that was self-attention, projections included.

    Raises:
        ValueError: there are no such positive rates.
    """
    # share * seconds = sa.attention / A + sa.other / O; the rest likewise: two linear equations in 1/A and 1/O.
    rest = work - self_attention
    inside, outside = share * seconds, (1 - share) * seconds
    determinant = self_attention.attention * rest.other - self_attention.other * rest.attention
    if not determinant > 0:
        raise ValueError(f"self_attention must have more products of scores than the rest of work, got {work}")
    per_attention = (inside * rest.other - outside * self_attention.other) / determinant
    per_other = (outside * self_attention.attention - inside * rest.attention) / determinant
    if not (per_attention > 0 and per_other > 0):
        raise ValueError(f"share must be one that rates above 0 give, got {share!r}")
    return Rates(1 / per_attention, 1 / per_other)
