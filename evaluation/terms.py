"""The common form of all estimators: a sum of ratios of means, over rows, slates or episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Terms:
    """Of n units, top (n, J) and bottom (n, J) or None (ones): sum_j mean(top_j) / mean(bottom_j).

    A plain mean has J = 1 and no bottom; SNIPS has w r over w; weighted per-decision importance
    sampling has one ratio for each step of the horizon.
    """

    top: Array
    bottom: Array | None = None

    def values(self) -> Array:
        """One number per unit, (n,); their mean is the estimate (of weights without mass: nan)."""
        if self.bottom is None:
            return self.top.sum(axis=1)
        mass = self.bottom.mean(axis=0)  # (J,)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(mass > 0, self.top / mass, np.nan).sum(axis=1)


def plain(values: Array) -> Terms:
    """The mean of values (n,)."""
    return Terms(values[:, None])


class Groups:
    """Rows (n,) put together as G slates or episodes, in the order in which each first appears.

    `step` (n,) orders the rows of a group; without it they keep their order.
    """

    def __init__(self, group: Any, step: Any = None) -> None:
        group = np.asarray(group)
        self.order: Array | slice = slice(None)
        change = group[1:] != group[:-1]  # (n - 1,)
        in_order = step is None or bool((np.diff(np.asarray(step)) > 0)[~change].all())
        names, first, inverse = np.unique(group, return_index=True, return_inverse=True)
        if len(names) != int(change.sum()) + bool(len(group)) or not in_order:
            rank = np.argsort(np.argsort(first))[inverse]  # (n,) of the group, by first appearance
            within = np.arange(len(group)) if step is None else np.asarray(step)
            self.order = np.lexsort((within, rank))
            change = np.diff(rank[self.order]) != 0
        self.starts = np.concatenate([[0], np.flatnonzero(change) + 1])[: len(names)]  # (G,)
        self.ends = np.append(self.starts[1:], len(group))  # (G,)
        self.lengths = self.ends - self.starts  # (G,)
        self.index = np.repeat(np.arange(len(names)), self.lengths)  # (n,) group of a sorted row
        self.place = np.arange(len(group)) - self.starts[self.index]  # (n,) from 0 within its group

    def __len__(self) -> int:
        return len(self.starts)

    def sort(self, x: Any) -> Array:
        """Rows of x (n,) in the order of groups and steps; all below expects them so."""
        return np.asarray(x)[self.order]

    def sum(self, x: Array) -> Array:
        """(n,) or (n, M) to (G,) or (G, M)."""
        return np.add.reduceat(x, self.starts, axis=0) if len(x) else x

    def first(self, x: Array) -> Array:
        """(G,): of the first row."""
        return x[self.starts]

    def last(self, x: Array) -> Array:
        """(G,): of the last row."""
        return x[self.ends - 1]

    def previous(self, x: Array, fill: float) -> Array:
        """(n,): of the row before in the group, `fill` at its first."""
        out = np.empty(len(x))
        out[1:] = x[:-1]
        out[self.starts] = fill
        return out

    def next(self, x: Array, fill: float) -> Array:
        """(n,): of the row after in the group, `fill` at its last."""
        out = np.empty(len(x))
        out[:-1] = x[1:]
        out[self.ends - 1] = fill
        return out

    def cumulative_product(self, ratio: Array) -> Array:
        """(n,): product of non-negative ratios (n,) up to each row, by logarithms.

        A thousand factors overflow no float on the way; a factor 0 makes all that follow 0.
        """
        zero = ratio <= 0
        log = np.log(np.where(zero, 1.0, ratio)).cumsum()  # (n,)
        before = np.where(self.starts > 0, log[self.starts - 1], 0.0)[self.index]
        zeros = zero.cumsum()
        zeros_before = np.where(self.starts > 0, zeros[self.starts - 1], 0)[self.index]
        return np.where(zeros > zeros_before, 0.0, np.exp(log - before))

    def padded(self, x: Array, horizon: int, fill: float | Array = 0.0) -> Array:
        """(n,) to (G, horizon), `fill` (a number, or (G,) one a group) behind the last row."""
        longest = int(self.lengths.max(initial=0))
        if longest > horizon:
            raise ValueError(f"an episode has {longest} steps, the horizon is {horizon}: raise it")
        out = np.empty((len(self), horizon))
        out[:] = np.asarray(fill, dtype=float).reshape(-1, 1)
        out[self.index, self.place] = x
        return out


def stack(columns: Sequence[Array]) -> Array:
    """Columns (n,) to (n, J)."""
    return columns[0][:, None] if len(columns) == 1 else np.stack(columns, axis=1)
