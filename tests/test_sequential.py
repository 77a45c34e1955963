"""Sequence estimators: stored numbers, and the exact value over all sessions of a tiny world."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import sequential as seq
from evaluation.terms import Groups, Terms

OPE = Path(__file__).parent / "data" / "ope"
GAMMA, T, S, A = 0.9, 3, 2, 2
END = 2  # the state of those who left
P0 = np.array([0.7, 0.3])
PI_B, PI_E = np.array([[0.4, 0.6], [0.8, 0.2]]), np.array([[0.9, 0.1], [0.25, 0.75]])
MOVE = np.array([[[0.5, 0.2, 0.3], [0.1, 0.9, 0.0]], [[0.3, 0.3, 0.4], [0.6, 0.2, 0.2]]])
GAIN = np.array([[1.0, -0.5], [2.0, 0.3]])  # (S, A)


class World:
    """Every session of at most T steps, each a row block, with its probability under PI_B."""

    def __init__(self) -> None:
        self.chance: list[float] = []
        rows: list[tuple[int, int, int, int]] = []  # episode, step, state, action
        for path in itertools.product(range(S), range(A), repeat=T):
            self._walk(path, rows)
        episode, self.step, self.state, self.action = np.array(rows).T
        self.groups = Groups(episode, self.step)
        self.ratio = (PI_E / PI_B)[self.state, self.action]
        self.reward = GAIN[self.state, self.action]
        self.product = self.groups.cumulative_product(self.ratio)
        wrong = np.random.default_rng(3).normal(size=(S, A))  # a model that knows nothing
        self.q_logged = wrong[self.state, self.action]
        self.value = (PI_E * wrong).sum(axis=1)[self.state]

    def _walk(self, path: tuple[int, ...], rows: list[tuple[int, int, int, int]]) -> None:
        """Add the sessions that follow a path and leave somewhere: each prefix is met once."""
        chance = P0[path[0]]
        for t in range(T):
            state, action = path[2 * t], path[2 * t + 1]
            chance *= PI_B[state, action]
            last = t == T - 1
            if all(x == 0 for x in path[2 * t + 2 :]):  # this prefix for the first time
                stop = chance * (1.0 if last else MOVE[state, action, END])
                if stop > 0:
                    number = len(self.chance)
                    self.chance.append(stop)
                    rows += [(number, u, path[2 * u], path[2 * u + 1]) for u in range(t + 1)]
            if not last:
                chance *= MOVE[state, action, path[2 * t + 2]]

    def mean(self, terms: Terms) -> float:
        """Expectation of a plain mean over all logs."""
        assert terms.bottom is None
        return float(np.array(self.chance) @ terms.values())


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def dynamic_value(pi: np.ndarray) -> float:
    v = np.zeros(S)
    for _ in range(T):
        v = (pi * (GAIN + GAMMA * MOVE[:, :, :S] @ v)).sum(axis=1)
    return float(P0 @ v)


def marginals(pi: np.ndarray) -> np.ndarray:
    """Chance to be in a state at a time and take an action, (T, S, A)."""
    d, out = P0, []
    for _ in range(T):
        out.append(d[:, None] * pi)
        d = np.einsum("sa,sax->x", out[-1], MOVE)[:S]
    return np.array(out)


TRUTH = dynamic_value(PI_E)


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    """Rows of the stored log, its target's ratios and model."""
    with np.load(OPE / "sequential_tabular.npz") as file:
        x = {name: file[name] for name in file}
    n = x["pscore"].size
    rows, action = np.arange(n), x["action"].ravel()
    groups = Groups(np.repeat(np.arange(300), 5))
    ratio = x["eval_action_dist"][rows, action] / x["pscore"]
    return {
        "groups": groups,
        "ratio": ratio,
        "product": groups.cumulative_product(ratio),
        "marginal": x["w_state_action"],
        "reward": x["reward"].ravel(),
        "q": x["q_hat"][rows, action],
        "v": (x["eval_action_dist"] * x["q_hat"]).sum(axis=1),
        "state": x["state"].ravel(),
        "gamma": float(x["gamma"]),
    }


def estimate(terms: Terms) -> float:
    return float(terms.values().mean())


