"""How purchases answer to prices: within a product, weeks in which it is cheaper than in others.

Sales of an item in a week, per visit, are compared with those of the same item in the other weeks
of a season: a Poisson model with an effect of each item x season (conditional on their sums). The
price of the week is what *other* households paid: a price known only where somebody bought is high
in number where sales are, and would answer to itself. What comes with a price (mailers, displays,
other shops' prices) is in its effect: a joint effect, not a causal one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from simulators.realism import Distance
from simulators.visits import Lines

SEASON = 13  # weeks in which an item's fame is taken for constant
LEAST = 300  # item-weeks with a price that varies, below which nothing is said
CHEAPEST = 0.05  # of the shelf price: a larger discount is a gift
ROUNDS = 50  # of Newton's method; five are enough


@dataclass(frozen=True)
class Elasticity:
    """Change of the log of sales per change of the log of a price; errors are robust by item."""

    shelf: float  # of the price before discounts, or of what was paid where no discount is logged
    shelf_error: float
    discount: float  # of the share of it that is left to pay, 1 - discount
    discount_error: float
    cells: int  # item-weeks

    def shift(self, shelf: Tensor, left: Tensor) -> Tensor:
        """What theta changes by at `shelf` (N,) over the usual price and `left` (N,) of it to pay.

        A purchase on a visit is rare, so that odds and rates move alike.
        """
        return self.shelf * shelf.log() + self.discount * left.log()


class Cells(NamedTuple):
    """c item-weeks in either half of the households, with the price that the other half paid."""

    item: np.ndarray  # (c,) int64
    stratum: np.ndarray  # (c,) int64: item x season x half
    sold: np.ndarray  # (c,) visits of this half with the item
    visits: np.ndarray  # (c,) of this half in the week
    price: np.ndarray  # (c, 2) log of shelf price and of the share left to pay


class Fitted(NamedTuple):
    """Coefficients (X,) of columns and their robust covariance (X, X)."""

    slope: np.ndarray
    covariance: np.ndarray


def price_cells(lines: Lines, times: np.ndarray | None = None) -> Cells:
    """Cells of receipts, households counted `times` (users,)."""
    known = np.isfinite(lines.price) & (lines.price > 0)
    left = np.nan_to_num(1.0 - np.nan_to_num(lines.discount)).clip(CHEAPEST, 1.0)
    week = ((lines.time - lines.time.min(initial=0.0)) // 7).astype(np.int64)
    week -= week.min(initial=0)
    half = (pd.util.hash_array(lines.user) % 2).astype(np.int64)  # ids in order may mean something
    heavy = np.ones(len(lines)) if times is None else times[lines.user].astype(np.float64)
    log_left = np.log(left)
    table = pd.DataFrame({
        "item": lines.item, "week": week, "half": half, "heavy": heavy, "visit": lines.visit,
        "left": log_left, "shelf": np.log(np.where(known, lines.price, 1.0)) - log_left,
    })  # fmt: skip
    keys = ["item", "week", "half"]
    paid = table[known & (heavy > 0)].groupby(keys)[["shelf", "left"]].median().reset_index()
    paid["half"] = 1 - paid["half"]  # told to the other half
    sold = table.groupby(keys)["heavy"].sum().rename("sold")
    visits = table.drop_duplicates("visit").groupby(["week", "half"])["heavy"].sum()
    cells = paid.join(sold, on=keys).join(visits.rename("visits"), on=["week", "half"])
    cells = cells.fillna({"sold": 0.0, "visits": 0.0})
    cells = cells[cells["visits"] > 0]
    seasons = (cells["item"] * 2 + cells["half"]) * 10_000 + cells["week"] // SEASON
    return Cells(
        cells["item"].to_numpy(), seasons.to_numpy(), cells["sold"].to_numpy(),
        cells["visits"].to_numpy(), cells[["shelf", "left"]].to_numpy(np.float64),
    )  # fmt: skip


def fit_elasticity(lines: Lines, times: np.ndarray | None = None) -> Elasticity | None:
    """The elasticities of receipts; None where prices are missing or hardly change."""
    cells = price_cells(lines, times)
    moves = moved(cells)  # (2,) in how many cells a column is not what it is in all its stratum
    columns = np.flatnonzero(moves >= LEAST)
    if 0 not in columns and 1 not in columns:
        return None
    found = conditional_poisson(cells, cells.price[:, columns])
    if found is None:
        return None
    slope, error = np.zeros(2), np.full(2, np.inf)
    slope[columns], error[columns] = found.slope, np.sqrt(np.diag(found.covariance))
    for silent, other in ((0, 1), (1, 0)):  # of what never changed alone the other speaks
        if silent not in columns:
            slope[silent], error[silent] = slope[other], error[other]
    return Elasticity(
        float(slope[0]), float(error[0]), float(slope[1]), float(error[1]), len(cells.item)
    )


def moved(cells: Cells) -> np.ndarray:
    """How many cells have a price that differs from the mean of their stratum by 1 %, (2,)."""
    stratum = np.unique(cells.stratum, return_inverse=True)[1]
    size = np.bincount(stratum)
    off = [abs(x - (np.bincount(stratum, x) / size)[stratum]) > 0.01 for x in cells.price.T]
    return np.array([int(x.sum()) for x in off])


def conditional_poisson(cells: Cells, x: np.ndarray) -> Fitted | None:
    """Log-linear effect of x (c, X) on sales per visit within strata; None if it cannot be told."""
    stratum = np.unique(cells.stratum, return_inverse=True)[1]
    total = np.bincount(stratum, cells.sold)[stratum]  # (c,) of the cell's stratum
    slope = np.zeros(x.shape[1])
    for _ in range(ROUNDS):
        due = cells.visits * np.exp(x @ slope)
        share = due / np.bincount(stratum, due)[stratum]
        mean = np.stack([np.bincount(stratum, share * c)[stratum] for c in x.T], axis=1)
        off, gap = x - mean, cells.sold - total * share  # (c, X), (c,)
        information = (off * (total * share)[:, None]).T @ off
        if np.linalg.cond(information) > 1e10 or not np.isfinite(information).all():
            return None
        step = np.linalg.solve(information, off.T @ gap).clip(-2.0, 2.0)
        slope = slope + step
        if abs(step).max() < 1e-8:
            break
    else:
        return None
    score = np.zeros((cells.item.max() + 1, x.shape[1]))
    np.add.at(score, cells.item, off * gap[:, None])  # items as clusters: weeks hang together
    inverse = np.linalg.inv(information)
    return Fitted(slope, inverse @ (score.T @ score) @ inverse)


def held_out_slope(found: Elasticity, lines: Lines) -> Distance | None:
    """By how much others' sales follow what `found` says, 1 being exactly; with interval."""
    cells = price_cells(lines)
    if len(cells.item) < LEAST:
        return None
    said = cells.price @ np.array([found.shelf, found.discount])
    slope = conditional_poisson(cells, said[:, None])
    if slope is None:
        return None
    value, half = float(slope.slope[0]), 1.96 * float(slope.covariance[0, 0]) ** 0.5
    return Distance(value, value - half, value + half)


def said(found: Elasticity | None) -> str:
    """The elasticities in words."""
    if found is None:
        return "prices: too few or too constant to say how purchases answer to them"

    def sells(slope: float, error: float, price: float) -> str:
        value, *ends = (float(price ** (slope + z * error)) for z in (0.0, 1.96, -1.96))
        return f"{value:.2f} times ({min(ends):.2f} to {max(ends):.2f})"

    shelf = sells(found.shelf, found.shelf_error, 0.9)
    discount = sells(found.discount, found.discount_error, 0.8)
    return (
        f"prices: a product sells {shelf} what it does else at a shelf price 10 % lower, "
        f"{discount} at a discount of 20 %, with all that comes with it "
        f"({found.cells:,} product-weeks)"
    )
