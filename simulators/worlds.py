"""Synthetic worlds of known truth: for tests, for judging estimators, and the tiny demo."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, normalize, pad

from encoders.state import EMPTY, PAST, remember
from simulators import choice as choices
from simulators import dynamics
from simulators.base import Catalog, Response, SimSpec, UserState, UserTable
from simulators.draws import Draws

BASKET = 32  # M: purchases of one trip; a household with a full basket goes home
TODAY = 19_000  # days since 1970-01-01: where the past of every household ends
PAST_TRIPS, TRIP_EVERY = 12, 7.0  # trips each household made before, days between them
HINT = 4  # P: what the profile tells of the taste
BLOCK = 1024  # rows whose item vectors are gathered at once
CHOICES = ("logit", "independent", "cascade")


@dataclass(frozen=True)
class Truth:
    """What only the world knows: never part of an observation."""

    taste: Tensor  # (U, D)
    bias: Tensor  # (N,) logit of an item to the average household
    gap: Tensor  # (N,) days after which an item is wanted again
    every: Tensor  # (U,) mean days between trips


class TinyWorld:
    """Households with a hidden taste who buy again what has run out.

    theta_ui = bias_i + taste * <t_u, v_i> + again * (log(1 + count) + min(age / gap_i, 2) - 1 if
    ever bought). `world_seed` makes the items, `spec.seed` the households and their past, which is
    drawn from this same theta, so what a household bought before tells what it will buy.
    """

    behaviours: tuple[str, ...] = ("buy",)

    def __init__(
        self,
        spec: SimSpec,
        *,
        items: int = 60,
        households: int = 400,
        dim: int = 8,
        taste: float = 1.5,
        again: float = 1.0,
        patience: float = 0.2,
        satiation: float = 0.0,
        drift: float = 0.0,
        stop: tuple[float, ...] = (0.25,),
        world_seed: int = 0,
        trips: int = 1,
        choice: str = "logit",
        exposure: float = 0.0,
    ) -> None:
        for name, low, value in (
            ("items", 2, items),
            ("households", 1, households),
            ("dim", 1, dim),
            ("trips", 1, trips),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if choice not in CHOICES:
            raise ValueError(f"choice must be one of {CHOICES}, got {choice!r}")
        if not stop or not all(0.0 <= p <= 1.0 for p in (*stop, patience)):
            raise ValueError(
                f"stop and patience are probabilities in [0, 1], got stop={tuple(stop)}, "
                f"patience={patience}"
            )
        self.taste, self.again, self.patience = taste, again, patience
        self.satiation, self.drift, self.exposure = satiation, drift, exposure
        self.trips, self.choice = trips, choice
        self.stop = torch.tensor(stop, device=spec.device)  # (M,)

        shop = torch.Generator().manual_seed(2 * world_seed)  # even: never a household's seed
        self.catalog, bias, gap = _shop(items, dim, taste, shop)
        people = torch.Generator().manual_seed(2 * (spec.seed * 1_000_003 + world_seed) + 1)
        tastes = torch.randn(households, dim, generator=people)  # (U, D)
        every = TRIP_EVERY * (0.5 + torch.rand(households, generator=people))  # (U,)
        self.catalog = self.catalog.to(spec.device)
        self.truth = Truth(*(x.to(spec.device) for x in (tastes, bias, gap, every)))
        self.users = self._grow_up(people)
        self.memory = (self.users.past, self.users.past_count, self.users.past_age)

    def start(self, users: Tensor, draws: Draws) -> UserState:
        """Rows of `users` (B,) to the state of B households who enter."""
        zero = torch.zeros_like(users)  # (B,)
        state = {
            "user": users,
            "taste": self.truth.taste[users],  # (B, D)
            "past": self.memory[0].index_select(0, users),  # (B, H) by item, for `_recall`
            "past_count": self.memory[1].index_select(0, users),
            "past_age": self.memory[2].index_select(0, users),
            "purchases": zero,  # on this trip
            "trip": zero,
        }
        if self.satiation or self.trips > 1:  # or nobody asks what is in the basket
            state["bought"] = torch.full((len(users), BASKET), EMPTY, device=users.device)
        return state

    def respond(self, state: UserState, slate: Tensor, draws: Draws) -> tuple[Response, UserState]:
        """Answer a slate (B, K) of distinct items or EMPTY; the state handed in is not changed."""
        item = slate.clamp(min=0)  # (B, K)
        affinity = self._affinity(state["taste"], item)  # (B, K)
        theta = torch.where(slate == EMPTY, -torch.inf, self._theta(state, item, affinity))
        chosen, organic = self._choose(theta, item, state, draws)  # (B, K) each
        bought = chosen.any(dim=1)  # (B,)

        state = dict(state)
        filled = state["purchases"]  # (B,)
        state["purchases"] = filled + chosen.sum(dim=1)
        if "bought" in state:
            state["bought"] = _fill(state["bought"], filled, slate, chosen)
        if self.drift:
            basket = (embedding(item, self.catalog.vectors) * chosen[:, :, None]).sum(
                dim=1
            )  # (B, D)
            state["taste"] = dynamics.drift(state["taste"], basket, self.drift)
        nth = (state["purchases"] - 1).clamp(min=0, max=len(self.stop) - 1)  # (B,)
        hazard = dynamics.leave_hazard(bought, self.stop[nth], ~bought, self.patience)  # (B,)
        over = (draws.uniform("leave")[:, 0] < hazard) | (state["purchases"] >= BASKET)  # (B,)
        left = over & (state["trip"] >= self.trips - 1)  # (B,)
        elapsed = torch.zeros_like(hazard)  # (B,)
        if self.trips > 1:
            gap = dynamics.return_gap(
                draws.uniform("return")[:, 0], self.truth.every[state["user"]]
            )
            elapsed = torch.where(over & ~left, gap, elapsed)
            state = _come_back(state, elapsed)
        value = _of(self.catalog.price, item) * chosen  # (B, K)
        response = Response(
            {"buy": chosen}, organic, value, left, elapsed, uncertainty=torch.zeros_like(value)
        )
        return response, state

    def relevance(self, state: UserState) -> Tensor:
        """(B, N) true probability that each item, shown alone now, is bought: for oracles only."""
        everything = torch.arange(len(self.catalog), device=self.stop.device)  # (N,)
        affinity = state["taste"] @ self.catalog.vectors.T  # (B, N)
        theta = self._theta(state, everything.repeat(len(affinity), 1), affinity)
        return (theta + self.exposure).sigmoid()

    def _affinity(self, taste: Tensor, item: Tensor) -> Tensor:
        """<t_u, v_i>, (B, K), of tastes (B, D) and items (B, K): the same bits in any batch."""
        parts = [  # embedding is faster than indexing; all rows at once would not stay in the cache
            embedding(i, self.catalog.vectors).mul_(t[:, None]).sum(dim=2)
            for t, i in zip(taste.split(BLOCK), item.split(BLOCK), strict=True)
        ]
        return torch.cat(parts)

    def _theta(self, state: UserState, item: Tensor, affinity: Tensor) -> Tensor:
        """Logits, (B, K), of buying `item` (B, K) now, unless an exposure changes them."""
        count, age = _recall(state, item)  # (B, K) each
        theta = _of(self.truth.bias, item) + self.taste * affinity
        theta = theta + self.again * wanted_again(count, age, _of(self.truth.gap, item))
        if self.satiation:
            category = self.catalog.category  # (N,)
            bought = state["bought"]  # (B, M)
            taken = torch.where(bought == EMPTY, EMPTY, category[bought.clamp(min=0)])  # (B, M)
            theta = dynamics.satiate(theta, category[item], taken, self.satiation)
        return theta

    def _choose(
        self, theta: Tensor, item: Tensor, state: UserState, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """What is bought and what would have been unshown, (B, K) bool each."""
        key = item + len(self.catalog) * state["trip"][:, None]  # (B, K): new wishes on a new trip
        uniform = draws.per_item("buy", key)  # (B, K)
        shown = theta + self.exposure  # (B, K)
        if self.choice != "logit":
            choose = choices.cascade if self.choice == "cascade" else choices.independent
            return choose(shown, uniform), choices.independent(theta, uniform)
        noise = choices.gumbel(uniform)
        outside = choices.gumbel(draws.uniform("outside"))[:, 0]  # (B,)
        return choices.logit(shown, noise, outside), choices.organic(theta, noise, outside)

    def _grow_up(self, generator: torch.Generator) -> UserTable:
        """Let every household make its past trips and keep what it bought last."""
        truth, num_users, num_items = self.truth, len(self.truth.taste), len(self.catalog)
        device = truth.taste.device
        utility = truth.bias + self.taste * truth.taste @ self.catalog.vectors.T  # (U, N)
        count = torch.zeros_like(utility)  # (U, N)
        age = torch.zeros_like(utility)  # (U, N)
        for _ in range(PAST_TRIPS):
            theta = utility + self.again * wanted_again(count, age, truth.gap)
            uniform = torch.rand(num_users, num_items, generator=generator).to(device)
            bought = choices.independent(theta, uniform)  # (U, N)
            count = count + bought
            age = torch.where(bought, 0.0, age) + truth.every[:, None]
        age = age - 0.5 * torch.rand(num_users, num_items, generator=generator).to(
            device
        )  # no ties
        size = min(PAST, num_items)  # H
        recent, past = torch.where(count > 0, -age, -torch.inf).topk(size, dim=1)  # (U, H) each
        past, order = past.masked_fill(recent == -torch.inf, EMPTY).sort(dim=1)  # by item
        age, count = -recent.gather(1, order), count.gather(1, past.clamp(min=0))  # (U, H) each
        # what nobody ever uses would only be copied about; EMPTY comes first
        used = int((past != EMPTY).sum(dim=1).max()) + (self.trips - 1) * BASKET
        past, count, age = (x[:, -used:].contiguous() for x in (past, count, age))  # (U, H) each
        never = past == EMPTY  # (U, H)
        hint = truth.taste[:, :HINT].cpu() + 0.7 * torch.randn(
            num_users, min(HINT, truth.taste.shape[1]), generator=generator
        )  # (U, P)
        day = TODAY + 28.0 * torch.rand(num_users, generator=generator).double()  # (U,)
        return UserTable(
            ids=np.arange(num_users),
            profile=hint.to(device),
            past=past,
            past_count=count.masked_fill(never, 0.0),
            past_age=age.masked_fill(never, 0.0),
            start=day.to(device),
        )


def wanted_again(count: Tensor, age: Tensor, gap: Tensor) -> Tensor:
    """What own purchases, `age` days ago, add to theta; 0 if never bought."""
    return torch.where(count > 0, count.log1p() + (age / gap).clamp(max=2.0) - 1.0, 0.0)


def _shop(
    items: int, dim: int, taste: float, generator: torch.Generator
) -> tuple[Catalog, Tensor, Tensor]:
    """Draw a catalogue with the bias (N,) and gap (N,) of its items."""
    groups = max(1, items // 10)
    category = torch.randint(groups, (items,), generator=generator)  # (N,)
    centres = torch.randn(groups, dim, generator=generator)
    vectors = centres[category] + 0.7 * torch.randn(items, dim, generator=generator)  # (N, D)
    vectors = normalize(vectors, dim=1)
    spread = 0.7 * torch.randn(items, generator=generator)
    bias = -4.2 - np.log(items / 60) + spread  # (N,): a larger shop sells no more per trip
    gap = 7.0 + 35.0 * torch.rand(items, generator=generator)  # (N,)
    crowd = torch.randn(512, dim, generator=generator)  # people to count sales with
    names = [f"category {c}" for c in range(groups)]
    catalog = Catalog(
        ids=np.arange(items),
        texts=[f"item {i}, {names[c]}" for i, c in enumerate(category.tolist())],
        vectors=vectors,
        category=category,
        price=(1.0 + 9.0 * torch.rand(items, generator=generator)),
        popularity=(bias + taste * crowd @ vectors.T).sigmoid().mean(dim=0),
        as_of=float(TODAY),
        category_names=names,
    )
    return catalog, bias, gap


def _recall(state: UserState, item: Tensor) -> tuple[Tensor, Tensor]:
    """Count and age, (B, K) each, of items in the past, which is sorted by item; 0 if not there."""
    past = state["past"]  # (B, H)
    place = torch.searchsorted(past, item).clamp(max=past.shape[1] - 1)  # (B, K)
    known = past.gather(1, place) == item  # (B, K)
    count, age = (state[k].gather(1, place) * known for k in ("past_count", "past_age"))
    return count, age


def _fill(basket: Tensor, filled: Tensor, slate: Tensor, chosen: Tensor) -> Tensor:
    """Put what was chosen of a slate (B, K) behind the `filled` (B,) places of a basket (B, M)."""
    size = basket.shape[1]
    place = filled[:, None] + chosen.cumsum(dim=1) - 1  # (B, K)
    place = torch.where(chosen, place, size).clamp(max=size)  # what does not fit goes overboard
    room = pad(basket, (0, 1), value=EMPTY)  # (B, M + 1)
    return room.scatter_(1, place, slate)[:, :size]


def _of(table: Tensor, item: Tensor) -> Tensor:
    """What a table (N,) says of items (B, K): a third of the time that an index takes."""
    return table.index_select(0, item.flatten()).view_as(item)


def _come_back(state: UserState, elapsed: Tensor) -> UserState:
    """Let `elapsed` (B,) days go by for who ends a trip: the basket becomes past."""
    rows = (elapsed > 0).nonzero().squeeze(1)  # (R,)
    if len(rows) == 0:
        return state
    most = int(state["purchases"][rows].max())
    basket = state["bought"][rows]  # (R, M)
    past, count, age = (state[k][rows] for k in ("past", "past_count", "past_age"))
    past, count, age = remember(past, count, age, basket[:, :most], elapsed[rows])  # (R, H) each
    past, order = past.sort(dim=1)
    fresh = {
        "past": past,
        "past_count": count.gather(1, order),
        "past_age": age.gather(1, order),
        "bought": torch.full_like(basket, EMPTY),
        "purchases": torch.zeros_like(rows),
        "trip": state["trip"][rows] + 1,
    }
    return state | {k: state[k].index_copy(0, rows, v) for k, v in fresh.items()}