def test_the_stored_estimates_are_matched(stored):
    with open(OPE / "sequential_tabular.json") as file:
        expected = {name: e["value"] for name, e in json.load(file)["expected"].items()}
    groups, w, r, gamma = (stored[k] for k in ("groups", "product", "reward", "gamma"))
    q, v = stored["q"], stored["v"]
    ours = {
        "dm": seq.direct(groups, v),
        "tis": seq.tis(groups, w, r, gamma),
        "pdis": seq.pdis(groups, w, r, gamma),
        "dr": seq.doubly_robust(groups, w, r, q, v, gamma),
        "sntis": seq.wtis(groups, w, r, gamma),
        "snpdis": seq.wpdis(groups, w, r, gamma, 5),
        "sndr": seq.weighted_doubly_robust(groups, w, r, q, v, gamma, 5),
    }
    for k in range(3):
        w_k = seq.sope_weights(groups, stored["marginal"], stored["ratio"], k)
        ours[f"sam_is(n_step_pdis={k})"] = seq.marginalised(groups, w_k, r, gamma)
        ours[f"sam_snis(n_step_pdis={k})"] = seq.wpdis(groups, w_k, r, gamma, 5)
    for name, terms in ours.items():
        assert estimate(terms) == pytest.approx(expected[name], rel=1e-9), name


def test_the_estimates_that_peers_store_wrong_are_right_here(stored):
    groups, r, gamma, q, v = (stored[k] for k in ("groups", "reward", "gamma", "q", "v"))
    drl = seq.doubly_robust(groups, stored["marginal"], r, q, v, gamma)
    assert estimate(drl) == pytest.approx(2.25219, abs=5e-6)  # discounted
    for k, plain, weighted in ((0, 2.25219, 2.2569), (1, 2.29749, 2.2809), (2, 2.37407, 2.3538)):
        w = seq.sope_weights(groups, stored["marginal"], stored["ratio"], k)
        sam_dr = estimate(seq.marginalised(groups, w, r, gamma, q, v))
        sam_sndr = estimate(seq.weighted_doubly_robust(groups, w, r, q, v, gamma, 5))
        assert sam_dr == pytest.approx(plain, abs=1.5e-5)  # as printed; wrong ones are 5e-3 off
        assert sam_sndr == pytest.approx(weighted, abs=5e-5)
        dense = [x.reshape(300, 5) for x in (w, r, q, v)]
        assert sam_dr == pytest.approx(by_hand(*dense, gamma), rel=1e-9)
        dense[0] = dense[0] / dense[0].mean(axis=0)
        assert sam_sndr == pytest.approx(by_hand(*dense, gamma), rel=1e-9)


def by_hand(w: np.ndarray, r: np.ndarray, q: np.ndarray, v: np.ndarray, gamma: float) -> float:
    """Model and residuals of sessions of equal length, (n, T) each."""
    following = np.column_stack([v[:, 1:], np.zeros(len(v))])  # none behind the last step
    row = gamma ** np.arange(w.shape[1]) * w * (r + gamma * following - q)
    return float((v[:, 0] + row.sum(axis=1)).mean())


def test_all_sessions_of_the_world_are_there_once_and_ragged(world):
    assert sum(world.chance) == pytest.approx(1.0, abs=1e-12)
    assert set(world.groups.lengths) == {1, 2, 3}
    rows = world.groups.index, world.step, world.state, world.action
    paths = {tuple(p) for p in np.split(np.array(rows[2:]).T.ravel(), 2 * world.groups.ends[:-1])}
    assert len(paths) == len(world.groups)


@pytest.mark.parametrize("name", ["tis", "pdis", "doubly_robust", "with_residuals"])
def test_products_of_ratios_are_unbiased_whatever_the_model(world, name):
    g, w, r = world.groups, world.product, world.reward
    terms = {
        "tis": seq.tis(g, w, r, GAMMA),
        "pdis": seq.pdis(g, w, r, GAMMA),
        "doubly_robust": seq.doubly_robust(g, w, r, world.q_logged, world.value, GAMMA),
        "with_residuals": seq.marginalised(g, w, r, GAMMA, world.q_logged, world.value),
    }[name]
    assert world.mean(terms) == pytest.approx(TRUTH, abs=1e-12)


