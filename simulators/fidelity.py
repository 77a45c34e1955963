"""How like the held-out log the fitted preferences are: ranking against baselines, and calibration.

Scored on trips after the cut of all households known before it, whole catalogue, no sampled items.
Baselines are computed here, from the same log before the cut, with seeded ties.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from encoders.state import EMPTY
from simulators.preference import Preference, bought_board, describe_trips
from simulators.trips import Trips

DECAY = 60.0  # days in which a purchase loses all but 1/e of its weight, in decayed own counts
CHUNK = 512  # trips scored at once
LITTLE = 0.02  # log loss below the per-item rate; users with less are little more than popularity
QUANTILES = 100  # of the predictions, for the calibration error


@dataclass(frozen=True)
class HeldOut:
    """What is known of the trips after the cut of users the fit has not seen."""

    trips: Trips
    theta: Tensor  # (n, N) logits
    bought: Tensor  # (n, N) bool


@torch.no_grad()
def priced(preference: Preference, trips: Trips) -> HeldOut:
    """Price every item for every trip."""
    theta, bought = [], []
    for at in range(0, len(trips), CHUNK):
        some = trips[np.arange(at, min(at + CHUNK, len(trips)))]
        theta.append(preference.logits(describe_trips(preference, some)))
        bought.append(bought_board(some, theta[-1].shape[1]))
    return HeldOut(trips, torch.cat(theta), torch.cat(bought))


def fidelity(
    preference: Preference, trips: Trips, counts: csr_matrix, log_rate: Tensor, seed: int = 0
) -> dict[str, Any]:
    """All figures of `preference` on held-out trips; `counts` (users, N) from before the cut."""
    if len(trips) == 0:
        raise ValueError(
            "no trips after the cut to judge on: choose an earlier cut or a longer log"
        )
    held = priced(preference, trips)
    theta, bought = held.theta, held.bought
    if not bought.any():
        raise ValueError(
            f"the {len(trips)} trips after the cut bought nothing of the {len(log_rate)} items of "
            "the catalogue: choose another cut or a larger catalogue"
        )
    return {
        "trips": len(trips),
        "households": len(np.unique(trips.user)),
        "items": len(log_rate),
        **calibration(theta, bought, log_rate),
        **ranking(theta, bought, trips, counts, log_rate, seed),
    }


def calibration(theta: Tensor, bought: Tensor, log_rate: Tensor) -> dict[str, Any]:
    """Observed against predicted purchases over every (trip, item) pair, (n, N) each."""
    probability = theta.sigmoid()
    order = probability.flatten().argsort()
    p, y = probability.flatten()[order].double(), bought.flatten()[order].double()
    total = len(p)
    none = p.new_zeros(1)
    predicted = torch.cat([none, p.cumsum(0)])  # (n N + 1,) sums of the k lowest predictions
    seen = torch.cat([none, y.cumsum(0)])  # (n N + 1,) and of what was bought of them

    def between(sums: Tensor, low: float, high: float) -> float:
        return float(sums[round(high * total)] - sums[round(low * total)])

    def ratio(low: float, high: float) -> float:
        return between(seen, low, high) / max(between(predicted, low, high), 1e-12)

    steps = np.linspace(0, 1, QUANTILES + 1)
    gaps = [abs(between(seen, a, b) - between(predicted, a, b)) for a, b in pairwise(steps)]
    softplus = torch.nn.functional.softplus
    loss = float((softplus(theta) - theta * bought).double().mean())
    flat = (log_rate - torch.log1p(-log_rate.exp().clamp_max(0.999999))).expand_as(theta)
    flat_loss = float((softplus(flat) - flat * bought).double().mean())
    return {
        "base_rate": float(y.mean()),
        "items_per_trip": float(y.sum() / len(theta)),
        "items_per_trip_predicted": float(p.sum() / len(theta)),
        "observed_over_predicted_deciles": [ratio(k / 10, (k + 1) / 10) for k in range(10)],
        "observed_over_predicted_top_percent": ratio(0.99, 1.0),
        "log_loss": loss,
        "log_loss_item_rate": flat_loss,
        "log_loss_reduction": 1 - loss / flat_loss,
        "calibration_error_over_base_rate": sum(gaps) / float(seen[-1]),
    }


def ranking(
    theta: Tensor, bought: Tensor, trips: Trips, counts: csr_matrix, log_rate: Tensor, seed: int
) -> dict[str, Any]:
    """Hit@10 per household at its first trip after the cut, for all it buys after the cut."""
    result: dict[str, Any] = {}
    found = hits(theta, bought, trips, counts, log_rate, seed)
    for mode, rival in (("repeats", "own counts"), ("new", "item-kNN")):
        hit = found[mode]
        gain = hit["model"] - hit[rival]
        # one household has no interval
        error = 1.96 * float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else float("nan")
        result[f"hit10_{mode}"] = {name: float(h.mean()) for name, h in hit.items()}
        result[f"hit10_{mode}_households"] = len(gain)
        result[f"hit10_{mode}_gain"] = {
            "over": rival,
            "value": float(gain.mean()),
            "low": float(gain.mean()) - error,
            "high": float(gain.mean()) + error,
        }
    return result


def hits(
    theta: Tensor, bought: Tensor, trips: Trips, counts: csr_matrix, log_rate: Tensor, seed: int,
    more: dict[str, Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Whether each household's ten best held one it bought, (h,) by mode and by who ranked.

    Modes: "repeats" is any item, "new" those the household had not bought. `more` are scores
    (h, N) of others, for the first trip of each household in order of its name.
    """
    _, first, row = np.unique(trips.user, return_index=True, return_inverse=True)
    wanted = torch.zeros(len(first), theta.shape[1], dtype=torch.int32)
    wanted.index_add_(0, torch.from_numpy(row), bought.int())
    start = trips[first]
    own, decayed = torch.zeros(2, len(first), theta.shape[1] + 1)
    past = torch.from_numpy(start.past).long()
    place = torch.where(past == EMPTY, theta.shape[1], past)
    own = own.scatter(1, place, torch.from_numpy(start.count))[:, :-1]
    weight = torch.from_numpy(start.count * np.exp(-start.age / DECAY))
    decayed = decayed.scatter(1, place, weight)[:, :-1]
    known = own > 0  # (h, N)
    tie = torch.rand(own.shape, generator=torch.Generator().manual_seed(seed)) * 1e-7
    rate = log_rate.exp() + tie  # (h, N)
    scores = {
        "model": theta[torch.from_numpy(first)] + tie,
        "popularity": rate,
        "own counts": own + 0.1 * rate,
        "decayed own counts": decayed + 1e-3 * rate,
        "item-kNN": torch.from_numpy(known.float().numpy() @ cosine(counts)) + tie,
        **{name: score + tie for name, score in (more or {}).items()},
    }
    result: dict[str, dict[str, Tensor]] = {}
    for mode in ("repeats", "new"):
        target = wanted > 0 if mode == "repeats" else (wanted > 0) & ~known
        scored = target.any(dim=1)
        result[mode] = {}
        for name, score in scores.items():
            allowed = score if mode == "repeats" else score.masked_fill(known, -torch.inf)
            top = allowed.topk(min(10, theta.shape[1]), dim=1).indices
            result[mode][name] = target.gather(1, top).any(dim=1)[scored].double()
    return result


