"""The worlds know their truth, the evaluator says what plain NumPy says, the rule picks by it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from scipy.special import stdtrit

from evaluation import RewardModel, evaluate
from evaluation.fqe import FittedQ
from experiments import bench, cli, ope_accuracy
from experiments.ope_worlds import Drawn, World, bandit, sessions, slates

Array = np.ndarray
CLIPS = (2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0, math.inf)
SHRINKS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0, math.inf)
SMOOTHS = (0.0, 0.001, 0.01, 0.1, 0.5)


def shown(table: Any) -> dict[tuple[str, str], float]:
    """Values by policy and estimator, where they are not withheld."""
    return {(r["policy"], r["estimator"]): r["value"] for r in table.rows
            if math.isfinite(r["value"])}  # fmt: skip


def rows_of(drawn: Drawn) -> Any:
    (batch,) = drawn.log.batches(10**9)
    return batch


def by_slope(values: list[Array]) -> float:
    """The mean of the rows' numbers that SLOPE takes, by its definition."""
    n = len(values[0])
    half = [float(stdtrit(n - 1, 0.95)) * math.sqrt(x.var() / (n - 1)) for x in values]
    order = sorted(range(len(values)), key=lambda i: -half[i])
    chosen = order[0]
    for place, now in enumerate(order):
        for wider in order[:place]:
            allowed = half[now] + (math.sqrt(6) - 1) * half[wider]
            if abs(values[wider].mean() - values[now].mean()) > allowed:
                return float(values[chosen].mean())
        chosen = now
    return float(values[chosen].mean())


def empirical_likelihood(weight: Array, reward: Array) -> float:
    """Cressie-Read's estimate with weights in [0, inf): least squares from uniform, E[w] = 1."""
    n = len(weight)
    if weight.sum() < n:  # an unseen row of unbounded weight takes the missing mass at no cost
        return float((weight * reward).mean() + (1 - weight.mean()) * reward.mean())
    w = np.append(weight, 0.0)  # an unseen row of weight 0 takes what is too much
    spread = w - w.mean()
    p = (1 + (1 - w.mean()) * spread / (spread**2).mean()) / (n + 1)
    assert p @ w == pytest.approx(1.0)
    assert p.sum() == pytest.approx(1.0)
    return float(p[:-1] @ (weight * reward))


def by_numpy(
    pi_e: Array, pi_b: Array, action: Array, reward: Array, q: Array, cluster: Array
) -> dict[str, float]:
    """Every bandit estimator from dense arrays, pi and q (n, A)."""
    i = np.arange(len(action))
    w, q_a, v = pi_e[i, action] / pi_b[i, action], q[i, action], (pi_e * q).sum(axis=1)
    same = cluster == cluster[action][:, None]  # (n, A)
    w_c = (pi_e * same).sum(axis=1) / (pi_b * same).sum(axis=1)
    rest = w * (reward - q_a)
    means = {
        "dm": v, "ips": w * reward, "snips": w * reward / w.mean(), "dr": v + rest,
        "sndr": v + rest / w.mean(), "mips": w_c * reward, "offcem": v + w_c * (reward - q_a),
    }  # fmt: skip
    tuned: dict[str, tuple[tuple[float, ...], Callable[[float], Array]]] = {
        "clipped_ips": (CLIPS, lambda m: np.minimum(w, m) * reward),
        "switch_dr": (CLIPS, lambda m: v + rest * (w <= m)),
        "dros": (SHRINKS, lambda m: v + rest * (1 if m == math.inf else m / (w**2 + m))),
        "sg_ips": (SMOOTHS, lambda m: w / (1 - m + m * w) * reward),
        "sg_dr": (SMOOTHS, lambda m: v + rest / (1 - m + m * w)),
        "ls": (CLIPS, lambda m: w * reward if m == math.inf else m * np.log(1 + w * reward / m)),
        "ix": (CLIPS, lambda m: pi_e[i, action] / (pi_b[i, action] + 1 / m) * reward),
    }  # fmt: skip
    if reward.min() < 0:
        tuned.pop("ls")
    out = {name: float(x.mean()) for name, x in means.items()}
    out |= {name: by_slope([f(m) for m in grid]) for name, (grid, f) in tuned.items()}
    return {**out, "cressie_read": empirical_likelihood(w, reward)}


