"""Fitted models of sessions find known values, and judge no row that they were fitted on."""

import itertools

import numpy as np
import pytest

from evaluation import sequential as seq
from evaluation.fqe import FittedQ
from evaluation.terms import Groups

GAMMA = 0.9
GAIN = np.array([[1.0, 0.0], [0.5, 2.0], [3.0, -1.0]])  # (S, A)
AFTER = np.array([[1, 2], [2, 0], [0, 1]])  # state after a state and action
PI = np.array([[0.2, 0.8], [0.6, 0.4], [1.0, 0.0]])
T = 4


def exact_q(left: int) -> np.ndarray:
    """Q (S, A) with so many steps left."""
    q = np.zeros_like(GAIN)
    for _ in range(left):
        q = GAIN + GAMMA * (PI * q).sum(axis=1)[AFTER]
    return q


def walks(copies: int, noise: float = 0.0) -> dict[str, np.ndarray | Groups]:
    """Every walk of T steps through the world, or of fewer where it first took action 1 in state 2.

    The context tells the state and the time, and whether it was the last.
    """
    rng = np.random.default_rng(0)
    rows: list[tuple[int, int, int, int]] = []
    for number, (_, start, *actions) in enumerate(
        itertools.product(range(copies), range(3), *[range(2)] * T)
    ):
        state = start
        for t, action in enumerate(actions):
            rows.append((number, t, state, action))
            if (state, action) == (2, 1):
                break
            state = AFTER[state, action]
    episode, step, state, action = np.array(rows).T
    reward = GAIN[state, action] + noise * rng.normal(size=len(state))
    return {
        "groups": Groups(episode),
        "step": step,
        "state": state,
        "action": action,
        "reward": reward,
        "context": np.column_stack([np.eye(3)[state], np.eye(T)[step]]),
    }


def leaving_q() -> np.ndarray:
    """Exact Q (T, S, A) of the walks, which end after action 1 in state 2."""
    q = np.zeros((T + 1, *GAIN.shape))
    for t in range(T - 1, -1, -1):
        v = (PI * q[t + 1]).sum(axis=1)[AFTER]
        v[2, 1] = 0.0
        q[t] = GAIN + GAMMA * v
    return q[:T]


def predict(x: dict[str, np.ndarray | Groups], **settings) -> tuple[np.ndarray, np.ndarray]:
    model = FittedQ(gamma=GAMMA, **settings)
    return model.fit_predict(x["context"], x["action"], x["reward"], x["groups"], PI[x["state"]], 2)


def test_a_table_finds_the_exact_values_of_ragged_sessions():
    x = walks(copies=4)
    q_logged, value = predict(x, model="tabular")
    exact = leaving_q()
    np.testing.assert_allclose(q_logged, exact[x["step"], x["state"], x["action"]], atol=1e-9)
    by_state = (PI * exact).sum(axis=2)
    np.testing.assert_allclose(value, by_state[x["step"], x["state"]], atol=1e-9)


def test_a_linear_model_with_a_column_for_each_state_and_time_finds_them_too():
    x = walks(copies=4)
    cell = np.ravel_multi_index((x["step"], x["state"]), (T, 3))
    x["context"] = np.eye(3 * T)[cell]
    q_logged, value = predict(x, model="linear", ridge=1e-8)
    exact = leaving_q()
    np.testing.assert_allclose(q_logged, exact[x["step"], x["state"], x["action"]], atol=1e-5)
    np.testing.assert_allclose(value, (PI * exact).sum(axis=2)[x["step"], x["state"]], atol=1e-5)


def test_boosted_trees_come_near_them():
    x = walks(copies=40)
    q_logged, value = predict(x, model="boosting")
    exact = leaving_q()
    assert np.abs(q_logged - exact[x["step"], x["state"], x["action"]]).mean() < 0.1
    assert np.abs(value - (PI * exact).sum(axis=2)[x["step"], x["state"]]).mean() < 0.1


def test_noise_is_averaged_away_by_much_data():
    x = walks(copies=400, noise=1.0)
    value = predict(x, model="tabular")[1]
    exact = (PI * leaving_q()).sum(axis=2)[x["step"], x["state"]]
    assert 1e-4 < np.abs(value - exact).max() < 0.3
    assert seq.direct(x["groups"], value - exact).values().mean() == pytest.approx(0.0, abs=0.03)


def test_a_sweep_passes_rewards_back_by_one_step():
    x = walks(copies=4)
    stay = x["step"] == 0
    for sweeps in (1, 2, 3):
        q = predict(x, model="tabular", iterations=sweeps)[0]
        short = leaving_q()[T - sweeps]  # exact with so many steps left
        np.testing.assert_allclose(q[stay], short[x["state"], x["action"]][stay], atol=1e-9)


def test_no_more_sweeps_than_gamma_can_tell_apart():
    groups = Groups(np.repeat([0, 1], 5000))
    assert FittedQ(gamma=0.5)._iterations(groups) == 20
    assert FittedQ(gamma=0.0)._iterations(groups) == 1
    assert FittedQ(gamma=1.0)._iterations(groups) == 5000


def test_no_session_is_priced_by_a_model_that_saw_it_nor_its_user():
    x = walks(copies=10, noise=1.0)
    user = x["groups"].index // 7
    args = (x["groups"], PI[x["state"]], 2, user)
    fitted = FittedQ(model="tabular", gamma=GAMMA, folds=3)
    before = fitted.fit_predict(x["context"], x["action"], x["reward"], *args)[0]
    for someone in (0, 5):
        own = user == someone
        shifted = x["reward"] + 100.0 * own
        after = fitted.fit_predict(x["context"], x["action"], shifted, *args)[0]
        np.testing.assert_array_equal(after[own], before[own])
        assert (after != before).any()


