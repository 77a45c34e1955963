import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.distribution import (
    bootstrap,
    cdf,
    cdf_from_means,
    cdf_terms,
    cvar,
    mean_of,
    quantile,
    variance_of,
)

FIXTURES = Path(__file__).parent / "data" / "ope"
KINDS = ["snips", "ips", "dr", "sndr"]


def episodes(first_exponent: int) -> tuple[Any, ...]:
    """Whole-episode ratio and discounted return; the stored CDFs, whose exponents start at 1."""
    with np.load(FIXTURES / "sequential_tabular.npz") as arrays:
        data = dict(arrays)
    n, horizon = data["reward"].shape
    pi_e = np.take_along_axis(data["eval_action_dist"], data["action"].reshape(-1, 1), axis=1)
    weight = (pi_e[:, 0] / data["pscore"]).reshape(n, horizon).prod(axis=1)
    discount = data["gamma"] ** (np.arange(horizon) + first_exponent)
    stored = json.loads((FIXTURES / "sequential_tabular.json").read_text())["cumulative"]
    return weight, data["reward"] @ discount, data["reward_scale"], data["initial_value"], stored


def test_means_with_the_right_discount_are_the_corrected_ones() -> None:
    weight, returned, grid, _, _ = episodes(first_exponent=0)
    grid = grid[1:]  # the reference counts a return of exactly 0 as .2
    assert mean_of(cdf(weight, returned, grid), grid) == pytest.approx(2.15266, abs=5e-6)
    tis = cdf(weight, returned, grid, kind="ips")
    assert mean_of(tis, grid) == pytest.approx(1.34887, abs=5e-6)


def test_cdfs_equal_the_stored_ones_if_returns_are_discounted_as_there() -> None:
    weight, returned, grid, initial_value, stored = episodes(first_exponent=1)
    model = (initial_value[:, None] <= grid).astype(float)  # (n, m), at the logged action as well
    kinds = {"cdf_tis": "ips", "cdf_sntis": "snips", "cdf_tdr": "dr", "cdf_sntdr": "sndr"}
    for name, kind in kinds.items():
        models = {"q_logged": model, "value": model} if kind.endswith("dr") else {}
        found = cdf(weight, returned, grid, kind=kind, **models)
        start = 0 if models else 1  # at 0 the reference forgets the returns of 0
        expected = stored[name]["estimate_cumulative_distribution_function"]
        np.testing.assert_allclose(found[start:], expected[start:], rtol=1e-9)
    at_zero = cdf(weight, returned, grid)[0]
    assert at_zero == pytest.approx(weight[returned == 0].sum() / weight.sum())
    only_model = cdf(0 * weight, returned, grid, kind="dr", q_logged=0 * model, value=model)
    dm = stored["cdf_dm"]["estimate_cumulative_distribution_function"]
    np.testing.assert_allclose(only_model, dm, rtol=1e-9)


def test_mean_variance_and_cvar_of_the_stored_cdfs_equal_the_stored_ones() -> None:
    *_, grid, _, stored = episodes(first_exponent=1)
    for name in ("cdf_tis", "cdf_sntis"):
        steps = np.array(stored[name]["estimate_cumulative_distribution_function"])
        mean, variance = (stored[name][f"estimate_{x}"] for x in ("mean", "variance"))
        assert mean_of(steps, grid) == pytest.approx(mean, rel=1e-9)
        assert variance_of(steps, grid) == pytest.approx(variance, rel=1e-9)
        # there a level is rounded up to the next step, so it is ours at that step
        for level, expected in zip(
            (0.05, 0.1, 0.25, 0.5), stored[name]["estimate_conditional_value_at_risk"], strict=True
        ):
            step = steps[steps > level].min()
            assert cvar(steps, grid, step) == pytest.approx(expected, rel=1e-9)
            assert cvar(steps, grid, level) <= cvar(steps, grid, step) + 1e-12