@pytest.mark.parametrize(("actions", "binary"), [(10, True), (30, False)])
def test_every_bandit_estimator_is_what_plain_numpy_says(actions: int, binary: bool) -> None:
    world = bandit(actions, "light", 1500, binary=binary, seed=5)
    names = [name for name in ope_accuracy.UNITS["row"] if binary or name != "ls"]
    compared = 0
    for seed in range(2):
        drawn = world.draw(seed)
        batch = rows_of(drawn)
        model = RewardModel().fit(batch.context, batch.action, batch.reward, None, actions)
        table = evaluate(drawn.log, drawn.targets, estimators=names, reward_model=model,
                         clusters=world.clusters, intervals=["clt"])  # fmt: skip
        q = model.predict(batch.context, np.arange(actions), model.fold_of(batch.rows))  # (n, A)
        pi_b = batch.logging_policy(batch.context)
        assert np.array_equal(pi_b[np.arange(1500), batch.action], batch.propensity)
        assert world.clusters is not None
        found = shown(table)
        for policy, target in drawn.targets.items():
            _, pi_e = target.kind.distribution(batch)  # type: ignore[misc]
            plain = by_numpy(pi_e, pi_b, batch.action, batch.reward, q, world.clusters)
            assert sorted(plain) == sorted(names)
            for name in names:
                if (policy, name) in found:
                    assert found[policy, name] == pytest.approx(plain[name], rel=1e-9), name
                    compared += name != "dm"
    assert compared > 100


def test_every_slate_estimator_is_what_plain_numpy_says() -> None:
    world = slates("cascade", 1000)
    drawn = world.draw(1)
    batch = rows_of(drawn)
    names = [name for name in ope_accuracy.UNITS["slate"] if name != "pi"]
    found = shown(evaluate(drawn.log, drawn.targets, estimators=names))
    r, p, m = (x.reshape(-1, 3) for x in (batch.reward, batch.propensity, batch.marginal))
    assert len(found) > 15
    for policy, target in drawn.targets.items():
        logged = target.logged(batch)
        assert logged.marginal is not None
        assert logged.q_logged is not None
        assert logged.value is not None
        ratio = logged.pi.reshape(-1, 3) / p
        prefix = ratio.cumprod(axis=1)
        weight = {"sips": np.repeat(prefix[:, 2:], 3, axis=1), "rips": prefix,
                  "iips": logged.marginal.reshape(-1, 3) / m}  # fmt: skip
        plain = {name: (w * r).sum(axis=1).mean() for name, w in weight.items()}
        plain |= {f"sn{name}": (w * r / w.mean(axis=0)).sum(axis=1).mean()
                  for name, w in weight.items()}  # fmt: skip
        q, v = logged.q_logged.reshape(-1, 3), logged.value.reshape(-1, 3)
        before = np.column_stack([np.ones(len(r)), prefix[:, :2]])
        plain["cascade_dr"] = (prefix * (r - q) + before * v).sum(axis=1).mean()
        for name in names:
            if (policy, name) in found:
                assert found[policy, name] == pytest.approx(plain[name], rel=1e-9), name


