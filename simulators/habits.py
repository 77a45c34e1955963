"""When a household stops buying and returns, what a purchase does to other wishes: from the log."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from simulators.base import Catalog
from simulators.company import Company, fit_company
from simulators.preference import Preference, bought_board, describe_trips
from simulators.prices import Elasticity
from simulators.returns import Returns, fit_returns
from simulators.trips import Trips

NTH = 12  # purchases told apart by the stop hazard; from there on it is constant
SAMPLE = 1500  # trips that satiation is measured on


@dataclass(frozen=True)
class Habits:
    """Fitted to trips; a negative `satiation`: a purchase invites another of its category."""

    stop: Tensor  # (NTH,) logit of stopping after the nth purchase
    size_slope: float  # per unit of the household's log items per trip, profile column 0
    satiation: float  # taken from theta per purchase of the same category on this trip
    company: Company | None = None  # what goes together; None: baskets were too few to tell
    returns: Returns | None = None  # when it comes back; None: trips were too few to tell
    elasticity: Elasticity | None = None  # of purchases by price; None: too little to tell
    display: float | None = None  # added to theta by being shown, if displays speak for slates

    def to(self, device: str) -> "Habits":
        company, returns = self.company and self.company.to(device), self.returns
        returns = returns and returns.to(device)
        return replace(self, stop=self.stop.to(device), company=company, returns=returns)

    def plain(self) -> dict[str, Any]:
        """All of it as tensors and numbers."""
        parts = {name: getattr(self, name) for name in ("company", "returns", "elasticity")}
        return vars(self) | {name: part and dict(vars(part)) for name, part in parts.items()}

    @staticmethod
    def of(plain: dict[str, Any]) -> "Habits":
        """What `plain` wrote."""
        kinds = {"company": Company, "returns": Returns, "elasticity": Elasticity}
        found = {name: plain.get(name) for name in kinds}
        return Habits(**plain | {n: part and kinds[n](**part) for n, part in found.items()})

    def stop_hazard(self, purchases: Tensor, log_size: Tensor) -> Tensor:
        """Probability (B,) to go home after the `purchases`-th purchase (B,)."""
        nth = (purchases - 1).clamp(min=0, max=NTH - 1)
        return (self.stop[nth] + self.size_slope * log_size).sigmoid()


def learn_habits(
    preference: Preference, catalog: Catalog, trips: Trips, weight: np.ndarray, seed: int
) -> Habits:
    """All habits of households whose trips before the catalogue's cut are weighted (n,)."""
    habits = fit_habits(preference, trips, weight, catalog.category.cpu(), seed)
    company = fit_company(preference, catalog, trips, np.random.default_rng(seed), weight)
    returns = fit_returns(trips, weight, until=catalog.as_of, rng=np.random.default_rng(seed))
    return replace(habits, company=company if company.learnt else None, returns=returns)


def fit_habits(
    preference: Preference, trips: Trips, weight: np.ndarray, category: Tensor, seed: int
) -> Habits:
    """Stop hazard and satiation of trips weighted (n,)."""
    stop, slope = fit_stop(np.diff(trips.pointer), trips.profile[:, 0], weight)
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(trips), min(SAMPLE, len(trips)), p=weight / weight.sum())
    return Habits(stop, slope, fit_satiation(preference, trips[rows], category))


def fit_stop(size: np.ndarray, log_size: np.ndarray, weight: np.ndarray) -> tuple[Tensor, float]:
    """Discrete-time hazard by logistic regression: of stopping after the nth purchase, given n.

    A trip of n purchases went on after each of the first n - 1 and stopped after the last.
    """
    some = size > 0
    size, log_size, weight = size[some], log_size[some], weight[some]
    nth = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)  # (m,) 0, 1, ... per trip
    last = torch.from_numpy((nth == np.repeat(size, size) - 1).astype(np.float32))
    level = torch.from_numpy(np.minimum(nth, NTH - 1))
    known = torch.from_numpy(np.repeat(log_size, size)).float()
    heavy = torch.from_numpy(np.repeat(weight, size)).float()
    coefficients = torch.zeros(NTH + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logit = coefficients[level] + coefficients[NTH] * known
        value = binary_cross_entropy_with_logits(logit, last, heavy, reduction="sum") / heavy.sum()
        value = value + 1e-5 * coefficients.square().sum()  # levels no trip reaches stay finite
        value.backward()
        return value

    optimizer.step(loss)
    found = coefficients.detach()
    return found[:NTH].clone(), float(found[NTH])


@torch.no_grad()
def fit_satiation(preference: Preference, trips: Trips, category: Tensor) -> float:
    """Minus the log of how many more pairs of a category trips hold than independent wishes would.

    Relative to pairs of any category, as big baskets hold more pairs of all kinds.
    """
    probability = preference.logits(describe_trips(preference, trips)).sigmoid()  # (n, N)
    real = bought_board(trips, len(category)).float()  # (n, N)
    table = torch.nn.functional.one_hot(category).float()  # (N, categories)
    ratios = []
    for group in (table, torch.ones(len(category), 1)):
        observed = ((real @ group).square() - real.square() @ group).sum()
        expected = ((probability @ group).square() - probability.square() @ group).sum()
        ratios.append(float(observed / expected.clamp_min(1e-9)))
    same, any_pair = ratios
    return -float(np.log(max(same, 1e-3) / max(any_pair, 1e-3)))
