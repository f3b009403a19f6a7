"""95 % intervals by bootstrap over images, paired: all cases are resampled alike."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

LEVEL = 0.95
RESAMPLES = 2000
_VALUES_AT_ONCE = 2**24


class Interval(NamedTuple):
    """A value with its interval; None if there are fewer than two images."""

    value: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        return self._asdict()

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is told apart from none."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def of_mean(values: np.ndarray) -> Interval | None:
    """The mean of ``values`` (N,) with its interval; those that are not finite are left out. None if all are."""
    values = values[np.isfinite(values)]
    return around(float(values.mean()), values) if len(values) else None


def around(value: float, parts: np.ndarray) -> Interval:
    """``value`` with the spread of the mean of ``parts`` (N,) over resampled images.

    The same number of images is always resampled alike, so that results can be repeated.
    """
    if len(parts) < 2:
        return Interval(value, None, None)
    if np.ptp(parts) == 0:
        return Interval(value, value, value)
    found = bootstrap(
        (parts,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _VALUES_AT_ONCE // len(parts)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    shift = value - float(parts.mean())
    return Interval(value, float(found.low) + shift, float(found.high) + shift)


def of_difference(values: np.ndarray, others: np.ndarray) -> Interval | None:
    """The mean of ``values - others``, paired by image, with its interval; None if no pair is finite."""
    with np.errstate(invalid="ignore"):
        return of_mean(values - others)
