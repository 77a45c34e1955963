"""evaluate() on slates, episodes, several loggers, and the distribution of what is earned."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import IDENTIFIED, PARTIAL, logged, of, softmax

from evaluation import DecisionLog, Target, evaluate
from evaluation.fqe import FittedQ

OPE = Path(__file__).parent / "data" / "ope"


def conditional(prefix, k=3):
    """Probabilities given the items above, from those of prefixes."""
    p = prefix.reshape(-1, k).copy()
    p[:, 1:] /= prefix.reshape(-1, k)[:, :-1]
    return p.ravel()


@pytest.mark.parametrize(
    "name", ["slate_cascade_additive_ranking", "slate_independent_factorizable"]
)
def test_slates_meet_their_stored_values(name):
    z = np.load(OPE / f"{name}.npz")
    found = json.loads((OPE / f"{name}.json").read_text())["expected"]
    q, pi = z["q_hat"].reshape(-1, 6), z["e_action_dist"].reshape(-1, 6)
    times = 4  # the log four times over: identified, values as before
    each = {k: np.tile(v, times) for k, v in {
        "action": z["action"], "reward": z["reward"],
        "propensity": conditional(z["pscore_cascade"]),
        "slot": z["position"], "marginal": z["pscore_item_position"], "joint": z["pscore"],
    }.items()}  # fmt: skip
    log = DecisionLog.from_arrays(decision=np.repeat(np.arange(300 * times), 3), **each)
    target = Target.from_probabilities(
        np.tile(conditional(z["e_pscore_cascade"]), times),
        value=np.tile((q * pi).sum(axis=1), times),
        q_logged=np.tile(q[np.arange(900), z["action"]], times),
        marginal=np.tile(z["e_pscore_item_position"], times),
    )
    ours = {"sips": "sips", "iips": "iips", "rips": "rips", "snsips": "snsips",
            "sniips": "sniips", "snrips": "snrips", "cascade_dr": "cascade-dr"}  # fmt: skip
    table = evaluate(log, {"e": target}, estimators=list(ours))
    shown = 0
    for mine, theirs in ours.items():
        row = of(table, "e", mine)
        if row["verdict"] == IDENTIFIED:
            assert row["value"] == pytest.approx(found[theirs]["value"], rel=1e-9)
            shown += 1
    assert shown == (7 if "independent" in name else 2)  # the other log's weights average 1.16


def test_the_product_form_of_pi_is_refused_for_slots_that_depend_on_each_other():
    z = np.load(OPE / "slate_cascade_additive_ranking.npz")
    log = DecisionLog.from_arrays(
        action=z["action"], reward=z["reward"], propensity=conditional(z["pscore_cascade"]),
        decision=z["slate_id"], slot=z["position"], marginal=z["pscore_item_position"],
    )  # fmt: skip
    target = Target.from_probabilities(conditional(z["e_pscore_cascade"]),
                                       marginal=z["e_pscore_item_position"])  # fmt: skip
    with pytest.raises(ValueError, match="slots that are drawn independently"):
        evaluate(log, {"e": target}, estimators=["pi"])


def episodes(context=True):
    z = np.load(OPE / "sequential_tabular.npz")
    return z, DecisionLog.from_arrays(
        action=z["action"].ravel(), reward=z["reward"].ravel(), propensity=z["pscore"],
        episode=np.repeat(np.arange(300), 5), step=np.tile(np.arange(5), 300),
        context=np.eye(6)[z["state"].ravel()] if context else None, marginal=np.full(1500, 0.01),
    )  # fmt: skip


def test_episodes_meet_their_right_stored_values():
    z, log = episodes()
    rows, pi = np.arange(1500), z["eval_action_dist"]
    target = Target.from_probabilities(
        pi[rows, z["action"].ravel()], value=(pi * z["q_hat"]).sum(axis=1),
        q_logged=z["q_hat"][rows, z["action"].ravel()], marginal=0.01 * z["w_state_action"],
    )  # fmt: skip
    table = evaluate(log, {"e": target}, estimators=["mis", "drl", "dm", "pdis"], gamma=0.9)
    assert of(table, "e", "drl")["value"] == pytest.approx(2.25219, abs=5e-6)
    assert of(table, "e", "mis")["value"] == pytest.approx(2.17529, abs=5e-6)  # without q
    assert of(table, "e", "dm")["value"] == pytest.approx(2.26514, abs=5e-6)
    assert of(table, "e", "pdis")["verdict"] == PARTIAL  # effective episodes: 8 of 300
    assert np.isnan(of(table, "e", "pdis")["value"])


def test_a_fitted_q_knows_the_time_left():
    """Without the step as part of the state its value at the start is that of an average step."""
    z, log = episodes()
    target = Target.from_function(lambda x: z["pi_b"][x.argmax(axis=1)])
    table = evaluate(log, {"b": target}, estimators=["fqe", "pdis"], gamma=0.9,
                     reward_model=FittedQ(gamma=0.9))  # fmt: skip
    mean = of(table, "b", "pdis")["value"]
    assert of(table, "b", "fqe")["value"] == pytest.approx(mean, rel=0.03)


def test_quantiles_of_the_logging_policy_are_those_of_the_log():
    rng = np.random.default_rng(0)
    reward = rng.integers(10, size=5000).astype(float)
    log = DecisionLog.from_arrays(action=rng.integers(3, size=5000), reward=reward,
                                  propensity=np.full(5000, 1 / 3))  # fmt: skip
    target = {"u": Target.from_function(np.full(3, 1 / 3))}
    table = evaluate(log, target, estimators=["quantiles", "cvar", "cdf"])
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        want = np.quantile(reward, level, method="inverted_cdf")
        assert of(table, "u", f"quantile({level:g})")["value"] == want
    worst = np.sort(reward)[:1250].mean()
    assert of(table, "u", "cvar(0.25)")["value"] == pytest.approx(worst, rel=1e-9)
    assert of(table, "u", "cdf(4)")["value"] == pytest.approx((reward <= 4).mean(), rel=1e-9)
    assert of(table, "u", "cvar(0.5)")["low"] < of(table, "u", "cvar(0.5)")["value"]


def two_loggers(n=6000, seed=0):
    """A near-uniform and a sharp logger of the same contexts, and both propensities (n, 2)."""
    rng = np.random.default_rng(seed)
    x, taste = rng.normal(size=(n, 3)), np.random.default_rng(99).normal(size=(3, 5))
    both = np.stack([softmax(x @ taste * 0.2), softmax(-x @ taste)], axis=1)  # (n, 2, A)
    logger = (rng.random(n) < 0.3).astype(int)
    pi_b = both[np.arange(n), logger]
    action = (pi_b.cumsum(axis=1) < rng.random(n)[:, None]).sum(axis=1)
    mean = 1.0 / (1.0 + np.exp(-(x @ taste) * 0.5))
    reward = (rng.random(n) < mean[np.arange(n), action]).astype(float)
    pi_e = softmax(x @ taste * 0.6)
    own = both[np.arange(n), :, action]  # (n, 2)
    given = {"action": action, "reward": reward, "logger": logger}
    return given, own, pi_e, (pi_e * mean).sum(axis=1).mean()


def test_loggers_are_pooled_by_their_shares_or_by_their_precision():
    given, own, pi_e, truth = two_loggers()
    rows = np.arange(len(own))
    target = {"e": Target.from_matrix(pi_e)}

    def ask(propensity, pooling="pooled"):
        log = DecisionLog.from_arrays(**given, propensity=propensity)
        return of(evaluate(log, target, estimators=["ips"], pooling=pooling), "e", "ips")

    naive = ask(own[rows, given["logger"]])
    balanced = ask(own)
    weighted = ask(own[rows, given["logger"]], "weighted")
    for row in (balanced, weighted):
        assert row["low"] < truth < row["high"]
        assert row["std_error"] < naive["std_error"]
    share = np.bincount(given["logger"]) / len(own)
    assert balanced["value"] == pytest.approx(
        (given["reward"] * pi_e[rows, given["action"]] / (own @ share)).mean(), rel=1e-9
    )


def test_weighted_pooling_is_the_inverse_variance_mean_of_the_loggers():
    given, own, pi_e, _ = two_loggers()
    rows = np.arange(len(own))
    p = own[rows, given["logger"]]
    log = DecisionLog.from_arrays(**given, propensity=p)
    table = evaluate(log, {"e": Target.from_matrix(pi_e)}, estimators=["ips"], pooling="weighted")
    w = pi_e[rows, given["action"]] / p * given["reward"]
    parts = [w[given["logger"] == j] for j in (0, 1)]
    precision = np.array([len(x) / x.var(ddof=1) for x in parts])
    row = of(table, "e", "ips")
    want = precision @ [x.mean() for x in parts] / precision.sum()
    assert row["value"] == pytest.approx(want, rel=1e-9)
    assert row["std_error"] == pytest.approx(precision.sum() ** -0.5, rel=1e-9)
    with pytest.raises(ValueError, match="give the log logger"):
        evaluate(logged(100)[0], {"e": Target.from_matrix(logged(100)[1])}, pooling="weighted")


def test_a_softened_list_has_exact_marginals_for_iips():
    """Three of five items drawn one after the other: its marginals by counting all lists."""
    rng = np.random.default_rng(0)
    slates, k = 4000, 3
    action = np.stack([rng.permutation(5)[:k] for _ in range(slates)]).ravel()  # uniform lists
    slot = np.tile(np.arange(k), slates)
    worth = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    reward = (rng.random(slates * k) < worth[action]).astype(float)
    log = DecisionLog.from_arrays(
        action=action, reward=reward, propensity=1.0 / (5 - slot),
        marginal=np.full(slates * k, 0.2), decision=np.repeat(np.arange(slates), k), slot=slot,
    )  # fmt: skip
    target = Target.from_ranker(worth, k=k).soften(temperature=1.0)
    table = evaluate(log, {"e": target}, estimators=["iips", "rips", "sips"])
    values = {name: of(table, "e", name) for name in ("iips", "rips", "sips")}
    assert values["iips"]["std_error"] < values["sips"]["std_error"]
    scores = (worth - worth.mean()) / worth.std()
    first = np.exp(scores) / np.exp(scores).sum()
    truth = 0.0
    from itertools import permutations

    for ranking in permutations(range(5), k):
        chance, left = 1.0, 1.0
        for item in ranking:
            chance, left = chance * first[item] / left, left - first[item]
        truth += chance * worth[list(ranking)].sum()
    for row in values.values():
        assert row["low"] < truth < row["high"]


def test_long_episodes_say_for_how_many_steps_the_ratios_reach():
    rng = np.random.default_rng(0)
    episodes_, steps = 400, 40
    action = rng.integers(2, size=episodes_ * steps)
    log = DecisionLog.from_arrays(
        action=action, reward=rng.random(len(action)), propensity=np.full(len(action), 0.5),
        episode=np.repeat(np.arange(episodes_), steps), step=np.tile(np.arange(steps), episodes_),
        context=np.ones((len(action), 1)),
    )  # fmt: skip
    table = evaluate(log, {"e": Target.from_function(np.array([0.2, 0.8]))},
                     estimators=["pdis"], gamma=0.95)  # fmt: skip
    found = table.diagnostics("e")
    assert 0 < found["horizon"]["horizon"] < 20
    assert any("100 effective episodes are left for" in r for r in
               found["kinds"]["trajectory"]["reasons"])  # fmt: skip
    assert of(table, "e", "pdis")["verdict"] == PARTIAL


def test_estimates_do_not_depend_on_what_else_is_asked():
    z, log = episodes()
    target = {"b": Target.from_function(lambda x: z["pi_b"][x.argmax(axis=1)])}
    alone = evaluate(log, target, estimators=["mis"], gamma=0.9)
    beside = evaluate(log, target, estimators=["mis", "drl", "fqe", "mrdr"], gamma=0.9)
    assert of(beside, "b", "mis")["value"] == pytest.approx(
        of(alone, "b", "mis")["value"], rel=1e-12
    )


def ragged(states, n=300, steps=4, seed=0):
    """Episodes of two actions; `states` many, or as many as rows."""
    rng = np.random.default_rng(seed)
    rows = n * steps
    context = (
        np.eye(states)[rng.integers(states, size=rows)] if states else rng.normal(size=(rows, 2))
    )
    return DecisionLog.from_arrays(
        action=rng.integers(2, size=rows), reward=rng.random(rows), propensity=np.full(rows, 0.5),
        episode=np.repeat(np.arange(n), steps), step=np.tile(np.arange(steps), n), context=context,
    )  # fmt: skip


def test_occupancies_are_not_told_of_states_that_are_seen_once():
    target = {"e": Target.from_function(np.array([0.4, 0.6]))}
    with pytest.raises(ValueError, match="most states of this log are seen once"):
        evaluate(ragged(0), target, estimators=["drl"])
    usual = {states: evaluate(ragged(states), target, reward_model=FittedQ()) for states in (0, 3)}
    assert usual[0].about["estimators"] == ["seq_sndr", "wpdis", "fqe"]
    assert usual[3].about["estimators"] == ["drl", "seq_sndr", "wpdis", "fqe"]


def test_single_decisions_of_an_episode_log_are_called_so():
    target = {"e": Target.from_function(np.array([0.4, 0.6]))}
    table = evaluate(ragged(3), target, estimators=["snips", "wpdis"])
    assert (of(table, "e", "snips")["per"], of(table, "e", "wpdis")["per"]) == ("row", "")
    assert "by wpdis." in str(table)  # the session's value is quoted, not a step's
    assert "by snips per row." in str(evaluate(ragged(3), target, estimators=["snips"]))


def test_magic_whose_error_is_unknown_is_not_compared():
    both = {
        "e": Target.from_function(np.array([0.4, 0.6])),
        "u": Target.from_function(np.full(2, 0.5)),
    }
    table = evaluate(ragged(3), both, estimators=["magic", "pdis"], baseline="u")
    assert [d["estimator"] for d in table.differences] == ["pdis"]
    assert np.isnan(of(table, "e", "magic")["low"])


def test_episodes_of_slates_are_refused_with_two_ways_out():
    log = DecisionLog.from_arrays(
        action=[0, 1, 1, 0], reward=[0.0, 1.0, 0.0, 1.0], propensity=[0.5, 1.0, 0.5, 1.0],
        decision=[0, 0, 1, 1], slot=[0, 1, 0, 1], episode=[0, 0, 0, 0], step=[0, 0, 1, 1],
    )  # fmt: skip
    target = Target.from_probabilities([0.5, 1.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="episodes of slates cannot be judged as one"):
        evaluate(log, {"e": target}, estimators=["pdis"])


def test_cressie_read_on_slates_is_of_their_rows():
    rng = np.random.default_rng(0)
    action = rng.integers(3, size=2000)
    reward = (rng.random(2000) < 0.3).astype(float)
    log = DecisionLog.from_arrays(action=action, reward=reward, propensity=np.full(2000, 1 / 3),
                                  decision=np.repeat(np.arange(1000), 2))  # fmt: skip
    table = evaluate(log, {"u": Target.from_probabilities(np.full(2000, 1 / 3))},
                     estimators=["cressie_read"])  # fmt: skip
    row = of(table, "u", "cressie_read")
    assert row["value"] == pytest.approx(reward.mean(), rel=1e-9)
    assert np.isnan(row["low"])  # rows of a slate are not independent


def test_loggers_apart_need_their_propensities():
    given, _, pi_e, _ = two_loggers(300)
    with pytest.raises(ValueError, match="needs the propensities of each logger"):
        evaluate(DecisionLog.from_arrays(**given, context=np.ones((300, 1))),
                 {"e": Target.from_matrix(pi_e)}, pooling="weighted")  # fmt: skip


def test_an_empty_slot_weighs_nothing_whatever_the_target_says_of_it():
    action, slates = np.tile([0, -1, 1, 0], 300), 600
    log = DecisionLog.from_arrays(
        action=action, reward=np.ones(1200), propensity=np.tile([0.5, 0.5, 0.5, 1.0], 300),
        decision=np.repeat(np.arange(slates), 2), slot=np.tile([0, 1], slates),
    )  # fmt: skip
    target = Target.from_probabilities(np.tile([0.5, 0.25, 0.5, 1.0], 300))
    row = of(evaluate(log, {"e": target}, estimators=["sips"]), "e", "sips")
    assert (row["value"], row["mean_weight"]) == (2.0, 1.0)
