"""Logs of impressions whose truth is known, and catalogues for them."""

import numpy as np
import pandas as pd
import torch

from simulators.base import Catalog
from sources.logs import Logs, Roles

ITEMS, USERS, SESSIONS, DAYS = 40, 1200, 8, 20
START = pd.Timestamp("2024-01-01")
AFTER_CLICK, AFTER_MISS = 0.1, 0.5  # chance to leave
LIKE, HATE = 0.2, 0.01  # of a click; of whatever is shown


def clicks_of(keen, category, slot):
    """The truth: keen users click more, on category 1 more, lower slots less."""
    return 1 / (1 + np.exp(-(-0.5 + 1.0 * keen + 1.0 * (category == 1) - 0.4 * slot)))


def feed(seed=0, slots=1):
    """Sessions of users, one item a minute until they leave; minutes are lognormal."""
    rng = np.random.default_rng(seed)
    keen = rng.normal(size=USERS)
    user = np.repeat(np.arange(USERS), SESSIONS)
    day, minute, parts = rng.uniform(0, DAYS, len(user)), 0, []
    while len(user):
        item, slot = rng.integers(ITEMS, size=len(user)), rng.integers(slots, size=len(user))
        yes = rng.random(len(user)) < clicks_of(keen[user], item % 4, slot)
        time = START + pd.to_timedelta(day, unit="D") + pd.Timedelta(minutes=minute)
        minutes = np.where(yes, rng.lognormal(0.0, 0.5, len(user)), 0.0)
        shown = pd.DataFrame({"user": user, "item": item, "time": time, "value": minutes,
                              "position": slot, "place": 1})  # fmt: skip
        answers = {
            "shown": np.ones(len(user), bool),
            "click": yes,
            "like": yes & (rng.random(len(user)) < LIKE),
            "hate": rng.random(len(user)) < HATE,
        }
        parts += [shown[which].assign(behaviour=name) for name, which in answers.items()]
        stays = rng.random(len(user)) >= np.where(yes, AFTER_CLICK, AFTER_MISS)
        user, day, minute = user[stays], day[stays], minute + 1
    events = pd.concat(parts, ignore_index=True)
    events = events.drop(columns="position") if slots == 1 else events
    table = pd.DataFrame({"user": range(USERS), "keen": keen, "sex": ["a", "b"] * (USERS // 2)})
    items = pd.DataFrame({"item": range(ITEMS), "kind": [str(i % 4) for i in range(ITEMS)]})
    roles = Roles(item_category=("kind",), user_number=("keen",), user_category=("sex",))
    return Logs.create(events, items, table, roles=roles, name="feed", purchases=("click",))


def catalog_of(logs, ids=None, share=0.7):
    """Items in four categories, with vectors that say nothing."""
    ids = np.arange(ITEMS) if ids is None else ids
    n = len(ids)
    vectors = np.random.default_rng(0).normal(size=(n, 4))
    return Catalog(
        ids=ids, texts=[""] * n, vectors=torch.from_numpy(vectors).float(),
        category=torch.arange(n) % 4, price=torch.full((n,), torch.nan),
        popularity=torch.ones(n) / n, as_of=logs.cut(share).timestamp() / 86_400,
        category_names=["0", "1", "2", "3"],
    )  # fmt: skip
