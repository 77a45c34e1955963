"""Judged once more, on users of another kind: the same households, the same assumptions."""

import pytest
from omegaconf import OmegaConf
from test_from_logs import config, no_bert

from experiments.arena import shop
from experiments.policies import named_agent
from experiments.prepare import prepare
from simulators.boosted import BoostedPreference

__all__ = ["no_bert"]  # a fixture for this file as well


@pytest.fixture(scope="module")
def asked(no_bert):
    cfg = config(second_opinion=True)
    cfg.env.simulator.patience = 0.4
    cfg.env.session = {
        "slate_size": 1, "max_steps": 4,
        "reward": {"_target_": "hydra.utils.get_method", "path": "envs.rewards.units"},
    }  # fmt: skip
    more = {"early_stopping": 0, "baselines": None, "num_envs": 8, "eval_users": 40,
            "replay_items": 4}  # fmt: skip
    return OmegaConf.merge(cfg, more)


def test_users_of_another_kind_judge_the_same_households(asked, monkeypatch):
    worlds = prepare(asked, "cpu")
    second = worlds.second
    assert second is not None
    assert isinstance(second.preference, BoostedPreference)
    assert set(second.users.ids) == set(worlds.test[0].users.ids)
    assert second.assumed.patience == 0.4
    assert second.habits.satiation != worlds.test[0].habits.satiation
    world = shop(asked, worlds, "cpu", 100)
    assert world.second is not None
    monkeypatch.setattr("experiments.policies.agent_config", lambda name: (name, OmegaConf.create(
        {"_target_": "agents.random.Random"})))  # fmt: skip
    agents = {name: named_agent(name, world.spec) for name in ("random", "popularity")}
    first, again = world.judge(agents), world.second(agents)
    assert [r["policy"] for r in first] == [r["policy"] for r in again]
    assert first[0]["mean_reward"] != again[0]["mean_reward"]
    assert world.judge(agents) == first  # judging leaves agents as they were


def test_it_is_made_only_where_it_is_asked_for(asked):
    assert prepare(OmegaConf.merge(asked, {"second_opinion": False}), "cpu").second is None
