"""Any model as a policy: masks, repeats, temperature, checkpoints; and policies that are frozen."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from agents.frozen import Frozen, standardised
from agents.interactions import history
from agents.linear import EASE
from agents.neighbours import ItemKNN
from agents.popular import BuyAgain, Popularity
from agents.static import Static
from agents.testing import check_agent, synthetic_observation, synthetic_spec
from encoders.state import EMPTY

# even users buy even items, odd users odd ones: what goes with what can be seen
CHECKERBOARD = csr_matrix((np.add.outer(np.arange(40), np.arange(24)) % 2 == 0).astype(float))
MODELS = [Popularity, BuyAgain, ItemKNN, EASE]


def popular(spec, counts):
    """The spec with so many events of the first items, all of one user."""
    full = np.zeros((1, spec.num_items))
    full[0, : len(counts)] = counts
    return replace(spec, interactions=csr_matrix(full), events=None)


def test_popularity_ranks_by_events_and_obeys_the_mask():
    spec = popular(synthetic_spec(slate_size=3), [1, 5, 3, 4])
    obs = synthetic_observation(spec, 2, torch.Generator().manual_seed(0))
    decision = Static(spec, model=Popularity).act(obs, torch.tensor([[EMPTY], [3]]))
    assert decision.slate.tolist() == [[1, 3, 2], [1, 2, 0]]
    assert (decision.propensity == 1.0).all()


def test_probabilities_are_certain_and_follow_the_mask():
    agent = Static(synthetic_spec(slate_size=2), model=BuyAgain)
    obs = history([[5, 2]], count=[[7.0, 2.0]])
    asked = torch.tensor([[5, 2]])
    assert agent.slate_probs(obs, None, asked).tolist() == [[1.0, 1.0]]
    assert agent.slate_probs(obs, torch.tensor([[5]]), asked).tolist() == [[0.0, 1.0]]
    assert agent.action_probs(obs, torch.tensor([[5]]))[0, 2] == 1.0


@pytest.mark.parametrize("model", MODELS)
def test_a_mask_of_everything_is_an_error(model):
    agent = Static(synthetic_spec(), model=model)
    with pytest.raises(ValueError, match="allows no item in row 0"):
        agent.act(history([[5, 2]]), torch.zeros(1, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs 2 allowed items, row 0 has 1"):
        agent.act(history([[5, 2]]), torch.arange(23)[None])


@pytest.mark.parametrize("model", MODELS)
def test_without_repeats_own_items_are_shown_only_where_nothing_else_is_left(model):
    spec = synthetic_spec(slate_size=3)
    agent = Static(spec, model=model, repeats=False)
    obs = synthetic_observation(spec, 64, torch.Generator().manual_seed(0))
    slate = agent.act(obs, None).slate
    own = torch.cat([obs.past, torch.where(obs.feedback[:, :, 0] > 0, obs.history, EMPTY)], dim=1)
    assert not (slate[:, :, None] == own[:, None, :]).any()
    assert (
        agent.action_probs(obs, None).gather(1, obs.past.clamp(min=0))[obs.past >= 0] == 0
    ).all()
    many = history([list(range(22))])  # 2 new items are too few for a slate of 3
    again = Static(spec, model=model).act(many, None).slate
    assert torch.equal(agent.act(many, None).slate, again)


def test_a_temperature_draws_by_standardised_scores():
    spec = synthetic_spec(slate_size=3)
    agent = Static(spec, model=ItemKNN, temperature=0.7)
    assert check_agent(agent, spec) == []
    obs = synthetic_observation(spec, 4, torch.Generator().manual_seed(0))
    level = standardised(agent.scores(obs), torch.ones(4, 24, dtype=torch.bool))
    expected = (level / 0.7).softmax(dim=1)
    assert torch.allclose(agent.action_probs(obs, None).double(), expected, atol=1e-6)
    best = agent.action_probs(obs, None, explore=False)
    assert torch.equal(best.argmax(dim=1), agent.scores(obs).argmax(dim=1))
    assert (best.max(dim=1).values == 1.0).all()


@pytest.mark.parametrize("model", [Popularity, BuyAgain, ItemKNN])
def test_equal_popularity_is_ordered_by_seed_and_not_by_id(model):
    spec = popular(synthetic_spec(slate_size=1), [1] * 24)
    agents = [Static(replace(spec, seed=seed), model=model) for seed in range(40)]
    first = {int(agent.act(history([[]]), None).slate) for agent in agents}
    assert len(first) > 10
    again = Static(replace(spec, seed=3), model=model).act(history([[]]), None).slate
    assert torch.equal(again, agents[3].act(history([[]]), None).slate)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", [0, 1])
def test_the_checkerboard_is_continued(model, kind):
    spec = replace(synthetic_spec(slate_size=4), interactions=CHECKERBOARD, events=None)
    slate = Static(spec, model=model, repeats=False).act(history([[kind]]), None).slate
    if model in (ItemKNN, EASE):
        assert (slate % 2 == kind).all()
    assert kind not in slate


def test_events_are_used_before_counts():
    spec = synthetic_spec()
    timed = Static(spec, model=partial(Popularity, by="weekday"))
    assert timed.scores(history([[]])).shape == (1, 24)
    with pytest.raises(ValueError, match="needs the time of every event"):
        Static(replace(spec, events=None), model=partial(Popularity, by="weekday"))


def test_what_a_static_policy_cannot_use_is_refused():
    spec = synthetic_spec()
    with pytest.raises(ValueError, match="needs none, such as random"):
        Static(replace(spec, interactions=None, events=None), model=ItemKNN)
    wrong = replace(spec, interactions=csr_matrix(np.ones((3, 5))), events=None)
    with pytest.raises(ValueError, match="of 5 items, the spec of 24"):
        Static(wrong, model=ItemKNN)
    with pytest.raises(ValueError, match=r"temperature must be 0 .* got -1"):
        Static(spec, model=ItemKNN, temperature=-1.0)


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_of_another_catalogue_or_model_is_refused(model):
    agent = Static(synthetic_spec(), model=model)
    other = Static(synthetic_spec(num_items=9), model=model)
    with pytest.raises(ValueError, match="a catalogue of 9 items, this one has 24"):
        agent.load_state_dict(other.state_dict())
    different = Static(synthetic_spec(), model=MODELS[MODELS.index(model) - 1])
    with pytest.raises(ValueError, match=f"the agent asked for is a {model.__name__}"):
        agent.load_state_dict(different.state_dict())


def test_standardised_scores_have_a_unit():
    scores = torch.tensor([[1.0, 3.0, 99.0], [4.0, 4.0, 4.0]])
    allowed = torch.tensor([[True, True, False], [True, True, True]])
    assert standardised(scores, allowed).tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert torch.allclose(standardised(scores * 7 - 2, allowed), standardised(scores, allowed))


def test_a_frozen_policy_gives_everything_a_chance_and_prefers_what_scores_high():
    spec = synthetic_spec(slate_size=2)
    obs = synthetic_observation(spec, 8, torch.Generator().manual_seed(0))
    popularity = Static(spec, model=Popularity)
    frozen = Frozen(popularity, spec, uniform=0.1)
    probs = frozen.action_probs(obs, obs.history)
    allowed = probs > 0
    assert (probs[allowed] >= 0.1 / 24).all()
    assert torch.allclose(probs.sum(dim=1), torch.ones(8))
    best = frozen.act(obs, obs.history, explore=False)
    assert torch.equal(best.slate[:, 0], probs.argmax(dim=1))
    assert (best.propensity == 1.0).all()
    cold = Frozen(popularity, spec, temperature=0.1).action_probs(obs, obs.history)
    assert (cold.max(dim=1).values > probs.max(dim=1).values).all()


def test_frozen_refuses_what_it_cannot_use():
    spec = synthetic_spec()
    popularity = Static(spec, model=Popularity)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Frozen(popularity, spec, temperature=0.0)
    with pytest.raises(ValueError, match="uniform must be in"):
        Frozen(popularity, spec, uniform=1.5)


def test_a_checkpoint_of_other_settings_is_refused():
    spec = synthetic_spec()
    saved = Static(spec, model=partial(EASE, weight="binary")).state_dict()
    with pytest.raises(ValueError, match="weight=binary, the agent asked for has weight=count"):
        Static(spec, model=partial(EASE, weight="count")).load_state_dict(saved)
    Static(spec, model=partial(EASE, weight="binary")).load_state_dict(saved)
