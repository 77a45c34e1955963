"""A target says what its policy would have done on logged rows, or why it cannot."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.log import DecisionLog
from evaluation.targets import Target

OPE = Path(__file__).parent / "data" / "ope"


def whole(log):
    """The log as one batch."""
    (batch,) = log.batches(rows=1 << 30)
    return batch


def bandit(n=300, num_actions=6, seed=0, **more):
    """A softmax logger over contexts, rewards that like item 0."""
    rng = np.random.default_rng(seed)
    context = rng.normal(size=(n, 3))
    logits = context @ rng.normal(size=(3, num_actions))
    pi = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    action = (pi.cumsum(1) > rng.random((n, 1))).argmax(1)
    reward = (rng.random(n) < np.where(action == 0, 0.8, 0.3)).astype(float)
    log = DecisionLog.from_arrays(action=action, reward=reward, context=context,
                                  propensity=pi[np.arange(n), action],
                                  num_actions=num_actions, **more)  # fmt: skip
    return log, pi


def slates(items, num_actions=6, propensity=0.5, shuffle=None, **more):
    """A log of slates (G, K)."""
    items = np.asarray(items)
    g, k = items.shape
    decision = np.repeat(np.arange(g), k)
    rows = (
        np.arange(g * k) if shuffle is None else np.random.default_rng(shuffle).permutation(g * k)
    )
    return DecisionLog.from_arrays(
        action=items.ravel()[rows], reward=np.zeros(g * k), decision=decision[rows],
        propensity=np.full(g * k, propensity), slot=np.tile(np.arange(k), g)[rows],
        num_actions=num_actions, **more)  # fmt: skip


# what is asked of every kind


@st.composite
def rows_of_probabilities(draw):
    n, a = draw(st.integers(1, 12)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return rng.dirichlet(np.full(a, 0.5), size=n), rng.integers(0, a, n)


@given(rows_of_probabilities())
def test_matrix_lists_function_and_arrays_of_one_policy_agree(drawn):
    pi, action = drawn
    n, a = pi.shape
    log = DecisionLog.from_arrays(action=action, reward=np.zeros(n), propensity=np.ones(n),
                                  context=np.arange(n)[:, None], num_actions=a)  # fmt: skip
    items = np.random.default_rng(0).permuted(np.tile(np.arange(a), (n, 1)), axis=1)
    shuffled = np.take_along_axis(pi, items, axis=1)
    padded = np.pad(items, ((0, 0), (0, 2)), constant_values=-1), np.pad(shuffled, ((0, 0), (0, 2)))
    targets = [Target.from_matrix(pi), Target.from_lists(*padded),
               Target.from_function(lambda x: pi[x[:, 0].astype(int)]),
               Target.from_policy(lambda x: pi[x[:, 0].astype(int)]),
               Target.from_probabilities(pi[np.arange(n), action])]  # fmt: skip
    batch = whole(log)
    for target in targets:
        target.check(log)
        np.testing.assert_array_equal(target.logged(batch).pi, pi[np.arange(n), action])
    for target in targets[:-1]:
        found, probs = target.distribution(batch)
        dense = np.zeros((n, a + 1))
        np.put_along_axis(dense, found, probs, axis=1)  # the last column takes the padding
        np.testing.assert_array_equal(dense[:, :a], pi)
    assert targets[-1].distribution(batch) is None


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_answers_do_not_depend_on_how_the_log_is_split(rows, monkeypatch):
    monkeypatch.setattr("evaluation.target_rows.ENTRIES", 64)  # also blocks within a batch
    log, pi = bandit(100)
    numbers = np.random.default_rng(1).random(100)
    targets = [Target.from_probabilities(numbers), Target.from_matrix(pi),
               Target.from_ranker(pi), Target.from_ranker(lambda x: x @ np.ones((3, 6))),
               Target.from_ranker(pi).soften(temperature=0.7, uniform=0.1)]  # fmt: skip
    for target in targets:
        parts = [target.logged(batch).pi for batch in log.batches(rows=rows)]
        np.testing.assert_array_equal(np.concatenate(parts), target.logged(whole(log)).pi)


def test_rows_are_those_of_the_caller_whatever_the_order_of_the_log():
    items = np.array([[0, 1, 2], [5, 3, 0], [2, 4, 1]])
    in_order, mixed = slates(items), slates(items, shuffle=3)
    softened = Target.from_ranker(np.arange(6.0), k=3).soften(temperature=1.0)
    expected = dict(zip(range(9), softened.logged(whole(in_order)).pi, strict=True))
    place = np.random.default_rng(3).permutation(9)  # the caller's row to the row in order
    batch = whole(mixed)
    assert softened.logged(batch).pi.tolist() == [expected[place[r]] for r in batch.rows]
    named = Target.from_probabilities(place / 9.0).logged(batch).pi
    np.testing.assert_array_equal(named, place[batch.rows] / 9.0)


# the fixtures


def test_position_fixture_is_looked_up_at_the_logged_slot():
    data = np.load(OPE / "bandit_position.npz")
    said = json.loads((OPE / "bandit_position.json").read_text())["expected"]
    log = DecisionLog.from_arrays(action=data["action"], reward=data["reward"], num_actions=6,
                                  propensity=data["pscore"], slot=data["position"])  # fmt: skip
    target = Target.from_matrix(data["action_dist"])
    target.check(log)
    weight = target.logged(whole(log)).pi / data["pscore"]
    snips = (weight * data["reward"]).sum() / weight.sum()
    assert snips == pytest.approx(said["snipw"]["value"], rel=1e-9)
    items, probs = target.distribution(whole(log))
    q = np.take_along_axis(data["q_hat"][np.arange(450), :, data["position"]], items, axis=1)
    assert (probs * q).sum(1).mean() == pytest.approx(said["dm"]["value"], rel=1e-9)


def test_slate_fixture_is_plackett_luce_given_the_items_above():
    data = np.load(OPE / "slate_cascade_additive_ranking.npz")
    action = data["action"]
    log = DecisionLog.from_arrays(action=action, reward=data["reward"], decision=data["slate_id"],
                                  propensity=np.ones(900), slot=data["position"],
                                  context=np.repeat(np.arange(300.0), 3)[:, None])  # fmt: skip
    logits = data["eval_logit"]
    first = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = Target.from_function(lambda x: first[x[:, 0].astype(int)])
    prefix = target.logged(whole(log)).pi.reshape(300, 3).cumprod(axis=1)
    np.testing.assert_allclose(prefix.ravel(), data["e_pscore_cascade"], rtol=1e-9)
    given_above = data["e_action_dist"].reshape(900, 6)
    np.testing.assert_allclose(
        target.distribution(whole(log))[1], given_above, rtol=1e-9, atol=1e-15
    )


# support


def test_covered_mass_is_exact_and_a_restricted_target_has_all_of_it():
    support = np.random.default_rng(5).random((300, 6)) < 0.5
    support[:, 0] = True
    support[np.arange(300), whole(bandit()[0]).action] = True
    log, pi = bandit(support=support)
    batch = whole(log)
    target = Target.from_matrix(pi)
    mass = (pi * support).sum(1)
    np.testing.assert_allclose(target.covered(batch), mass)
    best = Target.from_ranker(-pi)
    assert set(best.covered(batch)) == {0.0, 1.0}
    for kind in (target, best, best.soften(temperature=0.5, uniform=0.1)):
        restricted = kind.restricted()
        np.testing.assert_allclose(restricted.covered(batch), 1.0)
        assert restricted.estimand == f"{kind.estimand}, restricted to the log's support"
    np.testing.assert_allclose(target.restricted().logged(batch).pi, target.logged(batch).pi / mass)
    shown = np.where(support, -pi, -np.inf).argmax(1)
    assert best.restricted().distribution(batch)[0][:, 0].tolist() == shown.tolist()
    soft = best.restricted().soften(ess=20).resolved(log)
    np.testing.assert_allclose(soft.covered(batch), 1.0)


def test_restricting_says_what_it_needs():
    log, pi = bandit()
    assert Target.from_matrix(pi).covered(whole(log)) is None
    with pytest.raises(ValueError, match="support="):
        Target.from_matrix(pi).restricted().logged(whole(log))
    log = DecisionLog.from_arrays(action=[0, 1], reward=[0, 0], propensity=[1, 1],
                                  support=[[True, False, False], [False, True, True]])  # fmt: skip
    with pytest.raises(ValueError, match="row 1: the target shows nothing"):
        Target.from_matrix(np.array([[1.0, 0, 0], [1, 0, 0]])).restricted().logged(whole(log))
    numbers = Target.from_probabilities([1.0, 1.0])
    assert numbers.covered(whole(log)) is None
    with pytest.raises(ValueError, match="only the logged actions"):
        numbers.restricted().logged(whole(log))


# columns of the log


def test_a_target_may_name_columns_of_the_log():
    log = DecisionLog.from_arrays(action=[0, 1], reward=[1, 0], propensity=[0.5, 0.25],
                                  columns={"agent_prob": [0.1, 0.9], "v": [2.0, 3.0]})  # fmt: skip
    target = Target.from_probabilities("agent_prob", value="v")
    target.check(log)
    assert set(target.needs) == {"agent_prob", "v"}
    (batch,) = log.batches(columns=target.needs)
    assert target.logged(batch).pi.tolist() == [0.1, 0.9]
    assert target.logged(batch).value.tolist() == [2.0, 3.0]
    logger = Target.from_probabilities("propensity")
    logger.check(log)
    assert logger.logged(whole(log)).pi.tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match=r"no column 'agent_porb'.*Did you mean 'agent_prob'"):
        Target.from_probabilities("agent_porb").check(log)
    wrong = DecisionLog.from_arrays(action=[0, 1], reward=[1, 0], propensity=[1, 1],
                                    columns={"p": [0.5, 1.5]})  # fmt: skip
    with pytest.raises(ValueError, match=r"1\.5 in row 1"):
        Target.from_probabilities("p").logged(whole(wrong))


# agents


@pytest.fixture(scope="module")
def tiny():
    """Agents of a small catalogue, what they saw at 9 decisions, slates of 2."""
    import torch

    from agents.popular import Popularity
    from agents.random import Random
    from agents.static import Static
    from agents.testing import synthetic_observation, synthetic_spec

    spec = synthetic_spec(num_items=8, slate_size=2)
    obs = synthetic_observation(spec, 9, torch.Generator().manual_seed(0))
    excluded = torch.arange(9)[:, None] % 8
    slate = Random(spec).act(obs, excluded).slate
    return Random(spec), Static(spec, model=Popularity), obs, excluded, slate


def test_an_agent_answers_as_its_slate_probs(tiny, monkeypatch):
    monkeypatch.setattr("evaluation.target_kinds.DECISIONS", 4)
    *agents, obs, excluded, slate = tiny
    log = slates(slate.numpy(), num_actions=8, shuffle=1)
    batch = whole(log)
    for agent in agents:
        target = Target.from_policy(agent, obs, excluded)
        target.check(log)
        expected = agent.slate_probs(obs, excluded, slate).numpy().astype(float)
        np.testing.assert_array_equal(target.logged(batch).pi, expected[batch.decision, batch.slot])


def test_an_agents_distribution_is_whole_where_it_follows_from_the_first_slot(tiny):
    uniform, popular, obs, excluded, slate = tiny
    batch = whole(slates(slate.numpy(), num_actions=8))
    _, probs = Target.from_policy(uniform, obs, excluded).distribution(batch)
    assert sorted(set(np.round(probs[0], 6))) == [0, round(1 / 7, 6)]
    assert sorted(set(np.round(probs[1], 6))) == [0, round(1 / 6, 6)]
    assert Target.from_policy(popular, obs, excluded).distribution(batch) is None
    first = whole(slates(slate[:, :1].numpy(), num_actions=8))
    whole_first = popular.action_probs(obs, excluded).numpy()
    np.testing.assert_array_equal(
        Target.from_policy(popular, obs, excluded).distribution(first)[1], whole_first)  # fmt: skip


def test_an_agent_needs_what_it_saw(tiny):
    agent, _, obs, excluded, slate = tiny
    with pytest.raises(ValueError, match="seen_by"):
        Target.from_policy(agent)
    with pytest.raises(ValueError, match="neither"):
        Target.from_policy(object(), obs)
    with pytest.raises(ValueError, match="9 decisions, mask 3"):
        Target.from_policy(agent, obs, excluded[:3])
    more = slates(np.tile(slate.numpy(), (2, 1)), num_actions=8)
    with pytest.raises(ValueError, match=r"decisions 0..8, the log has decision 9"):
        Target.from_policy(agent, obs, excluded).logged(whole(more))


# what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Target.from_matrix([[0.5, 0.5], [0.5, 0.6]]), "row 1 sums to 1.1.*divide"),
        (lambda: Target.from_matrix([[0.5, 0.5], [1.5, -0.5]]), "row 1.*minimum -0.5"),
        (lambda: Target.from_matrix([[0.5, 0.5], [np.nan, 1.0]]), "row 1 sums to nan"),
        (lambda: Target.from_matrix(np.full((2, 2, 3), 0.4)), "row 0, slot 0, sums to 0.8"),
        (lambda: Target.from_matrix([0.5, 0.5]), r"\(n, A\)"),
        (lambda: Target.from_lists([[0, 1], [2, 2]], [[0.5, 0.5]] * 2), "row 1 of items names"),
        (lambda: Target.from_lists([[0, -1]], [[0.5, 0.5]]), "padding: make it 0"),
        (lambda: Target.from_lists([[0, -2]], [[0.5, 0.5]]), "below 0"),
        (lambda: Target.from_lists([[0, 1]], [[0.5, 0.4]]), "row 0 sums to 0.9"),
        (lambda: Target.from_lists([[0, 1]], [[1.0]]), r"\(1, 2\) and probs \(1, 1\)"),
        (lambda: Target.from_lists([[0.0, 1.0]], [[0.5, 0.5]]), "integers"),
        (lambda: Target.from_probabilities([0.5, 1.2]), "pi_logged.*1.2 in row 1"),
        (lambda: Target.from_probabilities([0.5, np.nan]), "nan in row 1"),
        (lambda: Target.from_probabilities([0.5], value=[np.inf]), "value must be finite.*row 0"),
        (lambda: Target.from_probabilities([[0.5]]), r"\(n,\)"),
        (lambda: Target.from_function([0.5, 0.4]), "sums to 0.9"),
        (lambda: Target.from_ranker(np.arange(3.0), k=4), "k=4 of 3"),
        (lambda: Target.from_ranker(np.arange(3.0), k=0), "at least 1"),
    ],
)
def test_wrong_numbers_are_refused_with_their_row(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target.from_probabilities(np.ones(3)), "pi_logged has 3 rows, the log has 300"),
        (Target.from_matrix(np.ones((3, 1))), "pi has 3 rows, the log has 300"),
        (Target.from_matrix(np.full((300, 5), 0.2)), "5 actions, the log has 6"),
        (Target.from_lists(np.full((300, 1), 6), np.ones((300, 1))), "in 0..5.*row 0 has 6"),
        (Target.from_ranker(np.arange(5.0)), "5 actions, the log has 6"),
        (Target.from_ranker(np.ones((2, 6))), "scores has 2 rows, the log has 300"),
    ],
)
def test_a_target_of_another_log_is_refused(target, words):
    with pytest.raises(ValueError, match=words):
        target.check(bandit()[0])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target.from_function(lambda x: np.full((len(x), 6), 0.2)), "row 0 sums to 1.2"),
        (Target.from_function(lambda x: np.ones(len(x))), r"got shape \(64,\)"),
        (Target.from_function(lambda x: np.ones((len(x), 1))), "actions 0..0, row"),
        (Target.from_ranker(lambda x: np.where(x[:, :1] > 0, 0, np.nan) * np.ones(6)), "nan, inf"),
        (Target.from_matrix(np.full((300, 6, 2), 1 / 6)), "the log says no slot"),
    ],
)
def test_wrong_answers_are_refused_when_they_come(target, words):
    with pytest.raises(ValueError, match=words):
        target.logged(whole(bandit()[0]))


def test_rows_of_float32_may_miss_one_by_what_rounding_adds_up_to() -> None:
    pi = np.random.default_rng(0).random((50, 2000)).astype(np.float32)
    pi /= pi.sum(axis=1, keepdims=True)
    pi[7] *= np.float32(1 + 5e-6)
    assert Target.from_matrix(pi).kind is not None
    with pytest.raises(ValueError, match="row 7 sums to"):
        Target.from_matrix(pi.astype(float))
    pi[9] *= np.float32(1.001)
    with pytest.raises(ValueError, match="row 9 sums to"):
        Target.from_matrix(pi)
