"""What ranked lists (U, k) are worth: per-user metrics, figures of the catalogue, intervals."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, issparse
from torch import Tensor

from encoders.state import EMPTY

Array = np.ndarray
DRAWN_AT_ONCE = 1 << 22  # users redrawn that are held in memory


def metrics(top: Tensor, relevant: csr_matrix) -> dict[str, Tensor]:
    """Lists (U, k) against relevant items (U, N) to float64 (U,) each, NaN where none is relevant.

    Gains are binary; ndcg and map divide by what the best list of k could reach, so 1 is perfect.
    """
    relevant = cells(relevant, "relevant")
    hit = found(top, relevant).double()  # (U, k)
    k = hit.shape[1]
    size = torch.from_numpy(np.diff(relevant.indptr)).long()  # (U,)
    place = torch.arange(1, k + 1, dtype=torch.float64)  # (k,)
    discount = 1.0 / (place + 1.0).log2()  # (k,)
    hits, best = hit.sum(dim=1), size.clamp(1, k)  # (U,) each
    precision_so_far = hit.cumsum(dim=1) / place  # (U, k)
    values = {
        "precision": hits / k,
        "recall": hits / size,
        "ndcg": hit @ discount / discount.cumsum(dim=0)[best - 1],
        "map": (hit * precision_so_far).sum(dim=1) / best,
        "mrr": (hit / place).amax(dim=1),
        "hit": (hits > 0).double(),
    }
    return {name: x.masked_fill(size == 0, torch.nan) for name, x in values.items()}


def cold_recall(
    top: Tensor, relevant: csr_matrix, popularity: Array | Tensor, *, cold: int = 10
) -> Tensor:
    """Recall (U,) of relevant items with at most `cold` train events, NaN where none is."""
    counts = checked_counts(popularity, relevant.shape[1])
    return recall_among(top, relevant, counts <= cold)


def recall_among(top: Tensor, relevant: csr_matrix, items: Tensor) -> Tensor:
    """Recall (U,) of those relevant items that are among `items` (N,) bool, NaN where none is."""
    relevant = cells(relevant, "relevant")
    if items.shape != (relevant.shape[1],) or items.dtype != torch.bool:
        raise ValueError(
            f"items must say True or False of each of {relevant.shape[1]} items, got "
            f"{items.dtype} of shape {tuple(items.shape)}"
        )
    counted = items.cpu()
    hit = found(top, relevant) & counted[top.cpu().clamp(min=0)]  # (U, k)
    user = np.repeat(np.arange(len(top)), np.diff(relevant.indptr))  # (nnz,)
    size = np.bincount(user[counted.numpy()[relevant.indices]], minlength=len(top))  # (U,)
    return hit.sum(dim=1).double() / torch.from_numpy(size).double().masked_fill_(
        torch.from_numpy(size == 0), torch.nan
    )


def catalogue(
    top: Tensor,
    *,
    popularity: Array | Tensor,
    vectors: Tensor | None,
    num_items: int,
    relevant: csr_matrix | None = None,
) -> dict[str, float]:
    """What lists (U, k) make of the catalogue, given train events (N,) and vectors (N, D) of texts.

    coverage         share of the catalogue that is in some list
    gini             of how often each item is in a list: 0 all alike, near 1 a few have all
    novelty          mean surprisal in bits (Zhou et al., 2010): -log2 of an item's share of train
                     events, one added to each item
    diversity        mean over lists of 1 - cosine of a pair, items without a vector left out
    popularity_bias  mean train events of what lists hold over those of what was relevant
                     (Abdollahpouri et al., 2019): above 1 lists lean on hits more than users do

    What cannot be said, without `vectors` or `relevant`, is NaN.
    """
    counts = checked_counts(popularity, num_items)
    top = checked_lists(top, num_items)
    if vectors is not None and len(vectors) != num_items:
        raise ValueError(
            f"vectors must have a row for each of {num_items} items, got {len(vectors)}"
        )
    shown = torch.bincount(top[top != EMPTY], minlength=num_items).double()  # (N,)
    if not shown.any():
        raise ValueError("top must hold an item somewhere, all its places are empty")
    rank = torch.arange(1, num_items + 1, dtype=torch.float64)
    uneven = ((2.0 * rank - num_items - 1.0) * shown.sort().values).sum()
    share = (counts + 1.0) / (counts.sum() + num_items)  # (N,)
    return {
        "coverage": float((shown > 0).double().mean()),
        "gini": float(uneven / (num_items * shown.sum())),
        "novelty": float(list_means(-share.log2(), top).nanmean()),
        "diversity": float("nan") if vectors is None else diversity(top, vectors),
        "popularity_bias": float("nan") if relevant is None else lift(top, relevant, counts),
    }


def diversity(top: Tensor, vectors: Tensor) -> float:
    """Mean over lists (U, k) of 1 - mean cosine of two different items; NaN where no list has two.

    The squared norm of a sum of n unit vectors is n plus the cosines of all ordered pairs.
    """
    unit = F.normalize(vectors.detach().cpu().double(), dim=1)  # (N, D)
    unit = torch.cat([unit, unit.new_zeros(1, unit.shape[1])])  # the last for empty places
    index = torch.where(top == EMPTY, len(unit) - 1, top)  # (U, k)
    told = unit.any(dim=1)[index].sum(dim=1)  # (U,) items that have a vector
    total = F.embedding_bag(index, unit, mode="sum").square().sum(dim=1)  # (U,)
    several = told > 1
    pairs = (told * (told - 1))[several]
    return float((1.0 - (total - told)[several] / pairs).mean())


def lift(top: Tensor, relevant: csr_matrix, counts: Tensor) -> float:
    """Mean train events (N,) of listed items over those of relevant ones, each a mean of users."""
    relevant = cells(relevant, "relevant")
    size = torch.from_numpy(np.diff(relevant.indptr))  # (U,)
    chosen = torch.from_numpy(relevant.astype(np.float64) @ counts.numpy()) / size  # (U,)
    return float(list_means(counts, top).nanmean() / chosen.nanmean())


def list_means(values: Tensor, top: Tensor) -> Tensor:
    """Mean (U,) of the values (N,) of each list's items (U, k), NaN where a list is empty."""
    there = top != EMPTY  # (U, k)
    return (values[top.clamp(min=0)] * there).sum(dim=1) / there.sum(dim=1)


