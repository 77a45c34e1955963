"""The synthetic world does what its truth says."""

from dataclasses import fields

import pytest
import torch

from encoders.state import EMPTY, remember
from simulators.base import SimSpec
from simulators.draws import Draws
from simulators.worlds import TinyWorld


def world(seed=0, **settings):
    return TinyWorld(SimSpec(None, None, seed=seed), **settings)


def enter(sim, users, episode=0):
    episodes = torch.full_like(users, episode)
    draws = Draws.root(0).at(users, episodes, torch.zeros_like(users))
    return sim.start(users, draws), draws


def test_same_seed_same_world_and_new_seed_new_households_in_the_same_shop():
    one, again, other = world(), world(), world(seed=1)
    assert torch.equal(one.users.past, again.users.past)
    assert not torch.equal(one.users.past, other.users.past)
    for column in ("vectors", "category", "price", "popularity"):
        assert torch.equal(getattr(one.catalog, column), getattr(other.catalog, column))
    assert torch.equal(one.truth.bias, other.truth.bias)
    assert not torch.equal(one.catalog.vectors, world(world_seed=1).catalog.vectors)


def test_the_hidden_taste_is_not_in_what_is_seen():
    sim = world()
    assert sim.users.profile.shape == (400, 4)
    assert not torch.isclose(sim.users.profile, sim.truth.taste[:, :4]).any(dim=1).all()
    hint = torch.stack([sim.users.profile[:, 0], sim.truth.taste[:, 0]])
    assert torch.corrcoef(hint)[0, 1] > 0.6  # a hint it is
    names = {f.name for f in fields(sim.users)}
    assert names == {"ids", "profile", "past", "past_count", "past_age", "start"}


def test_relevance_follows_the_equation_of_the_docstring():
    sim = world()
    state, _ = enter(sim, torch.arange(400))
    user, past = 7, sim.users.past[7]
    bought, never = int(past.max()), next(i for i in range(60) if i not in past)
    spot = int((past == bought).nonzero()[0])
    utility = sim.truth.bias + 1.5 * (sim.catalog.vectors @ sim.truth.taste[user])
    count, age = sim.users.past_count[user, spot], sim.users.past_age[user, spot]
    again = (1 + count).log() + min(age / sim.truth.gap[bought], torch.tensor(2.0)) - 1
    relevance = sim.relevance(state)[user]
    assert torch.isclose(relevance[never], utility[never].sigmoid())
    assert torch.isclose(relevance[bought], (utility[bought] + again).sigmoid())


def test_what_was_bought_before_tells_what_is_wanted_and_beats_popularity():
    sim = world()
    state, _ = enter(sim, torch.arange(400))
    relevance = sim.relevance(state)  # (U, N)
    best = sim.users.past_count.argmax(dim=1, keepdim=True)
    own = relevance.gather(1, sim.users.past.gather(1, best).clamp(min=0)).mean()
    popular = relevance[:, sim.catalog.popularity.argmax()].mean()
    assert own > 1.3 * popular > 1.3 * 2 * relevance.mean()
    assert relevance.max(dim=1).values.mean() > 1.1 * own  # and there is more to learn


def test_a_known_item_is_wanted_more_the_longer_ago_it_was_bought():
    sim = world()
    state, _ = enter(sim, torch.arange(400))
    later = state | {"past_age": state["past_age"] + 5.0 * (state["past"] != EMPTY)}
    now, then = sim.relevance(state), sim.relevance(later)
    known = torch.zeros(400, 61, dtype=torch.bool)
    known.scatter_(1, torch.where(sim.users.past == EMPTY, 60, sim.users.past), True)
    assert (then >= now)[known[:, :60]].all()
    assert torch.equal(then[~known[:, :60]], now[~known[:, :60]])


def test_better_slates_lengthen_the_session_and_patience_shortens_it():
    def steps_there(sim, best):
        users = torch.arange(400)
        state, _ = enter(sim, users)
        order = sim.relevance(state).argsort(dim=1, descending=best)
        there, steps = torch.ones(400, dtype=torch.bool), 0
        for step in range(5):
            draws = Draws.root(0).at(users, users * 0, torch.full_like(users, step))
            response, state = sim.respond(state, order[:, 3 * step : 3 * step + 3], draws)
            there &= ~response.left
            steps += int(there.sum())
        return steps

    kind = {"stop": (0.05,)}
    assert steps_there(world(**kind), True) > 1.1 * steps_there(world(**kind), False)
    assert steps_there(world(patience=0.5, **kind), True) < steps_there(world(**kind), True)
    assert steps_there(world(patience=0.0, stop=(0.0,)), False) == 5 * 400


