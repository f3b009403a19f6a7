"""Value noise on a periodic lattice: smooth random fields that are the same at any image size."""

from __future__ import annotations

import numpy as np

SIDE = 128  # lattice points a side; the noise repeats after that many cells
MASK = SIDE - 1


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 below ``low``, 1 above ``high``, smooth between them."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class Noise:
    """One random field with values in [0, 1]; coordinates count lattice cells."""

    def __init__(self, rng: np.random.Generator):
        self.lattice = rng.random((SIDE, SIDE), dtype=np.float32)
        self.flat = self.lattice.ravel()

    def hash(self, row: int, column: np.ndarray) -> np.ndarray:
        """A random number for each integer of ``column``."""
        return self.lattice[row & MASK, column & MASK]

    def hash2(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """A random number for each pair of integers."""
        return self.flat[(row & MASK) * SIDE + (column & MASK)]

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The field at points of any shape, which x and y broadcast to."""
        xf, yf = np.floor(x), np.floor(y)
        fx, fy = x - xf, y - yf
        xi, yi = xf.astype(np.int32), yf.astype(np.int32)
        fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
        x0, x1, y0, y1 = xi & MASK, (xi + 1) & MASK, (yi & MASK) * SIDE, ((yi + 1) & MASK) * SIDE
        a, b, c, d = self.flat[y0 + x0], self.flat[y0 + x1], self.flat[y1 + x0], self.flat[y1 + x1]
        top = a + (b - a) * fx
        return top + (c + (d - c) * fx - top) * fy

    def grid(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The field (h, w) on the grid of columns x (w,) and rows y (h,), by two products of matrices."""
        return weights(y) @ self.lattice @ weights(x).T


def weights(x: np.ndarray) -> np.ndarray:
    """The matrix (n, SIDE) that interpolates a periodic row of the lattice at n points."""
    cell = np.floor(x)
    f = x - cell
    f = f * f * (3 - 2 * f)
    i, rows = cell.astype(np.int64), np.arange(len(x))
    out = np.zeros((len(x), SIDE), np.float32)
    out[rows, i & MASK] = 1 - f
    out[rows, (i + 1) & MASK] = f
    return out


def fbm(sample, x, y, octaves: int, gain: float = 0.5, ridged: bool = False) -> np.ndarray:
    """Octaves of noise, each twice as fine and ``gain`` times as strong; ``ridged`` folds each into sharp crests.

    ``sample`` is ``Noise.at`` or ``Noise.grid``.
    """
    total, weight, sum_of_weights = 0.0, 1.0, 0.0
    for octave in range(octaves):
        n = sample(x * 2.0**octave + 17.3 * octave, y * 2.0**octave + 31.7 * octave)
        total = total + weight * (1 - np.abs(2 * n - 1) if ridged else n)
        sum_of_weights += weight
        weight *= gain
    return total / sum_of_weights
