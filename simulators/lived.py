"""Logs of synthetic worlds: households of known truth shop alone for a while, as a log has it.

What is fitted to such a log, blind, can be held against the truth: the same households, standing
where the log leaves them, as they really answer.
"""

import copy

import numpy as np
import pandas as pd
import torch

from encoders.state import EMPTY
from simulators.base import UserTable
from simulators.choice import independent
from simulators.fit import moment
from simulators.worlds import TODAY, TinyWorld, Truth, wanted_again
from sources.logs import Logs, Roles


def shopping_log(world: TinyWorld, *, days: float, seed: int = 0) -> Logs:
    """What the world's households buy in the `days` before its today, unrecommended.

    A household comes after gaps that are exponential about its own mean, and buys each item that it
    wants then, whatever else is in the basket. Only visits that buy are in a log.
    """
    if not days > 0:
        raise ValueError(f"days must be above 0, got {days}")
    truth, generator = world.truth, torch.Generator().manual_seed(seed)
    utility = truth.bias + world.taste * truth.taste @ world.catalog.vectors.T  # (U, N)
    count, last = torch.zeros_like(utility), torch.zeros_like(utility)  # times, and day of the last
    every = truth.every.double()
    gap = torch.empty_like(every)
    day = gap.exponential_(generator=generator) * every  # (U,) of the next visit
    found = []
    while True:
        rows = (day < days).nonzero().squeeze(1)  # (R,)
        if not len(rows):
            break
        age = day[rows, None].float() - last[rows]
        theta = utility[rows] + world.again * wanted_again(count[rows], age, truth.gap)
        uniform = torch.rand(theta.shape, generator=generator)
        bought = independent(theta, uniform)  # (R, N)
        at, item = bought.nonzero(as_tuple=True)
        found.append((rows[at], item, day[rows][at]))
        count[rows] += bought
        last[rows] = torch.where(bought, day[rows, None].float(), last[rows])
        day = day + torch.empty_like(every).exponential_(generator=generator) * every + 0.01
    user, thing, when = (torch.cat(x).numpy() for x in zip(*found, strict=True))
    price = world.catalog.price.numpy()[thing]
    events = pd.DataFrame({
        "user": user, "item": thing, "behaviour": "buy", "value": price, "price": price,
        "time": moment(TODAY - days) + pd.to_timedelta(when, unit="D"),
        "basket": [f"{u}-{t:.6f}" for u, t in zip(user, when, strict=True)],
    })  # fmt: skip
    kinds = [world.catalog.category_names[c] for c in world.catalog.category.tolist()]
    items = pd.DataFrame({"item": np.arange(len(kinds)), "kind": kinds})
    roles = Roles(item_category=("kind",))
    return Logs.create(events, items, roles=roles, name="world", now=moment(TODAY + 1))


def as_logged(world: TinyWorld, users: UserTable) -> TinyWorld:
    """The same world, serving some of its households as a log of theirs describes them."""
    rows = torch.from_numpy(np.asarray(users.ids, np.int64))  # a household's id is its row
    past, order = users.past.sort(dim=1)  # by item, EMPTY first, as it is looked up
    held = past != EMPTY
    count, age = (x.gather(1, order) * held for x in (users.past_count, users.past_age))
    widest = max(int(held.sum(dim=1).max()), 1)
    served = copy.copy(world)
    truth = world.truth
    served.truth = Truth(truth.taste[rows], truth.bias, truth.gap, truth.every[rows])
    served.users = users
    served.memory = (past[:, -widest:], count[:, -widest:], age[:, -widest:])
    return served
