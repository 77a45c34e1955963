"""Users fitted to a log of impressions: `ExposureSimulator.fit(SimSpec(logs, catalog))`.

Fitted, since such a log tells: the chance of each behaviour for a user, an item, a place, a moment
and (where slots are logged) a slot; what the session so far does to it (mood, the category seen and
liked again); minutes or money of the answered; leaving, a hazard per impression after what was
answered. Nobody answers what is not shown, so `organic` is False throughout. One value counts: of
impressions with an answer; glances at the others are worth nothing.

Assumed: the items of a slate are answered by what was known before it, independently; the log's
policy showed enough of what other policies would show. Sessions end for good (`elapsed` is 0).
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from encoders.state import EMPTY, calendar
from simulators.base import Catalog, Response, SimSpec, UserState, UserTable
from simulators.draws import Draws
from simulators.exposure_features import (
    MOMENT,
    Encoding,
    affinity,
    after_features,
    cross_features,
    design,
    fit_encoding,
    item_facts,
    item_features,
    profiles,
    usual_rate,
)
from simulators.fit import moment
from simulators.funnel import Funnel, fit_funnel
from simulators.impressions import Impressions, impressions_from_logs, user_table
from simulators.settings import check_settings
from sources.cache import cached
from sources.logs import Logs

FORMAT = 1  # of a saved fit; raised when its content or meaning changes
WARM_UP = 0.4  # share of impressions that are only history: later users are known as long
FITTED_ON = 500_000  # impressions at most, the latest; what was known before them is from all
STARTS = 4  # sessions of a user that may be starting points
USERS = 10_000  # starting points at most
FEWEST = 200  # impressions, and a tenth of that first answers, to fit anything to
CHUNK = 256  # users whose relevance of all items is worked out at once


class ExposureSimulator:
    """Users who answer what they are shown as those of the log did."""

    def __init__(
        self,
        catalog: Catalog,
        encoding: Encoding,
        funnel: Funnel,
        items: Tensor,
        users: UserTable,
        reading: dict[str, Any],
        *,
        device: str = "cpu",
        fit_key: str = "",
    ) -> None:
        width = len(funnel.user_line) - MOMENT
        if users.profile.shape[1] != width or not len(users):
            raise ValueError(
                f"users must be 1 or more with profiles of {width} numbers, as the model was "
                f"fitted on, got {tuple(users.profile.shape)}: pass users=None to take sessions of "
                "the log, or describe others with simulators.exposed.visitors"
            )
        if len(items) != len(catalog):
            raise ValueError(
                f"the model describes {len(items)} items, the catalogue has {len(catalog)}: fit it "
                "on this catalogue"
            )
        self.catalog, self.users = catalog.to(device), users.to(device)
        self.encoding, self.funnel, self.items = encoding, funnel.to(device), items.to(device)
        self.reading = reading  # how impressions are read from a log
        self.behaviours: tuple[str, ...] = tuple(reading["behaviours"])
        self.of_items = self.funnel.of_items(self.items)
        self.taste = encoding.taste.to(device)
        self.fit_key = fit_key  # names all that the fit came from

    @classmethod
    def fit(
        cls,
        spec: SimSpec,
        *,
        behaviours: tuple[str, ...] | None = None,
        impression: str = "shown",
        gap: float = 30.0,
        hidden: int = 16,
        epochs: int = 3,
    ) -> "ExposureSimulator":
        """Fit to the impressions of `spec.logs` before the catalogue's cut.

        `behaviours` are answers to events `impression`, all of the log if None; `gap` minutes
        without an impression end a session. A fit is found again by the content that goes in.
        """
        check_settings({"gap": gap, "hidden": hidden, "epochs": epochs})
        if spec.logs is None or spec.catalog is None:
            raise ValueError(
                "users fitted to impressions need logs and a catalogue, got none: env.data is null"
            )
        catalog = spec.catalog.to("cpu")
        logs = spec.logs.before(moment(catalog.as_of))
        reading = {
            "behaviours": None if behaviours is None else tuple(behaviours),
            "impression": impression,
            "gap": float(gap),
        }
        key = (
            f"exposed {FORMAT} {logs.fingerprint()} {catalog.fingerprint()} {reading} {hidden} "
            f"{epochs} {spec.seed} {spec.bootstrap}"
        )

        def make() -> dict[str, Any]:
            return _fit(logs, catalog, reading, hidden, epochs, spec.seed, spec.bootstrap)

        state = cached(key, make, torch.save, _load, what="the users fitted to impressions")
        return cls._restore(state, catalog, spec.users, spec.device, key)

    def save(self, path: str | Path) -> None:
        """Write what was fitted and the users as one file; the catalogue has its own."""
        state = _state(self.encoding, self.funnel, self.items, self.users, self.reading)
        torch.save(state | {"catalog": self.catalog.fingerprint()}, path)

    @classmethod
    def load(cls, path: str | Path, catalog: Catalog) -> "ExposureSimulator":
        """Read what `save` wrote; the catalogue must be the one it was fitted on."""
        state = _load(Path(path))
        if state["catalog"] != catalog.fingerprint():
            raise ValueError(
                f"{path} was fitted on another catalogue than the {len(catalog)} items given: "
                "load the catalogue of that fit, or fit again"
            )
        return cls._restore(state, catalog, None, "cpu", "")

    @classmethod
    def _restore(
        cls,
        state: dict[str, Any],
        catalog: Catalog,
        users: UserTable | None,
        device: str,
        fit_key: str,
    ) -> "ExposureSimulator":
        known = dict(state["encoding"])
        encoding = Encoding(**known | {"rate": np.array(known["rate"])})
        if users is None:
            table = dict(state["users"])
            kind = table.pop("ids_type")
            users = UserTable(**table | {"ids": np.array(table["ids"], dtype=kind)})
        return cls(
            catalog, encoding, Funnel(**state["funnel"]), state["items"], users, state["reading"],
            device=device, fit_key=fit_key,
        )  # fmt: skip

    def start(self, users: Tensor, draws: Draws) -> UserState:
        """Rows of `users` (B,) to the state of B users who begin a session."""
        table, size = self.users, len(self.taste)
        profile, past = table.profile[users], table.past[users]
        now = calendar(table.start[users])[:, :MOMENT]
        of_user = self.funnel.of_users(torch.cat([profile, now], dim=1))
        liked = torch.zeros(len(users), size + 1, device=users.device)  # the last is of no item
        kind = torch.where(past == EMPTY, size, self.catalog.category[past.clamp_min(0)])
        liked = liked.scatter_add_(1, kind, table.past_count[users])[:, :size]  # (B, C)
        none = torch.zeros(len(users), device=users.device)
        return {f"user_{name}": value for name, value in of_user.items()} | {
            "row": users,
            "usual": usual_rate(self.encoding, profile),
            "affinity": affinity(liked, self.taste),  # (B, C)
            "seen": torch.zeros_like(liked),  # (B, C) this session
            "liked": torch.zeros_like(liked),
            "shown": none,
            "clicks": none,
            "last": none,
            "streak": none,
        }

    def respond(self, state: UserState, slate: Tensor, draws: Draws) -> tuple[Response, UserState]:
        """Answer a slate (B, K) of distinct items or EMPTY; the state handed in is not changed."""
        real, item = slate != EMPTY, slate.clamp_min(0)  # (B, K) each
        cross = self._cross(state, self.catalog.category[item])  # (B, K, Pc)
        first = self.funnel.first(state["user_first"][:, None], self.of_items["first"][item], cross)
        rest = self.funnel.rest(state["user_later"][:, None], self.of_items["later"][item], cross)
        answers = torch.zeros(*slate.shape, len(self.behaviours), device=slate.device)
        for k, name in enumerate(self.behaviours):
            logit = self.funnel.given(rest, answers, k) if k else first
            uniform = draws.per_item(name, slate)
            answers[:, :, k] = ((uniform < logit.sigmoid()) & real).float()
        uniform = draws.per_item("value", slate)
        worth = self.funnel.worth(
            state["user_value"][:, None], self.of_items["value"][item], answers, uniform
        )
        clicked = answers[:, :, 0]  # (B, K)
        after, streak = self._after(state, clicked, real)
        stay = torch.where(real, 1.0 - self.funnel.hazard(state["user_leave"], after), 1.0)
        left = draws.uniform("leave")[:, 0] >= stay.prod(dim=1)  # (B,)
        chosen = {name: answers[:, :, k] > 0 for k, name in enumerate(self.behaviours)}
        # Unshown, nothing is answered; one fit has no opinion of its own error.
        nothing = torch.zeros_like(clicked)
        response = Response(
            chosen, torch.zeros_like(real), torch.where(answers.any(dim=2), worth, 0.0), left,
            torch.zeros_like(state["usual"]), nothing,
        )  # fmt: skip
        return response, self._moved(state, item, real, clicked, streak)

    def relevance(self, state: UserState) -> Tensor:
        """(B, N) true probability of the first behaviour of each item, shown alone now."""
        parts = []
        for rows in torch.arange(len(state["usual"]), device=self.taste.device).split(CHUNK):
            part = {name: value[rows] for name, value in state.items()}
            category = self.catalog.category.expand(len(rows), -1)
            user, item = part["user_first"][:, None], self.of_items["first"][None]
            cross = self._cross(part, category, alone=True)
            parts.append(self.funnel.first(user, item, cross).sigmoid())
        return torch.cat(parts)

    def _cross(self, state: UserState, category: Tensor, *, alone: bool = False) -> Tensor:
        """Cross features (B, K, Pc) of items of `category` (B, K), in one slate or each `alone`."""
        slot = None
        if self.encoding.positions:
            slot = torch.arange(category.shape[1], device=category.device) * float(not alone)
        taste, seen, liked = (state[n].gather(1, category) for n in ("affinity", "seen", "liked"))
        shown, clicks, last, usual = (
            state[n][:, None] for n in ("shown", "clicks", "last", "usual")
        )
        return cross_features(taste, seen, liked, shown, clicks, last, usual, slot)

    def _after(self, state: UserState, clicked: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, K, A) after each slot, and how long nothing was answered (B, K)."""
        nth = real.cumsum(dim=1).float()  # (B, K) shown of this slate
        latest = torch.where(clicked > 0, nth, 0.0).cummax(dim=1).values
        streak = nth - latest + torch.where(latest > 0, 0.0, state["streak"][:, None])
        shown, clicks = (state[name][:, None] for name in ("shown", "clicks"))
        total = clicks + clicked.cumsum(dim=1)
        usual = state["usual"][:, None]
        return after_features(shown + nth, clicked, total, streak, usual), streak

    def _moved(
        self, state: UserState, item: Tensor, real: Tensor, clicked: Tensor, streak: Tensor
    ) -> UserState:
        """The state after a slate."""
        category = self.catalog.category[item]
        slots = torch.arange(1, real.shape[1] + 1, device=item.device)
        lowest, some = (slots * real).max(dim=1)  # (B,) the last slot that shows an item
        answer = 2.0 * clicked.gather(1, some[:, None])[:, 0] - 1.0
        return state | {
            "seen": state["seen"].scatter_add(1, category, real.float()),
            "liked": state["liked"].scatter_add(1, category, clicked),
            "shown": state["shown"] + real.sum(dim=1),
            "clicks": state["clicks"] + clicked.sum(dim=1),
            "last": torch.where(lowest > 0, answer, state["last"]),
            "streak": streak[:, -1],
        }