def bootstrap(
    values: Tensor | Array, *, replicates: int = 2000, seed: int = 0, alpha: float = 0.05
) -> tuple[float, float, float]:
    """Mean of users' values (U,), NaN left out, with its percentile interval (Efron, 1979)."""
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    low, high, _ = redrawn(x, replicates, seed, alpha)
    return x.mean().item(), low, high


def paired(
    a: Tensor | Array,
    b: Tensor | Array,
    *,
    replicates: int = 2000,
    seed: int = 0,
    alpha: float = 0.05,
) -> tuple[float, float, float, float]:
    """Mean of a - b over the same users (U,), its percentile interval, and p of no difference.

    Two-sided p: twice the smaller share of redrawn means on one side of 0, the observed one counted
    among them so that it is never 0 (Davison and Hinkley, 1997).
    """
    x, y = (np.asarray(z, dtype=np.float64) for z in (a, b))
    if x.shape != y.shape:
        raise ValueError(
            f"a pair must be of the same users, got {len(x)} and {len(y)}: rank both with the same "
            "relevant items"
        )
    gap = (x - y)[~np.isnan(x - y)]
    low, high, p = redrawn(gap, replicates, seed, alpha)
    return gap.mean().item(), low, high, p


def redrawn(values: Array, replicates: int, seed: int, alpha: float) -> tuple[float, float, float]:
    """Limits of the mean of users (U,) redrawn with replacement, and p of a mean of 0."""
    if not 0.0 < alpha < 1.0 or replicates < 1:
        raise ValueError(
            "a bootstrap needs alpha in (0, 1) and at least 1 replicate, "
            f"got alpha={alpha} and replicates={replicates}"
        )
    size, rng = len(values), np.random.default_rng(seed)
    if not size:
        raise ValueError("an interval needs users, none has a value: there is nothing to average")
    if size == 1:
        return -np.inf, np.inf, 1.0  # one user shows no spread
    step = max(1, DRAWN_AT_ONCE // size)
    sizes = [min(step, replicates - start) for start in range(0, replicates, step)]
    means = np.concatenate([values[rng.integers(size, size=(n, size))].mean(axis=1) for n in sizes])
    low, high = np.quantile(means, [alpha / 2.0, 1.0 - alpha / 2.0])
    side = min((means <= 0).sum(), (means >= 0).sum())
    return float(low), float(high), float(min(1.0, 2.0 * (1 + side) / (1 + replicates)))


def found(top: Tensor, relevant: csr_matrix) -> Tensor:
    """Whether each place of the lists (U, k) holds an item that `cells` (U, N) has."""
    users, n = relevant.shape
    item = checked_lists(top, n).numpy()
    if len(item) != users:
        raise ValueError(
            f"there must be a list for each of {users} users of relevant, got {len(item)}: give "
            "relevant[rows] of the rows that were ranked"
        )
    there = np.repeat(np.arange(users) * n, np.diff(relevant.indptr)) + relevant.indices
    there = np.append(there, users * n)  # ascending; the last so that every search ends on one
    key = np.arange(users)[:, None] * n + item  # (U, k)
    return torch.from_numpy((there[np.searchsorted(there, key)] == key) & (item != EMPTY))


def cells(matrix: Any, name: str) -> csr_matrix:
    """The cells of a sparse (U, N) that are not 0, as ones in order of user and item."""
    if not issparse(matrix):
        raise ValueError(
            f"{name} must be a scipy sparse matrix (users, items), got {type(matrix).__name__}: "
            "scipy.sparse.csr_matrix(...) makes one of an array"
        )
    ones = csr_matrix(matrix, copy=True)
    ones.sum_duplicates()
    ones.eliminate_zeros()
    ones.data = np.ones(len(ones.data), dtype=np.float32)
    return ones


def checked_lists(top: Tensor, num_items: int) -> Tensor:
    """Lists (U, k) on the CPU, after a look that each holds items, and each of them once."""
    if top.ndim != 2 or not top.shape[1] or top.is_floating_point():
        raise ValueError(
            f"top must be lists of item numbers (U, k), got {top.dtype} of shape {tuple(top.shape)}"
        )
    top = top.cpu()
    outside = (top < EMPTY) | (top >= num_items)
    if outside.any():
        row, place = (int(x) for x in outside.nonzero()[0])
        raise ValueError(
            f"top must hold items in 0..{num_items - 1} or {EMPTY} (none), got "
            f"{int(top[row, place])} in row {row}"
        )
    ordered = top.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)
    if twice.any():
        row, place = (int(x) for x in twice.nonzero()[0])
        raise ValueError(
            f"top must hold an item once, row {row} has {int(ordered[row, place])} twice: it would "
            "count as found twice"
        )
    return top


def checked_counts(popularity: Array | Tensor, num_items: int) -> Tensor:
    """Train events of each item (N,), float64."""
    counts = torch.as_tensor(popularity, dtype=torch.float64).cpu()
    if counts.shape != (num_items,):
        raise ValueError(
            f"popularity must have a count for each of {num_items} items, got shape "
            f"{tuple(counts.shape)}"
        )
    if not counts.isfinite().all() or (counts < 0).any():
        raise ValueError(
            "popularity must be finite and at least 0: how many train events each item has"
        )
    return counts
