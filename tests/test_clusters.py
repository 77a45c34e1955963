"""Cluster and embedding weights are the published ones, and become others' at their limits."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.clusters import (
    choose_dimensions,
    cluster_ratio,
    embedding_ratio,
    estimated_embedding_ratio,
    kmeans_clusters,
)

DATA = Path(__file__).parent / "data" / "ope"


def stored(name: str, arrays: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(DATA / f"{arrays}.npz") as file:
        return json.loads((DATA / f"{name}.json").read_text())["expected"], dict(file)


@pytest.fixture(scope="module")
def mips() -> dict[str, Any]:
    expected, file = stored("mips", "mips")
    return {
        "expected": expected,
        "tables": [file["p_e_a"][:, :, d] for d in range(3)],
        "embedding": file["action_embed"],
        "pi_e": file["action_dist"][:, :, 0],
        "pi_b": file["pi_b"][:, :, 0],
        **{name: file[name] for name in ("context", "action", "reward", "w_x_e_estimated_LR")},
    }


def weights(mips: dict[str, Any], dimensions: tuple[int, ...]) -> np.ndarray:
    return embedding_ratio(
        [mips["tables"][d] for d in dimensions],
        mips["embedding"][:, list(dimensions)],
        mips["pi_e"],
        mips["pi_b"],
    )


def test_the_stored_mips_is_met(mips: dict[str, Any]) -> None:
    expected, w = mips["expected"], weights(mips, (0, 1, 2))
    assert (w * mips["reward"]).mean() == pytest.approx(expected["mips_true_w"], rel=1e-9)
    assert w.max() == pytest.approx(expected["mips_true_w_max"], rel=1e-9)


def test_the_stored_snmips_multiplies_dimensions_and_the_joint_weight_gives_another(
    mips: dict[str, Any],
) -> None:
    reward, joint = mips["reward"], weights(mips, (0, 1, 2))
    product = np.prod([weights(mips, (d,)) for d in range(3)], axis=0)
    stored_value = mips["expected"]["snmips_true_w"]
    assert (product * reward).mean() / product.mean() == pytest.approx(stored_value, rel=1e-9)
    assert (joint * reward).mean() / joint.mean() == pytest.approx(2.08551, abs=1e-5)


@pytest.mark.parametrize("method", ["exact", "greedy"])
def test_slope_drops_the_dimension_it_is_known_to_drop(mips: dict[str, Any], method: str) -> None:
    chosen = choose_dimensions(lambda d: weights(mips, d), 3, mips["reward"], method=method)
    value = (weights(mips, chosen) * mips["reward"]).mean()
    assert chosen == (0, 1)
    assert value == pytest.approx(mips["expected"][f"mips_true_w_slope_{method}"], rel=1e-9)


def test_slope_goes_on_past_a_subset_wider_than_one_before_it() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4000)
    spread = {(0, 1): 1.5, (0,): 2.0, (1,): 1.0}  # all agree: the narrowest of all is wanted
    assert choose_dimensions(lambda d: 1 + spread[d] * noise, 2, np.ones(4000)) == (1,)
    far = {(0, 1): 3.0, (0,): 2.0, (1,): 0.001}
    assert choose_dimensions(lambda d: 1 + far[d] * noise + 9 * (d == (1,)), 2, np.ones(4000)) == (
        0,
    )
    assert choose_dimensions(lambda d: 1 + far[d] * noise, 2, np.ones(4000), least=2) == (0, 1)


def test_estimated_weights_resemble_those_stored_whose_mean_is_the_stored_value(
    mips: dict[str, Any],
) -> None:
    stored_w, expected = mips["w_x_e_estimated_LR"], mips["expected"]
    value = expected["mips_estimated_w_LR(after sparse->sparse_output shim)"]
    assert (stored_w * mips["reward"]).mean() == pytest.approx(value, rel=1e-9)
    columns = [mips[c] for c in ("context", "action", "embedding", "pi_e", "pi_b")]
    found = estimated_embedding_ratio(*columns)
    assert np.corrcoef(found, stored_w)[0, 1] > 0.95
    assert found.max() < mips["expected"]["iw_max"]
    crossed = estimated_embedding_ratio(*columns, folds=3)
    assert not np.allclose(crossed, found)


def test_an_embedding_that_names_the_item_gives_ips(mips: dict[str, Any]) -> None:
    rows, action = np.arange(500), mips["action"]
    ips = mips["pi_e"][rows, action] / mips["pi_b"][rows, action]
    exact = embedding_ratio([np.eye(20)], action[:, None], mips["pi_e"], mips["pi_b"])
    assert exact == pytest.approx(ips, rel=1e-12)
    assert (exact * mips["reward"]).mean() == pytest.approx(mips["expected"]["ipw"], rel=1e-9)


def test_the_stored_cluster_mips_and_offcem_are_met() -> None:
    expected, file = stored("modern_on_bandit_binary", "bandit_binary")
    pi_e, pi_b, q = (file[k][:, :, 0] for k in ("action_dist", "pi_b", "q_hat"))
    action, reward = file["action"], file["reward"]
    w = cluster_ratio(expected["cluster_of_action"], action, None, pi_e, None, pi_b)
    assert (w * reward).mean() == pytest.approx(expected["mips_cluster"], rel=1e-9)
    residual = reward - q[np.arange(len(action)), action]
    offcem = ((pi_e * q).sum(axis=1) + w * residual).mean()
    values = [v for k, v in expected.items() if k.startswith("offcem")]
    assert len(values) == 2
    assert values == [pytest.approx(offcem, rel=1e-9)] * 2


def policies(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(6, size=50),
        rng.dirichlet(np.ones(6), size=50),
        rng.dirichlet(np.ones(6), size=50),
    )


def test_one_cluster_weighs_1_and_clusters_of_one_weigh_as_ips() -> None:
    action, pi_e, pi_b = policies()
    one = cluster_ratio(np.zeros(6, int), action, None, pi_e, None, pi_b)
    assert one == pytest.approx(np.ones(50), rel=1e-12)
    single = cluster_ratio(np.arange(6), action, None, pi_e, None, pi_b)
    rows = np.arange(50)
    assert single == pytest.approx(pi_e[rows, action] / pi_b[rows, action], rel=1e-12)


def test_lists_in_any_order_with_empty_places_weigh_as_dense_rows_do() -> None:
    action, pi_e, pi_b = policies()
    cluster = np.array([5, 5, 2, 2, 2, 9])  # the last is not item -1
    rng = np.random.default_rng(1)
    order = rng.permuted(np.tile(np.arange(6), (50, 1)), axis=1)
    items = np.hstack([order, np.full((50, 2), -1)])
    probs = np.hstack([np.take_along_axis(pi_e, order, axis=1), np.full((50, 2), 0.3)])
    dense = cluster_ratio(cluster, action, None, pi_e, None, pi_b)
    assert cluster_ratio(cluster, action, items, probs, None, pi_b) == pytest.approx(dense)
    singles = [
        cluster_ratio(cluster, action[[i]], items[[i]], probs[[i]], None, pi_b[[i]])[0]
        for i in range(50)
    ]
    assert singles == pytest.approx(dense, rel=1e-12)


def test_the_cluster_weight_is_the_mean_item_weight_under_the_logging_policy() -> None:
    _, pi_e, pi_b = policies()
    cluster = np.array([0, 0, 1, 1, 1, 2])
    for a in range(6):
        w = cluster_ratio(cluster, np.full(50, a), None, pi_e, None, pi_b)
        inside = cluster == cluster[a]
        mean = (pi_e / pi_b * pi_b)[:, inside].sum(axis=1) / pi_b[:, inside].sum(axis=1)
        assert w == pytest.approx(mean)


def test_kmeans_finds_the_groups_of_item_vectors() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], 30)
    vectors = 10.0 * np.eye(3)[group] + rng.normal(size=(90, 3))
    found = kmeans_clusters(vectors, 3, seed=1)
    pairs = itertools.combinations(range(90), 2)
    assert all((found[i] == found[j]) == (group[i] == group[j]) for i, j in pairs)
    assert np.array_equal(found, kmeans_clusters(vectors, 3, seed=1))


def test_what_does_not_fit_is_refused_by_name() -> None:
    action, pi_e, pi_b = policies()
    cluster, none = np.zeros(6, int), pi_b * (np.arange(6) != action[:, None])
    calls = [
        (lambda: cluster_ratio(cluster, action[:9], None, pi_e, None, pi_b), "lengths"),
        (lambda: cluster_ratio(cluster, action, None, pi_e[:, :5], None, pi_b), r"\(50, 6\)"),
        (lambda: cluster_ratio(cluster[:2], action, None, pi_e, None, pi_b), "action must be in"),
        (lambda: cluster_ratio(cluster, action, action[:, None] + 6, pi_e[:, :1], None, pi_b),
         "items must be in"),
        (lambda: cluster_ratio(np.arange(6), action, None, pi_e, None, none), "row 0"),
        (lambda: embedding_ratio([np.eye(6)], action[:9, None], pi_e, pi_b), "lengths"),
        (lambda: embedding_ratio([np.eye(6)[:, :2]], action[:, None], pi_e, pi_b), "dimension 0"),
        (lambda: embedding_ratio([np.eye(6)] * 2, action[:, None], pi_e, pi_b), r"\(n, 2\)"),
        (lambda: embedding_ratio([np.eye(6)], action[:, None], pi_e[:, :5], pi_b), "pi_e"),
        (lambda: estimated_embedding_ratio(None, action, action, pi_e, pi_b), r"\(n, D\)"),
        (lambda: choose_dimensions(lambda d: action, 3, action, method="best"), "greedy or exact"),
        (lambda: choose_dimensions(lambda d: action, 30, action, method="exact"), "greedy"),
        (lambda: choose_dimensions(lambda d: action, 3, action, least=4), "least"),
        (lambda: kmeans_clusters(pi_e, 51), "k must be"),
    ]  # fmt: skip
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
