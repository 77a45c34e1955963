"""Every agent that has a yaml keeps the contract; the kit catches those that do not."""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from agents.base import Agent, AgentSpec, allowed_items
from agents.dqn import DQN
from agents.frozen import Frozen
from agents.popular import BuyAgain, Popularity
from agents.random import Random
from agents.static import Static
from agents.testing import (
    check_agent,
    synthetic_observation,
    synthetic_spec,
    synthetic_steps,
)

CONF = Path(__file__).parents[1] / "experiments" / "conf" / "agent"
YAMLS = sorted(CONF.glob("*.yaml"))
ONE_ITEM = ("sb3_dqn", "sb3_qrdqn")  # SB3's value learners know no slates, and say who does
VARIANTS = {  # yamls that turn a knob of another's model: what they change
    "popularity_by_weekday": {"model.by": "weekday"},
    "buy_again_recent": {"model.order": "recent"},
    "buy_again_due": {"model.order": "due"},
    "two_tower_linear": {"model.deep": False},
    "qr_dqn": {"quantiles": 32},
    "a2c": {"lr": 0.002, "steps": 8, "epochs": 1, "minibatch": None, "clip": None},
    "reinforce_topk": {"off_policy": True, "top_k": None},
    "sb3_qrdqn": {"algo": "qrdqn"},
    "sb3_ppo": {"algo": "ppo"},
    "sb3_maskable_ppo": {"algo": "maskable_ppo"},
    "sb3_a2c": {"algo": "a2c", "lr": 0.003, "n_steps": 4},
}


def knobs(config: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where each knob of nested targets stands, its value and the signature's default."""
    if isinstance(config, list):
        for place, part in enumerate(config):
            yield from knobs(part, f"{where}{place}.")
    if not isinstance(config, dict):
        return
    signature = inspect.signature(get_class(config["_target_"])).parameters
    for name, value in config.items():
        if name in ("_target_", "_partial_"):
            continue
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, dict) and "_target_" in part for part in parts):
            yield from knobs(value, f"{where}{name}.")
        else:
            assert name in signature, f"{where}{name} is no knob of {config['_target_']}"
            yield where + name, value, signature[name].default


def same(value: Any, default: Any) -> bool:
    """Equal and of one type: a yaml has lists where a signature has tuples."""
    default = list(default) if isinstance(default, tuple) else default
    return value == default and type(value) is type(default)


