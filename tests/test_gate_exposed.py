"""The gate for users of impressions: right ones pass, those spoiled in one way fail there."""

import json
import sys
from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from feeds import catalog_of, feed
from synthetic import HashedTexts

import simulators.catalog
from encoders.state import EMPTY
from experiments import check_simulator
from simulators.base import SimSpec
from simulators.draws import Draws
from simulators.exposed import ExposureSimulator
from simulators.exposure_calibration import promised
from simulators.gate_exposed import (
    EXPOSED,
    behaviour_checks,
    exposed_checks,
    foretold,
    kind_of,
    length_check,
    shown_from,
)

ENV = """
name: feed
data: {_target_: feeds.feed}
catalog: {_target_: simulators.catalog.catalog_from_logs, size: 40, cut: 0.7, dim: 4}
simulator:
  _target_: simulators.exposed.ExposureSimulator.fit
  behaviours: null
  impression: shown
  gap: 30.0
  hidden: 8
  epochs: 2
session:
  slate_size: 1
  max_steps: 5
  reward: {_target_: hydra.utils.get_method, path: envs.rewards.units}
"""


@pytest.fixture(scope="module")
def logs():
    return feed()


@pytest.fixture(scope="module")
def halves(logs):
    return logs.split_users(0.5, 0)


@pytest.fixture(scope="module")
def sim(halves, logs):
    return ExposureSimulator.fit(SimSpec(halves[0], catalog_of(logs)))


def by_name(simulator, halves, **limits):
    return {c.check: c for c in exposed_checks(simulator, halves, {**EXPOSED, **limits})[0]}


def spoiled(sim, *, items=None, **funnel):
    changed = replace(sim.funnel, **funnel)
    items = sim.items if items is None else items
    return ExposureSimulator(sim.catalog, sim.encoding, changed, items, sim.users, sim.reading)


@pytest.fixture(scope="module")
def right(sim, halves):
    return by_name(sim, halves)


def test_users_fitted_rightly_pass_what_the_log_can_tell(right):
    kinds = ("ece", "prediction_decile", "activity_decile")
    behaviours = ("click", "like", "hate", "leave")
    assert set(right) == {f"{k}_{b}" for k in kinds for b in behaviours} | {
        "auc_over_item_rate_click", "value", "ks_length"
    }  # fmt: skip
    for name in ("ece_click", "ece_leave", "value"):
        assert right[name].passed is True, name
    assert sum(c.passed is False for c in right.values()) <= 2
    assert right["activity_decile_hate"].passed is not False  # a hundredth: 20 answers in all
    assert right["ks_length"].passed is not False


def test_users_who_click_too_much_fail_at_clicks_alone(sim, halves, right):
    wrong = by_name(spoiled(sim, bias=sim.funnel.bias + 1.0), halves)
    assert wrong["ece_click"].passed is False
    assert wrong["prediction_decile_click"].passed is False
    assert wrong["activity_decile_click"].passed is False
    assert wrong["activity_decile_click"].value < 0.85
    for name in ("ece_leave", "value"):
        assert wrong[name].value == pytest.approx(right[name].value)


def test_users_who_hardly_leave_fail_at_leaving_and_at_the_length_of_sessions(sim, halves, right):
    leave = sim.funnel.leave.clone()
    leave[-1] -= 1.5
    wrong = by_name(spoiled(sim, leave=leave), halves)
    assert wrong["ece_leave"].passed is False
    assert wrong["ks_length"].passed is False
    assert wrong["ks_length"].value > right["ks_length"].value + 0.1
    assert wrong["ece_click"].value == pytest.approx(right["ece_click"].value)


def test_users_whose_items_are_mixed_up_lose_to_the_rates_of_items(sim, halves, right):
    order = torch.randperm(len(sim.items), generator=torch.Generator().manual_seed(0))
    wrong = by_name(spoiled(sim, items=sim.items[order]), halves)
    name = "auc_over_item_rate_click"
    assert wrong[name].passed is False
    assert wrong[name].high < 0
    assert wrong[name].value < right[name].value - 0.03


def test_who_ranks_as_the_log_was_made_is_above_the_rates_of_items(sim, halves, monkeypatch):
    """The truth: category 1 is better; rates of items are that and noise."""

    def truth(served, user, item):
        return (item % 4 == 1).astype(float)

    monkeypatch.setattr("simulators.gate_exposed.foretold", truth)
    monkeypatch.setattr("simulators.gate_exposed.item_rates",
                        lambda sim, logs: np.random.default_rng(0).random((40, 3)))  # fmt: skip
    found = by_name(sim, halves)["auc_over_item_rate_click"]
    assert found.passed is True
    assert "AUC of click per user" in found.said


def test_what_is_foretold_is_the_chance_as_a_session_begins(sim):
    user, item = np.array([0, 3, 3, len(sim.users) - 1]), np.array([5, 0, 39, 7])
    users = torch.from_numpy(np.unique(user))
    state = sim.start(users, Draws.root(0).at(users, users * 0, users * 0))
    table = sim.relevance(state).numpy()
    row = np.unique(user, return_inverse=True)[1]
    assert foretold(sim, user, item) == pytest.approx(table[row, item], abs=1e-6)


