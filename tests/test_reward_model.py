"""Rewards are predicted by models that have not seen the user, in any batch, for any model."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from evaluation.folds import fold_of
from evaluation.item_models import smoothed_means
from evaluation.reward_model import FittedRewardModel, RewardModel, target_value

MODELS = {
    "linear": RewardModel(),
    "features": RewardModel(item_features=np.eye(5)[:, :3] + 0.1),
    "boosting": RewardModel("boosting"),
}


def clicks(n: int = 1200, seed: int = 0) -> dict[str, Any]:
    """A log of 60 users and 5 items, whose clicks depend on context, item and both."""
    rng = np.random.default_rng(seed)
    context, action = rng.normal(size=(n, 2)), rng.integers(5, size=n)
    score = context[:, 0] + np.linspace(-1, 1, 5)[action] * (1 + context[:, 1])
    reward = (rng.random(n) < 1 / (1 + np.exp(-score))).astype(float)
    return {
        "context": context,
        "action": action,
        "reward": reward,
        "cluster": rng.integers(60, size=n),
        "num_actions": 5,
    }


def predict_logged(fitted: FittedRewardModel, log: dict[str, Any]) -> np.ndarray:
    fold = fitted.fold_of(log["cluster"])
    return fitted.predict(log["context"], log["action"][:, None], fold)[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_a_user_s_own_rewards_never_change_the_user_s_predictions(name: str) -> None:
    log = clicks()
    user = log["cluster"] == 7
    changed = {**log, "reward": np.where(user, 1.0 - log["reward"], log["reward"])}
    before = predict_logged(MODELS[name].fit(**log), log)
    after = predict_logged(MODELS[name].fit(**changed), log)
    assert np.array_equal(before[user], after[user])
    assert not np.array_equal(before, after)  # others do learn from this user


def test_a_reward_that_one_user_alone_has_is_not_predicted_for_that_user() -> None:
    log = clicks()
    user = log["cluster"] == 7
    log["reward"] = np.where(user, 1000.0, log["reward"])
    q = predict_logged(RewardModel("boosting").fit(**log), log)
    assert q[user].max() <= 1.0


def test_the_fold_is_of_the_cluster_in_whatever_batch_it_comes() -> None:
    cluster = np.arange(3000)
    fold = fold_of(cluster, 3, seed=1)
    assert np.array_equal(fold[::-1], fold_of(cluster[::-1], 3, seed=1))
    assert np.array_equal(fold[5:6], fold_of(cluster[5:6].astype(np.int32), 3, seed=1))
    assert np.bincount(fold).min() > 900
    assert abs(np.corrcoef(fold, fold_of(cluster, 3, seed=2))[0, 1]) < 0.1
    names = np.array(["ann", "bob", "ann", "cy"])
    assert fold_of(names, 1000, 0)[0] == fold_of(names, 1000, 0)[2]
    assert np.array_equal(fold_of(names[1:], 1000, 0), fold_of(names.astype(object), 1000, 0)[1:])


@pytest.mark.parametrize("name", MODELS)
def test_answers_do_not_depend_on_the_batch(name: str) -> None:
    log = clicks(600)
    fitted = MODELS[name].fit(**log)
    items, fold = np.array([[4, 0, -1]] * 600), fitted.fold_of(log["cluster"])
    q = fitted.predict(log["context"], items, fold)
    singles = [fitted.predict(log["context"][[i]], items[[i]], fold[[i]])[0] for i in range(20)]
    assert q[:20] == pytest.approx(np.stack(singles), rel=1e-12)
    assert (q[:, 2] == 0).all()
    every = fitted.predict(log["context"], np.arange(5), fold)  # items (A,) the same for all rows
    assert q[:, :2] == pytest.approx(every[:, [4, 0]], rel=1e-12)


@pytest.mark.parametrize("features", [None, "few", "many"])
@pytest.mark.parametrize("binary", [True, False])
def test_linear_scores_equal_those_of_the_written_out_design(
    features: str | None, binary: bool
) -> None:
    from evaluation import item_models

    rng = np.random.default_rng(0)
    table = {None: None, "few": rng.normal(size=(30, 2)), "many": rng.normal(size=(30, 7))}
    x, action = rng.normal(size=(400, 3)), rng.integers(30, size=400)
    reward = (rng.random(400) < 0.4).astype(float) if binary else rng.normal(size=400)
    rows = item_models.Rows(x, action, reward, np.ones(400), np.arange(400) % 5 == 0)
    linear = item_models.fit_linear(rows, table[features], 30, True, binary)
    z = table[features]
    if z is not None:
        z = (z - z.mean(0)) / z.std(0)
    design = item_models.design_of((x - x.mean(0)) / x.std(0), action, z, 30, True)
    model = item_models.regress(
        design, rows, item_models.best_penalty(design, rows, binary), binary
    )
    expected = model.predict_proba(design)[:, 1] if binary else model.predict(design)
    assert linear.scores(x, action[:, None])[:, 0] == pytest.approx(expected, rel=1e-9)
    wide = linear.scores(x, np.tile(np.arange(30), (400, 1)))  # the path through all items
    assert wide[np.arange(400), action] == pytest.approx(expected, rel=1e-9)


def test_without_context_an_item_has_its_mean_shrunken_as_far_as_noise_asks() -> None:
    rng = np.random.default_rng(0)
    truth = np.linspace(0, 1, 50)
    action = np.repeat(np.arange(50), 40)
    noisy = truth[action] + rng.normal(size=2000)
    ones = np.ones(2000)
    found, raw = smoothed_means(action, noisy, 50, ones), noisy.reshape(50, 40).mean(1)
    assert ((found - truth) ** 2).mean() < ((raw - truth) ** 2).mean()
    exact = smoothed_means(action, truth[action], 52, ones)
    assert exact[:50] == pytest.approx(truth)  # no noise, no shrinkage
    assert exact[50:] == pytest.approx(0.5)  # never seen: the mean of all
    same = smoothed_means(action, rng.permutation(noisy), 50, ones)
    assert np.ptp(same) < 0.5 * np.ptp(raw)

    log = clicks()
    fitted = RewardModel().fit(None, log["action"], log["reward"], log["cluster"], 5)
    assert np.isfinite(fitted.predict(None, log["action"][:, None], np.zeros(1200, int))).all()


def test_a_model_that_knows_something_says_so_and_one_that_cannot_does_not() -> None:
    log = clicks(3000)
    for model in ("linear", "boosting"):
        report = RewardModel(model).fit(**log).report()
        assert report["loss"] == "log loss"
        assert report["out_of_fold"] < report["constant"]
        assert report["explained"] > 0.1
    noise = {**log, "reward": np.random.default_rng(1).normal(size=3000)}
    report = RewardModel().fit(**noise).report()
    assert report["loss"] == "squared error"
    assert abs(report["explained"]) < 0.05


def test_any_estimator_or_factory_will_do_and_is_left_unfitted() -> None:
    from sklearn.linear_model import Ridge
    from sklearn.naive_bayes import GaussianNB

    log, mine = clicks(), Ridge()
    for model in (mine, Ridge, partial(Ridge, alpha=2.0), GaussianNB):
        fitted = RewardModel(model, folds=2).fit(**log)
        assert predict_logged(fitted, log).std() > 0.05
    assert not hasattr(mine, "coef_")
    assert fitted.report()["model"] == "GaussianNB"


def test_weights_say_whose_rewards_count() -> None:
    log = clicks()
    half = np.arange(1200) < 600
    weighed = RewardModel(folds=1).fit(**log, weight=half.astype(float))
    only = {k: v if k == "num_actions" else v[half] for k, v in log.items()}
    alone = RewardModel(folds=1).fit(**only)
    x, items = log["context"], np.arange(5)
    assert np.abs(weighed.predict(x, items) - alone.predict(x, items)).mean() < 0.05


def test_predictions_stay_in_the_range_of_rewards_and_a_value_sums_over_the_policy() -> None:
    log = clicks()
    log["reward"] = 3.0 + 2.0 * log["reward"] + 0.1 * np.arange(1200) / 1200
    fitted = RewardModel(folds=1).fit(**log)
    q = fitted.predict(100.0 * log["context"], np.arange(5))
    assert q.min() == pytest.approx(log["reward"].min())
    assert q.max() == pytest.approx(log["reward"].max())
    items = np.array([[1, 2, -1]] * 1200)
    probs = np.array([[0.25, 0.75, 0.0]] * 1200)
    value = target_value(fitted, log["context"], items, probs)
    q = fitted.predict(log["context"], items)
    assert value == pytest.approx(0.25 * q[:, 1 - 1] + 0.75 * q[:, 1])


def test_a_hundred_thousand_items_need_no_dense_table() -> None:
    rng = np.random.default_rng(0)
    n, size = 2000, 100_000
    action = rng.integers(size, size=n)
    fitted = RewardModel(folds=2).fit(
        rng.normal(size=(n, 3)), action, (rng.random(n) < 0.3).astype(float), None, size
    )
    q = fitted.predict(rng.normal(size=(4, 3)), action[:40].reshape(4, 10), np.arange(4) % 2)
    assert q.shape == (4, 10)
    assert ((q > 0) & (q < 1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": np.ones(7)}, "lengths"),
        ({"reward": np.where(np.arange(1200) == 3, np.nan, 1.0)}, "reward .* row 3"),
        ({"context": np.full((1200, 2), np.inf)}, "context .* row 0"),
        ({"num_actions": 4}, "action must be in 0..3, got 4 in row"),
        ({"action": np.zeros(1200)}, "integers"),
        ({"cluster": np.zeros(1200, int)}, "folds=1"),
        ({"weight": np.zeros(1200)}, "weight"),
    ],
)
def test_a_wrong_column_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModel().fit(**{**clicks(), **change})


def test_a_wrong_question_is_named() -> None:
    log = clicks()
    fitted = RewardModel().fit(**log)
    fold = np.zeros(1200, int)
    for arguments, message in [
        ((log["context"], np.arange(5)), "fold_of"),
        ((log["context"], np.arange(6), fold), "num_actions"),
        ((log["context"][:, :1], np.arange(5), fold), "context"),
        ((log["context"], np.arange(5), fold[:3]), "lengths"),
        ((log["context"], np.arange(5), fold + 3), "fold must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            fitted.predict(*arguments)
    with pytest.raises(ValueError, match="shape of items"):
        target_value(fitted, log["context"], np.zeros((1200, 2), int), np.ones((1200, 3)), fold)
    with pytest.raises(ValueError, match="row for each of 5"):
        RewardModel(item_features=np.eye(4)).fit(**log)
    with pytest.raises(ValueError, match="linear, boosting"):
        RewardModel("forest")