def test_satiation_lowers_the_category_just_bought_from_only():
    sim = world(satiation=2.0, stop=(0.0,), patience=0.0)
    users = torch.arange(400)
    state, draws = enter(sim, users)
    before = sim.relevance(state)
    slate = before.argmax(dim=1, keepdim=True)
    response, after = sim.respond(state, slate, draws)
    buyer = int(response.chosen["buy"][:, 0].nonzero()[0])
    lower = sim.relevance(after)[buyer] < before[buyer]
    assert torch.equal(lower, sim.catalog.category == sim.catalog.category[slate[buyer, 0]])
    passed = ~response.chosen["buy"][:, 0]
    assert torch.equal(sim.relevance(after)[passed], before[passed])


def test_drift_moves_the_taste_of_buyers_only_and_not_without_it():
    users = torch.arange(400)
    for rate in (0.0, 0.2):
        sim = world(drift=rate)
        state, draws = enter(sim, users)
        slate = sim.relevance(state).argmax(dim=1, keepdim=True)
        response, after = sim.respond(state, slate, draws)
        moved = (after["taste"] != state["taste"]).any(dim=1)
        assert torch.equal(moved, response.chosen["buy"][:, 0] if rate else moved & False)


def test_trips_follow_each_other_with_gaps_and_the_basket_becomes_past():
    sim = world(trips=3, patience=0.3)
    users = torch.arange(400)
    state, _ = enter(sim, users)
    gone = torch.zeros(400, dtype=torch.bool)
    ended = torch.zeros(400, dtype=torch.int64)
    seen = tuple(getattr(sim.users, k) for k in ("past", "past_count", "past_age"))
    basket = [[] for _ in range(400)]
    for step in range(15):
        draws = Draws.root(0).at(users, users * 0, torch.full_like(users, step))
        slate = torch.stack([(users + step) % 60, (users + 30 + step) % 60], dim=1)
        response, state = sim.respond(state, slate, draws)
        for u in range(400):
            basket[u] += slate[u][response.chosen["buy"][u]].tolist()
        for u in (response.elapsed > 0).nonzero()[:, 0].tolist():
            bought = torch.tensor([basket[u] or [EMPTY]])
            known = (x[u : u + 1] for x in seen)
            new = remember(*known, bought, response.elapsed[u : u + 1])
            for column, value in zip(seen, new, strict=True):
                column[u] = value[0]
            basket[u] = []
        assert not (response.left & (response.elapsed > 0)).any()
        assert (ended[response.left & ~gone] == 2).all()  # only after the last trip
        ended += (response.elapsed > 0) & ~gone
        gone |= response.left
    assert (ended == 2).float().mean() > 0.8
    past, order = seen[0].sort(dim=1)
    width = state["past"].shape[1]
    assert torch.equal(past[:, -width:], state["past"])
    assert torch.equal(seen[1].gather(1, order)[:, -width:], state["past_count"])
    assert torch.equal(seen[2].gather(1, order)[:, -width:], state["past_age"])


def test_a_wish_is_kept_through_a_trip_and_renewed_on_the_next():
    sim = world(trips=2, choice="independent", stop=(0.0,), patience=0.0)
    users = torch.arange(400)
    state, _ = enter(sim, users)
    slate = sim.relevance(state).topk(4, dim=1).indices
    answers = []
    for step, trip in ((0, 0), (3, 0), (3, 1)):
        draws = Draws.root(0).at(users, users * 0, torch.full_like(users, step))
        response, _ = sim.respond(state | {"trip": users * 0 + trip}, slate, draws)
        answers.append(response.chosen["buy"])
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_exposure_sells_more_but_leaves_organic_demand_alone():
    users = torch.arange(400)
    found = []
    for exposure in (0.0, 1.0):
        sim = world(exposure=exposure)
        state, draws = enter(sim, users)
        response, _ = sim.respond(state, torch.arange(10).expand(400, 10), draws)
        found.append((response.chosen["buy"].sum(), response.organic))
    assert found[1][0] > found[0][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"items": 1}, "items must be at least 2, got 1"),
        ({"choice": "logits"}, r"choice must be one of .*'logit'.*got 'logits'"),
        ({"stop": ()}, r"stop and patience are probabilities"),
        ({"patience": 1.5}, r"patience=1.5"),
    ],
)
def test_a_world_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        world(**wrong)
    with pytest.raises(TypeError, match="nonsense"):
        world(nonsense=1)
