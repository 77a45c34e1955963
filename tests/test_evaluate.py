"""evaluate(): verdicts by support, stored values through the public door, what it refuses."""

from pathlib import Path

import numpy as np
import pytest

from evaluation import DecisionLog, RewardModel, Target, evaluate

OPE = Path(__file__).parent / "data" / "ope"
IDENTIFIED, PARTIAL, WITHHELD = "identified", "partially identified", "not identified"


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def world(n=4000, actions=5, seed=0, shown=None, sharp=0.5):
    """A log of a softmax policy; `shown` actions only, where given. Truth is known by row."""
    rng = np.random.default_rng(seed)
    x, taste = rng.normal(size=(n, 3)), np.random.default_rng(99).normal(size=(3, actions))
    pi_b = softmax(x @ taste * sharp)
    if shown is not None:
        pi_b[:, shown:] = 0.0
        pi_b /= pi_b.sum(axis=1, keepdims=True)
    action = (pi_b.cumsum(axis=1) < rng.random(n)[:, None]).sum(axis=1)
    mean = 1.0 / (1.0 + np.exp(-(x @ taste) * 0.5))
    reward = (rng.random(n) < mean[np.arange(n), action]).astype(float)
    return x, taste, pi_b, action, reward, mean


def logged(n=4000, support=None, **more):
    x, taste, pi_b, action, reward, mean = world(n, **more)
    log = DecisionLog.from_arrays(
        action=action, reward=reward, propensity=pi_b[np.arange(n), action], context=x,
        support=pi_b > 0 if support is True else support,
    )  # fmt: skip
    pi_e = softmax(x @ taste)
    return log, pi_e, (pi_e * mean).sum(axis=1).mean()


def of(table, policy, estimator):
    """The row of a table; the first where there are several intervals."""
    return next(r for r in table.rows if (r["policy"], r["estimator"]) == (policy, estimator))


def test_covered_mass_of_0_a_third_and_1_have_the_three_verdicts():
    n, actions = 6000, 10
    rng = np.random.default_rng(0)
    pi_b = np.full((n, actions), 0.0)
    pi_b[:, :5] = 0.2  # the log shows the first half only
    action = rng.integers(5, size=n)
    reward = (rng.random(n) < 0.1 + 0.05 * action).astype(float)
    log = DecisionLog.from_arrays(
        action=action, reward=reward, propensity=pi_b[np.arange(n), action], support=pi_b > 0,
        num_actions=actions, reward_range=(0.0, 1.0),
    )  # fmt: skip

    def target(inside):
        pi = np.zeros((n, actions))
        pi[:, :5], pi[:, 5:] = inside / 5, (1 - inside) / 5
        return Target.from_matrix(pi)

    table = evaluate(log, {m: target(float(m)) for m in ("0", "0.3", "1")}, estimators=["ips"])
    frame = table.frame().set_index(["policy", "estimator"])
    assert frame.loc[("1", "ips"), "verdict"] == IDENTIFIED
    assert frame.loc[("1", "ips"), "value"] == pytest.approx(0.2, abs=0.02)
    assert frame.loc[("0.3", "ips"), "verdict"] == PARTIAL
    assert frame.loc[("0.3", "ips"), "covered_mass"] == pytest.approx(0.3, rel=1e-12)
    assert frame.loc[("0", "ips"), "verdict"] == WITHHELD
    for policy in ("0", "0.3"):
        numbers = frame.loc[(policy, "ips"), ["value", "std_error", "low", "high"]]
        assert numbers.isna().all()
    low, high = frame.loc[("0.3", "bounds"), ["low", "high"]]
    assert low == pytest.approx(0.3 * 0.2, abs=0.01)
    assert high == pytest.approx(0.3 * 0.2 + 0.7, abs=0.01)
    assert frame.loc[("0", "bounds"), ["low", "high"]].tolist() == [0.0, 1.0]


