"""`check_simulator` finds each fault and says what to change, and has no false alarms."""

import random
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch

from encoders.state import EMPTY
from simulators.base import Response, SimSpec
from simulators.testing import check_simulator
from simulators.worlds import TinyWorld
from sources.logs import Logs

SPEC = SimSpec(None, None)


class Shop(TinyWorld):
    """A right simulator with two behaviours: what is bought was clicked before."""

    behaviours = ("click", "buy")

    def __init__(self, spec=SPEC, **settings):
        super().__init__(spec, items=20, households=30, dim=4, **settings)

    def respond(self, state, slate, draws):
        response, after = super().respond(state, slate, draws)
        clicked = response.chosen["buy"]
        bought = clicked & (draws.uniform("buy after click", slate.shape[1]) < 0.5)
        value = torch.where(bought, response.value, 0.0)
        return replace(response, chosen={"click": clicked, "buy": bought}, value=value), after


def spoilt(fault):
    """A shop with one fault: `fault(shop, state, slate, draws, response, after)` answers."""

    class Spoilt(Shop):
        def respond(self, state, slate, draws):
            response, after = super().respond(state, slate, draws)
            answer = fault(self, state, slate, draws, response, after)
            return (answer, after) if isinstance(answer, Response) else answer

    return Spoilt()


def answer(**wrong):
    """The fault of answering with other values: each a function of the response and the slate."""
    return spoilt(lambda shop, state, slate, draws, response, after: replace(
        response, **{k: f(response, slate) for k, f in wrong.items()}))  # fmt: skip


def state_of(**wrong):
    """The fault of a wrong state, each a function of the shop and the state after."""
    return spoilt(lambda shop, state, slate, draws, response, after: (
        response, after | {k: f(shop, after) for k, f in wrong.items()}))  # fmt: skip


def with_member(name, make):
    shop = Shop()
    setattr(shop, name, make(shop))
    return shop


def table(of, **wrong):
    """A shop whose catalogue or users have other columns, each a function of the table."""
    shop = Shop()
    old = getattr(shop, of)
    setattr(shop, of, replace(old, **{k: f(old) for k, f in wrong.items()}))
    return shop


def counts_calls(shop, state, slate, draws, response, after):
    shop.calls = getattr(shop, "calls", 0) + 1
    return replace(response, elapsed=shop.calls * (~response.left).float())


def writes_the_slate(shop, state, slate, draws, response, after):
    slate.clamp_(min=0)
    return response


def writes_the_users(shop, state, slate, draws, response, after):
    shop.users.past_age.add_(1.0)
    return response


def one_coin_for_all(shop, state, slate, draws, response, after):
    coin = draws.uniform("leave")[0, 0] < 0.5  # row 0: whoever that is
    return replace(response, left=coin.expand(len(slate)), elapsed=torch.zeros(len(slate)))


def takes_item_0(shop, state, slate, draws, response, after):
    chosen = {**response.chosen, "click": response.chosen["click"] | (slate.clamp(min=0) == 0)}
    return replace(response, chosen=chosen)


def looks_at_the_clock(shop, state, slate, draws, response, after):
    return replace(response, uncertainty=torch.full(slate.shape, time.perf_counter() % 1000))


def shuffles(shop, state, slate, draws, response, after):
    random.random()
    return response


def as_wide_as_needed(shop):
    def start(users, draws):
        state = TinyWorld.start(shop, users, draws)
        bought = torch.full((len(users), 40), -1)
        return state | {"bought": bought[:, : 20 + len(users)]}  # the fault: users do not fit

    return start


def keeps_one_state(shop, state, slate, draws, response, after):
    state.update(after)  # the same dict goes on: what was handed in is no more
    return response, state


def notes_the_slate(shop, state, slate, draws, response, after):
    state["taste"][:, 0] = slate[:, 0].float()  # twice is as once: no second answer differs
    return response, after


def needs_a_key(state):
    return state["mood"]


def of_the_batch(shop):
    def relevance(state):
        return TinyWorld.relevance(shop, state) / (1 + len(state["user"]))

    return relevance


def spoils_the_state(shop):
    def relevance(state):
        state["taste"].mul_(0.9)
        return TinyWorld.relevance(shop, state)

    return relevance


def promises(change):
    """The fault of a relevance that is not what happens."""
    return with_member("relevance", lambda shop: lambda s: change(TinyWorld.relevance(shop, s)))


def with_bias(more):
    shop = Shop()
    shop.truth = replace(shop.truth, bias=shop.truth.bias + more)
    return shop


