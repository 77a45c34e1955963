"""Matrix factors of counts, fitted by the library implicit; users are folded in from any history.

The library learns a vector per user of the log. None of them is kept: whoever asks, known or not,
gets the vector that the same objective gives to the history at hand, items held fixed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agents.interactions import (
    Interactions,
    or_popular,
    owned,
    popular_ranks,
    restore,
    spread,
    weighed,
)
from encoders.state import EMPTY, Observation

CHUNK = 2**23  # numbers of a temporary tensor: at most 64 MB
NEGATIVES = 512  # items that stand for all that a user might have had instead
STEPS = 20  # of the fold-in of BPR: each is cheap and none can overshoot


class ALS:
    """Least squares over all cells, those that happened weighing more (Hu et al., 2008)."""

    def __init__(
        self,
        past: Any,
        *,
        factors: int = 64,
        regularization: float = 10.0,
        alpha: float = 1.0,
        iterations: int = 15,
        weight: str = "log",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        _check_counts(factors=factors, iterations=iterations)
        _check_positive(regularization=regularization, alpha=alpha)
        past = _with_events(Interactions.of(past))
        self.num_items, self.weight, self.alpha = past.num_items, weight, alpha
        self.regularization = regularization
        self.ranks = popular_ranks(past, seed).to(device)  # (N,)
        fitted = als_items(
            weighed(past.counts(), weight), factors, regularization, alpha, iterations, seed
        )
        self.items = torch.from_numpy(fitted).to(device)  # (N, f)
        self.gram = gram(self.items)  # (f, f)

    def scores(self, obs: Observation) -> Tensor:
        """(B, N); popularity where a user has no history."""
        items, count, _ = owned(obs, self.num_items)
        # Chosen in this session and before: one cell of the matrix, whose count is the sum.
        once, total = cells(items, count)
        confidence = self.alpha * weighed(total, self.weight)  # (B, M)
        users = als_users(once, confidence, self.items, self.regularization, self.gram)  # (B, f)
        return or_popular(users.float() @ self.items.T, items, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        return {"num_items": self.num_items, "items": self.items, "ranks": self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "items", "ranks")
        self.gram = gram(self.items)


def als_items(
    values: Any, factors: int, regularization: float, alpha: float, iterations: int, seed: int
) -> np.ndarray:
    """Values (U, N) CSR to item factors (N, f) float32, on one thread: reproducible."""
    from implicit.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(
            factors=factors, regularization=regularization, alpha=alpha, iterations=iterations,
            use_gpu=False, num_threads=1, random_state=seed,
        )  # fmt: skip
        model.fit(values.astype(np.float32), show_progress=False)
    return np.array(model.item_factors, dtype=np.float32)


def gram(y: Tensor) -> Tensor:
    """Item factors (N, f) to Y'Y (f, f) float64."""
    exact = y.double()
    return exact.T @ exact


def als_users(
    items: Tensor,
    confidence: Tensor,
    y: Tensor,
    regularization: float,
    together: Tensor | None = None,
) -> Tensor:
    """Histories (B, M) with confidences and item factors (N, f) to users (B, f) float64.

    The exact half-step of the library: (Y'Y + reg + sum (c - 1) y y') x = sum c y. `together` is
    Y'Y where it is known.
    """
    f = y.shape[1]
    whole = gram(y) if together is None else together
    whole = whole + regularization * torch.eye(f, dtype=whole.dtype, device=y.device)  # (f, f)
    confidence = confidence.double() * (items != EMPTY)  # (B, M)
    users = whole.new_zeros(len(items), f)
    for rows, m in chunks(items, f):
        own = y[items[rows, :m].clamp(min=0)].double()  # (b, m, f)
        c = confidence[rows, :m]
        extra = (c - 1.0) * (items[rows, :m] != EMPTY)  # (b, m)
        right = torch.einsum("bm,bmf->bf", c, own)[:, :, None]  # (b, f, 1)
        if extra.any():
            left = whole + own.transpose(1, 2) @ (own * extra[:, :, None])  # (b, f, f)
        else:
            left = whole.expand(1, f, f)  # counts of 1 only: all users share it
        users[rows] = torch.cholesky_solve(right, torch.linalg.cholesky(left)).squeeze(2)
    return users