def test_missing_mass_is_seen_without_being_told_the_support():
    log, pi_e, _ = logged(shown=3)
    row = of(evaluate(log, {"e": Target.from_matrix(pi_e)}), "e", "snips")
    assert row["verdict"] == PARTIAL
    assert np.isnan(row["value"])
    assert row["covered_mass"] == pytest.approx(pi_e[:, :3].sum(axis=1).mean(), abs=0.02)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_weights_that_do_not_average_one_are_never_identified(factor):
    log, pi_e, _ = logged()
    x, _, pi_b, action, reward, _ = world()
    wrong = np.minimum(pi_b[np.arange(4000), action] * factor, 1.0)
    log = DecisionLog.from_arrays(action=action, reward=reward, propensity=wrong, context=x)
    table = evaluate(log, {"e": Target.from_matrix(pi_e)}, reward_model=RewardModel())
    assert all(r["verdict"] != IDENTIFIED for r in table.rows)
    assert all(np.isnan(r["value"]) for r in table.rows if r["estimator"] not in ("dm", "bounds"))


def test_a_restricted_target_is_identified_and_says_that_it_is_another():
    log, pi_e, _ = logged(shown=3, support=True)
    target = Target.from_matrix(pi_e).restricted()
    table = evaluate(log, {"e": target}, reward_model=RewardModel())
    assert {r["verdict"] for r in table.rows} == {IDENTIFIED}
    assert "restricted to the log's support" in table.diagnostics("e")["estimand"]


def test_the_truth_is_inside_and_the_model_narrows_the_interval():
    log, pi_e, truth = logged()
    names = ["dr", "ips", "snips"]
    table = evaluate(log, {"e": Target.from_matrix(pi_e)}, estimators=names,
                     reward_model=RewardModel())  # fmt: skip
    rows = {name: of(table, "e", name) for name in ("dr", "ips", "snips")}
    for row in rows.values():
        assert row["low"] < truth < row["high"]
    assert rows["dr"]["std_error"] < rows["ips"]["std_error"]


def test_the_logging_policy_has_weight_one_and_the_mean_reward():
    log, _, _ = logged()
    _, _, pi_b, _, reward, _ = world()
    row = of(evaluate(log, {"b": Target.from_matrix(pi_b)}, estimators=["ips"]), "b", "ips")
    assert (row["value"], row["mean_weight"]) == (pytest.approx(reward.mean()), pytest.approx(1))
    assert row["ess"] == pytest.approx(4000)


def test_differences_are_paired_and_adjusted_over_the_policies():
    log, pi_e, _ = logged()
    near = 0.95 * pi_e + 0.05 / 5
    targets = {"e": pi_e, "near": near, "uniform": np.full_like(pi_e, 0.2)}
    table = evaluate(log, {k: Target.from_matrix(v) for k, v in targets.items()},
                     estimators=["snips", "clipped_ips"], baseline="near")  # fmt: skip
    compared = table.compare().set_index("policy")
    alone = [of(table, p, "snips")["std_error"] for p in ("e", "near")]
    assert compared.loc["e", "std_error"] < 0.2 * np.hypot(*alone)
    gap = of(table, "e", "snips")["value"] - of(table, "near", "snips")["value"]
    assert compared.loc["e", "difference"] == pytest.approx(gap, rel=1e-9)
    assert (compared["p_holm"] >= compared["p_value"]).all()
    assert compared["p_holm"].max() == pytest.approx(
        max(compared["p_value"].max(), 2 * compared["p_value"].min())
    )
    assert set(compared["estimator"]) == {"snips"}  # none of lambdas chosen on this log


def test_fitted_propensities_are_said_everywhere_and_widen_the_interval():
    x, taste, pi_b, action, reward, _ = world(1500)
    log = DecisionLog.from_arrays(action=action, reward=reward, context=x)
    target = {"e": Target.from_matrix(softmax(x @ taste))}
    table = evaluate(log, target, estimators=["snips"], replicates=8)
    bare = evaluate(log, target, estimators=["snips"], replicates=0)
    assert of(table, "e", "snips")["std_error"] > of(bare, "e", "snips")["std_error"]
    assert table.about["propensities"] == "estimated"
    assert "propensities are estimated" in str(table)
    known = DecisionLog.from_arrays(
        action=action, reward=reward, propensity=pi_b[np.arange(1500), action], context=x
    )
    value = of(evaluate(known, target, estimators=["snips"]), "e", "snips")["value"]
    assert of(table, "e", "snips")["value"] == pytest.approx(value, abs=0.03)
    assert "propensities are estimated" not in str(evaluate(known, target))


