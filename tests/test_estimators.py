"""Estimators of rows: stored values, exact enumeration, metamorphic relations, bad input."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.accumulate import Accumulator
from evaluation.estimators import ESTIMATORS, contributions

OPE = Path(__file__).parent / "data" / "ope"
OURS = {
    "ipw": "ips", "snipw": "snips", "dm": "dm", "dr": "dr", "sndr": "sndr",
    "switch-dr": "switch_dr", "dr-os": "dros", "sg-ipw": "sg_ips", "sg-dr": "sg_dr",
}  # fmt: skip
BANDITS = ("bandit_binary", "bandit_continuous_reward", "bandit_position")


def columns(name):
    z = np.load(OPE / f"{name}.npz")
    rows = np.arange(len(z["action"]))
    slot = z["position"] if "position" in z else np.zeros(len(rows), dtype=int)
    pi, q = z["action_dist"][rows, :, slot], z["q_hat"][rows, :, slot]
    return {
        "weight": pi[rows, z["action"]] / z["pscore"], "reward": z["reward"].astype(float),
        "q_logged": q[rows, z["action"]], "value": (pi * q).sum(axis=1),
    }  # fmt: skip


def stored():
    for name in BANDITS:
        for key, found in json.loads((OPE / f"{name}.json").read_text())["expected"].items():
            kind, _, lam = key.partition("(lambda=")
            if kind in OURS and isinstance(found, dict) and "round_rewards_first5" in found:
                yield name, OURS[kind], float(lam.rstrip(")")) if lam else None, found


@pytest.mark.parametrize(("name", "estimator", "lam", "found"), list(stored()))
def test_stored_values_are_met(name, estimator, lam, found):
    values = contributions(estimator, **columns(name), lam=lam)
    assert values.mean() == pytest.approx(float(found["value"]), rel=1e-9)
    assert values[:5] == pytest.approx([float(x) for x in found["round_rewards_first5"]], rel=1e-9)
    assert values.std() == pytest.approx(float(found["round_rewards_std_ddof0"]), rel=1e-9)


def test_all_stored_estimators_were_there():
    assert len(list(stored())) == 105


@pytest.mark.parametrize("lam", [1.0, 5.0, 20.0])
def test_clipping_exploration_and_smoothing_meet_their_stored_values(lam):
    found = json.loads((OPE / "modern_on_bandit_binary.json").read_text())["expected"]
    z, given_ = np.load(OPE / "bandit_binary.npz"), columns("bandit_binary")
    given_ = {key: given_[key] for key in ("weight", "reward")}
    ix = contributions("ix", **given_, lam=lam, propensity=z["pscore"])
    assert ix.mean() == pytest.approx(found[f"ix(M={lam})"], rel=1e-9)
    ls = contributions("ls", **given_, lam=lam)
    assert ls.mean() == pytest.approx(found[f"ls(M={lam})"], rel=1e-9)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("ips", "vw.ips.Estimator({})"), ("snips", "vw.snips.Estimator({})"),
     ("cressie_read", "vw.cressieread.Estimator({})")],
)  # fmt: skip
def test_values_of_another_library_are_met(ours, theirs):
    found = json.loads((OPE / "modern_on_bandit_binary.json").read_text())["expected"]
    given_ = columns("bandit_binary")
    assert contributions(ours, **given_).mean() == pytest.approx(found[theirs], rel=1e-9)


def world():
    """Two contexts, three actions: chances, both policies, Bernoulli means and a wrong model."""
    x = np.array([0.3, 0.7])
    pi_b = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    pi_e = np.array([[0.1, 0.2, 0.7], [0.4, 0.4, 0.2]])
    mean = np.array([[0.2, 0.9, 0.5], [0.7, 0.1, 0.4]])
    wrong = np.array([[0.6, 0.1, 0.9], [0.0, 0.9, 0.8]])
    return x, pi_b, pi_e, mean, wrong


def expectation(name, **options):
    """E of an estimator over all logs of two rows, by enumeration."""
    x, pi_b, pi_e, mean, wrong = world()
    one = [
        (x[c] * pi_b[c, a] * (mean[c, a] if r else 1 - mean[c, a]), c, a, float(r))
        for c in range(2) for a in range(3) for r in (0, 1)
    ]  # fmt: skip
    total = 0.0
    for rows in itertools.product(one, repeat=2):
        c, a = np.array([r[1] for r in rows]), np.array([r[2] for r in rows])
        total += rows[0][0] * rows[1][0] * contributions(
            name, weight=pi_e[c, a] / pi_b[c, a], reward=np.array([r[3] for r in rows]),
            q_logged=wrong[c, a], value=(pi_e * wrong).sum(axis=1)[c], **options,
        ).mean()  # fmt: skip
    return total


def truth():
    x, _, pi_e, mean, _ = world()
    return float(x @ (pi_e * mean).sum(axis=1))


@pytest.mark.parametrize("name", ["ips", "dr"])
def test_unbiased_over_all_logs_of_two_rows_whatever_the_model(name):
    assert expectation(name) == pytest.approx(truth(), abs=1e-12)


@pytest.mark.parametrize(("name", "lam"), [("clipped_ips", 1.0), ("switch_dr", 1.0), ("dros", 1.0),
                                           ("sg_ips", 0.5), ("ls", 1.0), ("dm", None)])  # fmt: skip
def test_what_trades_bias_for_variance_is_biased(name, lam):
    assert abs(expectation(name, lam=lam) - truth()) > 0.01


def random_columns(seed=0, n=200):
    rng = np.random.default_rng(seed)
    return {
        "weight": rng.exponential(size=n), "reward": rng.normal(size=n),
        "q_logged": rng.normal(size=n), "value": rng.normal(size=n),
    }  # fmt: skip


ROWS = [n for n, e in ESTIMATORS.items() if e.unit == "row" and n not in ("replay", "ix")]


def options(name):
    return {"lam": 0.5} if ESTIMATORS[name].grid else {}


@pytest.mark.parametrize("name", ROWS)
def test_order_of_rows_does_not_matter(name):
    given_ = {**random_columns(), "reward": np.abs(random_columns()["reward"])}
    turn = np.random.default_rng(1).permutation(200)
    before = contributions(name, **given_, **options(name))
    after = contributions(name, **{k: v[turn] for k, v in given_.items()}, **options(name))
    assert after == pytest.approx(before[turn], rel=1e-12)


@pytest.mark.parametrize("name", ["dr", "sndr", "snips"])
def test_a_shift_of_all_rewards_and_of_the_model_shifts_the_value(name):
    given_ = random_columns()
    moved = {**given_, **{k: given_[k] + 3.0 for k in ("reward", "q_logged", "value")}}
    gap = contributions(name, **moved).mean() - contributions(name, **given_).mean()
    assert gap == pytest.approx(3.0, rel=1e-9)


@pytest.mark.parametrize("name", ["ips", "snips", "cressie_read", "dr", "sndr"])
def test_the_logging_policy_has_the_mean_reward(name):
    given_ = random_columns()
    given_ |= {"weight": np.ones(200), "value": given_["q_logged"]}
    given_["reward"] = np.abs(given_["reward"])
    values = contributions(name, **given_)
    assert values.mean() == pytest.approx(given_["reward"].mean(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "lam", "limit"),
    [("switch_dr", 0.0, "dm"), ("switch_dr", np.inf, "dr"), ("dros", 0.0, "dm"),
     ("dros", np.inf, "dr"), ("dros", 1e12, "dr"), ("sg_ips", 0.0, "ips"), ("sg_dr", 0.0, "dr"),
     ("clipped_ips", np.inf, "ips"), ("ls", 1e9, "ips"), ("mips", None, "ips"),
     ("offcem", None, "dr"), ("balanced_ips", None, "ips")],
)  # fmt: skip
def test_limits_are_other_estimators(name, lam, limit):
    given_ = random_columns()
    given_["reward"] = np.abs(given_["reward"])
    got, want = contributions(name, **given_, lam=lam), contributions(limit, **given_)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_exploration_bonus_vanishes_with_a_large_lambda():
    given_ = {k: random_columns()[k] for k in ("weight", "reward")}
    p = np.full(200, 0.3)
    got = contributions("ix", **given_, lam=1e12, propensity=p)
    assert got == pytest.approx(contributions("ips", **given_), rel=1e-9)


SLATES = [n for n, e in ESTIMATORS.items() if e.unit == "slate"]
EPISODES = [n for n, e in ESTIMATORS.items() if e.unit == "episode" and n not in ("magic",)]
BANDIT_OF = {
    "sips": "ips", "iips": "ips", "rips": "ips", "pi": "ips", "pbm": "ips", "snsips": "snips",
    "sniips": "snips", "snrips": "snips", "cascade_dr": "dr", "tis": "ips", "pdis": "ips",
    "wtis": "snips", "wpdis": "snips", "seq_dr": "dr", "seq_sndr": "sndr", "mrdr": "dr",
    "mis": "dr", "drl": "dr", "fqe": "dm",
}  # fmt: skip


@pytest.mark.parametrize("name", [*SLATES, *EPISODES])
def test_a_slate_of_one_and_an_episode_of_one_step_are_bandits(name):
    given_ = random_columns()
    one = {"group": np.arange(200), "step": np.zeros(200, dtype=int), "gamma": 0.5}
    got = contributions(name, **given_, **one).mean()
    assert got == pytest.approx(contributions(BANDIT_OF[name], **given_).mean(), rel=1e-9)


def test_replay_is_the_mean_where_both_agree_and_refuses_what_is_stochastic():
    weight = np.array([0.0, 1.0, 1.0, 0.0])
    assert contributions("replay", weight=weight, reward=[9.0, 1.0, 2.0, 9.0]).mean() == 1.5
    with pytest.raises(ValueError, match="replay judges deterministic policies"):
        contributions("replay", weight=[0.5, 1.0], reward=[0.0, 1.0])


def test_rows_of_a_group_may_come_in_any_order():
    rng = np.random.default_rng(0)
    group, step = np.repeat([7, 3, 5], [3, 1, 4]), np.array([0, 1, 2, 0, 0, 1, 2, 3])
    given_ = {k: v[:8] for k, v in random_columns().items()}
    want = contributions("seq_dr", **given_, group=group, step=step, gamma=0.9)
    turn = rng.permutation(8)
    moved = {k: v[turn] for k, v in given_.items()}
    got = contributions("seq_dr", **moved, group=group[turn], step=step[turn], gamma=0.9)
    appearance = list(dict.fromkeys(group[turn]))
    assert got == pytest.approx([want[[7, 3, 5].index(g)] for g in appearance], rel=1e-12)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'snips'"):
        contributions("snip", weight=[1.0], reward=[1.0])


@pytest.mark.parametrize(
    ("change", "said"),
    [({"weight": None}, "dros needs weight"), ({"value": None}, "dros needs value"),
     ({"lam": None}, "dros needs lam"), ({"lam": -1.0}, "lam must be at least 0"),
     ({"reward": [1.0, np.nan]}, "reward must be finite, got nan in row 1"),
     ({"weight": [-1.0, 1.0]}, "weight must be finite and at least 0, got -1.0 in row 0"),
     ({"weight": [1.0]}, r"weight must be \(2,\) like reward, got \(1,\)"),
     ({"reward": []}, "at least one row")],
)  # fmt: skip
def test_bad_input_is_named(change, said):
    given_ = {"weight": [1.0, 2.0], "reward": [0.0, 1.0], "q_logged": [0.1, 0.2],
              "value": [0.3, 0.4], "lam": 1.0, **change}  # fmt: skip
    with pytest.raises(ValueError, match=said):
        contributions("dros", **given_)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.sampled_from(["dr", "snips"]))
def test_the_accumulator_does_not_see_where_batches_end(sizes, name):
    n = sum(sizes)
    given_ = random_columns(n=n)
    acc = Accumulator(estimators=[name])
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        acc.update({k: v[end - size : end] for k, v in given_.items()})
    found = acc.result()["policy", name, None]
    assert found.value == pytest.approx(contributions(name, **given_).mean(), rel=1e-9, abs=1e-12)
    assert found.n == n


def test_a_weight_of_just_lambda_is_kept_by_switching():
    got = contributions("switch_dr", weight=[2.0, 2.1], reward=[1.0, 1.0], q_logged=[0.0, 0.0],
                        value=[0.5, 0.5], lam=2.0)  # fmt: skip
    assert got.tolist() == [2.5, 0.5]
