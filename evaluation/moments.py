"""Means and products of columns, in one pass, merged without cancellation."""

from collections.abc import Sequence

import numpy as np

from evaluation.terms import Array

FEW = 6  # columns whose products are taken one by one: BLAS is slow on matrices of so few rows
LOST = 1e-4  # of a sum of squares; below, a variance taken from it keeps under 12 digits


class Moments:
    """Count, means (M,) and centred cross products (M, M) of columns; merges without cancellation.

    Pairwise updating (Chan, Golub and LeVeque, 1983).
    """

    def __init__(self, width: int, ranged: bool = True) -> None:
        self.n, self.ranged = 0, ranged
        self.mean = np.zeros(width)
        self.cross = np.zeros((width, width))
        self.low, self.high = np.full(width, np.inf), np.full(width, -np.inf)

    def add(self, columns: Sequence[Array]) -> None:
        """Take in M contiguous columns (n,) each, as a list or as (M, n)."""
        count = len(columns[0])
        if not count:
            return
        mean = np.array([x.sum() for x in columns]) / count
        self._merge(count, mean, centred_products(columns, mean))
        if self.ranged:
            self.low = np.minimum(self.low, [x.min() for x in columns])
            self.high = np.maximum(self.high, [x.max() for x in columns])

    def merge(self, other: "Moments") -> None:
        """Take in what another has seen."""
        if other.n:
            self._merge(other.n, other.mean, other.cross)
            self.low = np.minimum(self.low, other.low)
            self.high = np.maximum(self.high, other.high)

    def _merge(self, count: int, mean: Array, cross: Array) -> None:
        total, gap = self.n + count, mean - self.mean
        self.cross = self.cross + cross + np.outer(gap, gap) * (self.n * count / total)
        self.mean = self.mean + gap * (count / total)
        self.n = total

    def covariance(self) -> Array:
        """(M, M), with n - 1."""
        return self.cross / max(self.n - 1, 1)


def centred_products(columns: Sequence[Array], mean: Array) -> Array:
    """Sums (M, M) of products of M columns (n,) less their means (M,).

    Raw products lose what the means square to; where that is too much, columns are centred first.
    """
    each = range(len(columns))
    if len(columns) > FEW:
        together = np.ascontiguousarray(columns)  # (M, n)
        raw = together @ together.T
    else:
        below = [[x @ y for y in columns[: i + 1]] for i, x in enumerate(columns)]
        raw = np.array([[below[max(i, j)][min(i, j)] for j in each] for i in each])
    out = raw - np.outer(mean, mean) * len(columns[0])
    if (out.diagonal() >= LOST * raw.diagonal()).all():
        return out
    centred = np.stack([x - m for x, m in zip(columns, mean, strict=True)])
    return centred @ centred.T