def test_minutes_that_are_promised_double_fail(sim, halves, right):
    served = copy_of(sim)
    wrong = by_name(served, halves)["value"]
    assert wrong.passed is False
    assert wrong.value == pytest.approx(right["value"].value / 2, rel=0.05)


def copy_of(sim):
    """The same users whose answers are worth twice as much."""
    served = copy(sim)

    class Twice:
        def __getattr__(self, name):
            return getattr(sim.funnel, name)

        def to(self, device):
            return self

        def worth(self, *parts):
            return 2 * sim.funnel.worth(*parts)

    served.funnel = Twice()
    return served


def test_answers_of_a_few_users_who_answer_often_are_told_by_less():
    """Sixty answers of six users say little; of sixty users they say that users are wrong."""
    rng = np.random.default_rng(0)
    m = 6000
    chance, user = np.full(m, 0.005), np.arange(m) % 600
    real = np.zeros(m, bool)
    real[rng.choice(m, 54, replace=False)] = True
    decile = np.zeros(m, int)
    limits = {**EXPOSED, "ece": 0.3}
    spread = behaviour_checks("x", real, chance, user, decile, limits, rng)[0]
    few = np.where(real, np.arange(m) % 3, user)
    clumped = behaviour_checks("x", real, chance, few, decile, limits, rng)[0]
    assert spread.value == clumped.value
    assert spread.passed is False
    assert clumped.passed is None


def test_slates_are_what_the_log_showed_the_user_and_then_others():
    user, item = np.array([0, 0, 0, 1, 1]), np.array([4, EMPTY, 5, 6, 7])
    slates = shown_from(user, item, np.array([0, 3, 2]), np.random.default_rng(0))
    assert slates[0, :2].tolist() == [4, 5]
    assert slates[1, :2].tolist() == [6, 7]
    assert slates[2, :1].tolist() == [5]
    assert set(np.unique(slates)) <= {4, 5, 6, 7}
    other = shown_from(user, item, np.array([0, 3, 2]), np.random.default_rng(1))
    assert (slates[0, 2:4] != other[0, 2:4]).any()  # not what the next user was shown
    assert (slates[0, :2] == other[0, :2]).all()


def test_lengths_of_different_sessions_are_told_apart():
    rng = np.random.default_rng(0)
    long, short = (pd.DataFrame({"user": range(500), "length": rng.geometric(p, 500)})
                   for p in (0.2, 0.4))  # fmt: skip
    assert length_check(long, short, EXPOSED, rng).passed is False
    found = length_check(long, long, EXPOSED, rng)
    assert found.passed is True
    assert found.value == 0.0


def test_limits_are_of_a_kind_or_of_one_behaviour(sim, halves):
    assert kind_of("ece_long_view") == "ece"
    assert kind_of("auc_over_item_rate_click") == "auc_over_item_rate"
    assert kind_of("ks_size") == ""
    assert kind_of("eces") == ""
    found = by_name(sim, halves, ece_click=0.001, ks_length=None, activity_decile=9.0)
    assert found["ece_click"].threshold == 0.001
    assert found["ece_like"].threshold == EXPOSED["ece"]
    assert found["activity_decile_click"].threshold == 9.0
    assert "ks_length" not in found


def test_a_behaviour_that_never_comes_is_left_out(sim, halves):
    ours, others = halves
    later = pd.Timestamp(sim.catalog.as_of, unit="D")
    events = others.events
    keep = ~((events["behaviour"] == "hate") & (events["time"] >= later))
    checks, _, notes = exposed_checks(sim, (ours, replace(others, events=events[keep])), EXPOSED)
    assert notes == ["hate: never after the cut, so its rate is not compared"]
    assert not any(check.check.endswith("hate") for check in checks)


def test_what_is_promised_is_of_the_impressions_after_the_cut(sim, halves):
    found = promised(sim, halves[1])
    assert (found.read.time[found.rows] >= sim.catalog.as_of).all()
    assert found.chance.shape == (len(found.rows), 3)
    assert ((found.chance > 0) & (found.chance < 1)).all()


def test_the_command_judges_users_of_impressions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulators.catalog, "TextEncoder", HashedTexts)
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "feed.yaml").write_text(ENV)
    out = tmp_path / "gate.json"
    words = [f"out={out}", f"out_dir={tmp_path / 'page'}", "++thresholds.ece_click=0.5",
             "policies=[random,popularity]", "eval_users=100", "sensitivity=true"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["check_simulator.py", "--config-dir", str(tmp_path),
                                      "env=feed", "progress=false", *words])  # fmt: skip
    check_simulator.main()
    said = capsys.readouterr().out
    rows = {row["check"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows["ece_click"]["threshold"] == 0.5
    assert rows["ece_click"]["passed"] is True
    assert {"ks_length", "ranking_agreement"} <= set(rows)
    assert "left out: sensitivity" in said
    passed = sum(row["passed"] is True for row in rows.values())
    assert f"{passed} of {len(rows)} checks passed" in said
    html = (tmp_path / "page" / "gate.html").read_text()
    assert "impressions of" in html
    assert (tmp_path / "page" / "gate.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*sys.argv, "++thresholds.ks_size=1"])
    with pytest.raises(SystemExit):
        check_simulator.main()
    assert "there is no such check" in capsys.readouterr().err
