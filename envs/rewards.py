"""Rewards: functions of a `Response` to slot rewards (B, K), whose sum is the step's reward."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from encoders.state import EMPTY
from simulators.base import Catalog, Response

Reward = Callable[[Response], Tensor]


def units(response: Response) -> Tensor:
    """One for every item bought: the first behaviour."""
    return next(iter(response.chosen.values())).float()


def revenue(response: Response) -> Tensor:
    """Money, or minutes, of what was chosen."""
    return response.value


def incremental(response: Response) -> Tensor:
    """One for every item bought that would not have been bought unshown (Rubin, 1974)."""
    return (next(iter(response.chosen.values())) & ~response.organic).float()


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of behaviours: `Weighted({"click": 0.1, "buy": 1.0})`."""

    weights: dict[str, float]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("reward weights must name at least one behaviour, got none")

    def check(self, behaviours: Iterable[str]) -> None:
        """Refuse weights of behaviours that a simulator does not have."""
        unknown = sorted(set(self.weights) - set(behaviours))
        if unknown:
            raise ValueError(
                f"reward weights name {unknown}, but this simulator's behaviours are "
                f"{sorted(behaviours)}: weigh some of those"
            )

    def __call__(self, response: Response) -> Tensor:
        self.check(response.chosen)
        parts = [weight * response.chosen[name] for name, weight in self.weights.items()]
        return torch.stack(parts).sum(dim=0).float()  # (B, K)


@dataclass(frozen=True)
class Margin:
    """What each item bought earns: a column of a table of items, by the item's id.

    An environment makes it a reward with `of(catalog)`.
    """

    path: str  # .csv or .parquet
    item: str = "item"  # its column of ids
    column: str = "margin"  # its column of money left of one purchase

    def of(self, catalog: Catalog) -> Reward:
        """The reward for items of this catalogue, each of which must have a margin."""
        earned = torch.from_numpy(self._read(catalog)).to(catalog.vectors.device)  # (N,)

        def margin(response: Response) -> Tensor:
            """What is left of what was bought."""
            assert response.items is not None
            return earned[response.items.clamp(min=0)] * units(response)  # (B, K)

        return margin

    def table(self) -> pd.DataFrame:
        """The table, whose columns of ids and of margins are there."""
        path = Path(self.path)
        if not path.is_file():
            raise ValueError(f"reward: {path} does not exist: give the table of items' margins")
        try:
            csv = path.suffix.lower() == ".csv"
            table = pd.read_csv(path, dtype={self.item: "str"}) if csv else pd.read_parquet(path)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"reward: {path} cannot be read ({error}): give a .csv or .parquet with the "
                f"columns {self.item} and {self.column}"
            ) from None
        for column in (self.item, self.column):
            if column not in table:
                raise ValueError(
                    f"reward: {path} lacks the column {column!r}, it has {list(map(str, table))}: "
                    "name those meant (env.session.reward.item, env.session.reward.column)"
                )
        return table

    def _read(self, catalog: Catalog) -> np.ndarray:
        path, table = Path(self.path), self.table()
        ids = table[self.item].astype("str")
        if ids.duplicated().any():
            twice = ids[ids.duplicated()].unique()
            raise ValueError(
                f"reward: {path} has {len(twice)} items twice, the first {list(twice[:3])}: one "
                "margin for each"
            )
        values = pd.to_numeric(table[self.column], errors="coerce").set_axis(ids)
        wanted = pd.Index([str(i) for i in catalog.ids])
        known = values.reindex(wanted).to_numpy(np.float32)  # (N,)
        missing = ~np.isfinite(known)
        if missing.any():
            raise ValueError(
                f"reward: {path} must have a number in {self.column!r} for every item of the "
                f"catalogue, {int(missing.sum())} of {len(known)} have none, the first "
                f"{list(wanted[missing][:3])}: fill them in, or leave these items out of the log"
            )
        return known


def at_stake(reward: Reward, response: Response, price: Tensor) -> Tensor:
    """What hangs on the first behaviour, (B, K): the reward if an item is chosen, less if not.

    What was chosen keeps its value and its other behaviours; for the rest `price` (N,) stands in,
    0 where it is not known.
    """
    assert response.items is not None
    shown = response.items != EMPTY  # (B, K)
    first = next(iter(response.chosen))
    never = torch.zeros_like(shown)
    usual = torch.nan_to_num(price)[response.items.clamp(min=0)]  # (B, K)
    value = torch.where(response.chosen[first], response.value, usual) * shown
    taken = replace(response, chosen={**response.chosen, first: shown}, organic=never, value=value)
    passed = replace(
        response,
        chosen=dict.fromkeys(response.chosen, never),
        organic=never,
        value=torch.zeros_like(response.value),
    )
    return (reward(taken) - reward(passed)).abs()


def doubt(reward: Reward, response: Response, price: Tensor) -> Tensor:
    """One standard deviation of the expected reward, (B, K), as the simulator states its own.

    Who is unsure of a probability by u (the spread of its members) is unsure of the reward expected
    of it by u times what hangs on it. Subtracted as in MOPO (Yu et al., 2020).
    """
    return response.uncertainty * at_stake(reward, response, price)
