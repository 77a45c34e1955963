"""Several models at once: their scores averaged, or their rankings voting."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.explore import break_ties, standardised
from agents.interactions import Interactions, owned, spread
from encoders.state import Observation

HOW = ("average", "vote")
DAMPING = 60.0  # of reciprocal ranks: the first is worth 1.15 of the tenth, as in the paper
STEPS = 4  # of a weight from 0 to 1 when weights are tuned
JUDGES = 1000  # users at most, whose last item weights are tuned on
CHUNK = 200  # of them at a time
CUTOFF = 10  # of NDCG


class Blend:
    """A weighted mean of standardised scores, or of 1 / (60 + rank) (Cormack et al., 2009).

    Without weights they are tuned on `past` itself: each user's last event is held out, the models
    are fitted to the rest and the weights that find those items best are kept; then the models
    are fitted to all. The last of a user's events without times is drawn with `seed`.
    """

    def __init__(
        self,
        past: Any,
        *,
        models: Sequence[Callable[..., Any]],
        weights: Sequence[float] | None = None,
        how: str = "average",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        if how not in HOW:
            raise ValueError(f"how must be one of {', '.join(HOW)}, got {how!r}")
        if not models:
            raise ValueError("models must name at least one model, got none: models: [...]")
        if weights is not None:
            _check_weights(weights, len(models))
        past = Interactions.of(past)
        self.num_items, self.how = past.num_items, how
        if weights is None:
            self.weights = tuned(past, models, how, device, seed)  # (models,)
        else:
            given = torch.tensor(list(weights), dtype=torch.float64)
            self.weights = (given / given.sum()).to(device)
        self.models = [make(past, device=device, seed=seed) for make in models]

    def scores(self, obs: Observation) -> Tensor:
        """(B, N) float64; popularity where a user has no history, as each model scores it."""
        return blended([model.scores(obs) for model in self.models], self.weights, self.how)

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_items": self.num_items,
            "weights": self.weights,
            "models": [model.state_dict() for model in self.models],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["models"]) != len(self.models):
            raise ValueError(
                f"the checkpoint is of {len(state['models'])} models, this blend has "
                f"{len(self.models)}: choose the blend that was saved"
            )
        for model, saved in zip(self.models, state["models"], strict=True):
            model.load_state_dict(saved)
        self.weights = state["weights"].to(self.weights.device)


def blended(scores: Sequence[Tensor], weights: Tensor, how: str) -> Tensor:
    """Scores (B, N) of each model and their weights (models,) to one (B, N) float64."""
    return sum(
        (w * comparable(s, how) for w, s in zip(weights, scores, strict=True)),
        start=torch.zeros((), dtype=torch.float64, device=weights.device),
    )


def comparable(scores: Tensor, how: str) -> Tensor:
    """Scores of any scale to standard deviations or to reciprocal ranks, (B, N) float64."""
    if how == "average":
        return standardised(scores, torch.ones_like(scores, dtype=torch.bool))
    best = break_ties(scores).argsort(dim=1, descending=True)  # (B, N)
    rank = torch.arange(1.0, scores.shape[1] + 1.0, dtype=torch.float64, device=scores.device)
    places = torch.empty_like(rank.expand(scores.shape)).scatter_(1, best, rank.expand_as(best))
    return 1.0 / (DAMPING + places)


def tuned(
    past: Interactions, models: Sequence[Callable[..., Any]], how: str, device: str, seed: int
) -> Tensor:
    """The weights (models,) of a grid whose blend finds held-out items best by NDCG@10."""
    rest, users, items, now = last_held_out(past, seed)
    grid = simplex(len(models)).to(device)  # (G, models)
    if not len(users) or len(models) == 1:
        return grid[0]
    draw = np.random.default_rng(seed).permutation(len(users))[:JUDGES]
    users, now, target = users[draw], now[draw], torch.from_numpy(items[draw]).to(device)
    fitted = [make(rest, device=device, seed=seed) for make in models]
    obs = rest.histories(users, now if past.timed else None).to(device)
    had, _, _ = owned(obs, past.num_items)
    again = bool((had == target[:, None]).any())
    gain = torch.zeros(len(grid), dtype=torch.float64, device=device)
    for rows in torch.arange(len(users), device=device).split(CHUNK):
        parts = [comparable(model.scores(obs[rows]), how) for model in fitted]  # (b, N) each
        known = spread(had[rows], torch.ones_like(had[rows]), past.num_items) > 0  # (b, N)
        for g, weights in enumerate(grid):
            total = sum(w * part for w, part in zip(weights, parts, strict=True) if w > 0)
            # A log where nobody has an item twice is judged on new ones, as it will be asked for.
            total = total if again else total.masked_fill(known, -torch.inf)
            gain[g] += ndcg(total, target[rows]).sum()
    return grid[int(gain.argmax())]  # of equally good ones the most even


def ndcg(scores: Tensor, target: Tensor) -> Tensor:
    """NDCG@10 (B,) of scores (B, N) if one item (B,) is wanted; equals share a rank."""
    mine = scores.gather(1, target[:, None])  # (B, 1)
    above, equal = (scores > mine).sum(dim=1), (scores == mine).sum(dim=1)  # (B,) with itself
    rank = above + (equal + 1.0) / 2.0
    return (rank <= CUTOFF) / (rank + 1.0).log2()


def simplex(size: int) -> Tensor:
    """Weights (G, size) in steps of a quarter that sum to 1, the most even first."""
    rows = [w for w in product(range(STEPS + 1), repeat=size) if sum(w) == STEPS]
    rows.sort(key=lambda w: sum(x * x for x in w))
    even = torch.full((1, size), 1.0 / size, dtype=torch.float64)
    return torch.cat([even, torch.tensor(rows, dtype=torch.float64) / STEPS])


def last_held_out(
    past: Interactions, seed: int
) -> tuple[Interactions, np.ndarray, np.ndarray, np.ndarray]:
    """What is left without the last event of users with two or more; users, items and times."""
    size = np.bincount(past.user, minlength=past.num_users)  # (U,)
    end = size.cumsum()
    users = np.flatnonzero(size > 1)
    back = np.ones(len(users), dtype=np.int64)
    if not past.timed:  # rows of counts lie in the order of ids: their last is no random item
        draw = np.random.default_rng(seed).random(len(users))
        back += (draw * size[users]).astype(np.int64)
    held = end[users] - back
    keep = np.ones(len(past.user), dtype=bool)
    keep[held] = False
    rest = replace(
        past,
        user=past.user[keep],
        item=past.item[keep],
        time=past.time[keep],
        value=past.value[keep],
    )
    return rest, users, past.item[held], past.time[held]


def _check_weights(weights: Sequence[float], size: int) -> None:
    if len(weights) != size:
        raise ValueError(f"weights must be one for each of {size} models, got {len(weights)}")
    if not all(0.0 <= w < float("inf") for w in weights) or not sum(weights) > 0:
        raise ValueError(
            f"weights must be finite, at least 0 and not all 0, got {list(weights)}: "
            "null tunes them"
        )
