"""The users that `bench=env` serves: those of a synthetic world, and those fitted to a log."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig

from simulators.base import Catalog, SimSpec, UserSimulator
from simulators.catalog import described
from simulators.fitted import FittedSimulator
from simulators.worlds import TinyWorld
from sources.logs import Logs, Roles

HOUSEHOLDS, DAYS, EVERY, BASKET = 800, 420, 9, 6  # of the log: trips are EVERY days apart
FAVOURITES, DEPARTMENTS, PER_KIND = 80, 20, 3  # items a household buys; items of a kind
EVERYTHING: dict[str, Any] = {  # what fitted users can do, beside what comes from the log
    "trips": 3, "drift": 0.1, "exposure": 0.3, "position": 0.1, "patience": 0.1,
}  # fmt: skip


def worlds(cfg: DictConfig) -> dict[str, UserSimulator]:
    """Each kind of users under the name of its row."""
    spec = SimSpec(None, None, seed=cfg.seed)
    tiny = TinyWorld(spec, items=cfg["items"], dim=cfg.dim)
    return {"TinyWorld": tiny, "fitted users, everything on": fitted(cfg)}


def fitted(cfg: DictConfig) -> FittedSimulator:
    """Households fitted to a log of regular shoppers, with every assumption at work."""
    logs = log_of_regulars(cfg["items"], cfg.seed)
    catalog = catalog_of(logs, cfg["items"], cfg.dim, cfg.seed)
    return FittedSimulator.fit(SimSpec(logs, catalog, seed=cfg.seed), **EVERYTHING)


def log_of_regulars(num_items: int, seed: int) -> Logs:
    """A log of about 37,000 trips by households who buy their favourites of `num_items`."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(num_items) // PER_KIND  # (N,)
    many = min(FAVOURITES, max(2, num_items // 2))
    key = rng.exponential(np.arange(10, num_items + 10), (HOUSEHOLDS, num_items))  # fame falls
    favourites = key.argsort(axis=1)[:, :many]  # (households, favourites)
    trips = rng.poisson(DAYS / EVERY, HOUSEHOLDS)
    user = np.repeat(np.arange(HOUSEHOLDS), trips)  # (trips,)
    time = np.round(rng.uniform(0, DAYS, len(user)) * 86_400)
    lines = 1 + rng.poisson(BASKET - 1, len(user))  # (trips,)
    trip = np.repeat(np.arange(len(user)), lines)  # (n,)
    item = favourites[user[trip], (many * rng.random(len(trip)) ** 2).astype(np.int64)]  # (n,)
    price = np.round(rng.uniform(1, 9, num_items), 2)
    events = pd.DataFrame(
        {
            "user": user[trip],
            "item": item,
            "time": pd.Timestamp("2024-01-01") + pd.to_timedelta(time[trip], unit="s"),
            "behaviour": "buy",
            "basket": trip,
            "value": price[item],
            "price": price[item],
        }
    ).drop_duplicates(["basket", "item"])
    items = pd.DataFrame(
        {
            "item": np.arange(num_items),
            "name": [f"thing {i}" for i in range(num_items)],
            "kind": [f"kind {k}" for k in kinds],
            "department": [f"department {k % DEPARTMENTS}" for k in kinds],
        }
    )
    roles = Roles(item_text=("name",), item_category=("kind", "department"))
    return Logs.create(events, items, roles=roles, name="regulars")


def catalog_of(logs: Logs, num_items: int, dim: int, seed: int) -> Catalog:
    """All items of the log at 90 % of its time, under vectors drawn at random: no BERT needed."""
    as_of = logs.cut(0.9)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_items, dim, generator=generator)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    ids = np.arange(num_items)
    return described(logs.before(as_of), ids, [f"thing {i}" for i in ids], vectors, as_of)
