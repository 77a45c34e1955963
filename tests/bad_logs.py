"""Small logs with something missing or odd, for the commands that read any log."""

import numpy as np
import pandas as pd

from sources.logs import Logs, Roles


def plain(
    users: int = 120, items: int = 40, days: int = 160, every: float = 8.0, seed: int = 5
) -> pd.DataFrame:
    """Events of users who come about every `every` days and have three favourites each."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        liked = rng.choice(items, 3, replace=False)
        day = rng.exponential(every)
        while day < days:
            taken = {*liked[rng.random(3) < 0.5].tolist(), int(rng.integers(items))}
            rows += [(user, item, day) for item in sorted(taken)]
            day += 0.5 + rng.exponential(every)
    frame = pd.DataFrame(rows, columns=["user", "item", "day"])
    frame["time"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(
        (frame.pop("day") * 86_400).round(), unit="s"
    )
    return frame.assign(behaviour="buy", value=1.0)


def bare() -> Logs:
    """Who, what and when of one behaviour: no users table, no text, no prices, no baskets."""
    return Logs.create(plain(), name="bare")


def shuffled() -> Logs:
    """The same events in no order of time."""
    return Logs.create(plain().sample(frac=1.0, random_state=3), name="bare")


def browsed() -> Logs:
    """A behaviour that is no purchase, and none that is."""
    return Logs.create(plain().assign(behaviour="view"), name="browsed", purchases=("view",))


def once() -> Logs:
    """Every user comes on one day and never again."""
    frame = plain(users=1500, every=8.0)
    first = frame.groupby("user")["time"].transform("min")
    start = pd.to_timedelta(frame["user"] % 200, unit="D")
    frame = frame[frame["time"] == first].assign(
        time=lambda f: pd.Timestamp("2024-01-01") + start[f.index]
    )
    return Logs.create(frame, name="once")


def ten() -> Logs:
    """Ten events in all, of two users who come again."""
    few = plain().query("user < 2").sort_values("time")
    return Logs.create(few.iloc[np.linspace(0, len(few) - 1, 10).astype(int)], name="ten")


def never_bought() -> Logs:
    """Half of the items of the shop have not been bought by anybody."""
    items = pd.DataFrame({"item": range(80), "title": [f"thing {i}" for i in range(80)]})
    return Logs.create(plain(), items, roles=Roles(("title",)), name="never bought")


def constant() -> Logs:
    """All that is known of items and users is the same for all of them."""
    events = plain().assign(price=2.0, quantity=1.0, discount=0.0)
    items = pd.DataFrame(
        {"item": range(40), "title": "thing", "shelf": "all", "weight": 1.0, "price": 2.0}
    )
    users = pd.DataFrame({"user": range(120), "age": 40.0, "town": "here"})
    roles = Roles(("title",), ("shelf",), ("weight",), ("town",), ("age",))
    return Logs.create(events, items, users, roles=roles, name="constant")


def empty_columns() -> Logs:
    """Columns are declared, and nothing stands in them."""
    events = plain().assign(price=np.nan)
    items = pd.DataFrame({"item": range(40), "title": None, "shelf": None, "weight": np.nan})
    users = pd.DataFrame({"user": range(120), "age": np.nan, "town": None})
    roles = Roles(("title",), ("shelf",), ("weight",), ("town",), ("age",))
    return Logs.create(events, items, users, roles=roles, name="empty columns")


def midnight() -> Logs:
    """Days without an hour, and a value of nothing."""
    frame = plain()
    return Logs.create(frame.assign(time=frame["time"].dt.floor("D"), value=0.0), name="midnight")


def worthless() -> Logs:
    """Few events, though enough to fit to."""
    return Logs.create(plain(users=25), name="worthless")


def one_moment() -> Logs:
    """All events carry the same time."""
    return Logs.create(plain().assign(time=pd.Timestamp("2024-01-01")), name="one moment")


def one_day() -> Logs:
    """All events lie within a day."""
    frame = plain()
    first = frame["time"].min()
    time = first + (frame["time"] - first) / 250
    return Logs.create(frame.assign(time=time), name="one day")


def one_item() -> Logs:
    """A single product."""
    return Logs.create(plain().assign(item=1), name="one item")


def one_user() -> Logs:
    """A single customer."""
    return Logs.create(plain().assign(user=1), name="one user")


def two_users() -> Logs:
    """Two customers, who come often."""
    frame = plain()
    return Logs.create(frame.assign(user=frame["user"] % 2), name="two users")


def too_early() -> Logs:
    """Nearly all is bought in the first days; the rest is silence, and one late purchase."""
    frame = plain(days=40)
    late = frame.iloc[[0]].assign(time=pd.Timestamp("2026-01-01"))
    return Logs.create(pd.concat([frame, late]), name="too early")


def unreached(*given, **settings):
    """Stand in for work that must not begin."""
    raise AssertionError("it was too late to refuse")
