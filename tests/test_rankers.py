"""Rankers show the best, softened ones a little of everything, and both add up to one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_targets import bandit, slates, whole

from evaluation import rankers
from evaluation.log import DecisionLog
from evaluation.targets import Target


def slow_plackett_luce(weights, slate):
    """Item by item, the share of what is left."""
    out, left = [], dict(enumerate(weights))
    for item in slate:
        out.append(left.get(item, 0.0) / sum(left.values()))
        left.pop(item, None)
    return out


def test_a_ranker_shows_the_best_and_nothing_else():
    log, pi = bandit()
    target = Target.from_ranker(pi)
    batch = whole(log)
    np.testing.assert_array_equal(target.logged(batch).pi, batch.action == pi.argmax(1))
    items, probs = target.distribution(batch)
    assert items[:, 0].tolist() == pi.argmax(1).tolist()
    assert (probs == 1).all()
    assert target.deterministic
    assert "deterministic" in target.estimand


def test_equal_scores_are_ordered_by_seed_and_never_by_item():
    batch = whole(bandit(5)[0])
    best = [Target.from_ranker(np.zeros(6), seed=s).distribution(batch)[0][0, 0] for s in range(60)]
    assert set(best) == set(range(6))
    again = Target.from_ranker(np.zeros(6), seed=3)
    assert again.distribution(batch)[0][0, 0] == best[3]
    every = DecisionLog.from_arrays(action=np.arange(6), reward=np.zeros(6), propensity=np.ones(6))
    assert again.logged(whole(every)).pi.argmax() == best[3]
    assert again.logged(whole(every)).pi.sum() == 1.0


@given(st.integers(0, 500), st.integers(1, 3), st.sampled_from([None, 0.3]), st.booleans())
def test_probabilities_of_all_slates_sum_to_one(seed, k, temperature, uniform):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, 5).astype(float)  # ties
    scores[rng.integers(5)] = -np.inf  # never shown
    every = np.array(list(itertools.permutations(range(5), k)))
    target = Target.from_ranker(scores, k=k)
    if temperature or uniform:
        target = target.soften(temperature=temperature, uniform=0.2 * uniform)
    batch = whole(slates(every, num_actions=5))
    logged = target.logged(batch)
    joint = logged.pi.reshape(-1, k).prod(axis=1)
    assert joint.sum() == pytest.approx(1.0, abs=1e-12)
    items, probs = target.distribution(batch)
    np.testing.assert_allclose(
        ((items == batch.action[:, None]) * probs).sum(1), logged.pi, atol=1e-15
    )
    possible = np.repeat(joint > 0, k)
    np.testing.assert_allclose(probs.sum(1)[possible], 1.0)
    if logged.marginal is not None:  # of the item at that slot: one list has them all
        assert (logged.marginal.reshape(-1, k).all(axis=1) == (joint == 1)).all()


def test_a_softened_list_is_plackett_luce_over_standardised_scores():
    scores = np.array([3.0, -1.0, 0.5, 8.0, 2.0, 2.0])
    standard = (scores - scores.mean()) / scores.std()
    every = np.array(list(itertools.permutations(range(6), 3)))[::7]
    for uniform in (0.0, 0.25):
        soft = Target.from_ranker(scores, k=3).soften(temperature=0.8, uniform=uniform)
        weights = np.exp(standard / 0.8)
        weights = (1 - uniform) * weights / weights.sum() + uniform / 6
        expected = [slow_plackett_luce(weights, slate) for slate in every]
        found = soft.logged(whole(slates(every))).pi.reshape(-1, 3)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_cold_lists_do_not_underflow_to_nothing():
    soft = Target.from_ranker(np.array([9.0, 5.0, 0.0]), k=3).soften(temperature=1e-3)
    found = soft.logged(whole(slates([[0, 1, 2], [1, 0, 2]], num_actions=3))).pi
    np.testing.assert_allclose(found, [1, 1, 1, 0, 1, 1], atol=1e-200)


def test_a_repeat_in_a_slate_is_impossible_and_an_empty_slot_certain():
    for target in (Target.from_ranker(np.arange(4.0), k=3),
                   Target.from_ranker(np.arange(4.0), k=3).soften(temperature=1.0),
                   Target.from_function(np.full(4, 0.25))):  # fmt: skip
        found = target.logged(whole(slates([[3, 3, 2], [3, -1, -1]], num_actions=4))).pi
        assert found[1] == 0
        assert found[4:].tolist() == [1, 1]


def test_scores_that_differ_in_the_last_bit_keep_their_order():
    scores = np.array([1.0, 1e-20, 2e-20, 1.0 + 2**-52])
    every = np.array(list(itertools.permutations(range(4), 4)))
    found = Target.from_ranker(scores, k=4).logged(whole(slates(every, num_actions=4))).pi
    assert every[found.reshape(-1, 4).all(axis=1)].tolist() == [[3, 0, 2, 1]]


def test_a_list_over_slots_without_decisions_is_looked_up_at_the_slot():
    log = DecisionLog.from_arrays(action=[2, 1, 2, 0], reward=np.zeros(4), propensity=np.ones(4),
                                  slot=[0, 1, 1, 2], num_actions=3)  # fmt: skip
    target = Target.from_ranker(np.array([0.0, 1.0, 2.0]), k=3)
    assert target.logged(whole(log)).pi.tolist() == [1, 1, 0, 1]
    assert target.distribution(whole(log))[0].ravel().tolist() == [2, 1, 1, 0]
    first = Target.from_ranker(np.array([0.0, 1.0, 2.0]))  # each slot a decision of its own
    assert first.logged(whole(log)).pi.tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="decision="):
        target.soften(temperature=1.0).logged(whole(log))


def effective(log, target):
    batch = whole(log)
    weight = target.logged(batch).pi / batch.propensity
    return weight.sum() ** 2 / np.square(weight).sum(), weight


def test_softening_reaches_the_effective_sample_size_it_was_asked_for():
    log, _ = bandit(2000)
    target = Target.from_ranker(lambda x: x @ np.arange(18.0).reshape(3, 6) ** 2).soften(ess=300)
    found = target.resolved(log)
    ess, weight = effective(log, found)
    assert 300 <= ess < 303
    assert "temperature" in found.estimand
    temperatures = [point["temperature"] for point in found.curve]
    assert temperatures == sorted(temperatures)
    at = found.curve[temperatures.index(found.kind.temperature)]
    reward = whole(log).reward
    assert at["ess"] == pytest.approx(ess)
    assert at["value"] == pytest.approx((weight * reward).sum() / weight.sum())
    assert at["mean_weight"] == pytest.approx(weight.mean())
    colder = [p["ess"] for p in found.curve if p["temperature"] < found.kind.temperature]
    assert max(colder) < 300
    assert found.resolved(log) is found


def test_softening_slates_counts_the_weights_of_slates():
    rng = np.random.default_rng(0)
    items = np.array([rng.permutation(5)[:2] for _ in range(400)])
    log = slates(items, num_actions=5, propensity=np.sqrt(1 / 20))
    found = Target.from_ranker(np.arange(5.0), k=2).soften(ess=200).resolved(log)
    weight = effective(log, found)[1].reshape(400, 2).prod(axis=1)
    assert 200 <= weight.sum() ** 2 / np.square(weight).sum() < 203


def test_epsilon_alone_keeps_the_best_item():
    log, pi = bandit()
    batch = whole(log)
    soft = Target.from_ranker(pi).soften(uniform=0.3)
    assert soft.deterministic is False
    expected = 0.05 + 0.7 * (batch.action == pi.argmax(1))
    np.testing.assert_allclose(soft.logged(batch).pi, expected)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ess": 301}, "at most 300.*301"),
        ({"ess": 299.99}, "the most is"),
        ({"temperature": 0.0}, "above 0"),
        ({"ess": 10, "temperature": 1.0}, "ess or temperature"),
        ({"uniform": 1.5}, r"\[0, 1\]"),
        ({}, "nothing was softened"),
    ],
)
def test_softening_refuses_what_cannot_be(asked, words):
    log, pi = bandit()
    with pytest.raises(ValueError, match=words):
        Target.from_ranker(pi).soften(**asked).resolved(log)


def test_softening_by_ess_needs_the_log_and_its_propensities():
    log, pi = bandit()
    soft = Target.from_ranker(pi).soften(ess=50)
    with pytest.raises(ValueError, match="resolved"):
        soft.logged(whole(log))
    without = DecisionLog.from_arrays(action=[0, 1], reward=[0, 1], propensity=None)
    with pytest.raises(ValueError, match="needs propensities"):
        Target.from_ranker(np.arange(2.0)).soften(ess=1).resolved(without)
    with pytest.raises(ValueError, match="only a ranker"):
        Target.from_matrix(pi).soften(temperature=1.0)


def test_longer_slates_than_the_ranker_lists_are_refused():
    with pytest.raises(ValueError, match=r"slates of 3 items, the ranker lists k=1.*k=3"):
        Target.from_ranker(np.arange(6.0)).logged(whole(slates([[0, 1, 2]])))


def test_no_dense_block_is_larger_than_it_must_be(monkeypatch):
    most = []
    plain = rankers.standardised
    monkeypatch.setattr(rankers, "standardised", lambda z: most.append(z.size) or plain(z))
    n, a = 4000, 500
    log = DecisionLog.from_arrays(action=np.arange(n) % a, reward=np.zeros(n), num_actions=a,
                                  propensity=np.full(n, 0.1), context=np.ones((n, 1)))  # fmt: skip
    Target.from_ranker(lambda x: x * np.arange(a)).soften(temperature=1.0).logged(whole(log))
    Target.from_ranker(np.ones((n, a))).soften(temperature=1.0).logged(whole(log))
    assert max(most) <= rankers.ENTRIES
    assert len(most) >= 8
