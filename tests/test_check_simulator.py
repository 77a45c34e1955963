"""What the gate's command computes itself: ranking over rivals, and whether halves agree."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_from_logs import config, no_bert

from encoders.items import interactions
from experiments import check_simulator
from experiments.check_simulator import agreement, ranking_checks
from experiments.from_logs import held_out_trips
from experiments.gate_order import wilson
from simulators.fidelity import HeldOut, priced
from simulators.fit import moment
from simulators.gate import THRESHOLDS

__all__ = ["no_bert"]  # a fixture for this file as well


@pytest.fixture(scope="module")
def held(fitted, shop, shelf):
    return priced(fitted.preference, held_out_trips(shop, shelf))


def checks_of(held, shop, shelf, fitted):
    cfg = OmegaConf.create({"ease_lam": 100.0, "seed": 0})
    found = ranking_checks(held, shop, shelf, THRESHOLDS, cfg, fitted.preference.log_rate)
    return {check.check: check for check in found}


def test_who_knows_what_will_be_bought_is_above_all_rivals_and_who_has_it_backwards_below(
    held, shop, shelf, fitted
):
    later = torch.zeros(len(held.trips), len(shelf))
    user = np.unique(held.trips.user, return_inverse=True)[1]
    for row in range(len(held.trips)):  # all that the household buys after the cut
        later[row] = held.bought[user == user[row]].any(dim=0)
    for theta, sign in ((later * 20, 1), (-later * 20, -1)):
        found = checks_of(HeldOut(held.trips, theta, held.bought), shop, shelf, fitted)
        assert len(found) == 5
        for name, check in found.items():
            if sign < 0 or "new" in name:  # own counts find all that is bought again, in this log
                assert sign * check.value > 0
                assert check.passed == (sign > 0)


def test_rivals_know_nothing_of_what_comes_after_the_cut(held, shop, shelf, fitted, monkeypatch):
    seen = []
    real = check_simulator.EASE

    def noted(past, **settings):
        seen.append(past.counts().sum())
        return real(past, **settings)

    monkeypatch.setattr(check_simulator, "EASE", noted)
    checks_of(held, shop, shelf, fitted)
    before = interactions(shop.before(moment(shelf.as_of)), shelf.ids)[0]
    assert seen == [before.sum()]
    assert before.sum() < interactions(shop, shelf.ids)[0].sum()


def test_agreement_counts_the_clear_pairs_of_either_half(shop, shelf, monkeypatch):
    cfg = OmegaConf.merge(config(), {"policies": ["x", "y", "z"], "eval_users": 50})
    cfg.env.session = {"slate_size": 1, "max_steps": 3}
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, (3, 400))
    clear = dict(zip("xyz", np.array([3.0, 2.0, 1.0])[:, None] + noise, strict=True))
    # y and z cannot be told apart here, and lie the other way round
    vague = dict(zip("xyz", np.array([3.0, 2.0, 2.0001])[:, None] + noise, strict=True))
    vague["z"] = vague["z"] - (vague["z"] - vague["y"]).mean() + 0.0001
    asked = []

    def scripted(cfg, simulator, spec, policies):
        asked.append(simulator)
        return (clear, vague)[len(asked) - 1]

    monkeypatch.setattr(check_simulator, "played", scripted)
    monkeypatch.setattr(check_simulator, "events_before", lambda *_: SimpleNamespace(counts=int))
    halves = shop.split_users(0.5, 0)
    found = agreement(cfg, shop, halves, shelf, THRESHOLDS)
    # clear in the first: xy, xz, yz, of which yz is the other way in the second; there xy and xz
    assert found.value == pytest.approx(4 / 5)
    assert not found.passed
    one, other = asked
    assert not torch.equal(one.preference.log_rate, other.preference.log_rate)
    assert torch.equal(one.users.profile, other.users.profile)  # the same users are asked
    assert set(one.users.ids) <= set(halves[1].users["user"])


def test_shares_of_a_few_have_wide_intervals():
    assert wilson(1.0, 53).low == pytest.approx(0.9324, abs=1e-4)  # as Wilson has it
    assert wilson(1.0, 5).low < 0.6
    assert np.isnan(wilson(float("nan"), 0).low)