FAULTS = {
    "one answer of two": (
        spoilt(lambda shop, state, slate, draws, response, after: [response]),
        "respond: must return a pair, got list: end it with `return response, state`",
    ),
    "swapped": (
        spoilt(lambda shop, state, slate, draws, response, after: (after, response)),
        "got dict and Response: mind the order",
    ),
    "chosen is no dict": (
        answer(chosen=lambda r, slate: r.chosen["buy"]),
        "chosen must be a dict, behaviour to (B, K) bool, got Tensor: write {'click': chosen}",
    ),
    "state is no dict": (
        with_member("start", lambda shop: lambda users, draws: [users]),
        "start: must return a dict of tensors with one row per user, got list",
    ),
    "state of lists": (
        with_member("start", lambda shop: lambda users, draws: {"user": users.tolist()}),
        "start: state['user']: must be a tensor, got list",
    ),
    "squeezes one slot away": (
        answer(value=lambda r, slate: r.value.squeeze()),
        "value: must have shape (12, 1), got (12,); a squeeze() without a dimension",
    ),
    "squeezes one user away": (
        answer(left=lambda r, slate: r.left.squeeze()),
        "left: must have shape (1,), got (); a squeeze() without a dimension",
    ),
    "arrays": (
        answer(value=lambda r, slate: r.value.numpy()),
        "respond: value: must be a tensor, got ndarray; use torch.as_tensor",
    ),
    "float64": (
        answer(value=lambda r, slate: r.value.double()),
        "value: must be torch.float32, got torch.float64; convert it",
    ),
    "other order of behaviours": (
        answer(chosen=lambda r, slate: dict(reversed(r.chosen.items()))),
        "['buy', 'click'] in another order than behaviours ['click', 'buy']",
    ),
    "a behaviour is missing": (
        answer(chosen=lambda r, slate: {"click": r.chosen["click"]}),
        "chosen has ['click'], behaviours are ['click', 'buy']; give one (B, K) for each",
    ),
    "another device": (
        answer(left=lambda r, slate: r.left.to("meta")),
        "left: must be on cpu like the catalogue, got meta; make it with device=spec.device",
    ),
    "state on another device": (
        state_of(taste=lambda shop, after: after["taste"].to("meta")),
        "state['taste']: must be on cpu like the catalogue, got meta",
    ),
    "a gradient": (
        answer(value=lambda r, slate: r.value.clone().requires_grad_()),
        "value: carries a gradient; decorate the method with @torch.no_grad()",
    ),
    "state changes its type": (
        state_of(purchases=lambda shop, after: after["purchases"].float()),
        "state['purchases']: must be torch.int64, got torch.float32",
    ),
    "NaN in the state": (
        state_of(taste=lambda shop, after: after["taste"] / 0.0 * 0.0),
        "state['taste'] is NaN at step 0 and will stay so: look for 0 / 0",
    ),
    "NaN money": (
        answer(value=lambda r, slate: r.value * torch.nan),
        "write torch.where(chosen, value, 0), as NaN times False is NaN",
    ),
    "back in time": (
        answer(elapsed=lambda r, slate: r.elapsed - 1.0),
        "elapsed must be finite days, 0 or more",
    ),
    "unsure of its doubt": (
        answer(uncertainty=lambda r, slate: r.value * torch.nan),
        "uncertainty must be finite and 0 or more",
    ),
    "left and came back": (
        answer(left=lambda r, slate: r.left | True, elapsed=lambda r, slate: r.left + 1.0),
        "who left does not come back, so elapsed must be 0 where left",
    ),
    "nobody leaves": (
        answer(left=lambda r, slate: r.left & False),
        "nobody of 256 users left within 100 slates of the best items; set `left`",
    ),
    "memory in the simulator": (
        spoilt(counts_calls),
        "keep nothing in the simulator between calls (it belongs into the state)",
    ),
    "the clock": (spoilt(looks_at_the_clock), "the same state and draws gave two different"),
    "random.random": (spoilt(shuffles), "a global random generator was used or seeded; take every"),
    "writes the slate": (
        spoilt(writes_the_slate),
        "wrote into the slate handed in; work on slate.clone()",
    ),
    "one state for ever": (
        spoilt(keeps_one_state),
        "wrote into the state handed in (['purchases']); return a new one",
    ),
    "notes in the state": (spoilt(notes_the_slate), "wrote into the state handed in (['taste'])"),
    "writes the users": (
        spoilt(writes_the_users),
        "wrote into users.past_age; users' changes belong into the state",
    ),
    "one coin for all": (
        spoilt(one_coin_for_all),
        "look for a mean, a maximum or a draw that is taken over the batch (dimension 0)",
    ),
    "width of the batch": (
        with_member("start", as_wide_as_needed),
        "state['bought'] is (32,) wide in a batch and (21,) alone; give it one width",
    ),
    "item 0 for no item": (
        spoilt(takes_item_0),
        "click is true in an empty slot; add & (slate != EMPTY), as clamp() alone turns -1 into",
    ),
    "raises": (
        with_member("relevance", lambda shop: needs_a_key),
        "raised KeyError: 'mood' (test_testing_kit.py, line",
    ),
    "relevance is NaN": (promises(lambda p: p * torch.nan), "relevance: is NaN for some items"),
    "relevance is a logit": (
        promises(lambda p: p.logit()),
        "must be probabilities above 0 and below 1; end it with sigmoid()",
    ),
    "wrong width": (promises(lambda p: p[:, 1:]), "relevance: must have shape (12, 20), got"),
    "relevance of the batch": (
        with_member("relevance", of_the_batch),
        "a user's probabilities depend on who else is in the batch; take no mean",
    ),
    "relevance writes": (
        with_member("relevance", spoils_the_state),
        "relevance: wrote into the state handed in (['taste'])",
    ),
    "promises too much": (
        promises(lambda p: (3.0 * p).clamp(max=0.99)),
        "best items are bought if shown alone, but respond bought",
    ),
    "promises of poor items": (
        promises(lambda p: torch.where(p == p.amax(dim=1, keepdim=True), p, p / 10)),
        "random items are bought if shown alone, but respond bought",
    ),
    "takes anything": (with_bias(9.0), "of whatever they are shown, so any slate is as good as"),
    "takes nothing": (with_bias(-12.0), "so agents see no reward; add a constant to the logits"),
    "is a class": (Shop, "Shop is a class: make one first, Shop("),
    "lacks members": (object(), "add catalog, behaviours, users, start, respond, relevance, as"),
    "a word for behaviours": (
        with_member("behaviours", lambda shop: "buy"),
        "behaviours: must be a tuple of names like (\"buy\",), each once, got 'buy'",
    ),
    "a dict for users": (
        with_member("users", lambda shop: vars(shop.users)),
        "must be a Catalog and a UserTable of simulators.base, got Catalog and dict",
    ),
    "no texts": (table("catalog", texts=lambda c: []), "catalog.texts: need one for each of the"),
    "ids twice": (
        table("catalog", ids=lambda c: c.ids // 2),
        "catalog.ids: an id stands for two items; give each its own",
    ),
    "categories from 1": (
        table("catalog", category=lambda c: c.category + 1),
        "must be 0 to 1, places in the 2 category_names, got 1 to 2",
    ),
    "sales for popularity": (
        table("catalog", popularity=lambda c: c.popularity * 1e4),
        "popularity is a share in [0, 1]",
    ),
    "negative prices": (
        table("catalog", price=lambda c: c.price - 99.0),
        "a price must not be negative (NaN if unknown)",
    ),
    "few items": (
        TinyWorld(SPEC, items=3, households=9),
        "catalog, users: need 5 items and 1 user, got 3 and 9",
    ),
    "seconds for days": (
        table("users", start=lambda u: u.start * 86_400),
        "users.start: must be finite days since 1970-01-01, got up to 1.64e+09: divide seconds",
    ),
    "unknown items": (
        table("users", past=lambda u: torch.where(u.past == EMPTY, 99, u.past)),
        "users.past: items are numbered 0 to 19, -1 where there is none",
    ),
    "negative counts": (
        table("users", past_count=lambda u: u.past_count - 9.0),
        "users.past_count: must be finite and 0 or more wherever users.past has an item",
    ),
    "profiles unknown": (
        table("users", profile=lambda u: u.profile * torch.nan),
        "must be finite; put 0 where nothing is known",
    ),
    "a list of prices": (
        table("catalog", price=lambda c: c.price.tolist()),
        "catalog.price: must be a tensor, got list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_said(name):
    simulator, words = FAULTS[name]
    problems = check_simulator(simulator)
    assert any(words in problem for problem in problems), problems
    assert len(problems) <= 3, "one fault, and a long list: the author cannot see which"
    assert all("\n" not in problem for problem in problems)


def test_a_right_shop_with_two_behaviours_has_no_fault():
    assert check_simulator(Shop(), seed=2) == []


def funnel(clicks, buys, names=("click", "buy")):
    """A log of so many clicks and purchases of a shop's items."""
    behaviour = [names[0]] * clicks + [names[1]] * buys
    row = range(len(behaviour))
    time = pd.Timestamp("2021-01-01") + pd.to_timedelta(row, unit="min")
    events = {"value": 1.0, "user": [r % 30 for r in row], "item": [r % 20 for r in row]}
    frame = pd.DataFrame({**events, "time": time, "behaviour": behaviour})
    return Logs.create(frame, purchases=names[1:])


def test_rates_are_compared_with_the_log():
    assert check_simulator(Shop(), logs=funnel(400, 200)) == []
    (problem,) = check_simulator(Shop(), logs=funnel(2000, 150))
    assert "buy happens 0.5" in problem
    assert "times for each click, in the log 0.075; multiply its probability" in problem


def test_other_names_than_the_log_has_are_said():
    (problem,) = check_simulator(Shop(), logs=funnel(300, 200, ("view", "order")))
    assert "['click', 'buy'] never occur in the log with items of the catalogue" in problem
    assert "take names from ['order', 'view']" in problem