def test_every_session_estimator_is_what_plain_loops_say() -> None:
    world = sessions(400)
    drawn = world.draw(2)
    batch, g = rows_of(drawn), world.gamma
    names = [name for name in ope_accuracy.UNITS["episode"] if name not in ("magic", "mis")]
    found = shown(evaluate(drawn.log, drawn.targets, estimators=names, gamma=g,
                           reward_model=FittedQ(gamma=g)))  # fmt: skip
    found |= shown(evaluate(drawn.log, drawn.targets, estimators=["mis"], gamma=g))
    assert len(found) > 20
    episodes = [np.flatnonzero(batch.episode == e) for e in range(400)]
    state = batch.context.argmax(axis=1)
    context = np.column_stack([batch.context, np.eye(10)[batch.step]])
    for policy, target in drawn.targets.items():
        _, pi = target.distribution(batch)  # type: ignore[misc]
        ratio = pi[np.arange(len(state)), batch.action] / batch.propensity
        q = FittedQ(gamma=g)
        q_a, v = q.fit_predict(context, batch.action, batch.reward, groups(episodes), pi, 3)
        plain = sequential(episodes, batch, ratio, q_a, v, g)
        occupancy = marginal(episodes, state, ratio)
        plain["drl"] = doubly_robust(episodes, batch.reward, q_a, v, occupancy, g)
        plain["mis"] = float((g**batch.step * occupancy * batch.reward).sum() / len(episodes))
        q_a, v = FittedQ(gamma=g, mrdr=True).fit_predict(
            context, batch.action, batch.reward, groups(episodes), pi, 3, None, batch.propensity
        )
        weight = np.concatenate([np.cumprod(ratio[rows]) for rows in episodes])
        plain["mrdr"] = doubly_robust(episodes, batch.reward, q_a, v, weight, g)
        for name in (*names, "mis"):
            if (policy, name) in found:
                assert found[policy, name] == pytest.approx(plain[name], rel=1e-9), name


def groups(episodes: list[Array]) -> Any:
    from evaluation.terms import Groups

    return Groups(np.repeat(np.arange(len(episodes)), [len(e) for e in episodes]))


def doubly_robust(
    episodes: list[Array], reward: Array, q: Array, v: Array, weight: Array, gamma: float
) -> float:
    total = 0.0
    for rows in episodes:
        before = 1.0
        for t, row in enumerate(rows):
            total += gamma**t * (weight[row] * (reward[row] - q[row]) + before * v[row])
            before = weight[row]
    return total / len(episodes)


def sequential(
    episodes: list[Array], batch: Any, ratio: Array, q: Array, v: Array, gamma: float
) -> dict[str, float]:
    """Estimators of products of ratios, an episode and a step at a time."""
    weight, reward = np.empty(len(ratio)), batch.reward
    for rows in episodes:
        weight[rows] = np.cumprod(ratio[rows])
    last = np.array([weight[rows[-1]] for rows in episodes])
    gains = np.array([sum(gamma**t * reward[r] for t, r in enumerate(rows)) for rows in episodes])
    out = {
        "fqe": float(np.mean([v[rows[0]] for rows in episodes])),
        "tis": float((last * gains).mean()), "wtis": float((last * gains).sum() / last.sum()),
        "pdis": sum(gamma**t * weight[r] * reward[r] for rows in episodes
                    for t, r in enumerate(rows)) / len(episodes),
        "seq_dr": doubly_robust(episodes, reward, q, v, weight, gamma),
        "wpdis": 0.0, "seq_sndr": float(np.mean([v[rows[0]] for rows in episodes])),
    }  # fmt: skip
    for t in range(max(map(len, episodes))):
        mass = np.mean([weight[rows[min(t, len(rows) - 1)]] for rows in episodes])
        for rows in episodes:
            if t < len(rows):
                share = gamma**t * weight[rows[t]] / mass / len(episodes)
                later = gamma * v[rows[t + 1]] if t + 1 < len(rows) else 0.0
                out["wpdis"] += share * reward[rows[t]]
                out["seq_sndr"] += share * (reward[rows[t]] + later - q[rows[t]])
    return out


