"""What static recommenders are fitted on, `Interactions`, and what they are asked about: a past."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from encoders.state import EMPTY, Observation, calendar
from sources.logs import Logs

Array = np.ndarray
WEIGHTS = ("binary", "log", "count")
FALLBACK = 1e-6  # of popularity beside a score: it orders what nothing else speaks for


@dataclass(frozen=True, eq=False)
class Interactions:
    """What U users did with N items, one row an event, sorted by user and each user's by time."""

    user: Array  # (n,) int64 rows of the U users
    item: Array  # (n,) int64 rows of the catalogue
    time: Array  # (n,) float64 days since 1970-01-01, NaN where no time is known
    value: Array  # (n,) float64: rating, where the log has them; else money, or 1
    num_users: int
    num_items: int
    vectors: Tensor | None = None  # (N, D) float32 of the items' texts, for models that read them

    def __post_init__(self) -> None:
        for name, end in (("user", self.num_users), ("item", self.num_items)):
            x = getattr(self, name)
            if len(x) and (x.min() < 0 or x.max() >= end):
                raise ValueError(
                    f"{name} must be rows in 0..{end - 1}, got {x.min()}..{x.max()}: "
                    "give the ids they are rows of"
                )
        bad = ~np.isfinite(self.value)
        if bad.any():
            raise ValueError(
                f"value must be finite, got {self.value[bad][0]} in row {int(bad.argmax())}: drop "
                "rows without a rating"
            )
        if (np.diff(self.user) < 0).any():
            raise ValueError("rows must be sorted by user: make them with Interactions.of")
        if self.vectors is not None and len(self.vectors) != self.num_items:
            raise ValueError(
                f"vectors must have a row for each of {self.num_items} items, "
                f"got {len(self.vectors)}"
            )

    @staticmethod
    def of(
        source: Any,
        *,
        items: Array | None = None,
        users: Array | None = None,
        vectors: Tensor | None = None,
        seed: int = 0,
    ) -> "Interactions":
        """Interactions, `Logs` or counts (U, N) as scipy sparse to interactions.

        Of `Logs`, `items` (N,) and `users` (U,) are the ids that rows stand for, by default all
        there are; events of one moment get an order drawn with `seed`, never that of their ids.
        """
        if isinstance(source, Interactions):
            return source if vectors is None else replace(source, vectors=vectors)
        if isinstance(source, Logs):
            return _of_logs(source, items, users, vectors, seed)
        return _of_counts(source, vectors)

    @property
    def timed(self) -> bool:
        """Whether every event has a time."""
        return bool(np.isfinite(self.time).all())

    def counts(self) -> Any:
        """How often each user had each item, scipy CSR (U, N) float32."""
        from scipy.sparse import csr_matrix

        one = np.ones(len(self.user), dtype=np.float32)
        return csr_matrix((one, (self.user, self.item)), shape=(self.num_users, self.num_items))

    def popularity(self) -> Array:
        """Events of each item, (N,)."""
        return np.bincount(self.item, minlength=self.num_items)

    def histories(
        self, users: Array | None = None, now: Array | None = None, width: int | None = None
    ) -> Observation:
        """What is known of `users` (B,) rows at days `now` (B,), in the type policies read.

        `past` holds each distinct item once, the latest first, up to `width`; by default all. Where
        no `now` is given it is the user's last event. Nothing is known of profile and session.
        """
        users = np.arange(self.num_users) if users is None else np.asarray(users, dtype=np.int64)
        if len(users) and (users.min() < 0 or users.max() >= self.num_users):
            raise ValueError(f"users must be rows in 0..{self.num_users - 1}, got {users.max()}")
        if now is not None and len(now) != len(users):
            raise ValueError(f"now must have a day for each of {len(users)} users, got {len(now)}")
        item, count, last, start = self._distinct
        size = np.diff(start)[users]  # (B,)
        most = max(1, int(size.max(initial=0)))
        width = most if width is None else min(width, most)
        place = np.arange(width)[None, :]  # (1, H)
        real = place < size[:, None]  # (B, H)
        index = np.where(real, start[users][:, None] + place, 0) if len(item) else real.astype(int)
        pick = item if len(item) else np.zeros(1, dtype=np.int64)
        when = np.where(real, (last if len(item) else np.zeros(1))[index], np.nan)  # (B, H)
        latest = when[:, 0] if now is None else np.asarray(now, dtype=np.float64)  # (B,)
        latest = np.nan_to_num(latest)
        age = np.clip(np.nan_to_num(latest[:, None] - when), 0.0, None) * real
        often = (count if len(item) else np.zeros(1))[index] * real
        b = len(users)
        return Observation(
            profile=torch.zeros(b, 0),
            past=torch.from_numpy(np.where(real, pick[index], EMPTY)),
            past_count=torch.from_numpy(often.astype(np.float32)),
            past_age=torch.from_numpy(age.astype(np.float32)),
            history=torch.full((b, 1), EMPTY),
            feedback=torch.zeros(b, 1, 1),
            context=calendar(torch.from_numpy(latest)),
        )

    @cached_property
    def _distinct(self) -> tuple[Array, Array, Array, Array]:
        """Distinct items, counts and last times of all users, the latest first; starts (U + 1,)."""
        key = self.user * self.num_items + self.item
        pair, back, count = np.unique(key[::-1], return_index=True, return_counts=True)
        last = len(key) - 1 - back  # row of the last event of each pair
        order = np.argsort(-last, kind="stable")  # the latest first, and users from the last on
        order = order[np.argsort(pair[order] // max(1, self.num_items), kind="stable")]
        user = pair[order] // max(1, self.num_items)
        start = np.searchsorted(user, np.arange(self.num_users + 1))
        return pair[order] % max(1, self.num_items), count[order], self.time[last[order]], start


def _of_logs(
    logs: Logs, items: Array | None, users: Array | None, vectors: Tensor | None, seed: int
) -> Interactions:
    """The purchases of a log, or all its events where it names none."""
    events = logs.events
    if logs.purchases:
        events = events[events["behaviour"].isin(logs.purchases)]
    items = logs.items["item"].to_numpy() if items is None else np.asarray(items)
    users = logs.users["user"].to_numpy() if users is None else np.asarray(users)
    row = pd.Index(users).get_indexer(events["user"])  # (n,)
    item = pd.Index(items).get_indexer(events["item"])
    inside = (row >= 0) & (item >= 0)
    time = events["time"].to_numpy().astype("datetime64[us]").astype(np.int64) / 86_400e6
    value = events["value"].to_numpy(np.float64) if "value" in events else np.ones(len(events))
    draw = np.random.default_rng(seed).random(len(events))  # by row of the log
    order = np.lexsort((draw, time, row))
    order = order[inside[order]]
    return Interactions(
        row[order].astype(np.int64), item[order].astype(np.int64), time[order], value[order],
        len(users), len(items), vectors,
    )  # fmt: skip


def _of_counts(counts: Any, vectors: Tensor | None) -> Interactions:
    """Counts (U, N) without times."""
    from scipy.sparse import csr_matrix, issparse

    if not issparse(counts):
        raise ValueError(
            f"interactions must be Interactions, Logs or a scipy sparse matrix (users, items), got "
            f"{type(counts).__name__}: scipy.sparse.csr_matrix(...) makes one of an array"
        )
    cells = csr_matrix(counts, dtype=np.float64, copy=True)
    cells.eliminate_zeros()
    if not np.isfinite(cells.data).all() or (cells.data < 0).any():
        raise ValueError("interactions must be finite and at least 0: counts, or 1 where there are")
    broken = cells.data[cells.data != np.round(cells.data)]
    if len(broken):
        raise ValueError(
            f"a matrix of interactions holds whole counts, got {broken[0]}: ratings come with "
            "Logs, as values"
        )
    often = cells.data.astype(np.int64)
    user = np.repeat(np.repeat(np.arange(cells.shape[0]), np.diff(cells.indptr)), often)
    item = np.repeat(cells.indices.astype(np.int64), often)
    unknown = np.full(len(user), np.nan)
    users, items = cells.shape
    return Interactions(user, item, unknown, np.ones(len(user)), users, items, vectors)


def history(
    items: Sequence[Sequence[int]],
    *,
    count: Sequence[Sequence[float]] | None = None,
    age: Sequence[Sequence[float]] | None = None,
) -> Observation:
    """Lists of catalogue rows, each the latest first, to what policies read; ages are in days."""
    width = max([1, *(len(row) for row in items)])
    for name, rows in (("count", count), ("age", age)):
        if rows is not None and [len(r) for r in rows] != [len(r) for r in items]:
            raise ValueError(f"{name} must have a number for each item of each history")

    def table(rows: Sequence[Sequence[float]], fill: float) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    past = table(items, EMPTY).long().reshape(len(items), width)
    ones = (past != EMPTY).float()
    given = [
        ones if x is None else table(x, 0.0).float().reshape(past.shape)
        for x in (count, [range(len(r)) for r in items] if age is None else age)
    ]
    return Observation(
        profile=torch.zeros(len(items), 0),
        past=past,
        past_count=given[0],
        past_age=given[1],
        history=torch.full((len(items), 1), EMPTY),
        feedback=torch.zeros(len(items), 1, 1),
        context=calendar(torch.zeros(len(items), dtype=torch.float64)),
    )


def owned(obs: Observation, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Items (B, M) that users had, counts and ages in days (B, M), the latest first.

    What was chosen in this session stands before the past, once more and 0 days old; its place in
    the past is then EMPTY. Items that the catalogue does not have are an error.
    """
    chosen = (obs.feedback[:, :, 0] > 0) & (obs.history != EMPTY)  # (B, L)
    columns = chosen.any(dim=0).nonzero().squeeze(1).flip(0)  # the latest first
    session = torch.where(chosen, obs.history, EMPTY)[:, columns]  # (B, l)
    items = torch.cat([session, obs.past], dim=1)  # (B, M)
    outside = (items < EMPTY) | (items >= num_items)
    if outside.any():
        row, place = (int(x) for x in outside.nonzero()[0])
        raise ValueError(
            f"a history must hold items in 0..{num_items - 1} or {EMPTY} (none), got "
            f"{int(items[row, place])} in row {row}: map outside ids to rows of the catalogue that "
            "was fitted, and drop what it does not have"
        )
    wrong = ~(obs.past_count >= 0) & (obs.past != EMPTY)  # NaN as well
    if wrong.any():
        row, place = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"past_count must be at least 0, got {float(obs.past_count[row, place])} in row {row}"
        )
    fresh = (session != EMPTY).float()  # (B, l)
    again = (session[:, :, None] == obs.past[:, None, :]) & (obs.past != EMPTY)[:, None, :]
    before = (again * obs.past_count[:, None, :]).sum(dim=2)  # (B, l)
    past = obs.past.masked_fill(again.any(dim=1), EMPTY)  # (B, H)
    items = torch.cat([session, past], dim=1)
    count = torch.cat([fresh + before, obs.past_count], dim=1) * (items != EMPTY)
    age = torch.cat([torch.zeros_like(fresh), obs.past_age], dim=1)
    return items, count, age


def weighed(count: Any, weight: str) -> Any:
    """Counts as evidence: 1 each, log2(1 + count), or as they are; once is always 1."""
    if weight not in WEIGHTS:
        raise ValueError(f"weight must be one of {', '.join(WEIGHTS)}, got {weight!r}")
    if weight == "count":
        return count
    if isinstance(count, Tensor):
        return (count > 0).to(count.dtype) if weight == "binary" else count.log1p() / np.log(2.0)
    return (count > 0).astype(count.dtype) if weight == "binary" else count.log1p() / np.log(2.0)


def spread(items: Tensor, weight: Tensor, num_items: int) -> Tensor:
    """Weights (B, M) of items (B, M) as rows over the catalogue, (B, N); EMPTY goes nowhere."""
    real = items != EMPTY
    table = torch.zeros(len(items), num_items, dtype=weight.dtype, device=items.device)
    return table.scatter_add_(1, items.clamp(min=0), weight * real)


def popular_ranks(past: Interactions, seed: int) -> Tensor:
    """Ranks (N,) float32 in [0, 1) by events, equal ones in an order drawn with `seed`."""
    draw = np.random.default_rng(seed).random(past.num_items)
    order = np.lexsort((draw, past.popularity()))
    ranks = np.empty(past.num_items, dtype=np.float32)
    ranks[order] = np.arange(past.num_items, dtype=np.float32) / past.num_items
    return torch.from_numpy(ranks)


def or_popular(scores: Tensor, items: Tensor, ranks: Tensor) -> Tensor:
    """Scores (B, N), changed in place; of a user without any item (B, M) the popular ranks (N,)."""
    nothing = (items == EMPTY).all(dim=1)  # (B,)
    if nothing.any():
        scores[nothing] = ranks.to(scores.dtype)
    return scores


def restore(model: Any, state: dict[str, Any], num_items: int, *names: str) -> None:
    """Put saved tensors back into a model, if they are of a catalogue of this size."""
    if state["num_items"] != num_items:
        raise ValueError(
            f"the checkpoint is of a catalogue of {state['num_items']} items, this one has "
            f"{num_items}: load it with the catalogue it was made on"
        )
    for name in names:
        mine = getattr(model, name)
        setattr(model, name, state[name].to(mine.device))