class BPR:
    """Rank what happened above what might have (Rendle et al., 2009); counts are not weighed.

    A user's vector is the optimum of the same objective for their history, with popular items
    standing for what might have been, as in training. Items chosen during the session count at
    once. Lost is what training had not yet learnt when it stopped, and the chance of its draws.
    """

    def __init__(
        self,
        past: Any,
        *,
        factors: int = 64,
        learning_rate: float = 0.01,
        regularization: float = 0.05,
        iterations: int = 100,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        _check_counts(factors=factors, iterations=iterations)
        _check_positive(learning_rate=learning_rate, regularization=regularization)
        past = _with_events(Interactions.of(past))
        self.num_items, self.regularization = past.num_items, regularization
        self.ranks = popular_ranks(past, seed).to(device)  # (N,)
        counts = past.counts()
        fitted = bpr_items(counts, factors, learning_rate, regularization, iterations, seed)
        self.items, self.bias = (torch.from_numpy(x).to(device) for x in fitted)  # (N, f), (N,)
        users = np.diff(counts.tocsc().indptr)  # (N,): of each item
        negatives, mass = spaced(torch.from_numpy(users), seed)  # (S,) each
        self.negatives, self.mass = negatives.to(device), mass.to(device)

    def scores(self, obs: Observation) -> Tensor:
        """(B, N); popularity where a user has no history."""
        items, count, _ = owned(obs, self.num_items)
        once, _ = cells(items, count)
        users = bpr_users(
            once, self.items, self.bias, self.negatives, self.mass, self.regularization
        )  # (B, f)
        return or_popular(users @ self.items.T + self.bias, items, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        names = ("items", "bias", "negatives", "mass", "ranks")
        return {"num_items": self.num_items, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "items", "bias", "negatives", "mass", "ranks")


def bpr_items(
    counts: Any, factors: int, rate: float, regularization: float, iterations: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts (U, N) CSR to item factors (N, f) and biases (N,), float32, on one thread."""
    from implicit.bpr import BayesianPersonalizedRanking
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        model = BayesianPersonalizedRanking(
            factors=factors, learning_rate=rate, regularization=regularization,
            iterations=iterations, use_gpu=False, num_threads=1, random_state=seed,
        )  # fmt: skip
        model.fit(counts, show_progress=False)
    fitted = np.array(model.item_factors, dtype=np.float32)  # (N, f + 1): the last is the bias
    return np.ascontiguousarray(fitted[:, :-1]), fitted[:, -1].copy()


def spaced(mass: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Items (S,) at even steps of the mass (N,) of all items, from a start drawn with `seed`.

    Second, how many steps each stands for, (S,) float32: few items stand for many.
    """
    draw = float(np.random.default_rng(seed).random())
    total = mass.double().cumsum(0)  # (N,)
    steps = (torch.arange(NEGATIVES, dtype=torch.float64) + draw) / NEGATIVES * total[-1]
    drawn = torch.searchsorted(total, steps, right=True).clamp(max=len(mass) - 1)
    items, often = drawn.unique(return_counts=True)
    return items, often.float()


def bpr_users(
    items: Tensor, y: Tensor, bias: Tensor, negatives: Tensor, mass: Tensor, regularization: float
) -> Tensor:
    """Histories (B, M), item factors (N, f) and biases, negatives and mass (S,) to users (B, f).

    Minimise the mean of -log sigmoid(x (y_i - y_j) + b_i - b_j) over own i and other j plus
    reg / 2 |x|^2. Steps use a bound on the curvature (Boehning, 1992): none makes it worse.
    """
    f = y.shape[1]
    users = y.new_zeros(len(items), f)
    other, other_bias = y[negatives], bias[negatives]  # (S, f), (S,)
    for rows, m in chunks(items, f + len(negatives)):
        mine = items[rows, :m]  # (b, m)
        real = (mine != EMPTY).to(y.dtype)
        p = real / real.sum(dim=1, keepdim=True).clamp(min=1.0)  # (b, m)
        q = mass * (1.0 - spread(mine, real, len(y))[:, negatives])  # (b, S) not one's own
        q = q / q.sum(dim=1, keepdim=True).clamp(min=1.0)
        own = y[mine.clamp(min=0)]  # (b, m, f)
        own_bias = bias[mine.clamp(min=0)]  # (b, m)
        up, down = torch.einsum("bm,bmf->bf", p, own), q @ other  # (b, f) each
        cross = up[:, :, None] * down[:, None, :]  # (b, f, f)
        curve = own.transpose(1, 2) @ (own * p[:, :, None]) - cross - cross.transpose(1, 2)
        curve = (curve + torch.einsum("bs,sf,sg->bfg", q, other, other)) / 4.0
        curve = curve + regularization * torch.eye(f, dtype=y.dtype, device=y.device)
        lower = torch.linalg.cholesky(curve)  # (b, f, f)
        x = up.new_zeros(up.shape)  # (b, f)
        for _ in range(STEPS):
            high = torch.einsum("bmf,bf->bm", own, x) + own_bias  # (b, m)
            low = x @ other.T + other_bias  # (b, S)
            wrong = (low[:, None, :] - high[:, :, None]).sigmoid()  # (b, m, S)
            pulls = p * torch.einsum("bms,bs->bm", wrong, q)  # (b, m) towards own
            pushes = q * torch.einsum("bms,bm->bs", wrong, p)  # (b, S) away from others
            slope = torch.einsum("bm,bmf->bf", pulls, own) - pushes @ other - regularization * x
            x = x + torch.cholesky_solve(slope[:, :, None], lower).squeeze(2)
        users[rows] = x
    return users


def cells(items: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Histories (B, M) with each item in its first place only, and its whole count there."""
    ids, order = items.sort(dim=1, stable=True)  # (B, M): equal ones side by side, as they came
    new = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)  # (B, M)
    group = new.cumsum(dim=1) - 1  # (B, M)
    total = torch.zeros_like(count).scatter_add_(1, group, count.gather(1, order))
    kept = new & (ids != EMPTY)  # (B, M)
    once = torch.full_like(items, EMPTY).scatter_(1, order, torch.where(kept, ids, EMPTY))
    whole = torch.zeros_like(count).scatter_(1, order, total.gather(1, group) * kept)
    return once, whole


def chunks(items: Tensor, width: int) -> Iterator[tuple[Tensor, int]]:
    """Rows of histories (B, M) that fit in memory at `width` numbers an item, and their length.

    Those of like length go together: little is computed for nothing.
    """
    places = torch.arange(1, items.shape[1] + 1, device=items.device)
    length = ((items != EMPTY) * places).amax(dim=1)  # (B,)
    order = length.argsort(stable=True)
    start, sizes = 0, length[order].tolist()
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * (sizes[end] + width) * width <= CHUNK:
            end += 1
        yield order[start:end], max(1, sizes[end - 1])
        start = end


def _with_events(past: Interactions) -> Interactions:
    if not len(past.item):
        raise ValueError(
            "factors need interactions, got none: widen the log before the cut, or choose random"
        )
    return past


def _check_counts(*, factors: int, iterations: int) -> None:
    for name, x in (("factors", factors), ("iterations", iterations)):
        if not (isinstance(x, int) and x >= 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {x!r}")


def _check_positive(
    *, regularization: float, alpha: float = 1.0, learning_rate: float = 1.0
) -> None:
    named = {"regularization": regularization, "alpha": alpha, "learning_rate": learning_rate}
    for name, x in named.items():
        if not 0.0 < x < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, got {x}: no vector is fixed by 0")
