"""Hand-written personas who read the labels of a small shop: no log, no language model.

What a persona wants is a weight for each word on a label. A user is a persona with a little
deviation, has money for one visit, and a mood that useless slates spoil.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from encoders.state import EMPTY
from simulators import choice
from simulators.base import Catalog, Response, SimSpec, UserState, UserTable
from simulators.draws import Draws
from simulators.testing_dynamics import Dynamic

GOODS = {"coffee": 6.0, "tea": 4.0, "bread": 3.0, "noodles": 2.0, "cheese": 5.0,
         "chocolate": 3.0, "apples": 2.5, "salmon": 9.0}  # fmt: skip
KINDS = {"": 1.0, "organic": 1.4, "value": 0.6, "fair-trade": 1.3, "family size": 2.2, "mild": 1.0,
         "strong": 1.0, "gift": 2.5}  # fmt: skip
BASKET = 12  # purchases of one visit; who has as many goes home
PLAIN = -3.0  # logit of buying what no word speaks for or against
TODAY = 20_000.0  # days since 1970-01-01


@dataclass(frozen=True)
class Persona:
    name: str
    words: dict[str, float]  # what a word on the label adds to the logit of buying
    money: float  # for one visit
    temper: float  # share of the mood that is lost with each useless slate
    adults: int  # what the shop knows of a customer: adults and children of the household
    children: int


PERSONAS = (
    Persona(
        "student",
        words={"value": 2.0, "noodles": 1.5, "strong": 1.0, "gift": -2.0},
        money=12.0, temper=0.2, adults=1, children=0,
    ),
    Persona(
        "parents",
        words={"family": 2.5, "mild": 1.0, "apples": 1.0, "bread": 1.0},
        money=45.0, temper=0.5, adults=2, children=2,
    ),
    Persona(
        "gourmet",
        words={"cheese": 2.0, "salmon": 2.0, "strong": 1.0, "value": -3.0},
        money=60.0, temper=0.4, adults=2, children=0,
    ),
    Persona(
        "idealist",
        words={"organic": 2.0, "fair-trade": 2.0, "salmon": -2.0},
        money=30.0, temper=0.3, adults=1, children=1,
    ),
    Persona(
        "present hunter",
        words={"gift": 3.0, "chocolate": 1.5, "tea": 1.0},
        money=40.0, temper=0.7, adults=2, children=1,
    ),
)  # fmt: skip


class Personas:
    """Users who are one of PERSONAS; a shop sees their household and purchases, never who they are.

    Assumed: who is in a bad mood leaves with probability up to `patience`; a purchase takes
    `satiation` from the logit of its category; a price takes `thrift` times its share of the
    money left. 0 switches each off.
    """

    behaviours = ("buy",)
    dynamics = (
        Dynamic("patience", "leaves sooner", off=0.0, on=0.5),
        Dynamic("satiation", "sates", off=0.0, on=1.0),
        Dynamic("thrift", "uses up", off=0.0, on=2.0),
    )

    def __init__(
        self,
        spec: SimSpec,
        *,
        people: int = 300,
        patience: float = 0.4,
        satiation: float = 0.5,
        thrift: float = 1.0,
    ) -> None:
        if people < 1 or not 0.0 <= patience <= 1.0:
            raise ValueError(
                f"people must be at least 1 and patience in [0, 1], got {people} and {patience}"
            )
        self.spec, self.people = spec, people
        self.patience, self.satiation, self.thrift = patience, satiation, thrift
        self.catalog, self.words, vocabulary = shop()
        draw = torch.Generator().manual_seed(spec.seed)  # other seeds are other people
        who = torch.randint(len(PERSONAS), (people,), generator=draw)  # (U,)
        tastes = [[p.words.get(word, 0.0) for word in vocabulary] for p in PERSONAS]
        self.taste = torch.tensor(tastes)[who]  # (U, W)
        self.taste = self.taste + 0.3 * torch.randn(self.taste.shape, generator=draw)
        self.money = torch.tensor([p.money for p in PERSONAS])[who]  # (U,)
        self.temper = torch.tensor([p.temper for p in PERSONAS])[who]  # (U,)
        household = torch.tensor([[p.adults, p.children] for p in PERSONAS]).float()[who]  # (U, 2)
        self.users = customers(household, PLAIN + self.taste @ self.words.T, draw)
        self.catalog, self.users = self.catalog.to(spec.device), self.users.to(spec.device)
        for name in ("words", "taste", "money", "temper"):
            setattr(self, name, getattr(self, name).to(spec.device))

    def rebuilt(self, *, patience: float, satiation: float, thrift: float) -> "Personas":
        """The same people with other settings, for the check of `dynamics`."""
        return Personas(
            self.spec, people=self.people, patience=patience, satiation=satiation, thrift=thrift
        )

    def start(self, users: Tensor, draws: Draws) -> UserState:
        return {
            "user": users,
            "money": self.money[users],  # (B,) left on this visit
            "mood": torch.ones(len(users), device=users.device),  # (B,)
            "taken": torch.zeros(len(users), len(GOODS), device=users.device),  # (B, categories)
        }

    def respond(self, state: UserState, slate: Tensor, draws: Draws) -> tuple[Response, UserState]:
        item = slate.clamp(min=0)  # (B, K)
        theta = self.theta(state).gather(1, item).masked_fill(slate == EMPTY, -torch.inf)  # (B, K)
        noise = choice.gumbel(draws.per_item("buy", item))  # (B, K)
        outside = choice.gumbel(draws.uniform("outside"))[:, 0]  # (B,)
        chosen = choice.logit(theta, noise, outside)  # (B, K), at most one of a slate
        value = torch.where(chosen, self.catalog.price[item], 0.0)  # (B, K)

        spoilt = state["mood"] * (1.0 - self.temper[state["user"]])  # (B,)
        after = {
            **state,
            "money": (state["money"] - value.sum(dim=1)).clamp(min=0.0),
            "mood": torch.where(chosen.any(dim=1), 1.0, spoilt),
            "taken": state["taken"].scatter_add(1, self.catalog.category[item], chosen.float()),
        }
        gone = draws.uniform("leave")[:, 0] < self.patience * (1.0 - after["mood"])  # (B,)
        done = (after["money"] < 1.0) | (after["taken"].sum(dim=1) >= BASKET)  # (B,)
        response = Response(
            {"buy": chosen},
            organic=choice.organic(theta, noise, outside),
            value=value,
            left=gone | done,
            elapsed=torch.zeros_like(value[:, 0]),
            uncertainty=torch.zeros_like(value),
        )
        return response, after

    def relevance(self, state: UserState) -> Tensor:
        return self.theta(state).sigmoid()  # (B, N)

    def theta(self, state: UserState) -> Tensor:
        """Logit of buying each item shown alone, (B, N)."""
        taste = self.taste[state["user"]]  # (B, W)
        liked = PLAIN + (taste[:, None] * self.words).sum(dim=2)  # (B, N), the same in any batch
        dear = self.catalog.price / state["money"].clamp(min=1.0)[:, None]  # (B, N)
        taken = state["taken"][:, self.catalog.category]  # (B, N)
        return liked - self.satiation * taken - self.thrift * dear


def shop() -> tuple[Catalog, Tensor, list[str]]:
    """Every good in every kind, the words on each label (N, W), and the vocabulary (W,)."""
    labels = [(kind, good) for good in GOODS for kind in KINDS]
    texts = [f"{kind} {good}".strip() for kind, good in labels]
    vocabulary = sorted({word for text in texts for word in text.split()})
    words = torch.tensor([[float(w in text.split()) for w in vocabulary] for text in texts])
    price = torch.tensor([round(KINDS[kind] * GOODS[good], 2) for kind, good in labels])
    catalog = Catalog(
        ids=np.array(texts),
        texts=texts,
        vectors=normalize(words - words.mean(dim=0), dim=1),  # an encoder may stand here
        category=torch.tensor([list(GOODS).index(good) for _, good in labels]),
        price=price,
        popularity=torch.full((len(texts),), 1.0 / len(texts)),
        as_of=TODAY,
        category_names=list(GOODS),
    )
    return catalog, words, vocabulary


def customers(household: Tensor, liked: Tensor, draw: torch.Generator) -> UserTable:
    """Users with a household (U, 2) and a past: ten items, drawn as they are `liked` (U, N)."""
    past = torch.multinomial(liked.exp(), 10, generator=draw)  # (U, 10)
    age = 1.0 + 60.0 * torch.rand(past.shape, generator=draw)  # (U, 10) days
    return UserTable(
        ids=np.arange(len(past)),
        profile=household,
        past=past,
        past_count=torch.ones(past.shape),
        past_age=age,
        start=torch.full((len(past),), TODAY, dtype=torch.float64),
    )
