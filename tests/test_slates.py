import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.slates import (
    all_rankings,
    cascade_doubly_robust,
    item_position_marginals,
    joint_weights,
    position_based_weights,
    prefix_weights,
    pseudo_inverse_product_weights,
    pseudo_inverse_weights,
    ranking_probs,
    self_normalised_slots,
    weighted_slots,
)
from evaluation.terms import Groups, Terms

FIXTURES = Path(__file__).parent / "data" / "ope"
RANKING, PRODUCT = "slate_cascade_additive_ranking", "slate_independent_factorizable"
PI = "pi_general(not obp: own numpy by enumeration)"


def fixture(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        data = dict(arrays)
    return data, json.loads((FIXTURES / f"{name}.json").read_text())["expected"]


def in_fixture_order(name: str) -> tuple[dict[str, Any], dict[str, Any], Groups, dict[str, Any]]:
    data, expected = fixture(name)
    groups = Groups(data["slate_id"], data["position"])
    prefix = data["e_pscore_cascade"] / data["pscore_cascade"]
    weights = {
        "sips": joint_weights(groups, prefix / groups.previous(prefix, 1.0)),
        "iips": data["e_pscore_item_position"] / data["pscore_item_position"],
        "rips": prefix_weights(groups, prefix / groups.previous(prefix, 1.0)),
    }
    return data, expected, groups, weights


@pytest.mark.parametrize("name", [RANKING, PRODUCT])
def test_slate_estimators_equal_the_stored_values(name: str) -> None:
    data, expected, groups, weights = in_fixture_order(name)
    np.testing.assert_allclose(weights["sips"], data["e_pscore"] / data["pscore"], rtol=1e-9)
    for key, weight in weights.items():
        value = weighted_slots(groups, weight, data["reward"]).values().mean()
        assert value == pytest.approx(expected[key]["value"], rel=1e-9)
        value = self_normalised_slots(groups, weight, data["reward"], horizon=3).values().mean()
        assert value == pytest.approx(expected[f"sn{key}"]["value"], rel=1e-9)


@pytest.mark.parametrize("name", [RANKING, PRODUCT])
def test_cascade_doubly_robust_equals_the_stored_value(name: str) -> None:
    data, expected, groups, weights = in_fixture_order(name)
    q, pi_e = data["q_hat"].reshape(-1, 6), data["e_action_dist"].reshape(-1, 6)
    q_logged = np.take_along_axis(q, data["action"][:, None], axis=1)[:, 0]
    terms = cascade_doubly_robust(
        groups, weights["rips"], data["reward"], q_logged, (pi_e * q).sum(axis=1)
    )
    assert terms.values().mean() == pytest.approx(expected["cascade-dr"]["value"], rel=1e-9)


@pytest.mark.parametrize("name", [RANKING, PRODUCT])
def test_pseudo_inverse_by_enumeration_equals_the_stored_weights(name: str) -> None:
    data, expected = fixture(name)
    if name == RANKING:
        slates = all_rankings(6, 3)
        probs_b = ranking_probs(data["behavior_logit"], slates)
        probs_e = ranking_probs(data["eval_logit"], slates)
    else:  # each position draws from the same softmax, items may repeat
        slates = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
        probs_b, probs_e = (
            np.prod([ranking_probs(data[key], all_rankings(6, 1))[:, s] for s in slates.T], axis=0)
            for key in ("behavior_logit", "eval_logit")
        )
    np.testing.assert_allclose(probs_b.sum(axis=1), 1.0, rtol=1e-12)
    logged = data["action"].reshape(-1, 3)
    weight = np.concatenate(
        [
            pseudo_inverse_weights(slates, b, e, row[None])
            for b, e, row in zip(probs_b, probs_e, logged, strict=True)
        ]
    )
    np.testing.assert_allclose(weight, data["pi_weights"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(weight[:5], expected[PI]["weights_first5"], rtol=1e-9)
    groups = Groups(data["slate_id"], data["position"])
    value = weighted_slots(groups, weight[groups.index], data["reward"]).values().mean()
    assert value == pytest.approx(expected[PI]["value"], rel=1e-9)


def test_pseudo_inverse_of_independent_positions_equals_the_stored_value() -> None:
    data, expected, groups, weights = in_fixture_order(PRODUCT)
    weight = pseudo_inverse_product_weights(groups, weights["iips"])
    value = weighted_slots(groups, weight, data["reward"]).values().mean()
    stored = expected["pi_product(VowpalWabbit/estimators)"]["value"]
    assert value == pytest.approx(stored, rel=1e-9)


def test_rankings_and_marginals_equal_the_stored_propensities() -> None:
    data, _ = fixture(RANKING)
    slates, logged = all_rankings(6, 3), data["action"].reshape(-1, 3)
    of_logged = (slates[None] == logged[:, None]).all(axis=2)  # (300, m)
    for key, stored in (("behavior_logit", "pscore"), ("eval_logit", "e_pscore")):
        joint = (ranking_probs(data[key], slates) * of_logged).sum(axis=1)
        np.testing.assert_allclose(joint, data[stored][::3], rtol=1e-9)
        first = np.repeat(np.exp(data[key]), 3, axis=0)  # not normalised
        at = item_position_marginals(first, data["action"], 3)
        stored_at = data[f"{stored}_item_position"]
        np.testing.assert_allclose(at[np.arange(900), data["position"]], stored_at, rtol=1e-9)


class World:
    """Two contexts, four items, lists of two: every list that Plackett-Luce may log, as rows."""

    def __init__(self, k: int = 2, items: int = 4) -> None:
        rng = np.random.default_rng(5)
        self.slates = all_rankings(items, k)  # (m, k)
        m, contexts = len(self.slates), 2
        logits = rng.normal(size=(2, contexts, items))
        self.pi_b, self.pi_e = (ranking_probs(x, self.slates) for x in logits)  # (2, m)
        self.x = np.repeat(np.arange(contexts), m)  # (2 m,) context of a slate
        self.slate = np.tile(self.slates, (contexts, 1))  # (2 m, k)
        self.chance = self.pi_b.ravel() / contexts  # (2 m,) of a slate in the log
        self.target = self.pi_e.ravel() / contexts
        self.groups = Groups(np.repeat(np.arange(contexts * m), k))
        self.first_e, self.first_b = (np.exp(x)[self.x.repeat(k)] for x in (logits[1], logits[0]))
        self.items = self.slate.ravel()  # (n,)
        self.step_e, self.step_b = (self._conditional(p) for p in (self.pi_e, self.pi_b))
        self.ratio = self._logged(self.step_e) / self._logged(self.step_b)  # (n,)
        self.at_e = item_position_marginals(self.first_e, self.items, k)  # (n, k)
        self.at_b = item_position_marginals(self.first_b, self.items, k)
        self.rng, self.k, self.num_items = rng, k, items

    def _conditional(self, joint: np.ndarray) -> np.ndarray:
        """Joint (2, m) to the probability of any item given the slate's items above, (n, A)."""
        n, k = self.slate.shape
        out = np.zeros((n, k, self.slates.max() + 1))
        for row, (x, slate) in enumerate(zip(self.x, self.slate, strict=True)):
            for slot in range(k):
                same = (self.slates[:, :slot] == slate[:slot]).all(axis=1)
                np.add.at(out[row, slot], self.slates[same, slot], joint[x, same])
                out[row, slot] /= joint[x, same].sum()
        return out.reshape(n * k, -1)

    def _logged(self, probs: np.ndarray) -> np.ndarray:
        return np.take_along_axis(probs, self.items[:, None], axis=1)[:, 0]

    def weights(self) -> dict[str, np.ndarray]:
        """By name, (n,) each."""
        place = self.groups.place
        marginal = self.at_e[np.arange(len(place)), place] / self.at_b[np.arange(len(place)), place]
        pi = [
            pseudo_inverse_weights(self.slates, self.pi_b[x], self.pi_e[x], self.slates)
            for x in (0, 1)
        ]
        return {
            "sips": joint_weights(self.groups, self.ratio),
            "rips": prefix_weights(self.groups, self.ratio),
            "iips": marginal,
            "pi": np.concatenate(pi)[self.groups.index],
        }

    def expected(self, terms: Terms) -> float:
        """Of an estimator, over all logs: it is a mean over slates."""
        return self.chance @ terms.values()

    def truth(self, reward: np.ndarray) -> float:
        return self.target @ self.groups.sum(reward)

    def rewards(self) -> dict[str, np.ndarray]:
        """(n,) by the structure that each estimator takes for granted."""
        x, above, below = self.x, self.slate[:, 0], self.slate[:, 1]
        a = self.rng.uniform(size=(2, 2, self.num_items))  # context, place, item
        pairs = self.rng.uniform(size=(2, self.num_items, self.num_items))
        independent = np.stack([a[x, 0, above], a[x, 1, below]], axis=1)
        additive = np.stack([independent.sum(axis=1), np.zeros(len(x))], axis=1)  # all on top
        cascade = np.stack([a[x, 0, above], pairs[x, above, below]], axis=1)
        anything = pairs[x, above, below][:, None] * [1.0, 0.5]
        return {
            "independent": independent.ravel(),
            "additive": additive.ravel(),
            "cascade": cascade.ravel(),
            "anything": anything.ravel(),
        }


RIGHT = {
    "sips": ["independent", "additive", "cascade", "anything"],
    "rips": ["independent", "cascade"],
    "iips": ["independent"],
    "pi": ["independent", "additive"],
}


@pytest.mark.parametrize("name", RIGHT)
def test_each_weight_is_unbiased_under_its_assumption_and_biased_otherwise(name: str) -> None:
    world = World()
    weight = world.weights()[name]
    for structure, reward in world.rewards().items():
        bias = world.expected(weighted_slots(world.groups, weight, reward)) - world.truth(reward)
        if structure in RIGHT[name]:
            assert abs(bias) < 1e-11
        else:
            assert abs(bias) > 1e-3, structure


@pytest.mark.parametrize("name", RIGHT)
def test_each_weight_has_mean_one_at_every_position(name: str) -> None:
    world = World()
    weight = world.weights()[name].reshape(-1, 2)
    np.testing.assert_allclose(world.chance @ weight, 1.0, rtol=1e-11)


def test_cascade_doubly_robust_is_unbiased_for_any_model() -> None:
    world = World()
    weight = world.weights()["rips"]
    q = world.rng.normal(size=(len(world.items), world.num_items))  # of items given those above
    q[1::2] = q[1::2][world.slate[:, 0]]  # a model sees the item above, not the one shown
    q[::2] = q[0]
    q_logged = np.take_along_axis(q, world.items[:, None], axis=1)[:, 0]
    value = (world.step_e * q).sum(axis=1)
    reward = world.rewards()["cascade"]
    terms = cascade_doubly_robust(world.groups, weight, reward, q_logged, value)
    assert world.expected(terms) == pytest.approx(world.truth(reward), abs=1e-11)
    explicit = cascade_doubly_robust(
        world.groups, weight, reward, q_logged, value, world.groups.previous(weight, 1.0)
    )
    np.testing.assert_array_equal(explicit.values(), terms.values())
    no_model = cascade_doubly_robust(world.groups, weight, reward, 0 * value, 0 * value)
    np.testing.assert_allclose(
        no_model.values(), weighted_slots(world.groups, weight, reward).values(), rtol=1e-12
    )


def test_position_based_weights_are_unbiased_if_examination_is_known() -> None:
    world = World()
    examination = np.array([1.0, 0.4])
    worth = world.rng.uniform(size=(2, world.num_items))
    reward = examination[world.groups.place] * worth[world.x.repeat(2), world.items]
    right = position_based_weights(world.at_e, world.at_b, examination)
    wrong = position_based_weights(world.at_e, world.at_b, examination[::-1])
    truth = world.truth(reward)
    assert world.expected(weighted_slots(world.groups, right, reward)) == pytest.approx(
        truth, abs=1e-11
    )
    assert abs(world.expected(weighted_slots(world.groups, wrong, reward)) - truth) > 1e-3


def test_position_based_weights_vary_less_than_item_position_weights() -> None:
    world = World()
    chance = np.repeat(world.chance, 2)
    pbm = position_based_weights(world.at_e, world.at_b, np.array([1.0, 1.0]))
    assert chance @ pbm**2 < chance @ world.weights()["iips"] ** 2


def test_a_slate_of_one_is_a_bandit() -> None:
    world = World(k=1)
    ratio, n = world.ratio, len(world.items)
    reward, q_logged, value = world.rng.normal(size=(3, n))
    weights = world.weights()
    weights["pi_product"] = pseudo_inverse_product_weights(world.groups, weights["iips"])
    weights["pbm"] = position_based_weights(world.at_e, world.at_b, np.array([0.3]))
    for weight in weights.values():
        np.testing.assert_allclose(weight, ratio, rtol=1e-10)
        np.testing.assert_allclose(
            weighted_slots(world.groups, weight, reward).values(), ratio * reward, rtol=1e-10
        )
        np.testing.assert_allclose(
            self_normalised_slots(world.groups, weight, reward, horizon=1).values(),
            ratio * reward / ratio.mean(),
            rtol=1e-10,
        )
    terms = cascade_doubly_robust(world.groups, ratio, reward, q_logged, value)
    np.testing.assert_allclose(terms.values(), value + ratio * (reward - q_logged), rtol=1e-12)


def test_slates_of_unlike_lengths_by_hand() -> None:
    groups = Groups(["b", "a", "b"], [1, 0, 0])  # b shows rows 2 then 0, a row 1
    ratio, reward = (groups.sort(np.array(x)) for x in ([3.0, 5.0, 2.0], [1.0, 10.0, 100.0]))
    assert joint_weights(groups, ratio).tolist() == pytest.approx([6.0, 6.0, 5.0])
    prefix = prefix_weights(groups, ratio)
    assert prefix.tolist() == pytest.approx([2.0, 6.0, 5.0])
    assert pseudo_inverse_product_weights(groups, ratio).tolist() == [4.0, 4.0, 5.0]
    assert weighted_slots(groups, prefix, reward).values().tolist() == pytest.approx([206.0, 50.0])
    terms = self_normalised_slots(groups, prefix, reward, horizon=2)
    assert terms.bottom is not None
    assert terms.bottom.tolist() == pytest.approx(np.array([[2.0, 6.0], [5.0, 5.0]]))
    assert terms.values().mean() == pytest.approx((200 + 50) / 7 + 6 / 11)


def test_self_normalisation_keeps_mean_one_if_items_decide_how_long_a_slate_gets() -> None:
    pi_b, pi_e = np.array([0.5, 0.5]), np.array([0.9, 0.1])  # item 0 ends the slate
    groups = Groups([0, 1, 1])
    ratio = np.array([*(pi_e / pi_b), 1.0])
    terms = self_normalised_slots(groups, prefix_weights(groups, ratio), np.ones(3), horizon=2)
    assert terms.bottom is not None
    assert pi_b @ terms.bottom == pytest.approx(np.ones(2))
    assert pi_b @ terms.top == pytest.approx(np.array([1.0, 0.1]))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(0, 1000))
def test_a_target_that_is_the_logging_policy_gives_the_mean_reward(
    lengths: list[int], seed: int
) -> None:
    groups = Groups(np.repeat(np.arange(len(lengths)), lengths))
    rng = np.random.default_rng(seed)
    reward, q = rng.normal(size=(2, sum(lengths)))
    ones, mean = np.ones(len(reward)), reward.sum() / len(lengths)
    for weight in (
        joint_weights(groups, ones),
        prefix_weights(groups, ones),
        pseudo_inverse_product_weights(groups, ones),
    ):
        assert weight.tolist() == ones.tolist()
    for terms in (
        weighted_slots(groups, ones, reward),
        self_normalised_slots(groups, ones, reward, horizon=5),
        cascade_doubly_robust(groups, ones, reward, q, q),
    ):
        assert terms.values().mean() == pytest.approx(mean)


def test_marginals_equal_the_sum_over_all_rankings_also_of_rare_items() -> None:
    probs = np.array([[0.6, 0.3, 0.1 - 1e-9, 1e-9, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
    with np.errstate(divide="ignore"):
        joint = ranking_probs(np.log(probs), all_rankings(5, 3))  # (2, m)
    for item in range(5):
        exact = np.stack([joint[:, s == item].sum(axis=1) for s in all_rankings(5, 3).T], axis=1)
        found = item_position_marginals(probs, np.array([item, item]), 3)
        np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-13)


def test_marginals_of_many_items_fill_every_place_once() -> None:
    probs = np.random.default_rng(0).dirichlet(np.full(300, 0.3))
    found = item_position_marginals(np.tile(probs, (300, 1)), np.arange(300), 5)
    np.testing.assert_allclose(found.sum(axis=0), 1.0, rtol=1e-9)
    np.testing.assert_allclose(found[:, 0], probs, rtol=1e-9, atol=1e-13)


def test_pseudo_inverse_loses_the_target_mass_that_was_never_logged() -> None:
    slates = np.array([[0], [1], [2]])
    pi_b, pi_e = np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    weight = pseudo_inverse_weights(slates, pi_b, pi_e, slates[:2])
    assert weight.mean() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: all_rankings(3, 4), "k must be in 1..3"),
        (lambda: all_rankings(50, 6), "use item_position_marginals"),
        (
            lambda: pseudo_inverse_weights(
                all_rankings(3, 2), np.ones(6), np.ones(6), np.array([[0, 9]])
            ),
            "row 0 of logged",
        ),
        (
            lambda: pseudo_inverse_weights(
                all_rankings(3, 2), np.ones(5), np.ones(6), np.array([[0, 1]])
            ),
            "5 of the logging policy",
        ),
        (
            lambda: pseudo_inverse_weights(
                all_rankings(3, 2), np.ones(6), np.ones(6), np.array([[0]])
            ),
            "of one length",
        ),
        (
            lambda: position_based_weights(
                np.ones((2, 2)), np.array([[1, 0], [0, 1]]), np.array([1.0, 0.0])
            ),
            "row 1 shows an item at no place",
        ),
        (lambda: position_based_weights(np.ones((2, 3)), np.ones((2, 3)), np.ones(1)), "must be"),
        (lambda: item_position_marginals(np.ones((2, 3)), np.array([0]), 2), "one item a row"),
    ],
)
def test_bad_slates_are_refused_with_the_reason(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