def test_the_joint_ratio_on_every_row_is_the_last_weight_of_trajectory_sampling(world):
    joint = world.groups.last(world.product)[world.groups.index]
    by_joint = seq.tis(world.groups, joint, world.reward, GAMMA).values()
    by_product = seq.tis(world.groups, world.product, world.reward, GAMMA).values()
    np.testing.assert_array_equal(by_joint, by_product)


def test_marginal_ratios_are_unbiased_whatever_the_model(world):
    g, r = world.groups, world.reward
    w = (marginals(PI_E) / marginals(PI_B))[world.step, world.state, world.action]
    model = world.q_logged, world.value
    for terms in (
        seq.marginalised(g, w, r, GAMMA),
        seq.marginalised(g, w, r, GAMMA, *model),
        seq.doubly_robust(g, w, r, *model, GAMMA),
        seq.pdis(g, seq.sope_weights(g, w, world.ratio, 1), r, GAMMA),
        seq.pdis(g, seq.sope_weights(g, w, world.ratio, 2), r, GAMMA),
    ):
        assert world.mean(terms) == pytest.approx(TRUTH, abs=1e-12)


def test_weights_of_every_step_average_one_over_ragged_sessions(world):
    exact = (marginals(PI_E) / marginals(PI_B))[world.step, world.state, world.action]
    for w in (world.product, exact):
        bottom = seq.wpdis(world.groups, w, world.reward, GAMMA, 5).bottom  # (G, 5)
        np.testing.assert_allclose(np.array(world.chance) @ bottom, 1.0, atol=1e-12)


def test_a_value_behind_the_last_row_is_used_where_a_session_was_cut(world):
    behind = world.groups.next(world.value, 7.0)
    w, r, q, v = world.product, world.reward, world.q_logged, world.value
    cut = seq.marginalised(world.groups, w, r, GAMMA, q, v, behind).values()
    whole = seq.marginalised(world.groups, w, r, GAMMA, q, v).values()
    extra = GAMMA**world.groups.lengths * world.groups.last(w) * 7.0
    np.testing.assert_allclose(cut - whole, extra)