def marginal(episodes: list[Array], state: Array, ratio: Array) -> Array:
    """Ratio of each row's state and action at its step, from the weights that arrived there."""
    out, arrived = np.empty(len(ratio)), {row: 1.0 for rows in episodes for row in rows[:1]}
    for t in range(max(map(len, episodes))):
        here = [rows for rows in episodes if len(rows) > t]
        for s in range(10):
            found = [rows for rows in here if state[rows[t]] == s]
            w = np.mean([arrived[rows[t]] for rows in found]) if found else 0.0
            for rows in found:
                out[rows[t]] = w * ratio[rows[t]]
                if len(rows) > t + 1:
                    arrived[rows[t + 1]] = out[rows[t]]
    return out


@pytest.mark.parametrize(
    "world",
    [bandit(10, "medium", 40_000, binary=True), bandit(30, "light", 40_000, binary=False),
     slates("cascade", 30_000), slates("independent", 30_000), sessions(20_000)],
    ids=lambda world: world.name,
)  # fmt: skip
def test_the_truth_is_what_weights_find_in_a_large_log(world: World) -> None:
    drawn = world.draw(11)
    batch = rows_of(drawn)
    for policy, truth in world.truth.items():
        ratio = drawn.targets[policy].logged(batch).pi / batch.propensity
        values = weighted_returns(batch, ratio, world.gamma)
        assert abs(values.mean() - truth) < 4.0 * values.std() / math.sqrt(len(values)), policy


def weighted_returns(batch: Any, ratio: Array, gamma: float) -> Array:
    """Each unit's return times the ratio of all that was done."""
    unit = batch.episode if batch.episode is not None else batch.decision
    if unit is None:
        return ratio * batch.reward
    _, code = np.unique(unit, return_inverse=True)
    step = batch.step if batch.episode is not None else np.zeros(len(code))
    return np.exp(np.bincount(code, np.log(ratio))) * np.bincount(code, gamma**step * batch.reward)


@pytest.mark.parametrize(("overlap", "goal"), [("light", 3.0), ("medium", 10.0), ("heavy", 50.0)])
def test_overlap_is_what_it_says(overlap: str, goal: float) -> None:
    world = bandit(10, overlap, 100_000, binary=True)
    drawn = world.draw(0)
    batch = rows_of(drawn)
    squares = [np.mean((t.logged(batch).pi / batch.propensity) ** 2)
               for t in drawn.targets.values()]  # fmt: skip
    assert np.mean(squares) == pytest.approx(goal, rel=0.1)


def test_a_log_with_holes_is_withheld_for_every_target() -> None:
    world = bandit(10, "light", 2000, binary=True, hidden=0.3)
    drawn = world.draw(0)
    table = evaluate(drawn.log, drawn.targets, estimators=["ips", "snips"])
    mass = {policy: table.diagnostics(policy)["kinds"]["action"]["covered_mass"]
            for policy in table.policies}  # fmt: skip
    assert mass["uniform"] == pytest.approx(0.7)
    assert all(0.6 < m < 0.8 for m in mass.values())
    assert not shown(table)


def test_what_is_measured_is_what_evaluate_shows() -> None:
    world = bandit(10, "light", 600, binary=True)
    runs, primary = ope_accuracy.measured(world, 2, seed=3)
    assert primary.any()
    for log in range(2):
        drawn = world.draw(3 * 2 + log)
        names = list(runs)
        table = evaluate(drawn.log, drawn.targets, estimators=names, reward_model=RewardModel(),
                         clusters=world.clusters, intervals=["clt", "student_t"])  # fmt: skip
        found = shown(table)
        for place, policy in enumerate(world.truth):
            for name, run in runs.items():
                assert run.shown[log, place] == ((policy, name) in found)
                if (policy, name) in found:
                    assert run.value[log, place] == found[policy, name]
        for row in table.rows:
            # the bench measures intervals that the table leaves out, and why it does
            if row["interval"] in ("clt", "student_t") and np.isfinite(row["low"]):
                ends = runs[row["estimator"]].ends[row["interval"]]
                assert tuple(ends[log, list(world.truth).index(row["policy"])]) == (
                    row["low"], row["high"],
                )  # fmt: skip


