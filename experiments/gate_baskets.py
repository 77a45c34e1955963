"""Whose ten best items are those of the next basket: fitted users against simple rankings."""

from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from encoders.state import EMPTY
from evaluation.ranking_table import metrics
from simulators.fidelity import DECAY, HeldOut, cosine
from simulators.gate import Check, above
from simulators.realism import Distance

K = 10
METRICS = {"recall10": "recall", "ndcg10": "ndcg"}
RIVALS = {  # of each metric: end of the check's name, and who
    "recall10": {"popularity": "popularity", "item_knn": "item-kNN"},
    "ndcg10": {
        "popularity": "popularity", "item_knn": "item-kNN", "decayed_counts": "decayed own counts",
    },
}  # fmt: skip


def basket_checks(
    held: HeldOut, counts: csr_matrix, log_rate: Tensor, limits: Mapping[str, float], seed: int
) -> list[Check]:
    """Recall and NDCG at 10 of the first basket after the cut of each household, over rivals.

    `counts` (users, N) are of those that were fitted on, before the cut; ties are drawn.
    """
    some = held.bought.any(dim=1).numpy()
    first = np.unique(held.trips.user, return_index=True)[1]
    first = first[some[first]]  # a visit that bought nothing of the catalogue has no basket
    at = torch.from_numpy(first)
    wanted = csr_matrix(held.bought[at].numpy())
    found = {
        name: metrics(scores.topk(min(K, scores.shape[1]), dim=1).indices, wanted)
        for name, scores in rankings(held, at, counts, log_rate, seed).items()
    }
    checks = []
    for metric, rivals in RIVALS.items():
        ours = found["model"][METRICS[metric]]  # (h,)
        for end, rival in rivals.items():
            other = found[rival][METRICS[metric]]
            said = (
                f"next basket, {metric[:-2]}@{K}: {float(ours.mean()):.3f}, {rival} "
                f"{float(other.mean()):.3f}, {len(first)} households"
            )
            name = f"basket_{metric}_over_{end}"
            checks.append(above(name, paired(ours - other), limits, said, users=len(first)))
    return checks


def with_rivals(checks: list[Check], held: HeldOut) -> tuple[list[Check], list[str]]:
    """Checks without those over a rival that cannot find anything, and why they are missing."""
    if again(held):
        return checks, []
    kept = [c for c in checks if not c.check.endswith(("own_counts", "decayed_counts"))]
    return kept, ["over own counts: nobody takes an item again after the cut"]


def again(held: HeldOut) -> bool:
    """Whether anybody takes an item that is in its past: a rival that knows only these has a use.

    Nobody rates a film twice.
    """
    row, place = np.nonzero(held.trips.past != EMPTY)
    item = held.trips.past[row, place].astype(np.int64)
    return bool(held.bought[torch.from_numpy(row), torch.from_numpy(item)].any())


def rankings(
    held: HeldOut, rows: Tensor, counts: csr_matrix, log_rate: Tensor, seed: int
) -> dict[str, Tensor]:
    """Scores (h, N) for trips `rows` (h,) of the fitted users and of their rivals."""
    start, n = held.trips[rows.numpy()], held.theta.shape[1]
    past = torch.from_numpy(start.past).long()
    place = torch.where(past == EMPTY, n, past)
    own, decayed = torch.zeros(2, len(rows), n + 1)
    own = own.scatter(1, place, torch.from_numpy(start.count))[:, :-1]
    weight = torch.from_numpy(start.count * np.exp(-start.age / DECAY))
    decayed = decayed.scatter(1, place, weight)[:, :-1]
    tie = torch.rand(own.shape, generator=torch.Generator().manual_seed(seed)) * 1e-7
    rate = log_rate.exp() + tie
    return {
        "model": held.theta[rows] + tie,
        "popularity": rate,
        "item-kNN": torch.from_numpy((own > 0).float().numpy() @ cosine(counts)) + tie,
        "decayed own counts": decayed + 1e-3 * rate,
    }


def paired(gain: Tensor) -> Distance:
    """The mean of (h,) differences with its 95 % interval."""
    if not len(gain):
        return Distance(float("nan"), float("nan"), float("nan"))
    mean = float(gain.mean())
    error = 1.96 * float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else float("nan")
    return Distance(mean, mean - error, mean + error)