def test_what_was_never_done_has_the_value_of_what_was():
    n = 40
    context, action = np.tile([[0.0], [1.0]], (n // 2, 1)), np.zeros(n, dtype=int)
    reward = 1.0 + context[:, 0]
    pi = np.tile([0.0, 1.0], (n, 1))  # only what the log never has
    for model in ("linear", "tabular", "boosting"):
        fitted = FittedQ(model=model, ridge=1e-9)
        q, value = fitted.fit_predict(context, action, reward, Groups(np.arange(n)), pi, 2)
        assert np.isfinite(value).all()
        if model != "boosting":  # too few rows for a tree to split
            np.testing.assert_allclose(q, reward, atol=1e-6)
            np.testing.assert_allclose(value, reward, atol=1e-6)


def logged(seed: int, steps: int) -> dict[str, np.ndarray | Groups]:
    """Sessions where the target's only action is rare on one side of a bend that no line fits."""
    rng = np.random.default_rng(seed)
    groups = Groups(np.repeat(np.arange(1000), steps))
    x = rng.uniform(-1.0, 1.0, 1000 * steps)
    p_one = 0.5 + 0.45 * x
    action = (rng.random(len(x)) < p_one).astype(int)
    return {
        "context": np.column_stack([x, groups.place]),
        "action": action,
        "reward": 2.0 * np.abs(x) * action + 0.1 * rng.normal(size=len(x)),
        "groups": groups,
        "pi": np.tile([0.0, 1.0], (len(x), 1)),
        "propensity": np.where(action == 1, p_one, 1.0 - p_one),
    }


@pytest.mark.parametrize("steps", [1, 2])
def test_mrdr_makes_doubly_robust_vary_less_than_fitted_q(steps):
    truth = sum(GAMMA**t for t in range(steps))  # E[2 |x|] = 1 a step
    estimates: dict[bool, list[float]] = {False: [], True: []}
    spread = {False: 0.0, True: 0.0}
    for seed in range(10):
        x = logged(seed, steps)
        groups = x["groups"]
        pi_logged = x["pi"][np.arange(len(x["action"])), x["action"]]
        weight = groups.cumulative_product(pi_logged / x["propensity"])
        for mrdr in (False, True):
            fitted = FittedQ(gamma=GAMMA, mrdr=mrdr)
            q, value = fitted.fit_predict(**x, num_actions=2)
            each = seq.doubly_robust(groups, weight, x["reward"], q, value, GAMMA).values()
            estimates[mrdr].append(float(each.mean()))
            spread[mrdr] += float(each.var())
    assert spread[True] < 0.8 * spread[False]
    for values in estimates.values():  # three standard errors of the mean
        assert np.mean(values) == pytest.approx(truth, abs=3 * np.std(values) / 10**0.5)


def test_mrdr_aims_at_the_reweighted_rest_of_the_session_by_hand():
    groups = Groups([0, 0, 0, 1])
    pi, propensity = np.tile([0.6, 0.4], (4, 1)), np.array([0.5, 0.8, 0.5, 0.2])
    action, reward = np.array([1, 1, 0, 1]), np.array([1.0, 2.0, 4.0, 3.0])
    fitted = FittedQ(gamma=0.5, mrdr=True)
    weight, target = fitted._variance_loss(action, reward, groups, pi, propensity)
    rho = np.array([0.8, 0.5, 1.2, 2.0])
    second = 2.0 + 0.5 * rho[2] * 4.0
    assert target.tolist() == pytest.approx([1.0 + 0.5 * rho[1] * second, second, 4.0, 3.0])
    product = np.array([0.8, 0.4, 0.48, 2.0])
    by_hand = np.array([1.0, 0.25, 0.0625, 1.0]) * product**2 * (1.0 - propensity)
    np.testing.assert_allclose(weight, by_hand / by_hand.mean())


def test_the_same_seed_gives_the_same_folds_and_another_gives_others():
    x = walks(copies=2, noise=1.0)
    first, again, other = (predict(x, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": np.zeros((3, 1))}, r"context must be \(n, d\) = \(4, d\), got \(3, 1\)"),
        ({"reward": np.array([0.0, 1.0, np.nan, 0.0])}, "finite, they are not in row 2"),
        ({"action": np.array([0, 2, 0, 0])}, r"action must be in 0..1, got 2 in row 1"),
        ({"action": np.zeros(3, dtype=int)}, r"action and reward must be \(n,\) = \(4,\)"),
        ({"pi": np.ones((4, 3))}, r"pi must be \(n, A\) = \(4, 2\), got \(4, 3\)"),
        ({"cluster": np.zeros(4)}, "2 folds need as many episodes or clusters, got 1"),
    ],
)
def test_bad_rows_are_named(change, message):
    x = {
        "context": np.zeros((4, 1)),
        "action": np.zeros(4, dtype=int),
        "reward": np.zeros(4),
        "groups": Groups([0, 0, 1, 1]),
        "pi": np.full((4, 2), 0.5),
        "num_actions": 2,
    }
    FittedQ().fit_predict(**x)
    with pytest.raises(ValueError, match=message):
        FittedQ().fit_predict(**(x | change))


def test_settings_without_meaning_are_refused():
    for settings, message in (
        ({"model": "forest"}, "model must be one of linear, boosting, tabular, got 'forest'"),
        ({"gamma": 1.5}, "gamma must be"),
        ({"folds": 1}, "no row judges its own"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"ridge": 0.0}, "ridge must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FittedQ(**settings)
    with pytest.raises(ValueError, match="mrdr needs the propensity"):
        predict(walks(copies=2), mrdr=True)
