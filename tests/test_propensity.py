"""A fitted logging policy is close to the real one, calibrated, and says how unsure it is."""

from typing import Any

import numpy as np
import pytest

from evaluation.action_models import fit_counts
from evaluation.propensity import (
    best_temperature,
    fit_propensity,
    popularity_propensity,
    tempered,
)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def softmax_log(n: int, actions: int = 4, sharp: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Actions drawn by softmax of a linear score, and the probabilities they were drawn with."""
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(n, 3))
    pi = softmax(sharp * context @ np.random.default_rng(99).normal(size=(3, actions)))
    action = (pi.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return {
        "context": context,
        "action": action,
        "pi": pi,
        "cluster": rng.integers(n // 10, size=n),
    }


def fit(log: dict[str, Any], **options: Any) -> Any:
    size = log["pi"].shape[1]
    return fit_propensity(log["context"], log["action"], size, log["cluster"], **options)


def test_ips_with_fitted_propensities_finds_the_value_that_true_ones_find() -> None:
    log = softmax_log(8000)
    fitted = fit(log)
    rows = np.arange(8000)
    true = log["pi"][rows, log["action"]]
    assert np.abs(fitted.logged / true - 1).mean() < 0.05
    reward = (log["action"] == 2) + log["context"][:, 0]
    target = np.full(4, 0.25)[log["action"]]
    value = (0.25 + log["context"][:, 0]).mean()
    assert (target / fitted.logged * reward).mean() == pytest.approx(value, abs=0.05)
    assert (target / fitted.logged).mean() == pytest.approx(1.0, abs=0.02)
    report = fitted.report
    assert report["temperature"] == pytest.approx(1.0, abs=0.1)
    assert report["ece"] < 0.02
    assert report["log_loss"] < report["log_loss_popularity"] - 0.1
    entropy = -(log["pi"] * np.log(log["pi"])).sum(axis=1).mean()
    assert report["log_loss"] == pytest.approx(entropy, abs=0.03)


@pytest.mark.parametrize("model", ["multinomial", "boosting", "counts"])
def test_the_policy_sums_to_1_and_prices_the_logged_action_as_logged(model: str) -> None:
    log = softmax_log(1500)
    fitted = fit(log, model=model)
    fold = fitted.fold_of(log["cluster"])
    pi = fitted.probs(log["context"], fold)
    assert pi.sum(axis=1) == pytest.approx(np.ones(1500))
    assert pi[np.arange(1500), log["action"]] == pytest.approx(fitted.logged, rel=1e-9)
    singles = [fitted.probs(log["context"][[i]], fold[[i]])[0] for i in range(10)]
    assert np.stack(singles) == pytest.approx(pi[:10], rel=1e-9)
    assert fitted.report["model"] == model
    assert fitted.report["log_loss"] < fitted.report["log_loss_popularity"]


def test_a_user_s_actions_do_not_make_the_user_s_propensities() -> None:
    log = softmax_log(1000)
    user = log["cluster"] == 3
    changed = {**log, "action": np.where(user, 3 - log["action"], log["action"])}
    fold = fit(log).fold_of(log["cluster"])
    one = fit(log, calibrate=False).probs(log["context"], fold)
    two = fit(changed, calibrate=False).probs(log["context"], fold)
    assert np.array_equal(one[user], two[user])
    assert not np.array_equal(one, two)


def test_calibration_humbles_an_overconfident_model() -> None:
    log = softmax_log(900, sharp=0.3)
    report = fit(log, model="boosting").report
    assert report["temperature"] > 1.5
    assert report["ece"] < 0.7 * report["ece_uncalibrated"]
    plain = fit(log, model="boosting", calibrate=False).report
    assert plain["temperature"] == 1.0
    assert plain["ece"] == pytest.approx(report["ece_uncalibrated"])
    assert report["log_loss"] < plain["log_loss"]


def test_the_temperature_undoes_a_sharpening() -> None:
    log = softmax_log(5000)
    sharp = 3.0 * np.log(log["pi"])
    t = best_temperature(sharp, log["action"], 1e-6, np.ones(4, dtype=bool))
    assert t == pytest.approx(3.0, rel=0.1)


def test_a_tempered_row_keeps_a_floor_where_actions_were_seen_and_0_elsewhere() -> None:
    seen = np.array([True, True, True, False])
    p = tempered(np.log([[0.98, 0.02 - 1e-9, 1e-9, 1e-300]]), 1.0, 0.01, seen)
    assert p.sum() == pytest.approx(1.0)
    assert p[0, 2] == pytest.approx(0.01 / 1.01)
    assert p[0, 3] == 0.0


def test_an_action_nobody_logged_has_no_probability_and_a_rare_one_the_clipped() -> None:
    log = softmax_log(600)
    log["action"] = np.where(log["action"] == 3, 0, log["action"])
    log["action"][5] = 4  # logged once: its own model never saw it
    fitted = fit_propensity(log["context"], log["action"], 6, clip=0.01)
    pi = fitted.probs(log["context"], fitted.fold_of(np.arange(600)))
    assert (pi[:, [3, 5]] == 0).all()
    assert fitted.logged[5] == pytest.approx(0.01 / 6, rel=0.01)
    assert fitted.report["share_clipped"] == pytest.approx(1 / 600)
    assert fitted.report["actions_never_logged"] == 2


def test_replicates_spread_as_models_of_other_logs_do() -> None:
    def estimate(log: dict[str, Any], logged: np.ndarray) -> float:
        return float((0.25 / logged * (log["action"] == 1) * (1 + log["context"][:, 0])).mean())

    log = softmax_log(600)
    fitted = fit(log)
    found = [estimate(log, logged) for logged in fitted.replicates(20, seed=1)]
    again = [estimate(log, logged) for logged in fitted.replicates(3, seed=1)]
    assert found[:3] == again
    other = [softmax_log(600, seed=s) for s in range(1, 13)]
    fits = [fit(o, calibrate=False).probs(log["context"], np.zeros(600, int)) for o in other]
    spread = np.std([estimate(log, pi[np.arange(600), log["action"]]) for pi in fits])
    assert 0.4 * spread < np.std(found) < 2.5 * spread


@pytest.mark.parametrize("model", ["boosting", "counts"])
def test_every_model_has_replicates(model: str) -> None:
    log = softmax_log(500)
    found = np.stack(list(fit(log, model=model, folds=2).replicates(3)))
    assert found.std(axis=0).mean() > 0.001
    assert ((found > 0) & (found <= 1)).all()


def test_without_context_propensities_are_shrunken_popularity_by_slot() -> None:
    rng = np.random.default_rng(0)
    slot = np.arange(4000) % 2
    action = np.where(slot == 0, rng.integers(2, size=4000), 2 + rng.integers(2, size=4000))
    fitted = fit_propensity(None, action, 4, slot=slot, folds=2)
    assert fitted.report["model"] == "counts"
    assert "no" in fitted.report["note"]
    pi = fitted.probs(None, np.array([0, 1]), np.array([0, 1]))
    assert pi == pytest.approx(np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]), abs=0.06)
    flat = fit_propensity(None, action, 4, folds=2)
    assert flat.logged == pytest.approx(np.full(4000, 0.25), abs=0.03)


def test_slots_are_told_apart_with_context_too() -> None:
    log = softmax_log(1500)
    slot = np.arange(1500) % 2
    action = np.where(slot == 1, 3 - log["action"], log["action"])
    with_slot = fit_propensity(log["context"], action, 4, slot=slot, model="boosting")
    without = fit_propensity(log["context"], action, 4, model="boosting")
    assert with_slot.report["log_loss"] < without.report["log_loss"]


def test_many_actions_fall_back_to_counts_and_say_so() -> None:
    rng = np.random.default_rng(0)
    context = rng.normal(size=(3000, 2))
    action = rng.integers(600, size=3000) + 600 * (context[:, 0] > 0)
    fitted = fit_propensity(context, action, 50_000)
    assert fitted.report["model"] == "counts"
    assert "50000 actions are too many" in fitted.report["note"]
    assert fitted.report["log_loss"] < fitted.report["log_loss_popularity"]
    mid = fit_propensity(context[:600], action[:600] % 101, 101, model="boosting")
    assert mid.report["model"] == "multinomial"


def test_counts_trust_a_group_only_as_far_as_groups_differ() -> None:
    rng = np.random.default_rng(0)
    cell, same = np.arange(2000) % 20, rng.integers(5, size=2000)
    alike = fit_counts(cell, same, 20, 5).table
    assert np.abs(alike - 0.2).max() < 0.05
    apart = fit_counts(cell, (same // 4 + cell) % 5, 20, 5).table
    assert apart[np.arange(20), np.arange(20) % 5].min() > 0.6


def test_popularity_is_a_power_of_the_counts() -> None:
    counts = np.array([0.0, 1.0, 4.0, 16.0])
    assert popularity_propensity(counts, 1.0) == pytest.approx(counts / 21)
    assert popularity_propensity(counts, 0.0) == pytest.approx(np.array([0, 1, 2, 4]) / 7)
    assert popularity_propensity(counts, -1.0) == pytest.approx(np.array([0, 1, 1, 1]) / 3)
    with pytest.raises(ValueError, match="counts must be"):
        popularity_propensity(np.array([1.0, -1.0]), 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.zeros(7, int)}, "lengths"),
        ({"slot": np.zeros(7, int)}, "lengths"),
        ({"slot": np.full(500, -1)}, "slot must be integers"),
        ({"action": np.full(500, 4)}, "got 4 in row 0"),
        ({"context": np.full((500, 3), np.nan)}, "context .* row 0"),
        ({"cluster": np.zeros(500, int)}, "folds=1"),
        ({"model": "forest"}, "forest"),
        ({"clip": 0.0}, "clip"),
    ],
)
def test_a_wrong_column_is_named(change: dict[str, Any], message: str) -> None:
    log = softmax_log(500)
    del log["pi"]
    with pytest.raises(ValueError, match=message):
        fit_propensity(**{**log, "num_actions": 4, **change})


def test_a_wrong_question_is_named() -> None:
    fitted = fit(softmax_log(500))
    with pytest.raises(ValueError, match="3 context columns"):
        fitted.probs(None, np.zeros(2, int))
    with pytest.raises(ValueError, match="lengths"):
        fitted.probs(np.zeros((3, 3)), np.zeros(2, int))
    with pytest.raises(ValueError, match="fold must be in"):
        fitted.probs(np.zeros((2, 3)), np.full(2, 3))
