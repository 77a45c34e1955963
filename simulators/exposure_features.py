"""What is known before an impression, as numbers: of the user, the item, the place, the session.

Never ids: users and places are described by how they answered before, so new ones are served too.
A rate is told as its lift, the difference of logits to the rate of all, few counts pulled to 0.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from encoders.state import EMPTY, calendar
from simulators.base import Catalog
from simulators.funnel import Design
from simulators.impressions import Impressions, before
from sources.logs import Logs

MOMENT = 9  # columns of the calendar that are used: weekday and hour
PULL = 7.0  # impressions' worth of the rate of all in the rate of a user, an item or a place
TASTE = 5.0  # answers' worth of everybody's categories in those of a user
MOOD = 3.0  # impressions' worth of the usual rate in the rate of a session so far
WEEK = 7.0  # days of the usual pace in the pace of a user or an item
LEVELS = 16  # a category of users with more of them is left out: each would be a column
COLUMNS = 6  # of categories of items that are used, in the order declared


@dataclass(frozen=True)
class Encoding:
    """How features are made; fitted once, the same for whoever comes later."""

    rate: np.ndarray  # (F,) of all impressions
    value: float  # mean value of an impression
    pace: tuple[float, float]  # impressions a day of a user, and of an item
    numbers: list[tuple[str, float, float]]  # attribute of users, mean and spread
    levels: list[tuple[str, list[str]]]  # attribute of users and its values
    places: dict[str, list[float]]  # lifts of each behaviour (F,)
    taste: Tensor  # (C,) share of first answers by category of the catalogue
    positions: bool  # whether slots were logged


def fit_encoding(
    impressions: Impressions, logs: Logs, catalog: Catalog, weight: np.ndarray
) -> Encoding:
    """Rates of all, levels and scales of attributes, from impressions weighted (n,)."""
    answers = impressions.answers
    total = weight.sum()
    rate = (weight @ answers + 0.5) / (total + 1.0)  # never 0 or 1
    value = float(weight @ impressions.value.clip(0.0) / total)
    places: dict[str, list[float]] = {}
    if impressions.place is not None:
        code, names = pd.factorize(impressions.place, sort=True)
        count = np.bincount(code, weight)
        often = np.stack([np.bincount(code, weight * a) for a in answers.T], axis=1)
        places = {
            str(n): row.tolist() for n, row in zip(names, lift(often, count, rate), strict=True)
        }
    users = logs.users
    numbers = []
    for name in logs.roles.user_number:
        x = np.arcsinh(users[name].to_numpy(np.float64))
        known = x[np.isfinite(x)]
        if len(known) and known.std() > 1e-9:  # a constant tells nobody apart
            numbers.append((name, float(known.mean()), float(known.std())))
    levels = []
    for name in logs.roles.user_category:
        values = levels_of(users[name])
        if 2 <= len(values) <= LEVELS:
            levels.append((name, values))
    inside = impressions.item != EMPTY
    days = max(float(np.ptp(impressions.time)), 1.0)
    pace = (
        float(total / np.unique(impressions.user[weight > 0]).size / days),
        float(weight[inside].sum() / len(catalog) / days),
    )
    category = catalog.category.cpu().numpy()[impressions.item[inside]]
    liked = np.bincount(
        category, (weight * answers[:, 0])[inside], minlength=len(catalog.category_names)
    )
    taste = torch.from_numpy((liked + 1.0) / (liked.sum() + len(liked))).float()
    positions = impressions.position is not None
    return Encoding(rate, value, pace, numbers, levels, places, taste, positions)


def levels_of(column: pd.Series) -> list[str]:
    """Values a category can have: all that it knows, also those of users left out."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return sorted(str(v) for v in column.cat.categories)
    return sorted(str(v) for v in column.dropna().unique())


