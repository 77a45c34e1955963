"""One Python object per user, batched by a small adapter: slow, but any Python may stand in it.

The objects live for one answer only. What a shopper must remember between slates is a list of
numbers: the adapter keeps them in the state as a row of a tensor, so sessions can be put together,
saved and replayed like those of any other simulator. Numbers in, numbers out.
"""

import math

import numpy as np
import torch
from torch import Tensor

from encoders.state import EMPTY
from simulators.base import Catalog, Response, SimSpec, UserState, UserTable
from simulators.draws import Draws

COLOURS = ("red", "blue", "green", "black")
THINGS = ("shirt", "mug", "lamp", "chair", "poster", "bag", "clock", "plant")
TODAY = 20_000.0  # days since 1970-01-01


class Shopper:
    """The part an author writes: no tensors. Replace it by your own, with the same four methods."""

    def __init__(self, traits: list[float], memory: list[float]) -> None:
        """`traits` are numbers that never change, `memory` what `memory()` gave the last time."""
        self.colour, self.thing, self.nerves = int(traits[0]), int(traits[1]), traits[2]
        self.in_vain, self.bought = memory

    @staticmethod
    def fresh() -> list[float]:
        """The memory of a shopper who comes in."""
        return [0.0, 0.0]

    def memory(self) -> list[float]:
        """What to remember: as many numbers as `fresh` gives."""
        return [self.in_vain, self.bought]

    def probability(self, item: int) -> float:
        """How likely the shopper buys the item if it is shown alone now."""
        thing, colour = divmod(item, len(COLOURS))
        wish = -3.0 + 2.0 * (colour == self.colour) + 2.5 * (thing == self.thing) - self.bought
        return 1.0 / (1.0 + math.exp(-wish))

    def answer(self, items: list[int], uniform: list[float]) -> tuple[list[bool], int, bool]:
        """Wanted or not, for each item; the place of the one bought or -1; whether to leave.

        `uniform` has a random number in (0, 1) for each item: use it, and no other randomness.
        """
        shown = zip(items, uniform, strict=True)
        wanted = [item != EMPTY and u < self.probability(item) for item, u in shown]
        bought = wanted.index(True) if any(wanted) else -1  # the first that is wanted
        self.in_vain = 0.0 if bought >= 0 else self.in_vain + 1.0
        self.bought += bought >= 0
        return wanted, bought, self.in_vain >= self.nerves


class Shoppers:
    """Many `Shopper`s as one simulator: it makes them, asks them, and keeps their memory."""

    behaviours = ("buy",)

    def __init__(self, spec: SimSpec, *, people: int = 100, nerves: int = 4) -> None:
        if people < 1 or nerves < 1:
            raise ValueError(f"people and nerves must be at least 1, got {people} and {nerves}")
        draw = torch.Generator().manual_seed(spec.seed)  # other seeds are other people
        colour = torch.randint(len(COLOURS), (people,), generator=draw)
        thing = torch.randint(len(THINGS), (people,), generator=draw)
        traits = torch.stack([colour, thing, torch.full_like(colour, nerves)], dim=1)  # (U, 3)
        self.catalog = shop().to(spec.device)
        self.traits = traits.tolist()
        self.users = UserTable(
            ids=np.arange(people),
            profile=torch.nn.functional.one_hot(colour, len(COLOURS)).float(),  # it can be seen
            past=torch.full((people, 1), EMPTY),
            past_count=torch.zeros(people, 1),
            past_age=torch.zeros(people, 1),
            start=torch.full((people,), TODAY, dtype=torch.float64),
        ).to(spec.device)

    def start(self, users: Tensor, draws: Draws) -> UserState:
        fresh = torch.tensor(Shopper.fresh(), device=users.device)  # (M,)
        return {"user": users, "memory": fresh.repeat(len(users), 1)}

    def respond(self, state: UserState, slate: Tensor, draws: Draws) -> tuple[Response, UserState]:
        # one number per user and item: the same wish at whatever step and slot it is shown
        uniform = draws.per_item("buy", slate).tolist()
        organic, memory = [], []
        chosen = torch.zeros(slate.shape, dtype=torch.bool)  # (B, K)
        left = torch.zeros(len(slate), dtype=torch.bool)  # (B,)
        for b, shopper in enumerate(self.awake(state)):
            wanted, bought, leaves = shopper.answer(slate[b].tolist(), uniform[b])
            organic.append(wanted)
            memory.append(shopper.memory())
            left[b] = leaves
            if bought >= 0:
                chosen[b, bought] = True
        chosen, device = chosen.to(slate.device), slate.device
        value = torch.where(chosen, self.catalog.price[slate.clamp(min=0)], 0.0)  # (B, K)
        response = Response(
            {"buy": chosen},
            organic=torch.tensor(organic, device=device),
            value=value,
            left=left.to(device),
            elapsed=torch.zeros_like(value[:, 0]),
            uncertainty=torch.zeros_like(value),
        )
        return response, {**state, "memory": torch.tensor(memory, device=device)}

    def relevance(self, state: UserState) -> Tensor:
        items = range(len(self.catalog))
        rows = [[shopper.probability(i) for i in items] for shopper in self.awake(state)]
        return torch.tensor(rows, device=state["memory"].device)  # (B, N)

    def awake(self, state: UserState) -> list[Shopper]:
        """The shoppers of B rows of the state, as they were after their last answer."""
        rows = zip(state["user"].tolist(), state["memory"].tolist(), strict=True)
        return [Shopper(self.traits[user], memory) for user, memory in rows]


def shop() -> Catalog:
    """Every thing in every colour."""
    names = [f"{colour} {thing}" for thing in THINGS for colour in COLOURS]
    thing = torch.arange(len(names)) // len(COLOURS)  # (N,)
    colour = torch.arange(len(names)) % len(COLOURS)  # (N,)
    one_hot = torch.nn.functional.one_hot
    what = torch.cat([one_hot(thing, len(THINGS)), one_hot(colour, len(COLOURS))], dim=1).float()
    return Catalog(
        ids=np.array(names),
        texts=names,
        vectors=torch.nn.functional.normalize(what - what.mean(dim=0), dim=1),
        category=thing,
        price=5.0 + 3.0 * thing.float(),
        popularity=torch.full((len(names),), 1.0 / len(names)),
        as_of=TODAY,
        category_names=list(THINGS),
    )
