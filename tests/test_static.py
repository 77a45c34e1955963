"""Popularity and buy-again rank as they say, break ties by seed, and give certain propensities."""

from dataclasses import replace

import pytest
import torch

from agents.frozen import Frozen, standardised
from agents.static import BuyAgain, Popularity
from agents.testing import synthetic_observation, synthetic_spec
from encoders.state import EMPTY


def household(spec, past, count, age):
    """One user with this past."""
    obs = synthetic_observation(spec, 1, torch.Generator().manual_seed(0))
    pad = spec.past_size - len(past)
    return replace(
        obs,
        past=torch.tensor([past + [EMPTY] * pad]),
        past_count=torch.tensor([count + [0.0] * pad]),
        past_age=torch.tensor([age + [0.0] * pad]),
    )


def popular(spec, values):
    full = torch.zeros(spec.num_items)
    full[: len(values)] = torch.tensor(values)
    return replace(spec, popularity=full)


def test_popularity_ranks_by_popularity():
    spec = popular(synthetic_spec(slate_size=3), [0.1, 0.5, 0.3, 0.4])
    obs = synthetic_observation(spec, 2, torch.Generator().manual_seed(0))
    decision = Popularity(spec).act(obs, torch.tensor([[EMPTY], [3]]))
    assert decision.slate.tolist() == [[1, 3, 2], [1, 2, 0]]
    assert (decision.propensity == 1.0).all()


def test_buy_again_ranks_by_count_then_recency_then_popularity_then_the_rest_by_popularity():
    spec = popular(synthetic_spec(slate_size=7), [0.9, 0.8, 0.01, 0.3, 0.2, 0.0, 0.25])
    obs = household(spec, [5, 2, 3, 4, 6], [7.0, 2.0, 2.0, 2.0, 1.0], [300.0, 9.0, 50.0, 50.0, 0.0])
    slate = BuyAgain(spec).act(obs, None).slate
    assert slate[0].tolist() == [5, 2, 3, 4, 6, 0, 1]


def test_buy_again_probabilities_are_certain_and_follow_the_mask():
    spec = synthetic_spec(slate_size=2)
    obs = household(spec, [5, 2], [7.0, 2.0], [1.0, 1.0])
    agent = BuyAgain(spec)
    asked = torch.tensor([[5, 2]])
    assert agent.slate_probs(obs, None, asked).tolist() == [[1.0, 1.0]]
    assert agent.slate_probs(obs, torch.tensor([[5]]), asked).tolist() == [[0.0, 1.0]]
    assert agent.action_probs(obs, torch.tensor([[5]]))[0, 2] == 1.0


def test_an_empty_past_leaves_popularity():
    spec = popular(synthetic_spec(slate_size=2), [0.1, 0.5, 0.3])
    obs = household(spec, [], [], [])
    assert BuyAgain(spec).act(obs, None).slate.tolist() == [[1, 2]]


@pytest.mark.parametrize("kind", [Popularity, BuyAgain])
def test_equal_popularity_is_ordered_by_seed_and_not_by_id(kind):
    spec = replace(synthetic_spec(slate_size=1), popularity=torch.ones(24))
    obs = household(spec, [], [], [])
    first = {int(kind(replace(spec, seed=seed)).act(obs, None).slate) for seed in range(40)}
    assert len(first) > 10
    again = kind(replace(spec, seed=3)).act(obs, None).slate
    assert torch.equal(again, kind(replace(spec, seed=3)).act(obs, None).slate)


@pytest.mark.parametrize("kind", [Popularity, BuyAgain])
def test_a_checkpoint_of_another_catalogue_is_refused(kind):
    with pytest.raises(ValueError, match="a catalogue of 9 items, this one has 24"):
        kind(synthetic_spec()).load_state_dict(kind(synthetic_spec(num_items=9)).state_dict())


def test_standardised_scores_have_a_unit():
    scores = torch.tensor([[1.0, 3.0, 99.0], [4.0, 4.0, 4.0]])
    allowed = torch.tensor([[True, True, False], [True, True, True]])
    assert standardised(scores, allowed).tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert torch.allclose(standardised(scores * 7 - 2, allowed), standardised(scores, allowed))


def test_a_frozen_policy_gives_everything_a_chance_and_prefers_what_scores_high():
    spec = synthetic_spec(slate_size=2)
    obs = synthetic_observation(spec, 8, torch.Generator().manual_seed(0))
    frozen = Frozen(Popularity(spec), spec, uniform=0.1)
    probs = frozen.action_probs(obs, obs.history)
    allowed = probs > 0
    assert (probs[allowed] >= 0.1 / 24).all()
    assert torch.allclose(probs.sum(dim=1), torch.ones(8))
    best = frozen.act(obs, obs.history, explore=False)
    assert torch.equal(best.slate[:, 0], probs.argmax(dim=1))
    assert (best.propensity == 1.0).all()
    cold = Frozen(Popularity(spec), spec, temperature=0.1).action_probs(obs, obs.history)
    assert (cold.max(dim=1).values > probs.max(dim=1).values).all()


def test_frozen_refuses_what_it_cannot_use():
    spec = synthetic_spec()
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Frozen(Popularity(spec), spec, temperature=0.0)
    with pytest.raises(ValueError, match="uniform must be in"):
        Frozen(Popularity(spec), spec, uniform=1.5)