@pytest.mark.parametrize("slate_size", [1, 3])
@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_every_yaml_builds_an_agent_that_keeps_the_contract(path, slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    if slate_size > 1 and path.stem in ONE_ITEM:
        with pytest.raises(InstantiationException, match="shows one item, got slate_size=3"):
            instantiate(OmegaConf.load(path), spec)
        return
    agent = instantiate(OmegaConf.load(path), spec)
    assert isinstance(agent, Agent)
    assert check_agent(agent, spec) == []


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_a_yaml_repeats_the_defaults_of_the_signatures(path):
    config = OmegaConf.to_container(OmegaConf.load(path))
    changed = {where: value for where, value, default in knobs(config) if not same(value, default)}
    assert changed == VARIANTS.get(path.stem, {})


def test_variants_are_of_yamls_that_are_there():
    here = {path.stem for path in YAMLS}
    assert set(VARIANTS) <= here | {"two_tower_linear"}
    assert {"popularity", "buy_again", "item_knn", "user_knn", "rp3beta", "ease"} <= here


def test_knobs_are_found_in_nested_models_and_lists_of_them():
    inner = {"_target_": "agents.linear.EASE", "_partial_": True, "lam": 2.0}
    found = knobs({"_target_": "agents.static.Static", "model": inner, "temperature": 0.0})
    assert list(found) == [("model.lam", 2.0, 300.0), ("temperature", 0.0, 0.0)]
    several = knobs({"_target_": "agents.static.Static", "model": [inner, inner]})
    assert [where for where, _, _ in several] == ["model.0.lam", "model.1.lam"]
    with pytest.raises(AssertionError, match=r"model\.lamm is no knob"):
        list(knobs({"_target_": "agents.static.Static", "model": {**inner, "lamm": 1}}))


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_a_saved_agent_scores_as_it_did_and_the_same_in_any_batch(path):
    spec = synthetic_spec(slate_size=1 if path.stem in ONE_ITEM else 2)
    config = OmegaConf.load(path)
    agent = instantiate(config, spec)
    obs = synthetic_observation(spec, 8, torch.Generator().manual_seed(2))
    scores = agent.scores(obs)
    assert scores.shape == (8, 24)
    assert scores.isfinite().all()
    alone = torch.cat([agent.scores(obs[row : row + 1]) for row in range(8)])
    assert torch.allclose(alone, scores, atol=1e-5, rtol=1e-5)
    other = instantiate(config, replace(spec, seed=7))
    other.load_state_dict(agent.state_dict())
    assert torch.allclose(other.scores(obs), scores, atol=1e-6, rtol=1e-6)
    again = instantiate(config, spec)
    assert torch.equal(again.scores(obs), scores)


def equal(one: Any, other: Any) -> bool:
    """Nested states with the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("path", [p for p in YAMLS if p.stem not in ONE_ITEM], ids=lambda p: p.stem)
def test_two_agents_of_one_state_share_nothing(path):
    spec = synthetic_spec()
    config, generator = OmegaConf.load(path), torch.Generator().manual_seed(3)
    one, other = instantiate(config, spec), instantiate(config, replace(spec, seed=5))
    if isinstance(one, Static):
        pytest.skip("nothing in it is learnt")
    for transition in synthetic_steps(one, spec, 64, 20, generator):
        one.update(transition)
    before = copy.deepcopy(one.state_dict())
    other.load_state_dict(one.state_dict())
    for transition in synthetic_steps(other, spec, 64, 20, generator):
        other.update(transition)
    assert equal(one.state_dict(), before)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_training_goes_on_bit_for_bit_from_state_and_experience(path):
    spec = synthetic_spec(slate_size=1 if path.stem in ONE_ITEM else 2)
    config = OmegaConf.load(path)
    one, other = instantiate(config, spec), instantiate(config, replace(spec, seed=5))
    generator = torch.Generator().manual_seed(3)
    for transition in synthetic_steps(one, spec, 64, 21, generator):
        one.update(transition)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    if hasattr(one, "experience"):
        other.load_experience(copy.deepcopy(one.experience()))
    state = generator.get_state()
    runs = []
    for agent in (one, other):
        again = torch.Generator()
        again.set_state(state)
        shown = []
        for transition in synthetic_steps(agent, spec, 64, 20, again):
            agent.update(transition)
            shown.append(transition.decision.slate)
        runs.append((torch.stack(shown), agent.state_dict()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert equal(runs[0][1], runs[1][1])


def test_the_synthetic_events_are_the_interactions_in_time_order():
    spec = synthetic_spec()
    events = spec.events
    assert (events.counts() != spec.interactions).nnz == 0
    assert spec.interactions.max() == 3
    assert events.timed
    assert ((np.diff(events.time) >= 0) | (np.diff(events.user) > 0)).all()
    assert torch.equal(events.vectors, spec.item_vectors)


@pytest.mark.parametrize("slate_size", [1, 3])
def test_frozen_policies_keep_the_contract(slate_size):
    spec = synthetic_spec(slate_size=slate_size)
    for inner in (DQN(spec), Static(spec, model=BuyAgain)):
        assert check_agent(Frozen(inner, spec), spec) == []


class Overconfident(Random):
    def act(self, obs, mask, *, explore=True):
        decision = super().act(obs, mask, explore=explore)
        return replace(decision, propensity=torch.ones_like(decision.propensity))


class Popular(Static):
    def __init__(self, spec):
        super().__init__(spec, model=Popularity)


class Maskless(Popular):
    def act(self, obs, mask, *, explore=True):
        return super().act(obs, None, explore=explore)


class OneCoin(Random):
    def act(self, obs, mask, *, explore=True):
        decision = super().act(obs[:1], None if mask is None else mask[:1], explore=explore)
        rows = torch.zeros(len(obs), dtype=torch.int64)
        return replace(decision, slate=decision.slate[rows], propensity=decision.propensity[rows])


class Forgetful(DQN):
    def load_state_dict(self, state):
        self.env_steps = state["env_steps"]


class GlobalRandom(Random):
    def act(self, obs, mask, *, explore=True):
        self.generator.manual_seed(int(torch.randint(0, 1000, ())))
        return super().act(obs, mask, explore=explore)


class Gullible(DQN):
    def update(self, transition):
        return super().update(replace(transition, reward=torch.zeros_like(transition.reward)))


class OffByOne(Popular):
    def action_probs(self, obs, mask, *, explore=True):
        return super().action_probs(obs, mask, explore=explore) * 1.1


class Crowd(Popular):
    def scores(self, obs):
        return super().scores(obs).roll(len(obs), dims=1)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Overconfident, "propensity and slate_probs"),
        (Maskless, "showed a masked item"),
        (OneCoin, "each user"),
        (Forgetful, "after load_state_dict"),
        (GlobalRandom, "global random generator"),
        (Gullible, "NaN"),
        (OffByOne, "sums to 1.1"),
        (Crowd, "alone than in a batch"),
    ],
)
def test_the_kit_says_what_is_wrong(broken, words):
    spec = synthetic_spec()
    assert words in "\n".join(check_agent(broken(spec), spec))


def test_the_kit_leaves_the_agent_as_it_was():
    spec = synthetic_spec()
    agent, other = DQN(spec), DQN(spec)
    check_agent(agent, spec)
    obs = synthetic_observation(spec, 8, torch.Generator().manual_seed(1))
    assert torch.equal(agent.scores(obs), other.scores(obs))


def test_a_slate_larger_than_the_catalogue_is_refused():
    with pytest.raises(ValueError, match="shrink the slate"):
        synthetic_spec(num_items=5, slate_size=6)


def test_item_vectors_that_are_not_finite_are_refused():
    spec = synthetic_spec()
    vectors = spec.item_vectors.clone()
    vectors[3, 1] = torch.nan
    with pytest.raises(ValueError, match="item 3"):
        replace(spec, item_vectors=vectors)


@pytest.mark.parametrize("name", ["past_size", "history_size"])
def test_an_agent_spec_needs_a_place_for_the_past(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        replace(synthetic_spec(), **{name: 0})


def test_an_agent_spec_needs_a_row_per_item():
    with pytest.raises(ValueError, match="one row per item, expected 24, got 3"):
        AgentSpec(**{**synthetic_spec().__dict__, "popularity": torch.ones(3)})


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(2, 5, dtype=torch.bool), "allows no item in row 0"),
        (torch.tensor([[-1, -1], [0, 7]]), "row 1 does not"),
        (torch.ones(3, 5, dtype=torch.bool), "got \\(3, 5\\)"),
        (torch.ones(2, 5), "float32"),
        (torch.arange(5).expand(2, 5), "allows no item in row 0"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused(mask, words):
    with pytest.raises(ValueError, match=words):
        allowed_items(mask, 2, 5, "cpu")


def test_the_three_forms_of_a_mask_agree():
    excluded = torch.tensor([[1, -1], [0, 2]])
    allowed = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(allowed_items(excluded, 2, 3, "cpu"), allowed)
    assert torch.equal(allowed_items(allowed, 2, 3, "cpu"), allowed)
    assert allowed_items(None, 2, 3, "cpu").all()
