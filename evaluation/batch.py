"""Logged rows on their way through the evaluator: a batch, and how columns are cut into them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from evaluation.log_checks import as_array
from evaluation.log_files import ROWS, Piece

Array = np.ndarray
EMPTY = -1  # the action of an empty slot, the padding of a list
POLICY_ROWS = 1024  # rows for which a logging policy is asked at once: (1024, A) at most


@dataclass(frozen=True)
class Batch:
    """n logged rows; whole slates and episodes only.

    What the log does not have, or nobody asked for, is None.
    """

    rows: Array  # (n,) of the log, as the caller counts them
    action: Array  # (n,) int64, -1 an empty slot
    reward: Array  # (n,)
    propensity: Array  # (n,) given the items above it
    marginal: Array | None = None  # (n,) of the item at that slot, or of state and action
    joint: Array | None = None  # (n,) of the whole slate, on each of its rows
    context: Array | None = None  # (n, d)
    slot: Array | None = None  # (n,) int64, as all below
    decision: Array | None = None
    episode: Array | None = None
    step: Array | None = None
    cluster: Array | None = None
    logger: Array | None = None
    support: Array | None = None  # (n, A) bool
    listed: Array | None = None  # (n, m) items the logging policy could show, -1 behind the last
    logging_policy: Any = None  # context (b, d) -> (b, A), or an object with distribution(batch)
    columns: Mapping[str, Array] = field(default_factory=dict)  # others of the log, by name

    def __len__(self) -> int:
        return len(self.rows)

    def supported(self, items: Array) -> Array | None:
        """Which of items (n, k) the logging policy could show, (n, k); None where unknown."""
        if self.support is not None:
            return (items >= 0) & np.take_along_axis(self.support, np.maximum(items, 0), axis=1)
        if self.listed is not None:
            return within(items, self.listed)
        if self.logging_policy is None:
            return None
        if hasattr(self.logging_policy, "distribution"):
            shown, probs = self.logging_policy.distribution(self)  # (n, m) each
            return within(items, np.where(probs > 0, shown, EMPTY))
        if self.context is None:
            raise ValueError("support is a function of the context, the log has none: give context")
        blocks = range(0, len(self), POLICY_ROWS)
        return np.concatenate([self._asked(items, slice(a, a + POLICY_ROWS)) for a in blocks])

    def _asked(self, items: Array, rows: slice) -> Array:
        """Which items of a slice of rows the logging policy shows at all."""
        probs = as_array(self.logging_policy(self.context[rows]))  # type: ignore[index]
        some = items[rows]
        return (some >= 0) & (np.take_along_axis(probs, np.maximum(some, 0), axis=1) > 0)


class Rows(Protocol):
    """Where a log's columns come from."""

    num_rows: int

    @property
    def names(self) -> Sequence[str]: ...
    def where(self, row: int) -> str: ...
    def pieces(self, names: Sequence[str]) -> Iterator[Piece]: ...


class ArrayRows:
    """Columns in memory, read in `order` (n,) or as they lie."""

    def __init__(self, arrays: Piece, order: Array | None = None) -> None:
        self.arrays, self.order = arrays, order
        self.names = list(arrays)
        self.num_rows = len(next(iter(arrays.values())))

    def where(self, row: int) -> str:
        return f"row {row}"

    def pieces(self, names: Sequence[str]) -> Iterator[Piece]:
        if self.order is None:
            yield {name: self.arrays[name] for name in names}
            return
        for at in range(0, self.num_rows, ROWS):
            rows = self.order[at : at + ROWS]
            yield {name: self.arrays[name][rows] for name in names}


def within(items: Array, listed: Array) -> Array:
    """Whether each of items (n, k) is in its row of listed (n, m), (n, k)."""
    if items.shape[1] <= listed.shape[1]:
        found = [(listed == items[:, j, None]).any(axis=1) for j in range(items.shape[1])]
        return np.stack(found, axis=1) & (items >= 0)
    some = np.zeros(items.shape, dtype=bool)
    for j in range(listed.shape[1]):
        some |= items == listed[:, j, None]
    return some & (items >= 0)


def cut(pieces: Iterator[Piece], key: str | None, rows: int) -> Iterator[Piece]:
    """Pieces of any size to such of at most `rows`, or of one whole run of the ids `key`."""
    held: Piece = {}
    for piece in pieces:
        if held and key is None and size(held) + size(piece) > rows:
            yield held  # a short batch costs less than moving all that follow
            held = {}
        held = {n: np.concatenate([held[n], x]) for n, x in piece.items()} if held else piece
        edges = edges_of(held, key, rows)
        for start, end in pairwise(edges):
            yield {name: x[start:end] for name, x in held.items()}
        held = {n: x[edges[-1] :] for n, x in held.items()} if edges[-1] < size(held) else {}
    if held:
        yield held


def size(piece: Piece) -> int:
    """Rows of a piece."""
    return len(next(iter(piece.values())))


def edges_of(piece: Piece, key: str | None, rows: int) -> list[int]:
    """Where to cut a piece, from 0; what is behind the last edge waits for the next piece."""
    n = size(piece)
    if key is None:
        return list(range(0, n + 1, rows))
    ids = piece[key]
    changes = np.flatnonzero(ids[1:] != ids[:-1]) + 1  # (runs - 1,)
    edges = [0]
    while n - edges[-1] >= rows:
        after = int(np.searchsorted(changes, edges[-1] + rows, side="right"))
        if after and changes[after - 1] > edges[-1]:
            edges.append(int(changes[after - 1]))
        elif after < len(changes):
            edges.append(int(changes[after]))  # a run longer than `rows` stays whole
        else:
            break
    return edges