def test_an_adaptive_log_has_only_intervals_that_hold_for_it():
    x, taste, pi_b, action, reward, _ = world(2000)
    log = DecisionLog.from_arrays(
        action=action, reward=reward, propensity=pi_b[np.arange(2000), action], adaptive=True
    )
    targets = {"e": Target.from_matrix(softmax(x @ taste)), "b": Target.from_matrix(pi_b)}
    intervals = ["clt", "confidence_sequence"]
    table = evaluate(log, targets, estimators=["ips", "snips"], intervals=intervals, baseline="b")
    has = {(r["estimator"], r["interval"]): np.isfinite(r["low"]) for r in table.rows}
    assert has == {("ips", "clt"): False, ("ips", "confidence_sequence"): True,
                   ("snips", "clt"): False, ("snips", "confidence_sequence"): False}  # fmt: skip
    assert table.compare()["low"].isna().all()
    assert "adaptive" in str(table)


@pytest.mark.parametrize("rows", [1, 77, 100_000])
def test_values_do_not_depend_on_the_size_of_batches(rows):
    log, pi_e, _ = logged(600)
    names = ["ips", "snips", "dr", "dros", "cressie_read", "quantiles"]
    targets = {"e": Target.from_matrix(pi_e)}
    one = evaluate(log, targets, estimators=names, reward_model=RewardModel())
    two = evaluate(log, targets, estimators=names, reward_model=RewardModel(), batch_rows=rows)
    for a, b in zip(one.rows, two.rows, strict=True):
        assert b["value"] == pytest.approx(a["value"], rel=1e-9, nan_ok=True)
        assert b["low"] == pytest.approx(a["low"], rel=1e-9, nan_ok=True)


def test_a_scan_of_parquet_says_what_the_arrays_say(tmp_path):
    import pandas as pd

    x, taste, pi_b, action, reward, _ = world(3000)
    pi = softmax(x @ taste)[np.arange(3000), action]
    frame = pd.DataFrame({"item": action, "click": reward, "pi_e": pi,
                          "p": pi_b[np.arange(3000), action]})  # fmt: skip
    for i in range(3):
        frame[i * 1000 : (i + 1) * 1000].to_parquet(tmp_path / f"{i}.parquet")
    names = {"action": "item", "reward": "click", "propensity": "p"}
    log = DecisionLog.scan(str(tmp_path / "*.parquet"), extra=["pi_e"], columns=names)
    scanned = evaluate(
        log, {"e": Target.from_probabilities("pi_e")}, intervals=["clt", "bootstrap"]
    )
    log = DecisionLog.from_arrays(action=action, reward=reward, propensity=frame["p"])
    arrays = evaluate(log, {"e": Target.from_probabilities(pi)}, intervals=["clt", "bootstrap"])
    for one, two in zip(scanned.rows, arrays.rows, strict=True):
        assert one["value"] == pytest.approx(two["value"], rel=1e-12)
        assert one["high"] == pytest.approx(two["high"], rel=1e-12)


def test_clusters_widen_the_interval_of_repeated_users():
    x, taste, pi_b, action, reward, _ = world(1000)
    p = pi_b[np.arange(1000), action]
    pi = softmax(x @ taste)

    def error(times, cluster):
        log = DecisionLog.from_arrays(
            action=np.repeat(action, times), reward=np.repeat(reward, times),
            propensity=np.repeat(p, times),
            cluster=np.repeat(np.arange(1000), times) if cluster else None,
        )  # fmt: skip
        target = Target.from_matrix(np.repeat(pi, times, axis=0))
        return of(evaluate(log, {"e": target}, estimators=["snips"]), "e", "snips")["std_error"]

    assert error(5, True) == pytest.approx(error(1, False), rel=0.1)
    assert error(5, False) == pytest.approx(error(1, False) / 5**0.5, rel=0.05)