def cosine(counts: csr_matrix) -> np.ndarray:
    """Cosine of items (N, N) by who bought them, zero diagonal (Sarwar et al., 2001)."""
    binary = (counts > 0).astype(np.float32)
    length = np.sqrt(np.asarray(binary.sum(axis=0)).ravel())
    table = (binary.T @ binary).toarray() / np.maximum(np.outer(length, length), 1e-9)
    np.fill_diagonal(table, 0.0)
    return table.astype(np.float32)


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures in words, one claim a line."""
    f = figures
    deciles = f["observed_over_predicted_deciles"]
    text = [
        f"held out: {f['trips']} trips of {f['households']} households after the cut, "
        f"{f['items']} items",
        f"  items per trip: {f['items_per_trip_predicted']:.2f} predicted, "
        f"{f['items_per_trip']:.2f} bought",
        f"  bought / predicted: {min(deciles):.2f} to {max(deciles):.2f} over the deciles of the "
        f"prediction, {f['observed_over_predicted_top_percent']:.2f} in the top 1 %",
        f"  calibration error: {f['calibration_error_over_base_rate']:.3f} of the base rate "
        f"({f['base_rate']:.4f})",
        f"  log loss: {100 * f['log_loss_reduction']:.1f} % below the per-item rate",
    ]
    if f["log_loss_reduction"] < LITTLE:
        text.append(
            "  warning: that is hardly better than knowing how often each item is bought; what "
            "agents learn of single users here means little: a longer log, more users or a smaller "
            "catalogue would help"
        )
    for mode, title in (("repeats", "all items"), ("new", "items new to the household")):
        gain = f[f"hit10_{mode}_gain"]
        hits = ", ".join(f"{name} {value:.3f}" for name, value in f[f"hit10_{mode}"].items())
        text += [
            f"  Hit@10, {title} ({f[f'hit10_{mode}_households']} households): {hits}",
            f"    model - {gain['over']}: {gain['value']:+.4f} "
            f"({gain['low']:+.4f} to {gain['high']:+.4f})",
        ]
    return text