def visitors(
    simulator: ExposureSimulator, logs: Logs, *, since: float, per_user: int = 1, seed: int = 0
) -> UserTable:
    """Users of another log as they begin sessions from day `since` on, described as the fit did."""
    read = impressions_from_logs(logs, simulator.catalog.ids, **simulator.reading)
    rows = _sessions(read, since, per_user, np.random.default_rng(seed))
    if not len(rows):
        raise ValueError(
            f"{logs.name}: no session begins on or after {moment(since):%Y-%m-%d}: choose an "
            "earlier cut or a longer log"
        )
    profile = profiles(simulator.encoding, read, rows, logs.users)
    return user_table(read, rows, profile, len(simulator.catalog))


def _fit(
    logs: Logs,
    catalog: Catalog,
    reading: dict[str, Any],
    hidden: int,
    epochs: int,
    seed: int,
    bootstrap: bool,
) -> dict[str, Any]:
    """All the tensors and numbers that make the users."""
    read = impressions_from_logs(logs, catalog.ids, **reading)
    inside = read.item != EMPTY
    yes = int(read.answers[inside, 0].sum())
    if inside.sum() < FEWEST or min(yes, inside.sum() - yes) < FEWEST // 10:
        raise ValueError(
            f"{logs.name}: {inside.sum()} impressions of the catalogue before the cut with {yes} "
            f"{read.behaviours[0]} are too few to fit users to ({FEWEST} impressions, "
            f"{FEWEST // 10} with and without it): give a longer log, a later cut or a larger "
            "catalogue"
        )
    rng = np.random.default_rng(seed)
    size = len(read.users)
    times = rng.multinomial(size, np.full(size, 1 / size)) if bootstrap else np.ones(size)
    weight = times.astype(np.float64)[read.user]  # (n,)
    encoding = fit_encoding(read, logs, catalog, weight)
    facts, category = item_facts(logs, catalog), catalog.category.numpy()
    latest = min(FITTED_ON, len(read) - int(WARM_UP * len(read)))
    rows = np.sort(np.argsort(-read.time, kind="stable")[:latest])
    known = inside[rows]
    item = item_features(encoding, read, weight, facts, read.item[rows], read.time[rows])
    features = design(encoding, read, rows, logs.users, category, item)
    funnel = fit_funnel(
        features, read.answers[rows], read.value[rows], known, (read.last[rows], read.ended[rows]),
        weight[rows], hidden=hidden, epochs=epochs, seed=seed,
    )  # fmt: skip
    everything = np.arange(len(catalog))
    now = np.full(len(catalog), catalog.as_of)
    items = torch.from_numpy(item_features(encoding, read, weight, facts, everything, now))
    starts = _sessions(read, -np.inf, STARTS, rng)
    starts = np.sort(rng.permutation(starts)[:USERS])
    profile = profiles(encoding, read, starts, logs.users)
    users = user_table(read, starts, profile, len(catalog))
    return _state(encoding, funnel, items, users, reading | {"behaviours": read.behaviours})


def _sessions(
    impressions: Impressions, since: float, per_user: int, rng: np.random.Generator
) -> np.ndarray:
    """First rows of up to `per_user` sessions of each user from day `since` on, drawn at random."""
    rows = np.flatnonzero((impressions.nth == 0) & (impressions.time >= since))
    drawn = pd.DataFrame({"row": rng.permutation(rows)})
    drawn["user"] = impressions.user[drawn["row"]]
    kept = drawn[drawn.groupby("user").cumcount() < per_user]
    return np.sort(kept["row"].to_numpy())


def _state(
    encoding: Encoding, funnel: Funnel, items: Tensor, users: UserTable, reading: dict[str, Any]
) -> dict[str, Any]:
    """A fit as plain tensors, numbers and texts."""
    table = vars(users) | {"ids": users.ids.tolist(), "ids_type": str(users.ids.dtype)}
    return {
        "encoding": vars(encoding) | {"rate": encoding.rate.tolist()},
        "funnel": {f.name: getattr(funnel, f.name) for f in fields(funnel)},
        "items": items,
        "users": table,
        "reading": reading,
    }


def _load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state
