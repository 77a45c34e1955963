"""Rows of probabilities: what is refused of them, and what is left of them down a slate."""

import difflib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from evaluation.terms import Array, Groups

if TYPE_CHECKING:
    from evaluation.log import Batch, DecisionLog

EMPTY = -1  # no item: an empty slot, the padding of a list
TOLERANCE = 1e-6  # by which the probabilities of a row may miss 1
SINGLE = 1e-4  # the same of float32, whose rounding adds up over thousands of items
ENTRIES = 1 << 19  # of a dense (b, A) block: 4 MB, which stays in the cache

Distribution = tuple[Array, Array]  # items (n, k) and their probabilities (n, k)


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` rows such that (b, width) is a small block."""
    size = max(1, ENTRIES // max(1, width))
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def take(x: Array, rows: Array) -> Array:
    """x[rows] (n, ...), without a copy where the rows are neighbours."""
    n = len(rows)
    if n and rows[-1] - rows[0] == n - 1 and (np.diff(rows) == 1).all():
        return x[rows[0] : rows[0] + n]
    return x[rows]


def every_item(probs: Array) -> Distribution:
    """Probabilities (n, A) of all items in their order."""
    return np.broadcast_to(np.arange(probs.shape[1]), probs.shape), probs


def pick(x: Array, index: Array) -> Array:
    """x[i, index[i]] as (b,), of x (b, M), or of the one row (1, M)."""
    return x[np.arange(len(index)) if len(x) == len(index) else 0, index]


def items_above(batch: "Batch") -> Array | None:
    """(n, K - 1) what was shown above each row in its slate, EMPTY elsewhere; None if nothing."""
    if batch.decision is None or not len(batch.action):
        return None
    groups = Groups(batch.decision, batch.slot)
    longest = int(groups.lengths.max())
    if longest == 1:
        return None
    slates = groups.padded(groups.sort(batch.action), longest, EMPTY).astype(np.int64)  # (G, K)
    above = slates[groups.index, :-1]  # (n, K - 1)
    above[np.arange(longest - 1) >= groups.place[:, None]] = EMPTY
    out = np.empty_like(above)
    out[groups.order] = above
    return out


def without(x: Array, above: Array | None, fill: float) -> Array:
    """x (b, A) or (1, A) with `fill` at the items above (b, K - 1), a copy if there are any."""
    if above is None:
        return x
    wide = np.empty((len(above), x.shape[1] + 1))  # the last column takes EMPTY
    wide[:, :-1] = x
    np.put_along_axis(wide, above, fill, axis=1)
    return wide[:, :-1]


def remaining(probs: Array, above: Array | None) -> Array:
    """Probabilities (b, A) shared out anew without the items above; 0 where nothing is left."""
    if above is None:
        return probs
    left = without(probs, above, 0.0)  # (b, A)
    mass = left.sum(axis=1, keepdims=True)
    return left / np.where(mass > 0, mass, 1.0)


def supported(batch: "Batch", items: Array) -> Array:
    """Whether the log could have shown each of items (n, k); without a support: an error."""
    known = batch.supported(items)
    if known is None:
        raise ValueError(
            "the log does not say which actions were possible: make it with support= "
            "(DecisionLog.from_arrays), or leave the target unrestricted"
        )
    return known


def real_actions(
    batch: "Batch", num_actions: int, part: slice = slice(None)
) -> tuple[Array, Array]:
    """Logged actions (b,) of a part, 0 where the slot is empty, and whether it is (b,)."""
    action: Array = batch.action[part]
    if len(action) and action.max() >= num_actions:
        row = batch.rows[part][action.argmax()]
        raise ValueError(
            f"the target knows actions 0..{num_actions - 1}, row {row} of the log shows "
            f"{action.max()}: give a probability for every action of the log"
        )
    return np.maximum(action, 0), action == EMPTY


def certain(probs: Array) -> bool:
    """Whether all probabilities are 0 or 1."""
    return all(bool(((p == 0) | (p == 1)).all()) for p in (probs[s] for s in _rows(probs)))


def check_rows(probs: Array, rows: Array | None = None, what: str = "pi") -> None:
    """Refuse rows of (n, A) or (n, A, L) that are no distribution over axis 1."""
    for part in _rows(probs):
        total = probs[part].sum(axis=1, dtype=np.float64)  # (b,) or (b, L)
        bad = ~(np.abs(total - 1.0) <= (TOLERANCE if probs.itemsize > 4 else SINGLE))
        bad |= ~(probs[part].min(axis=1) >= 0)  # also nan
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])  # (row,) or (row, slot)
            row = part.start + at[0] if rows is None else rows[part.start + at[0]]
            slot = f", slot {at[1]}," if len(at) == 2 else ""
            raise ValueError(
                f"{what} must be probabilities, at least 0 and in each row 1 in all, row {row}"
                f"{slot} sums to {total[at]:.6g} with minimum {probs[part].min(axis=1)[at]:.6g}: "
                "divide each row by its sum, and pass scores to Target.from_ranker"
            )


def check_numbers(x: Array, name: str, rows: Array | None = None) -> None:
    """Refuse numbers (n,) of a field of `Logged` that cannot be."""
    if name in ("pi", "marginal"):
        bad, expected = ~((x >= 0) & (x <= 1 + TOLERANCE)), "probabilities in [0, 1]"
    else:
        bad, expected = ~np.isfinite(x), "finite numbers"
    if bad.any():
        at = int(bad.argmax())
        row = at if rows is None else rows[at]
        said = "pi_logged" if name == "pi" else name
        raise ValueError(
            f"{said} must be {expected}, got {x[at]} in row {row}: "
            "give what the policy says of the logged action, not a score or a logarithm"
        )


def check_length(x: Array, log: "DecisionLog", name: str) -> None:
    """Refuse an array with another number of rows than the log."""
    if len(x) != log.num_rows:
        raise ValueError(
            f"{'pi_logged' if name == 'pi' and x.ndim == 1 else name} has {len(x)} rows, the log "
            f"has {log.num_rows}: give one row for each row of the log, in its order"
        )


def check_actions(num_actions: int, log: "DecisionLog") -> None:
    """Refuse a target that knows fewer actions than the log."""
    if num_actions < log.num_actions:
        raise ValueError(
            f"the target has probabilities or scores of {num_actions} actions, the log has "
            f"{log.num_actions}: give one for every action, 0 (scores: -inf) for what it never does"
        )


def _rows(probs: Array) -> Iterator[slice]:
    return blocks(len(probs), int(np.prod(probs.shape[1:])))


def closest(word: str, words: Iterable[str]) -> str:
    """Suggest the nearest of `words`, or nothing."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
