"""Users fitted to a log of purchases: `FittedSimulator.fit(SimSpec(logs, catalog))`.

Fitted on trips of a window before the cut: how likely a household is to buy each product on a trip
(preference.py), when it stops buying, how much a purchase changes its wish for others of the
category (habits.py). Days between trips are the household's own.

Assumed, since purchases cannot tell: a household leaves a useless slate with probability `patience`
(0: never); being shown changes nothing (`exposure`, added to theta; 0: nothing) whatever the slot
(`position`, lost per slot; 0: nothing); taste does not drift within a trip (`drift`; 0: none).
A product shown is judged as if the household were shopping alone: the choice among K is a logit.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from encoders.state import EMPTY, remember
from simulators import choice as choices
from simulators import dynamics
from simulators.base import Catalog, Response, SimSpec, UserState, UserTable
from simulators.draws import Draws
from simulators.fit import fit_once, load_state, restore, store, user_table
from simulators.habits import Habits
from simulators.preference import Preference, fit_preference

FORMAT = 3  # of a saved fit; raised when its content or meaning changes
BASKET = 40  # M: purchases of one trip; a household with a full basket goes home


@dataclass(frozen=True)
class Assumptions:
    """What purchases cannot tell; satiation they can: None takes it from the log."""

    patience: float = 0.1
    satiation: float | None = None
    drift: float = 0.0
    exposure: float = 0.0
    position: float = 0.0
    choice: str = "logit"
    trips: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.patience <= 1.0:
            raise ValueError(f"patience must be a probability in [0, 1], got {self.patience}")
        if self.trips < 1:
            raise ValueError(f"trips must be at least 1, got {self.trips}")
        if self.choice not in ("logit", "independent", "cascade"):
            raise ValueError(f"choice must be logit, independent or cascade, got {self.choice!r}")
        for name in ("satiation", "drift", "exposure", "position"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")


class FittedSimulator:
    """Households who answer slates as those of the log would."""

    behaviours: tuple[str, ...] = ("buy",)

    def __init__(
        self,
        catalog: Catalog,
        preference: Preference,
        habits: Habits,
        users: UserTable,
        *,
        device: str = "cpu",
        fit_key: str = "",
        **assumed: Any,
    ) -> None:
        self.assumed = Assumptions(**assumed)
        if len(catalog) != len(preference.bias):
            raise ValueError(
                f"the preference model prices {len(preference.bias)} items, the catalogue has "
                f"{len(catalog)}: fit it on this catalogue"
            )
        width = preference.of_user.in_features - preference.extra
        if users.profile.shape[1] != width or not len(users):
            raise ValueError(
                f"users must be 1 or more with profiles of {width} numbers, as the model was "
                f"fitted on, got {tuple(users.profile.shape)}: take them from the same log"
            )
        self.catalog, self.preference = catalog.to(device), preference.to(device)
        self.habits = habits.to(device)
        self.users = users.to(device)
        fitted = self.assumed.satiation is None
        self.satiation = habits.satiation if fitted else self.assumed.satiation
        self.price = torch.nan_to_num(self.catalog.price)  # (N,)
        self.fit_key = fit_key  # names all that the fit came from

    @classmethod
    def fit(
        cls,
        spec: SimSpec,
        *,
        window: float = 150.0,
        epochs: int = 2,
        hidden: int = 32,
        **assumed: Any,
    ) -> "FittedSimulator":
        """Fit to the purchases of `spec.logs` in the `window` days before the catalogue's cut.

        `assumed` are the fields of `Assumptions`. A fit is kept and found again by the content of
        all that goes in.
        """
        if not window > 0 or epochs < 1 or hidden < 1:
            raise ValueError(
                "window must be above 0 days, epochs and hidden at least 1, got "
                f"window={window}, epochs={epochs}, hidden={hidden}"
            )
        Assumptions(**assumed)  # a wrong one is refused before the work
        learn = partial(fit_preference, epochs=epochs, hidden=hidden, seed=spec.seed)
        about = f"fit {FORMAT} {epochs} {hidden}"
        key, state = fit_once(spec, learn, about, window=window, what="the fitted users")
        preference, habits = restore(state)
        users = spec.users if spec.users is not None else user_table(state["users"])
        assert spec.catalog is not None
        return cls(
            spec.catalog, preference, habits, users, device=spec.device, fit_key=key, **assumed
        )

    @classmethod
    def default(cls) -> "FittedSimulator":
        """Households of the whole retail log, as `recplay/Ecommerce-v0` has them."""
        from simulators.catalog import catalog_from_logs
        from sources.complete_journey import load

        logs = load()
        return cls.fit(SimSpec(logs, catalog_from_logs(logs)))

    def save(self, path: str | Path) -> None:
        """Write model, habits and users as one file of tensors; the catalogue has its own."""
        state = store(self.preference, self.habits)
        ids = self.users.ids
        users = vars(self.users) | {"ids": ids.tolist(), "ids_type": str(ids.dtype)}
        torch.save(state | {"users": users, "catalog": self.catalog.fingerprint()}, path)

    @classmethod
    def load(cls, path: str | Path, catalog: Catalog, **assumed: Any) -> "FittedSimulator":
        """Read what `save` wrote; the catalogue must be the one it was fitted on."""
        state = load_state(Path(path))
        if state["catalog"] != catalog.fingerprint():
            raise ValueError(
                f"{path} was fitted on another catalogue than the {len(catalog)} items given: "
                "load the catalogue of that fit, or fit again"
            )
        preference, habits = restore(state)
        return cls(catalog, preference, habits, user_table(state["users"]), **assumed)

    def start(self, users: Tensor, draws: Draws) -> UserState:
        """Rows of `users` (B,) to the state of B households who enter."""
        table = self.users
        state = self.preference.describe(
            table.profile[users],
            table.past[users],
            table.past_count[users],
            table.past_age[users],
            table.start[users],
        )
        none = torch.zeros_like(users)
        return state | {
            "row": users,
            "time": table.start[users],
            "basket": torch.full((len(users), BASKET), EMPTY, device=users.device),  # this trip
            "purchases": none,
            "trip": none,
        }

    def respond(self, state: UserState, slate: Tensor, draws: Draws) -> tuple[Response, UserState]:
        """Answer a slate (B, K) of distinct items or EMPTY; the state handed in is not changed."""
        theta = self._theta(state, slate)  # (B, K)
        chosen, organic = self._choose(theta, slate, state, draws)  # (B, K) each
        bought = chosen.any(dim=1)  # (B,)
        state = dict(state)
        basket, purchases = fill(state["basket"], state["purchases"], slate, chosen)
        state["basket"], state["purchases"] = basket, purchases
        if self.assumed.drift:
            what = embedding(slate.clamp_min(0), self.preference.source) * chosen[:, :, None]
            state["recent"] = state["recent"] + self.assumed.drift * what.sum(dim=1)
        stop = self.habits.stop_hazard(purchases, self.users.profile[state["row"], 0])  # (B,)
        hazard = dynamics.leave_hazard(bought, stop, ~bought, self.assumed.patience)  # (B,)
        over = (draws.uniform("leave")[:, 0] < hazard) | (purchases >= BASKET)  # (B,)
        left = over & (state["trip"] >= self.assumed.trips - 1)  # (B,)
        elapsed = torch.zeros_like(hazard)  # (B,) days
        if self.assumed.trips > 1:
            every = torch.exp(-self.users.profile[state["row"], 1])  # (B,) days a trip
            gap = dynamics.return_gap(draws.uniform("return")[:, 0], every)
            elapsed = torch.where(over & ~left, gap, elapsed)
            state = self._come_back(state, elapsed)
        value = self.price[slate.clamp_min(0)] * chosen  # (B, K)
        # One fit has no opinion of its own error.
        return Response(
            {"buy": chosen}, organic, value, left, elapsed, torch.zeros_like(value)
        ), state

    def relevance(self, state: UserState) -> Tensor:
        """(B, N) true probability that each item, shown alone now, is bought: for oracles only."""
        theta = self.preference.logits(state)
        category = self.catalog.category.expand(len(theta), -1)
        return (self._sated(theta, category, state) + self.assumed.exposure).sigmoid()

    def _theta(self, state: UserState, slate: Tensor) -> Tensor:
        """Logits (B, K) of buying now, unshown; -inf in an empty slot."""
        theta = self.preference.logit(state, slate)
        return self._sated(theta, self.catalog.category[slate.clamp_min(0)], state)

    def _sated(self, theta: Tensor, category: Tensor, state: UserState) -> Tensor:
        if not self.satiation:
            return theta
        most = int(state["purchases"].max())
        basket = state["basket"][:, :most]  # (B, m)
        taken = torch.where(basket == EMPTY, EMPTY, self.catalog.category[basket.clamp_min(0)])
        return dynamics.satiate(theta, category, taken, self.satiation)

    def _choose(
        self, theta: Tensor, slate: Tensor, state: UserState, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """What is bought and what would have been unshown, (B, K) bool each."""
        key = slate + len(self.catalog) * state["trip"][:, None]  # new wishes on a new trip
        uniform = draws.per_item("buy", key)  # (B, K)
        shown = choices.position(theta + self.assumed.exposure, self.assumed.position)
        if self.assumed.choice != "logit":
            choose = choices.cascade if self.assumed.choice == "cascade" else choices.independent
            return choose(shown, uniform), choices.independent(theta, uniform)
        noise = choices.gumbel(uniform)
        outside = choices.gumbel(draws.uniform("outside"))[:, 0]  # (B,)
        return choices.logit(shown, noise, outside), choices.organic(theta, noise, outside)

    def _come_back(self, state: UserState, elapsed: Tensor) -> UserState:
        """Let `elapsed` (B,) days go by for who ends a trip: the basket becomes past."""
        rows = (elapsed > 0).nonzero().squeeze(1)  # (R,)
        if len(rows) == 0:
            return state
        basket = state["basket"][rows][:, : max(1, int(state["purchases"][rows].max()))]
        past, count, age = (state[k][rows] for k in ("past", "count", "age"))
        time = state["time"][rows] + elapsed[rows].double()
        past, count, age = remember(past, count, age, basket, elapsed[rows])
        profile = self.users.profile[state["row"][rows]]
        fresh = self.preference.describe(profile, past, count, age, time) | {
            "time": time,
            "basket": torch.full((len(rows), BASKET), EMPTY, device=rows.device),
            "purchases": torch.zeros_like(rows),
            "trip": state["trip"][rows] + 1,
        }
        return state | {k: state[k].index_copy(0, rows, v) for k, v in fresh.items()}


def fill(basket: Tensor, filled: Tensor, slate: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Put what was chosen of a slate (B, K) behind the `filled` (B,) places of a basket (B, M)."""
    size = basket.shape[1]
    place = torch.where(chosen, filled[:, None] + chosen.cumsum(dim=1) - 1, size).clamp_max(size)
    room = torch.nn.functional.pad(basket, (0, 1), value=EMPTY)  # the last takes what does not fit
    return room.scatter_(1, place, slate)[:, :size], filled + chosen.sum(dim=1)
