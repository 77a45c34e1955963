"""Folds of users as a hash of their name, and checks of the columns that models are fitted to."""

import hashlib
from typing import Any

import numpy as np

Array = np.ndarray


def same_length(**columns: Any) -> int:
    """The number of rows that all given columns share; None is no column."""
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must have one entry per logged row, got lengths {lengths}")
    n = next(iter(lengths.values()))
    if n == 0:
        raise ValueError(f"{', '.join(lengths)} have no rows: nothing can be fitted")
    return n


def checked_context(context: Any, rows: int) -> Array:
    """Context (n, d) as floats, (n, 0) for None."""
    if context is None:
        return np.zeros((rows, 0))
    x = np.asarray(context, dtype=float)
    if x.ndim != 2:
        raise ValueError(f"context must be (n, d), got shape {x.shape}")
    bad = ~np.isfinite(x).all(axis=1)  # (n,)
    if bad.any():
        raise ValueError(f"context is not finite in row {int(bad.argmax())}: fill or drop it")
    return x


def checked_action(action: Any, num_actions: int) -> Array:
    """Logged actions (n,) that exist."""
    a = np.asarray(action)
    if a.dtype.kind not in "iu":
        raise ValueError(f"action must be integers 0..{num_actions - 1}, got dtype {a.dtype}")
    bad = (a < 0) | (a >= num_actions)  # (n,)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"action must be in 0..{num_actions - 1}, got {a[row]} in row {row}: "
            "map items to codes or raise num_actions"
        )
    return a.astype(np.int64)


def fold_of(cluster: Any, folds: int, seed: int) -> Array:
    """Fold of each cluster, (n,) to (n,): a hash, so the same in every batch (splitmix64)."""
    if folds < 1:
        raise ValueError(f"folds must be at least 1, got {folds}")
    name = np.asarray(cluster)
    if name.dtype.kind in "iub":
        z = name.astype(np.int64).astype(np.uint64)
    elif name.dtype.kind == "f":
        z = (name.astype(np.float64) + 0.0).view(np.uint64)  # -0.0 and 0.0 are one cluster
    else:
        unique, inverse = np.unique(name.astype(str), return_inverse=True)
        digests = [hashlib.blake2b(u.encode(), digest_size=8).digest() for u in unique.tolist()]
        z = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)[inverse]
    step = ((seed + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = z + np.uint64(step)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(32)) % np.uint64(folds)).astype(np.int64)


def others(fold: Array, own: int, folds: int) -> Array:
    """Rows (n,) bool that the model of fold `own` is trained on: not its own; of one fold all."""
    if folds == 1:
        return np.ones(len(fold), dtype=bool)
    if (fold == own).all():
        raise ValueError(
            f"all rows fall into fold {own} of {folds}: too few clusters to keep a user's rows "
            "out of its model; pass folds=1 or name smaller clusters"
        )
    return fold != own