def uniform_log() -> tuple[Groups, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sessions as often as they are likely, so that frequencies in the log are exact."""
    after = np.array([[[0, 1, 1, END], [0, 0, 0, 1]], [[1, 0, END, END], [1, 1, 0, END]]])
    episodes = []
    for start, actions, fate in itertools.product((0, 1), range(8), range(16)):
        state, rows = start, []
        for t in range(T):
            if state == END:
                break
            action = actions >> t & 1
            rows.append((t, state, action))
            state = after[state, action, fate >> 2 * t & 3]
        episodes.append(rows)
    number = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])
    step, state, action = np.array([row for e in episodes for row in e]).T
    return Groups(number), step, state, action, (PI_E / 0.5)[state, action]


def test_marginal_ratios_are_found_from_a_log_of_exact_frequencies():
    groups, step, state, _, ratio = uniform_log()
    found = seq.marginal_state_action_weights(groups, state + 10, ratio)
    product = groups.cumulative_product(ratio)
    for t, s in itertools.product(range(3), range(2)):
        here = (step == t) & (state == s)  # the ratio is the mean of the products before
        before = groups.previous(product, 1.0)[here].mean()
        np.testing.assert_allclose(found[here], before * ratio[here], rtol=1e-12)
    assert found.var() < product.var()


def test_ratios_of_occupancies_give_the_same_value_without_looking_at_the_time():
    groups, _, state, action, ratio = uniform_log()
    by_time = seq.marginal_state_action_weights(groups, state, ratio)
    pooled = seq.occupancy_ratio(groups, state, ratio, GAMMA)
    assert len({*zip(state, action, pooled.round(9), strict=True)}) == 4
    reward = GAIN[state, action]
    exact = estimate(seq.pdis(groups, groups.cumulative_product(ratio), reward, GAMMA))
    assert estimate(seq.marginalised(groups, by_time, reward, GAMMA)) == pytest.approx(exact)
    assert estimate(seq.marginalised(groups, pooled, reward, GAMMA)) == pytest.approx(exact)


def test_sessions_of_one_step_are_bandit_rows():
    rng = np.random.default_rng(0)
    w, r, q, v = rng.exponential(size=50), *rng.normal(size=(3, 50))
    groups = Groups(np.arange(50))
    for terms in (seq.tis(groups, w, r, GAMMA), seq.pdis(groups, w, r, GAMMA)):
        np.testing.assert_allclose(terms.values(), w * r)
    for terms in (seq.wtis(groups, w, r, GAMMA), seq.wpdis(groups, w, r, GAMMA, 1)):
        np.testing.assert_allclose(terms.values(), w * r / w.mean())
    dr = v + w * (r - q)
    np.testing.assert_allclose(seq.doubly_robust(groups, w, r, q, v, GAMMA).values(), dr)
    np.testing.assert_allclose(seq.marginalised(groups, w, r, GAMMA, q, v).values(), dr)
    weighted = seq.weighted_doubly_robust(groups, w, r, q, v, GAMMA, 1).values()
    np.testing.assert_allclose(weighted, v + w * (r - q) / w.mean())


@given(st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_weighted_estimates_do_not_change_with_the_scale_of_the_weights(scale, seed):
    rng = np.random.default_rng(seed)
    groups = Groups(np.repeat(np.arange(6), [3, 1, 2, 3, 3, 1]))
    w, r, q, v = rng.exponential(size=13), *rng.normal(size=(3, 13))
    for f in (
        lambda x: seq.wtis(groups, x, r, GAMMA),
        lambda x: seq.wpdis(groups, x, r, GAMMA, 4),
        lambda x: seq.weighted_doubly_robust(groups, x, r, q, v, GAMMA, 4),
    ):
        np.testing.assert_allclose(f(scale * w).values(), f(w).values(), rtol=1e-9, atol=1e-12)


def test_a_thousand_steps_are_weighted_without_losing_them_on_the_way():
    steps = 1000
    ratio = np.repeat([0.125, 8.0], steps // 2)  # half-way 8^-500, which no float holds
    groups = Groups(np.zeros(steps, dtype=int))
    w = groups.cumulative_product(ratio)
    assert estimate(seq.tis(groups, w, np.ones(steps), 1.0)) == pytest.approx(1000.0, rel=1e-9)
    up_and_down = np.tile(ratio[::-1], 3)  # half-way 8^500
    many = Groups(np.repeat(np.arange(3), steps))
    np.testing.assert_allclose(seq.effective_episodes(many, up_and_down), 3.0)  # all weights equal


def test_effective_episodes_are_those_of_the_products(world):
    ess = seq.effective_episodes(world.groups, world.ratio)
    padded = world.groups.padded(world.product, T, world.groups.last(world.product))
    np.testing.assert_allclose(ess, padded.sum(axis=0) ** 2 / (padded**2).sum(axis=0))
    assert seq.effective_episodes(world.groups, 0 * world.ratio).tolist() == [0.0] * T


def test_the_horizon_is_capped_where_episodes_run_out_and_the_rest_is_bounded():
    rng = np.random.default_rng(0)
    steps, episodes = 40, 1000
    groups = Groups(np.repeat(np.arange(episodes), steps))
    ratio = np.where(rng.random(steps * episodes) < 0.5, 0.5, 1.5)  # E[rho^2] = 1.25
    cap = seq.horizon_cap(groups, ratio, GAMMA, (0.0, 2.0))
    ess = seq.effective_episodes(groups, ratio)
    assert 6 <= cap.horizon <= 16  # 1000 / 1.25^h = 100 at h = 10.3
    assert cap.ess == ess[cap.horizon - 1] >= 100 > ess[cap.horizon]
    left = steps - cap.horizon
    bound = GAMMA**cap.horizon * 2.0 * (1 - GAMMA**left) / (1 - GAMMA)
    assert cap.bias_bound == pytest.approx(bound)
    assert cap.log_weight_variance == pytest.approx(steps * 0.3017, rel=0.15)  # ((ln 3) / 2)^2
    assert cap.ess_implied < 10
    whole = seq.horizon_cap(groups, np.ones(len(ratio)), GAMMA, (0.0, 2.0))
    assert (whole.horizon, whole.ess, whole.bias_bound) == (steps, episodes, 0.0)
    few = seq.horizon_cap(Groups(np.zeros(4)), np.ones(4), 1.0, (-3.0, 2.0))
    assert (few.horizon, few.bias_bound) == (0, 12.0)  # undiscounted, and the lower end counts


def noisy_sessions(seed: int, bias: float) -> tuple[Groups, dict[str, np.ndarray]]:
    """200 sessions of a walk worth 1 a step whatever is done; the model is off by `bias`."""
    rng = np.random.default_rng(seed)
    groups = Groups(np.repeat(np.arange(200), 8))
    ratio = np.where(rng.random(1600) < 0.5, 0.4, 1.6)
    left = (8 - groups.place).astype(float)
    return groups, {
        "weight": groups.cumulative_product(ratio),
        "reward": 1.0 + rng.normal(size=1600),
        "q_logged": left + bias,
        "value": left + bias,
    }


def test_magic_takes_a_good_model_and_leaves_a_bad_one():
    to_the_end = {0.0: [], 40.0: []}
    for bias, seed in itertools.product(to_the_end, range(10)):
        groups, x = noisy_sessions(seed, bias)
        share = seq.blend(seq.weighted_doubly_robust(groups, **x, gamma=1.0, horizon=8))
        assert share[0] == pytest.approx(1.0)
        assert (np.diff(share) <= 1e-12).all()
        to_the_end[bias].append(share[-1])
    assert np.mean(to_the_end[0.0]) < 0.2
    assert min(to_the_end[40.0]) > 0.95


def test_magic_lies_between_the_model_and_weighted_doubly_robust_and_errs_less_than_it():
    error = {"magic": 0.0, "wdr": 0.0}
    for seed in range(40):
        groups, x = noisy_sessions(seed, 0.1)
        magic = estimate(seq.magic(groups, **x, gamma=1.0, horizon=8))
        terms = seq.weighted_doubly_robust(groups, **x, gamma=1.0, horizon=8)
        partial = (terms.top / terms.bottom.mean(axis=0)).mean(axis=0).cumsum()  # model ... WDR
        assert partial.min() - 1e-9 <= magic <= partial.max() + 1e-9
        error["magic"] += (magic - 8.0) ** 2
        error["wdr"] += (partial[-1] - 8.0) ** 2
    assert error["magic"] < 0.5 * error["wdr"]


def test_magic_stops_where_no_weight_is_left():
    groups, x = noisy_sessions(0, 0.0)
    x["weight"] = np.where(groups.place >= 3, 0.0, x["weight"])
    assert np.isnan(estimate(seq.weighted_doubly_robust(groups, **x, gamma=1.0, horizon=8)))
    assert estimate(seq.magic(groups, **x, gamma=1.0, horizon=8)) == pytest.approx(8.0, abs=0.5)


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_the_minimum_over_the_simplex_is_below_every_other_point(seed, m):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(m, max(1, m - 1)))  # of less than full rank
    matrix = factor @ factor.T * 10.0 ** rng.integers(-20, 20)
    x = seq.simplex_minimum(matrix)
    assert x.sum() == pytest.approx(1.0)
    assert (x >= 0).all()
    others = np.vstack([np.eye(m), rng.dirichlet(np.ones(m), 200)])
    least = np.einsum("ki,ij,kj->k", others, matrix, others).min()
    assert x @ matrix @ x <= least + 1e-9 * np.trace(matrix)


def test_what_cannot_be_meant_is_refused(world):
    g, w, r = world.groups, world.product, world.reward
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 1.1"):
        seq.pdis(g, w, r, 1.1)
    with pytest.raises(ValueError, match="both q_logged and value"):
        seq.marginalised(g, w, r, GAMMA, q_logged=r)
    with pytest.raises(ValueError, match="k must be at least 0"):
        seq.sope_weights(g, w, world.ratio, -1)
    with pytest.raises(ValueError, match="has 3 steps, the horizon is 2"):
        seq.wpdis(g, w, r, GAMMA, 2)