def test_a_lambda_is_chosen_for_each_policy_unless_it_is_given():
    log, pi_e, _ = logged()
    names = ["dros", "clipped_ips(lam=1.5)"]
    table = evaluate(log, {"e": Target.from_matrix(pi_e)}, estimators=names,
                     reward_model=RewardModel())  # fmt: skip
    assert of(table, "e", "dros")["lam"] in (0.1, 1, 10, 100, 1000, 10_000, np.inf)
    assert "chosen on this log" in of(table, "e", "dros")["note"]
    assert np.isnan(of(table, "e", "dros")["low"])
    assert np.isfinite(of(table, "e", "clipped_ips")["low"])
    assert of(table, "e", "clipped_ips")["lam"] == 1.5
    assert "chosen" not in of(table, "e", "clipped_ips")["note"]


def test_cluster_estimators_are_right_when_items_of_a_cluster_answer_alike():
    n, actions, cluster = 8000, 6, np.array([0, 0, 0, 1, 1, 1])
    rng = np.random.default_rng(1)
    x = rng.normal(size=(n, 2))
    pi_b, pi_e = (
        softmax(x @ rng.normal(size=(2, actions))),
        softmax(x @ rng.normal(size=(2, actions))),
    )
    action = (pi_b.cumsum(axis=1) < rng.random(n)[:, None]).sum(axis=1)
    mean = np.where(cluster == 0, 0.2, 0.7)
    reward = (rng.random(n) < mean[action]).astype(float)
    log = DecisionLog.from_arrays(action=action, reward=reward, context=x,
                                  propensity=pi_b[np.arange(n), action])  # fmt: skip
    table = evaluate(log, {"e": Target.from_matrix(pi_e)}, estimators=["mips", "ips"],
                     clusters=cluster)  # fmt: skip
    truth = (pi_e @ mean).mean()
    mips, ips = of(table, "e", "mips"), of(table, "e", "ips")
    assert mips["low"] < truth < mips["high"]
    assert mips["std_error"] < ips["std_error"]
    assert "answer alike" in mips["note"]


def test_a_classifier_tells_weights_without_any_propensity():
    log, pi_e, truth = logged(8000)
    table = evaluate(log, {"e": Target.from_matrix(pi_e)}, estimators=["balanced_ips"])
    row = of(table, "e", "balanced_ips")
    assert row["value"] == pytest.approx(truth, abs=0.05)
    assert row["mean_weight"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"estimators": ["dro"]}, "unknown estimator 'dro', did you mean"),
     ({"estimators": ["rips"]}, "rips judges slates, this log has rows"),
     ({"estimators": "dr"}, "are lists"),
     ({"intervals": ["ctl"]}, "did you mean 'clt'"),
     ({"baseline": "f"}, "unknown baseline 'f'"),
     ({"alpha": 95}, r"alpha must be in \(0, 1\)"),
     ({"gamma": 2.0}, r"gamma must be in \[0, 1\]"),
     ({"estimators": ["dr"]}, "dr needs q_logged and value of 'e'"),
     ({"estimators": ["mips"]}, "mips and offcem need clusters"),
     ({"reward_model": 3}, "reward_model must be a RewardModel")],
)  # fmt: skip
def test_what_cannot_be_asked_is_answered_with_the_remedy(change, said):
    log, pi_e, _ = logged(200)
    with pytest.raises(ValueError, match=said):
        evaluate(log, {"e": Target.from_matrix(pi_e)}, **change)


def test_targets_of_another_log_are_refused_by_name():
    log, pi_e, _ = logged(200)
    with pytest.raises(ValueError, match=r"target 'e': .*200"):
        evaluate(log, {"e": Target.from_matrix(pi_e[:100])})
    with pytest.raises(ValueError, match="at least one target"):
        evaluate(log, {})
    with pytest.raises(ValueError, match=r"make it by Target.from_"):
        evaluate(log, {"e": pi_e})


def test_importing_the_evaluator_does_not_import_torch():
    import subprocess
    import sys

    heavy = "'torch', 'pandas', 'sklearn', 'matplotlib', 'transformers'"
    code = f"import evaluation, sys; print([m for m in ({heavy}) if m in sys.modules])"
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_a_model_alone_has_no_interval():
    log, pi_e, _ = logged(500)
    table = evaluate(log, {"e": Target.from_matrix(pi_e)}, reward_model=RewardModel())
    row = of(table, "e", "dm")
    assert np.isfinite(row["value"])
    assert np.isnan(row["low"])
    assert "model only" in row["note"]


