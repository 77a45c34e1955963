"""From a log of impressions to worlds: judges are other users, as they come after the cut."""

import bad_logs
import feeds
import pytest
from test_from_logs import config, no_bert

import simulators.catalog
from experiments.prepare import prepare
from simulators.exposed import ExposureSimulator
from simulators.fit import moment

__all__ = ["no_bert"]  # a fixture for this file as well
SIMULATOR = {"_target_": "simulators.exposed.ExposureSimulator.fit", "impression": "shown",
             "epochs": 1}  # fmt: skip


@pytest.fixture(scope="module")
def worlds(no_bert):
    cfg = config("feeds.feed", evaluators=2)
    cfg.env.simulator = SIMULATOR
    cfg.env.catalog.size = 40
    return prepare(cfg, "cpu")


def test_judges_are_other_users_after_the_cut(worlds):
    assert isinstance(worlds.train, ExposureSimulator)
    cut = worlds.train.catalog.as_of
    assert (worlds.train.users.start < cut).all()
    for judge in worlds.test:
        assert (judge.users.start >= cut).all()
        assert not set(judge.users.ids) & set(worlds.train.users.ids)
    later = feeds.feed().since(moment(cut)).events["user"].unique()
    assert set(worlds.test[0].users.ids) <= set(later)


def test_there_are_no_trips_to_replay_and_the_gate_has_not_been_asked(worlds):
    assert worlds.replay is None
    assert "have not been held against their log yet" in worlds.gate
    assert worlds.fidelity == {}


def test_agents_meet_profiles_of_one_width(worlds):
    widths = {world.users.profile.shape[1] for world in (worlds.train, *worlds.test)}
    assert len(widths) == 1


def test_a_reward_of_answers_that_the_log_lacks_is_refused_before_the_encoding(monkeypatch):
    cfg = config("feeds.feed", evaluators=2)
    cfg.env.simulator = SIMULATOR
    weigh = {"_target_": "envs.rewards.Weighted", "weights": {"clik": 1.0}}
    cfg.env.session.reward = weigh
    monkeypatch.setattr(simulators.catalog, "catalog_from_logs", bad_logs.unreached)
    with pytest.raises(ValueError, match=r"session.reward weights name \['clik'\].*are \['click"):
        prepare(cfg, "cpu")
