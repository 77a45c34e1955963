"""Users answer as one member of the ensemble would, and say how far the members are apart."""

import copy

import pytest
import torch
from fitted_users import at

from encoders.state import EMPTY
from simulators.base import SimSpec
from simulators.fitted import FittedSimulator

MANY = torch.arange(400)


def top(sim, rows=MANY, k=5):
    draws = at(rows)
    state = sim.start(rows, draws)
    return state, sim.relevance(state).topk(k, dim=1).indices, draws


def test_every_member_speaks_for_about_as_many(fitted):
    member = fitted.start(MANY, at(MANY))["member"]
    counts = torch.bincount(member, minlength=5)
    assert counts.shape == (5,)
    assert counts.min() > 40
    again = fitted.start(MANY[100:200], at(MANY[100:200]))["member"]
    assert torch.equal(again, member[100:200])  # a household in an episode, in any batch


def test_a_household_is_priced_by_its_own_member_on_every_trip(shelf, fitted):
    sim = FittedSimulator(shelf, fitted.preference, fitted.habits, fitted.users, trips=3)
    state, slate, _ = top(sim)
    member = state["member"]
    mean = fitted.preference.logits({k: v for k, v in state.items() if k != "member"})
    assert not torch.allclose(mean.sigmoid(), sim.relevance(state), atol=1e-3)
    for step in range(6):
        _, state = sim.respond(state, slate.roll(step, dims=1), at(MANY, step))
    assert (state["trip"] > 0).any()
    assert torch.equal(state["member"], member)


def test_uncertainty_is_the_spread_of_the_members_probabilities(shelf, fitted):
    """Each member asked alone, by hand."""
    sim = FittedSimulator(shelf, fitted.preference, fitted.habits, fitted.users, exposure=0.4)
    state, slate, draws = top(sim)
    slate[::7, 1] = EMPTY
    response, after = sim.respond(state, slate, draws)
    said = []
    for member in range(5):
        as_one = state | {"member": torch.full_like(state["member"], member)}
        said.append(sim.relevance(as_one).gather(1, slate.clamp_min(0)))
    expected = torch.stack(said).std(dim=0).masked_fill(slate == EMPTY, 0.0)
    torch.testing.assert_close(response.uncertainty, expected, rtol=1e-3, atol=1e-6)
    assert (response.uncertainty[slate != EMPTY] > 0).all()
    later, _ = sim.respond(after, slate.roll(1, dims=1), at(MANY, 1))  # with a basket begun
    assert later.uncertainty.isfinite().all()


def test_one_member_is_one_opinion_and_off(shop, shelf):
    sim = FittedSimulator.fit(
        SimSpec(shop, shelf, seed=3), window=120.0, epochs=1, hidden=8, members=1
    )
    state, slate, draws = top(sim)
    response, _ = sim.respond(state, slate, draws)
    assert not response.uncertainty.any()
    assert not state["member"].any()
    again = FittedSimulator.fit(
        SimSpec(shop, shelf, seed=3, bootstrap=True), window=120.0, epochs=1, hidden=8
    )
    assert again.preference.bias.shape == (60, 1)  # a member of an ensemble of fits itself
    with pytest.raises(ValueError, match="members must be at least 1"):
        FittedSimulator.fit(SimSpec(shop, shelf), members=0)


def test_saved_users_keep_their_members(fitted, shelf, tmp_path):
    fitted.save(tmp_path / "users.pt")
    loaded = FittedSimulator.load(tmp_path / "users.pt", shelf)
    state, slate, draws = top(fitted)
    one, _ = fitted.respond(state, slate, draws)
    other, _ = loaded.respond(loaded.start(MANY, draws), slate, draws)
    assert torch.equal(one.uncertainty, other.uncertainty)


def test_what_all_members_agree_on_is_certain(shelf, fitted):
    agreed = copy.deepcopy(fitted.preference)
    with torch.no_grad():
        for p in (agreed.out.weight, agreed.out.bias):
            p.copy_(p.mean(dim=0, keepdim=True).expand_as(p))
        agreed.bias.copy_(agreed.bias.mean(dim=1, keepdim=True).expand_as(agreed.bias))
    sim = FittedSimulator(shelf, agreed, fitted.habits, fitted.users)
    state, slate, draws = top(sim)
    response, _ = sim.respond(state, slate, draws)
    assert response.uncertainty.max() < 1e-6
