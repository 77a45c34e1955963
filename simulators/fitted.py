"""Users fitted to a log of purchases: `FittedSimulator.fit(SimSpec(logs, catalog))`.

Fitted on trips of a window before the cut: how likely a household is to buy each product on a trip
(preference.py), when it stops buying (habits.py), how what it has in the basket changes its wish
for anything else (company.py; `satiation`: a number taken per purchase of the category instead, 0:
nothing changes; where baskets are too few for company.py, one number is fitted), and when it comes
back for another trip (returns.py; an exponential gap by its own rate where trips are too few).

Assumed, since purchases cannot tell: a household leaves a useless slate with probability `patience`
(0: never); being shown changes nothing (`exposure`, added to theta; 0: nothing; `display`: as much
as a display in a shop, promotions.py) whatever the slot (`position`, lost per slot; 0: nothing);
taste does not drift within a trip (`drift`; 0: none).

`offers`, a table of today's prices and discounts (offers.py), changes what is paid and, as far as
weeks with other prices told (prices.py), what is bought; without it all costs what it usually does.
A product shown is judged as if the household were shopping alone: the choice among K is a logit.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from encoders.state import EMPTY, remember
from simulators import choice as choices
from simulators import dynamics
from simulators.base import Catalog, Response, SimSpec, UserState, UserTable
from simulators.draws import Draws
from simulators.fit import fit_once, load_state, moment, restore, store, user_table
from simulators.habits import Habits
from simulators.offers import with_offers
from simulators.preference import Preference
from simulators.preference_fit import fit_preference
from simulators.settings import Assumptions, check_display, check_settings

FORMAT = 7  # of a saved fit; raised when its content or meaning changes
BASKET = 40  # M: purchases of one trip; a household with a full basket goes home
DESCRIBED = 20_000  # users of a table up to which all are described once and kept: 0.2 GB
CHUNK = 2048  # described at once


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
        offers: str | Path | None = None,
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
        self.offered: Tensor | None = None  # (N,) what prices of today add to theta
        if offers is not None:
            catalog, shift = with_offers(catalog, offers, habits.elasticity)
            self.offered = shift.to(device)
        self.catalog, self.preference = catalog.to(device), preference.to(device)
        self.habits = habits.to(device)
        self.users = users.to(device)
        fitted = self.assumed.satiation is None
        self.company = self.habits.company if fitted else None
        constant = habits.satiation if fitted else self.assumed.satiation
        self.satiation = None if self.company else constant  # None: not one number
        self.exposure = exposure_of(self.assumed, habits)
        self.seen: tuple[UserTable, UserState] | None = (
            None  # all users of a small table, described
        )
        self.price = torch.nan_to_num(self.catalog.price)  # (N,)
        self.fit_key = fit_key  # names all that the fit came from

    @classmethod
    def fit(
        cls,
        spec: SimSpec,
        *,
        window: float = 150.0,
        epochs: int = 4,
        hidden: int = 32,
        members: int = 5,
        offers: str | Path | None = None,
        **assumed: Any,
    ) -> "FittedSimulator":
        """Fit to the purchases of `spec.logs` in the `window` days before the catalogue's cut.

        `offers` names a table of today's prices, `assumed` are the fields of `Assumptions`. A fit
        is kept and found again by the content of all that goes in.
        """
        given = {"window": window, "epochs": epochs, "hidden": hidden, "members": members}
        check_settings(given | assumed)  # what is wrong is refused before the work
        if spec.logs is not None:
            check_display(Assumptions(**assumed).exposure, spec.logs.name)
        if spec.bootstrap:  # a bootstrap sample is one member of an ensemble already
            members = 1
        learn = partial(
            fit_preference, epochs=epochs, hidden=hidden, members=members, seed=spec.seed
        )
        about = f"fit {FORMAT} {epochs} {hidden} {members}"
        key, state = fit_once(spec, learn, about, window=window, what="the fitted users")
        preference, habits = restore(state)
        habits = with_display(habits, spec, Assumptions(**assumed))
        users = spec.users if spec.users is not None else user_table(state["users"])
        assert spec.catalog is not None
        return cls(
            spec.catalog, preference, habits, users, device=spec.device, fit_key=key,
            offers=offers, **assumed,
        )  # fmt: skip

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
        if len(table) > DESCRIBED:
            state = self._described(users)
        else:  # households come again and again
            if self.seen is None or self.seen[0] is not table:
                parts = [self._described(rows) for rows in self._rows().split(CHUNK)]
                self.seen = table, {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
            state = {k: v.index_select(0, users) for k, v in self.seen[1].items()}
        members = self.preference.bias.shape[1]
        member = (draws.uniform("member")[:, 0] * members).long()  # (B,) whom a household is like
        enters = {"row": users, "time": table.start[users], "trip": torch.zeros_like(users)}
        return state | self._entered(len(users)) | enters | {"member": member}

    def _described(self, users: Tensor) -> UserState:
        """What the preference model knows of rows of `users` (B,) as they enter."""
        table = self.users
        columns = (table.profile, table.past, table.past_count, table.past_age, table.start)
        return self.preference.describe(*(x.index_select(0, users) for x in columns))

    def _rows(self) -> Tensor:
        return torch.arange(len(self.users), device=self.price.device)

    def _entered(self, count: int) -> UserState:
        """What is known of this trip at its beginning, of `count` households."""
        device = self.price.device
        empty: UserState = {
            "basket": torch.full((count, BASKET), EMPTY, device=device),
            "purchases": torch.zeros(count, dtype=torch.int64, device=device),
        }
        if self.company:  # running sums over the basket
            width = self.company.source.shape[1] + self.company.vectors.shape[1]
            empty["together"] = torch.zeros(count, width, device=device)  # (B, R + D)
        return empty

    def respond(self, state: UserState, slate: Tensor, draws: Draws) -> tuple[Response, UserState]:
        """Answer a slate (B, K) of distinct items or EMPTY; the state handed in is not changed."""
        opinions = self.preference.opinions(state, slate)  # (B, K, M)
        own = self.preference.agreed(state, opinions)  # (B, K)
        theta = self._theta(state, slate, own)  # (B, K)
        unsure = self._unsure(opinions, own, theta)  # (B, K)
        chosen, organic = self._choose(theta, slate, state, draws)  # (B, K) each
        bought = chosen.any(dim=1)  # (B,)
        given, state = state, dict(state)
        basket, purchases = fill(state["basket"], state["purchases"], slate, chosen)
        state["basket"], state["purchases"] = basket, purchases
        state |= self._moved(state, slate, chosen, bought)
        stop = self.habits.stop_hazard(purchases, self.users.profile[state["row"], 0])  # (B,)
        hazard = dynamics.leave_hazard(bought, stop, ~bought, self.assumed.patience)  # (B,)
        over = (draws.uniform("leave")[:, 0] < hazard) | (purchases >= BASKET)  # (B,)
        left = over & (state["trip"] >= self.assumed.trips - 1)  # (B,)
        elapsed = torch.zeros_like(hazard)  # (B,) days
        if self.assumed.trips > 1:
            rows = (over & ~left).nonzero().squeeze(1)  # (R,)
            gap = self._gap(state, rows, draws.uniform("return", 3)[rows])  # (R,)
            elapsed = elapsed.index_copy(0, rows, gap)
            state = self._come_back(state, rows, gap, given)
        value = self.price[slate.clamp_min(0)] * chosen  # (B, K)
        return Response({"buy": chosen}, organic, value, left, elapsed, unsure), state

    def relevance(self, state: UserState) -> Tensor:
        """(B, N) true probability that each item, shown alone now, is bought: for oracles only."""
        theta = self.preference.logits(state)
        if self.company:
            rows = (state["purchases"] > 0).nonzero().squeeze(1)  # (R,)
            baskets = state["basket"][rows, : _most(state)]
            theta = theta.index_add(0, rows, self.company.change(baskets))
        else:
            theta = self._sated(theta, self.catalog.category.expand(len(theta), -1), state)
        if self.offered is not None:
            theta = theta + self.offered
        return (theta + self.exposure).sigmoid()

    def _unsure(self, opinions: Tensor, own: Tensor, theta: Tensor) -> Tensor:
        """Spread (B, K) of the members' probabilities that an item, shown alone, is bought."""
        if opinions.shape[2] == 1:
            return torch.zeros_like(theta)  # one fit has no opinion of its own error
        change = torch.where(own == -torch.inf, 0.0, theta - own) + self.exposure  # (B, K)
        chance = (opinions + change[:, :, None]).sigmoid()  # (B, K, M)
        members = chance.shape[2]
        # `std` over so short a dimension takes five times as long
        off = chance - chance[:, :, :1]
        ones = torch.ones(members, device=chance.device)
        square = off.square() @ ones - (off @ ones).square() / members  # (B, K)
        return (square.clamp_min(0.0) / (members - 1)).sqrt()

    def _theta(self, state: UserState, slate: Tensor, theta: Tensor) -> Tensor:
        """Logits (B, K) of buying now, unshown, given those of an empty basket."""
        items = slate.clamp_min(0)
        if self.offered is not None:
            theta = theta + self.offered[items]
        if not self.company:
            return self._sated(theta, self.catalog.category[items], state)
        rows = (state["purchases"] > 0).nonzero().squeeze(1)  # (R,) the others have no basket yet
        known = (state["together"], state["basket"][:, : _most(state)], state["purchases"], items)
        return theta.index_add(
            0, rows, self.company.beside(*(x.index_select(0, rows) for x in known))
        )

    def _sated(self, theta: Tensor, category: Tensor, state: UserState) -> Tensor:
        if not self.satiation:
            return theta
        basket = state["basket"][:, : _most(state)]  # (B, m)
        taken = torch.where(basket == EMPTY, EMPTY, self.catalog.category[basket.clamp_min(0)])
        return dynamics.satiate(theta, category, taken, self.satiation)

    def _choose(
        self, theta: Tensor, slate: Tensor, state: UserState, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """What is bought and what would have been unshown, (B, K) bool each."""
        key = slate + len(self.catalog) * state["trip"][:, None]  # new wishes on a new trip
        uniform = draws.per_item("buy", key)  # (B, K)
        shown = choices.position(theta + self.exposure, self.assumed.position)
        if self.assumed.choice != "logit":
            choose = choices.cascade if self.assumed.choice == "cascade" else choices.independent
            return choose(shown, uniform), choices.independent(theta, uniform)
        noise = choices.gumbel(uniform)
        outside = choices.gumbel(draws.uniform("outside"))[:, 0]  # (B,)
        return choices.logit(shown, noise, outside), choices.organic(theta, noise, outside)

    def _moved(self, state: UserState, slate: Tensor, chosen: Tensor, bought: Tensor) -> UserState:
        """What purchases of this slate do to the wishes that come after it."""
        moved: UserState = {}
        if not self.company and not self.assumed.drift:
            return moved
        rows = bought.nonzero().squeeze(1)  # (R,)
        items = slate.index_select(0, rows).clamp_min(0)  # (R, K)
        taken = chosen.index_select(0, rows)  # (R, K)
        if self.company:
            sums = self.company.sums(items, taken)
            moved["together"] = state["together"].index_add(0, rows, sums)
        if self.assumed.drift:
            table, weight = self.preference.source, taken.float()
            what = embedding_bag(items, table, per_sample_weights=weight, mode="sum")  # (R, R')
            what = what.to(state["recent"].dtype)
            moved["recent"] = state["recent"].index_add(0, rows, what, alpha=self.assumed.drift)
        return moved

    def _gap(self, state: UserState, rows: Tensor, uniform: Tensor) -> Tensor:
        """Days (R,) until households `rows` (R,) come back, given `uniform` (R, 3)."""
        row, time = state["row"][rows], state["time"][rows]  # (R,) each
        profile = self.users.profile[row]
        if self.habits.returns is None:
            every = torch.exp(-profile[:, 1])  # (R,) days a trip
            return dynamics.return_gap(uniform[:, 0], every)
        log_days = profile[:, 2].double()  # (R,) since the first trip, + 7, as it entered
        trips = torch.exp(profile[:, 1] + log_days) + state["trip"][rows]  # (R,) with this one
        days = log_days.exp() - 7 + time - self.users.start[row]
        return self.habits.returns.gap(uniform, time, trips, days)

    def _come_back(
        self, state: UserState, rows: Tensor, elapsed: Tensor, given: UserState
    ) -> UserState:
        """Let `elapsed` (R,) days go by for who ends a trip, `rows` (R,): the basket is past.

        Tensors of `given` are left as they are; what is new in `state` since may be written to.
        """
        if len(rows) == 0:
            return state
        most = max(1, int(state["purchases"][rows].max()))
        names = ("basket", "past", "count", "age")
        basket, past, count, age = (state[k].index_select(0, rows) for k in names)
        time = state["time"][rows] + elapsed.double()
        past, count, age = remember(past, count, age, basket[:, :most], elapsed)
        profile = self.users.profile[state["row"][rows]]
        fresh = self.preference.describe(profile, past, count, age, time) | self._entered(len(rows))
        fresh |= {"time": time, "trip": state["trip"][rows] + 1}
        mine = {k: state[k].clone() if state[k] is given.get(k) else state[k] for k in fresh}
        return state | {k: mine[k].index_copy_(0, rows, v) for k, v in fresh.items()}


def _most(state: UserState) -> int:
    """How many places of the baskets are filled, at most."""
    return min(BASKET, max(1, int(state["purchases"].max())))


def exposure_of(assumed: Assumptions, habits: Habits) -> float:
    """What being shown adds to theta."""
    if not isinstance(assumed.exposure, str):
        return assumed.exposure
    if habits.display is None:
        raise ValueError(
            "exposure=display needs users fitted with exposure=display to a log with a table of "
            "promotions, as Complete Journey has: fit them so, or give exposure as a number "
            "(docs/promotions.md)"
        )
    return habits.display


def with_display(habits: Habits, spec: SimSpec, assumed: Assumptions) -> Habits:
    """Measure, if asked for, what a display does to sales of the catalogue before its cut."""
    if not isinstance(assumed.exposure, str):
        return habits
    from simulators.promotions import fit_display_lift

    assert spec.logs is not None
    assert spec.catalog is not None
    check_display(assumed.exposure, spec.logs.name)
    past = spec.logs.before(moment(spec.catalog.as_of))
    return replace(habits, display=fit_display_lift(past, spec.catalog.ids).log_shift)


def fill(basket: Tensor, filled: Tensor, slate: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Put what was chosen of a slate (B, K) behind the `filled` (B,) places of a basket (B, M)."""
    size = basket.shape[1]
    place = torch.where(chosen, filled[:, None] + chosen.cumsum(dim=1) - 1, size).clamp_max(size)
    room = torch.nn.functional.pad(basket, (0, 1), value=EMPTY)  # the last takes what does not fit
    return room.scatter_(1, place, slate)[:, :size], filled + chosen.sum(dim=1)