def lift(often: np.ndarray, count: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """Lifts (q, F) of `often` (q, F) answers to `count` (q,) impressions."""
    share = (often + PULL * rate) / (count + PULL)[:, None]
    return np.asarray(logit(share) - logit(rate), np.float32)


def logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-7, 1.0 - 1e-7)
    return np.asarray(np.log(p) - np.log1p(-p))


def often(impressions: Impressions, count: np.ndarray, when: np.ndarray, pace: float) -> np.ndarray:
    """Log of impressions a day (q,) by the usual `pace`, a week of which is added to the count.

    A count alone, or with less added, would grow with the log: later users would be told apart.
    """
    days = np.maximum(when - impressions.time.min(), 0.0)
    return np.asarray(np.log((count / pace + WEEK) / (days + WEEK)))


def worth(encoding: Encoding, value: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Log of the mean value (q,) relative to that of all; 0 where nothing has a value."""
    if encoding.value <= 0:
        return np.zeros(len(count), np.float32)
    mean = (value.clip(0.0) + PULL * encoding.value) / (count + PULL)
    return np.log(mean / encoding.value).astype(np.float32)


def profiles(
    encoding: Encoding, impressions: Impressions, rows: np.ndarray, users: pd.DataFrame
) -> np.ndarray:
    """Profiles (m, P) at impressions `rows` (m,): all but the place as their sessions began.

    F lifts, log of impressions a day and a session, the value, F lifts of the place, attributes.
    """
    begun, one = impressions.begun(), np.ones((len(impressions), 1))
    what = [one, impressions.answers, impressions.value[:, None], impressions.nth[:, None] == 0]
    first, back = np.unique(rows - impressions.nth[rows], return_inverse=True)  # once per session
    user = impressions.user[first]
    past = before(
        impressions.user, impressions.time, np.concatenate(what, axis=1), user, begun[first]
    )
    count, sessions = past[:, 0], past[:, -1]
    history = np.column_stack(
        [
            lift(past[:, 1:-2], count, encoding.rate),
            often(impressions, count, begun[first], encoding.pace[0]),
            np.log((count + 1.0) / (sessions + 1.0)),
            worth(encoding, past[:, -2], count),
        ]
    )[back]  # (m, F + 3)
    where = np.zeros((len(rows), len(encoding.rate)))
    if impressions.place is not None:
        code, names = pd.factorize(impressions.place[rows])
        nowhere = [0.0] * len(encoding.rate)  # a place the fit did not know
        lifts = np.array([encoding.places.get(str(n), nowhere) for n in names])
        where = lifts.reshape(-1, len(encoding.rate))[code]  # also of no rows
    known = attributes(encoding, users).reindex(impressions.users).to_numpy(np.float32)  # (U, A)
    known = np.nan_to_num(known)[impressions.user[rows]]
    return np.concatenate([history, where, known], axis=1).astype(np.float32)


def attributes(encoding: Encoding, users: pd.DataFrame) -> pd.DataFrame:
    """Attributes as numbers (U, A), indexed by user; what is missing is 0."""
    users = users.set_index("user")
    parts = {}
    for name, mean, spread in encoding.numbers:
        x = (np.arcsinh(users[name].to_numpy(np.float64)) - mean) / spread
        parts[name] = np.nan_to_num(np.clip(x, -5.0, 5.0))
    for name, values in encoding.levels:
        text = users[name].astype(object).map(str, na_action="ignore")
        parts |= {f"{name}={v}": (text == v).to_numpy(np.float64) for v in values}
    return pd.DataFrame(parts, index=users.index)


@dataclass(frozen=True)
class ItemFacts:
    """What is known of N items whatever they were answered with."""

    groups: np.ndarray  # (N, G) codes of categories
    numbers: np.ndarray  # (N, J) standardised, 0 where missing


def item_facts(logs: Logs, catalog: Catalog) -> ItemFacts:
    """Declared categories and numbers of the catalogue's items."""
    items = logs.items.set_index("item").loc[catalog.ids]
    groups, numbers = [], []
    for name in logs.roles.item_category[:COLUMNS]:
        code, values = pd.factorize(
            items[name].astype(object).map(str, na_action="ignore").fillna("")
        )
        if len(values) > 1:
            groups.append(code)
    for name in logs.roles.item_number:
        x = np.arcsinh(items[name].to_numpy(np.float64))
        spread = np.nanstd(x) if np.isfinite(x).any() else 0.0
        if spread > 1e-9:
            numbers.append(np.nan_to_num((x - np.nanmean(x)) / spread))
    n = len(catalog)
    return ItemFacts(
        np.stack(groups, axis=1) if groups else np.zeros((n, 0), np.int64),
        np.stack(numbers, axis=1) if numbers else np.zeros((n, 0)),
    )


def item_features(
    encoding: Encoding,
    impressions: Impressions,
    weight: np.ndarray,
    facts: ItemFacts,
    item: np.ndarray,
    when: np.ndarray,
) -> np.ndarray:
    """Features (q, Pi) of items (q,) from impressions, weighted (n,), strictly before `when` (q,).

    F lifts, log of impressions a day, the value, the first behaviour's lift by category, numbers.
    """
    inside = impressions.item != EMPTY
    shown, time, heavy = impressions.item[inside], impressions.time[inside], weight[inside]
    answers = impressions.answers[inside] * heavy[:, None]
    what = [heavy[:, None], answers, (impressions.value[inside] * heavy)[:, None]]
    past = before(shown, time, np.concatenate(what, axis=1), item, when)
    parts = [
        lift(past[:, 1:-1], past[:, 0], encoding.rate),
        often(impressions, past[:, 0], when, encoding.pace[1])[:, None],
        worth(encoding, past[:, -1], past[:, 0])[:, None],
    ]
    for code in facts.groups.T:
        group = before(
            code[shown], time, np.concatenate([what[0], answers[:, :1]], axis=1), code[item], when
        )
        parts.append(lift(group[:, 1:], group[:, 0], encoding.rate[:1]))
    return np.concatenate([*parts, facts.numbers[item]], axis=1).astype(np.float32)


def affinity(liked: Tensor, taste: Tensor) -> Tensor:
    """Log of how much more than all, `taste` (C,), users like each category, (B, C) of likes."""
    share = (liked + TASTE * taste) / (liked.sum(dim=1, keepdim=True) + TASTE)
    return (share / taste).log()


def user_features(profile: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Profiles (m, P) and the moment (m,) to features (m, Pu)."""
    moment = calendar(torch.from_numpy(time))[:, :MOMENT].numpy()
    return np.concatenate([profile, moment], axis=1)


def cross_features(
    affinity: Tensor,
    seen: Tensor,
    liked: Tensor,
    shown: Tensor,
    clicks: Tensor,
    last: Tensor,
    usual: Tensor,
    slot: Tensor | None,
) -> Tensor:
    """Features (..., Pc) of a user with an item, each input (...).

    The taste for its category, how often that was seen and liked this session, impressions so far,
    first answers so far beside the usual rate, the last answer (-1, 0 none, 1), the slot if logged.
    """
    parts = [affinity, seen.log1p(), liked.log1p(), shown.log1p(), mood(clicks, shown, usual), last]
    if slot is not None:
        parts.append(slot.log1p())
    return torch.stack(torch.broadcast_tensors(*parts), dim=-1)


def after_features(
    shown: Tensor, clicked: Tensor, clicks: Tensor, streak: Tensor, usual: Tensor
) -> Tensor:
    """Features (..., A) after an answer: impressions, it, the mood, impressions since the last."""
    parts = [shown.log1p(), clicked, mood(clicks, shown, usual), streak.log1p()]
    return torch.stack(torch.broadcast_tensors(*parts), dim=-1)


def mood(clicks: Tensor, shown: Tensor, usual: Tensor) -> Tensor:
    """First answers of this session beyond the `usual` rate of the user, per impression."""
    return (clicks - usual * shown) / (shown + MOOD)


def usual_rate(encoding: Encoding, profile: Tensor) -> Tensor:
    """A user's rate of the first behaviour (B,), from the profile (B, P)."""
    return (profile[:, 0] + float(logit(encoding.rate[:1])[0])).sigmoid()


def design(
    encoding: Encoding,
    impressions: Impressions,
    rows: np.ndarray,
    users: pd.DataFrame,
    category: np.ndarray,
    item: np.ndarray,
) -> Design:
    """Features of impressions `rows` (m,); `category` (N,) and `item` (m, Pi) are of the items."""
    profile = profiles(encoding, impressions, rows, users)
    usual = usual_rate(encoding, torch.from_numpy(profile))
    so_far = session_so_far(impressions, category)
    taste = _affinities(encoding, impressions, rows, category)
    now = {k: torch.from_numpy(v[rows]).float() for k, v in so_far.items()}
    slot = None
    if encoding.positions:
        logged = impressions.position
        slot = (
            torch.zeros(len(rows))
            if logged is None
            else torch.from_numpy(np.nan_to_num(logged[rows])).float()
        )
    clicked = torch.from_numpy(impressions.answers[rows, 0]).float()
    cross = cross_features(
        taste, now["seen"], now["liked"], now["shown"], now["clicks"], now["last"], usual, slot
    )
    streak = torch.where(clicked > 0, 0.0, now["streak"] + 1.0)
    after = after_features(now["shown"] + 1.0, clicked, now["clicks"] + clicked, streak, usual)
    return Design(
        user_features(profile, impressions.time[rows]).astype(np.float32),
        item.astype(np.float32),
        cross.numpy(),
        after.numpy(),
    )


def session_so_far(impressions: Impressions, category: np.ndarray) -> dict[str, np.ndarray]:
    """What was shown and answered before in the same session, (n,) each."""
    n, clicked = len(impressions), impressions.answers[:, 0].astype(np.int64)
    row = np.arange(n)
    first = row - impressions.nth
    total = np.cumsum(clicked) - clicked  # of all rows before
    latest = np.concatenate([[-1], np.maximum.accumulate(np.where(clicked, row, -1))[:-1]])
    inside = impressions.item != EMPTY
    key = impressions.session * len(category) + np.where(inside, category[impressions.item], 0)
    group = pd.DataFrame({"key": key[inside], "clicked": clicked[inside]}).groupby("key")
    seen, liked = np.zeros((2, n))
    seen[inside] = group.cumcount()
    liked[inside] = group["clicked"].cumsum() - clicked[inside]
    before_it = np.concatenate([[0], clicked[:-1]])
    return {
        "shown": impressions.nth.astype(np.float64),
        "clicks": (total - total[first]).astype(np.float64),
        "last": np.where(impressions.nth == 0, 0.0, 2.0 * before_it - 1.0),
        "streak": (row - np.maximum(latest + 1, first)).astype(np.float64),
        "seen": seen,
        "liked": liked,
    }


def _affinities(
    encoding: Encoding, impressions: Impressions, rows: np.ndarray, category: np.ndarray
) -> Tensor:
    """The taste (m,) of users for the category of what they were shown, as the session began."""
    count = len(encoding.taste)
    liked = impressions.answers[:, 0] & (impressions.item != EMPTY)
    owner, time = impressions.user[liked], impressions.time[liked]
    kind = category[impressions.item[liked]]
    item = impressions.item[rows]
    wanted = np.where(item != EMPTY, category[item], 0)
    user, when = impressions.user[rows], impressions.begun()[rows]
    one = np.ones((len(owner), 1))
    same = before(owner * count + kind, time, one, user * count + wanted, when)[:, 0]
    total = before(owner, time, one, user, when)[:, 0]
    share = encoding.taste.numpy()[wanted]
    lifted = np.log((same + TASTE * share) / (total + TASTE) / share)
    return torch.from_numpy(np.where(item != EMPTY, lifted, 0.0)).float()