def test_log_smoothing_is_for_rewards_that_are_not_negative():
    log = DecisionLog.from_arrays(action=[0, 1], reward=[-1.0, 1.0], propensity=[0.5, 0.5])
    with pytest.raises(ValueError, match="ls needs rewards of at least 0"):
        evaluate(log, {"e": Target.from_function(np.array([0.5, 0.5]))}, estimators=["ls"])


def test_a_target_that_brings_its_model_needs_no_names_of_estimators():
    log, pi_e, _ = logged(500)
    _, _, _, action, _, mean = world(500)
    rows = np.arange(500)
    target = Target.from_probabilities(pi_e[rows, action], value=(pi_e * mean).sum(axis=1),
                                       q_logged=mean[rows, action])  # fmt: skip
    table = evaluate(log, {"e": target})
    assert {r["estimator"] for r in table.rows} >= {"sndr", "dr", "snips", "dm"}


def test_the_model_speaks_where_the_log_cannot_though_nobody_asked_it():
    log, pi_e, _ = logged(shown=3)
    table = evaluate(log, {"e": Target.from_matrix(pi_e)}, estimators=["ips"],
                     reward_model=RewardModel())  # fmt: skip
    assert [r["estimator"] for r in table.rows] == ["ips", "dm", "bounds"]
    assert np.isfinite(of(table, "e", "dm")["value"])


def test_float32_propensities_do_not_fail_the_mean_weight():
    n = 4000
    p = np.random.default_rng(0).random(n) * 0.5 + 0.25
    action, reward = np.zeros(n, dtype=int), np.random.default_rng(1).random(n)
    log = DecisionLog.from_arrays(action=action, reward=reward, propensity=p.astype(np.float32))
    target = Target.from_probabilities(p * (1 + 4e-8))
    assert of(evaluate(log, {"b": target}), "b", "snips")["verdict"] == IDENTIFIED


def test_a_value_that_rests_on_a_few_rewards_is_said_to():
    n = 3000
    reward = np.zeros(n)
    reward[:4] = 1.0
    log = DecisionLog.from_arrays(action=np.zeros(n, dtype=int), reward=reward,
                                  propensity=np.full(n, 0.5))  # fmt: skip
    table = evaluate(log, {"b": Target.from_probabilities(np.full(n, 0.5))})
    assert of(table, "b", "snips")["verdict"] == IDENTIFIED
    assert "the value rests on the rewards of about 4.0 units" in " ".join(str(table).split())


def test_what_is_withheld_is_one_row_an_estimator_and_says_so():
    log, pi_e, _ = logged(shown=3)
    table = evaluate(log, {"e": Target.from_matrix(pi_e)}, estimators=["ips", "snips"],
                     intervals=["clt", "bootstrap"])  # fmt: skip
    found = [(r["estimator"], r["interval"]) for r in table.rows]
    assert found == [("ips", "withheld"), ("snips", "withheld"), ("bounds", "worst case")]


def test_the_curve_of_a_softened_ranker_withholds_what_its_weights_cannot_tell():
    log, pi_e, _ = logged(800, sharp=0.8)
    target = Target.from_ranker(-pi_e).soften(ess=120)
    curve = evaluate(log, {"e": target}).diagnostics("e")["curve"]
    fit = [p["ess"] >= 100 and abs(p["mean_weight"] - 1) <= 0.1 for p in curve]
    assert {True, False} == set(fit)
    assert [np.isfinite(p["value"]) for p in curve] == fit


def test_bounds_hold_the_truth_where_covered_choices_were_hardly_ever_seen():
    """All is covered, yet 400 rows show the target's item once or never: its propensity is .002."""
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        action = (rng.random(400) < 0.002).astype(int)
        reward = (rng.random(400) < np.where(action == 1, 0.9, 0.1)).astype(float)
        pi_b = np.tile([0.998, 0.002], (400, 1))
        log = DecisionLog.from_arrays(
            action=action, reward=reward, propensity=pi_b[np.arange(400), action],
            support=pi_b > 0, reward_range=(0.0, 1.0),
        )  # fmt: skip
        table = evaluate(log, {"e": Target.from_function(np.array([0.1, 0.9]))})
        row = of(table, "e", "bounds")
        held += row["low"] <= 0.82 <= row["high"]
    assert held >= 190