class World:
    """Two contexts, two actions, rewards 0, 1 or 2; every log of one row, with its chance."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        pi_b, pi_e = rng.dirichlet([2.0, 2.0], size=(2, 2))  # (x, a) each
        outcome = rng.dirichlet(np.ones(3), size=(2, 2))  # (x, a, r)
        self.x, self.a, self.r = np.array(list(product(range(2), range(2), range(3)))).T  # (12,)
        self.chance = 0.5 * pi_b[self.x, self.a] * outcome[self.x, self.a, self.r]
        self.weight = (pi_e / pi_b)[self.x, self.a]
        self.grid = np.arange(3.0)
        self.truth = 0.5 * np.einsum("xa,xar->r", pi_e, outcome).cumsum()
        model = rng.dirichlet(np.ones(3), size=(2, 2)).cumsum(axis=2)  # any CDF, (x, a, m)
        self.models = {
            "q_logged": model[self.x, self.a],
            "value": np.einsum("xa,xam->xm", pi_e, model)[self.x],
        }

    def given(self, kind: str) -> dict[str, np.ndarray]:
        return self.models if kind.endswith("dr") else {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_expectation_of_the_columns_is_the_true_cdf(kind: str) -> None:
    world = World()
    terms = cdf_terms(world.weight, world.r, world.grid, kind=kind, **world.given(kind))
    top = world.chance @ terms.top
    bottom = None if terms.bottom is None else world.chance @ terms.bottom
    np.testing.assert_allclose(cdf_from_means(top, bottom, 3), world.truth, rtol=1e-12)
    # the same from a log that holds each row as often as it is likely
    times = np.round(world.chance * 200_000).astype(int)
    rows = np.repeat(np.arange(12), times)
    models = {name: model[rows] for name, model in world.given(kind).items()}
    found = cdf(world.weight[rows], world.r[rows], world.grid, kind=kind, **models)
    np.testing.assert_allclose(found, world.truth, atol=1e-4)


def test_ips_and_dr_are_unbiased_over_all_logs_of_two_rows() -> None:
    world = World()
    for kind in ("ips", "dr"):
        top = cdf_terms(world.weight, world.r, world.grid, kind=kind, **world.given(kind)).top
        pairs = np.array(list(product(range(12), repeat=2)))  # (144, 2)
        estimate = top[pairs].mean(axis=1)  # (144, m) before anything is clipped
        np.testing.assert_allclose(
            world.chance[pairs].prod(axis=1) @ estimate, world.truth, rtol=1e-12
        )


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_batches_give_the_cdf_of_the_whole(kind: str) -> None:
    rng = np.random.default_rng(1)
    weight, reward = rng.exponential(size=60), rng.normal(size=60)
    grid = np.linspace(-3.0, 3.0, 9)
    q_logged, value = rng.uniform(size=(2, 60, 9)).cumsum(axis=2) / 9
    models = {"q_logged": q_logged, "value": value} if kind.endswith("dr") else {}
    whole = cdf(weight, reward, grid, kind=kind, **models)
    top, bottom = np.zeros((2, 1))
    for rows in (slice(0, 7), slice(7, 40), slice(40, 60)):
        part = {name: model[rows] for name, model in models.items()}
        terms = cdf_terms(weight[rows], reward[rows], grid, kind=kind, **part)
        top = top + terms.top.sum(axis=0)
        ones = np.ones_like(terms.top)
        bottom = bottom + (ones if terms.bottom is None else terms.bottom).sum(axis=0)
    np.testing.assert_allclose(cdf_from_means(top, bottom, 9), whole, rtol=1e-12)


@given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_a_cdf_never_falls_and_stays_between_0_and_1(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    weight, reward = rng.exponential(size=15) ** 2, rng.normal(size=15)
    grid = np.linspace(-1.0, 1.0, 7)
    q_logged, value = rng.uniform(size=(2, 15, 7))
    models = {"q_logged": q_logged, "value": value} if kind.endswith("dr") else {}
    found = cdf(weight, reward, grid, kind=kind, **models)
    assert (np.diff(found) >= 0).all()
    assert found[0] >= 0
    assert found[-1] <= 1


def test_the_logging_policy_as_target_gives_the_empirical_distribution() -> None:
    reward = np.random.default_rng(0).normal(size=101)
    grid = np.sort(reward)
    found = cdf(np.ones(101), reward, grid)
    for level in (0.01, 0.25, 0.5, 0.9):
        expected = np.quantile(reward, level, method="inverted_cdf")
        assert quantile(found, grid, level) == expected
    assert mean_of(found, grid) == pytest.approx(reward.mean())
    assert variance_of(found, grid) == pytest.approx(reward.var())


def test_cvar_goes_from_the_least_reward_to_the_mean() -> None:
    rng = np.random.default_rng(0)
    reward, weight = rng.normal(size=50), rng.exponential(size=50)
    grid = np.sort(reward)
    found = cdf(weight, reward, grid)
    assert cvar(found, grid, 1e-6) == pytest.approx(reward.min())
    assert quantile(found, grid, 1e-6) == reward.min()
    assert quantile(found, grid, 1.0) == reward.max()
    assert cvar(found, grid, 1.0) == pytest.approx(weight @ reward / weight.sum())
    assert cvar(found, grid, 1.0) == pytest.approx(mean_of(found, grid))
    levels = [cvar(found, grid, level) for level in np.linspace(0.02, 1.0, 50)]
    assert (np.diff(levels) >= -1e-12).all()


def test_cvar_splits_the_step_the_level_falls_into() -> None:
    steps, grid = np.array([0.5, 1.0]), np.array([0.0, 10.0])
    assert cvar(steps, grid, 0.75) == pytest.approx(0.25 * 10.0 / 0.75)


def test_where_mass_is_missing_there_is_no_quantile_and_no_cvar() -> None:
    steps, grid = np.array([[0.2, 0.6], [0.5, 1.0]]), np.array([1.0, 2.0])
    assert quantile(steps, grid, 0.6).tolist() == [2.0, 2.0]
    assert np.isnan(quantile(steps, grid, 0.9)).tolist() == [True, False]
    assert np.isnan(cvar(steps, grid, 0.9)).tolist() == [True, False]
    assert np.isnan(cdf(np.zeros(3), np.arange(3.0), grid)).all()  # weights without any mass


def test_bootstrap_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    grid = np.linspace(0.0, 1.0, 101)
    hits = 0
    for run in range(200):
        reward = rng.uniform(size=400)
        weight = 2.0 * reward  # from uniform to density 2 r: its median is sqrt(1/2)
        terms = cdf_terms(weight, reward, grid)
        assert terms.bottom is not None
        blocks = np.arange(400) % 100
        top, bottom = (
            np.stack([x[blocks == b].sum(axis=0) for b in range(100)])
            for x in (terms.top, terms.bottom[:, 0])
        )
        low, high = bootstrap(
            top, bottom, grid, lambda f, t: quantile(f, t, 0.5), replicates=200, seed=run
        )
        hits += bool(
            low <= 0.71 and high >= np.sqrt(0.5)
        )  # 0.71: rewards are rounded up to the grid
    assert 0.9 <= hits / 200 <= 0.99


def test_bootstrap_of_sums_is_that_of_the_estimator_and_repeats_by_seed() -> None:
    rng = np.random.default_rng(2)
    reward, weight = rng.normal(size=300), rng.exponential(size=300)
    grid = np.sort(reward)
    terms = cdf_terms(weight, reward, grid)
    assert terms.bottom is not None
    args = (terms.top, terms.bottom, grid, mean_of)  # each unit a block
    low, high = bootstrap(*args, replicates=2000, seed=1)
    assert (low, high) == bootstrap(*args, replicates=2000, seed=1)
    assert (low, high) != bootstrap(*args, replicates=2000, seed=2)
    value = weight @ reward / weight.sum()
    delta = 1.96 * np.sqrt(((weight * (reward - value)) ** 2).mean() / 300) / weight.mean()
    assert low < value < high
    assert (high - low) / 2 == pytest.approx(delta, rel=0.08)
    band = bootstrap(terms.top, terms.bottom[:, 0], grid, lambda f, t: f, replicates=50)
    assert band[0].shape == band[1].shape == grid.shape
    assert (band[0] <= band[1]).all()


def call(**changed: Any) -> np.ndarray:
    given: dict[str, Any] = {
        "weight": np.ones(3),
        "reward": np.arange(3.0),
        "thresholds": np.arange(3.0),
    }
    return cdf(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "wis"}, "kind must be one of snips, ips, dr, sndr"),
        ({"weight": np.ones(2)}, "weight and reward"),
        ({"weight": np.array([1.0, 1.0, -2.0])}, "weight -2.0 and reward 2.0 in row 2"),
        ({"reward": np.array([0.0, np.nan, 1.0])}, "in row 1"),
        ({"thresholds": np.array([1.0, 1.0])}, "rise strictly"),
        ({"kind": "dr"}, "q_logged is needed"),
        ({"value": np.ones((3, 3))}, "value is needed by dr"),
        (
            {"kind": "dr", "q_logged": np.ones((3, 3)), "value": np.ones((3, 2))},
            r"value must be \(3, 3\)",
        ),
    ],
)
def test_bad_columns_are_refused_with_the_reason(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_bad_levels_and_blocks_are_refused() -> None:
    steps, grid = np.array([0.5, 1.0]), np.array([0.0, 1.0])
    for of in (quantile, cvar):
        with pytest.raises(ValueError, match="level must be in"):
            of(steps, grid, 0.0)
    with pytest.raises(ValueError, match="at least 2 blocks"):
        bootstrap(np.ones((1, 2)), np.ones(1), grid, mean_of)
    with pytest.raises(ValueError, match="alpha must be in"):
        bootstrap(np.ones((2, 2)), np.ones(2), grid, mean_of, alpha=1.0)