def test_figures_are_those_of_their_definitions() -> None:
    truth, value = np.array([1.0, 2.0, 4.0]), np.array([[1.0, 2.5, 4.0], [3.0, 2.0, 1.0]])
    ranked = ope_accuracy.ranked(value, truth, unit=2.0)
    assert ranked == {"rank_correlation": 0.0, "regret": 0.75}  # right once; then the worst of all
    error = (value - truth) / 2.0
    found = ope_accuracy.errors(error, np.array([[True, True, False], [False, False, False]]))
    assert found["bias"] == pytest.approx(np.mean([0.5, 0.125, 0.75]))
    assert found["rmse"] == pytest.approx(math.sqrt((0.0625 + 1.0 + 2.25) / 6))
    assert found["rmse_identified"] == pytest.approx(0.25 / math.sqrt(2))
    ends = np.stack([value - 1.0, value + 1.0], axis=2)
    ends[0, 0] = np.nan
    shown = np.array([[True, True, True], [True, False, False]])
    covered = ope_accuracy.covered(ends, truth, 2.0, shown)
    assert (covered["coverage"], covered["intervals"]) == (0.6, 5)
    assert (covered["coverage_identified"], covered["intervals_identified"]) == (2 / 3, 3)
    assert covered["width"] == covered["width_identified"] == 1.0
    assert covered["coverage_error_identified"] == pytest.approx(math.sqrt(2) * 2 / 3 / 3)


def made_up(estimator: str, interval: str, rmse: float, coverage: float, **more: Any) -> dict:
    row = {
        "unit": "row", "world": "w", "n": 9, "repeats": 10, "identified": 10, "bias": 0.0,
        "estimator": estimator, "interval": interval, "rmse_identified": rmse, "withheld": 0.0,
        "rank_correlation": 1.0, "regret": 0.0, "coverage_identified": coverage,
        "coverage_error_identified": 0.01, "width_identified": 1.0, "intervals_identified": 10,
    }  # fmt: skip
    return {**row, **more}


def test_the_rule_takes_the_best_that_covers_and_its_narrowest_interval() -> None:
    rows = [
        made_up("dm", "clt", 0.1, 0.5),
        made_up("dr", "clt", 0.2, 0.92),
        made_up("dr", "bootstrap", 0.2, 0.90, width_identified=0.5),
        made_up("dr", "hoeffding", 0.2, 1.0, width_identified=9.0),
        made_up("ips", "clt", 0.3, 0.95),
        made_up("ips", "clt", 0.0, 0.0, world="nothing identified", identified=9),
    ]
    assert [row["estimator"] for row in ope_accuracy.standings(rows, "row")] == ["dm", "dr", "ips"]
    assert [row["stands"] for row in ope_accuracy.standings(rows, "row")] == [False, True, True]
    assert ope_accuracy.winner(rows, "row") == ("dr", "clt")
    worse = made_up("dr", "clt", 0.2, 0.90, world="v")  # fails to cover in one world of two
    assert ope_accuracy.winner([*rows, worse], "row") == ("ips", "clt")
    assert ope_accuracy.winner(rows[:1], "row") is None


def test_the_bench_prints_every_estimator_and_writes_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose("bench", overrides=["bench=ope_accuracy", "quick=true", "repeats=2",
                                          f"out={tmp_path / 'rows.json'}"])  # fmt: skip
    bench.main.__wrapped__(cfg)
    printed, rows = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    for unit, names in ope_accuracy.UNITS.items():
        assert f"Estimators of {unit}s" in printed
        assert {row["estimator"] for row in rows if row["unit"] == unit} == {*names}
    assert {row["interval"] for row in rows} == {*ope_accuracy.INTERVALS}
    holes = [row for row in rows if "deficient" in row["world"]]
    assert {row["estimator"] for row in holes if row["withheld"] < 1} == {"dm"}
    assert "nan" not in printed
    assert all(row["repeats"] == 2 for row in rows)
