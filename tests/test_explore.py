"""Slates from scores: propensities are exact, coins are per user and slot, ties have no bias."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.explore import (
    break_ties,
    epsilon_greedy_probs,
    epsilon_greedy_slate,
    epsilon_greedy_slate_probs,
    plackett_luce_probs,
    sample_slate,
    seeded_ranks,
    softmax_uniform,
)
from encoders.state import EMPTY


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def everything(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def frequencies(slates, n):
    """Share of each ordered slate (draws, K) as a dict."""
    code = (slates * n ** torch.arange(slates.shape[1])).sum(dim=1)
    values, counts = code.unique(return_counts=True)
    return {int(v): int(c) / len(slates) for v, c in zip(values, counts, strict=True)}


def test_without_epsilon_the_best_are_shown_in_order_with_certainty():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]])
    allowed = torch.tensor([[True, False, True, True], [True, True, True, True]])
    decision = epsilon_greedy_slate(scores, allowed, 3, 0.0, seeded())
    assert decision.slate.tolist() == [[3, 2, 0], [0, 1, 2]]
    assert decision.propensity.tolist() == [[1.0] * 3] * 2


def test_epsilon_greedy_propensities_by_hand():
    scores, slate = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[0, 2]])
    probs = epsilon_greedy_slate_probs(scores, everything(1, 4), slate, 0.3)
    assert probs[0].tolist() == pytest.approx([0.7 + 0.3 / 4, 0.3 / 3])


def test_epsilon_greedy_slates_come_as_often_as_their_propensities_say():
    draws, n, k, epsilon = 40_000, 4, 2, 0.6
    scores = torch.tensor([[0.3, 0.9, 0.1, 0.5]]).expand(draws, n)
    allowed = torch.tensor([[True, True, True, False]]).expand(draws, n)
    decision = epsilon_greedy_slate(scores, allowed, k, epsilon, seeded())
    share = frequencies(decision.slate, n)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    total = 0.0
    for pair in pairs:
        asked = torch.tensor([pair])
        probs = epsilon_greedy_slate_probs(scores[:1], allowed[:1], asked, epsilon)
        chance = float(probs.prod())
        total += chance
        slack = 5 * math.sqrt(chance / draws)
        assert share[pair[0] + n * pair[1]] == pytest.approx(chance, abs=slack)
    assert total == pytest.approx(1.0)


def test_each_user_flips_their_own_coin():
    scores = torch.tensor([[0.0, 1.0]]).expand(16, 2)
    generator = seeded()
    shares = [
        float((epsilon_greedy_slate(scores, everything(16, 2), 1, 0.5, generator).slate == 0).sum())
        for _ in range(400)
    ]
    mean, spread = torch.tensor(shares).mean(), torch.tensor(shares).std()
    assert float(mean) == pytest.approx(4.0, abs=0.5)  # binomial(16, 1/4), not all or nothing
    assert float(spread) == pytest.approx(math.sqrt(3.0), abs=0.3)


def test_each_slot_flips_its_own_coin():
    scores = torch.arange(50.0).expand(4096, 50)
    slate = epsilon_greedy_slate(scores, everything(4096, 50), 2, 0.5, seeded()).slate
    greedy = torch.stack([slate[:, 0] == 49, slate[:, 1] >= 48], dim=1).float()
    both = float((greedy[:, 0] * greedy[:, 1]).mean())
    assert both == pytest.approx(0.25, abs=0.04)


@settings(max_examples=40, deadline=None, database=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 9),
    epsilon=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
)
def test_whatever_the_input_act_and_slate_probs_agree(n, k, epsilon, seed):
    generator = seeded(seed)
    scores = torch.randint(0, 3, (5, n), generator=generator).float()  # many ties
    allowed = torch.rand(5, n, generator=generator) < 0.8
    if int(allowed.sum(dim=1).min()) < k:
        with pytest.raises(ValueError, match="allowed items"):
            epsilon_greedy_slate(scores, allowed, k, epsilon, generator)
        return
    decision = epsilon_greedy_slate(scores, allowed, k, epsilon, generator)
    asked = epsilon_greedy_slate_probs(scores, allowed, decision.slate, epsilon)
    assert torch.equal(decision.propensity, asked)
    assert allowed.gather(1, decision.slate).all()
    assert all(len(set(row)) == k for row in decision.slate.tolist())
    first = epsilon_greedy_probs(scores, allowed, epsilon)
    assert torch.allclose(first.gather(1, decision.slate[:, :1]), asked[:, :1])
    assert torch.allclose(first.sum(dim=1), torch.ones(5))


def test_an_empty_or_repeated_or_forbidden_slot_has_no_chance_and_uses_nothing_up():
    scores, allowed = torch.zeros(1, 4), torch.tensor([[True, True, True, False]])
    slate = torch.tensor([[0, EMPTY, 0, 3, 1]])
    assert epsilon_greedy_slate_probs(scores, allowed, slate, 1.0)[0].tolist() == pytest.approx(
        [1 / 3, 0.0, 0.0, 0.0, 1 / 2]
    )
    probs = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    assert plackett_luce_probs(probs, slate)[0].tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0, 0.5])


def test_plackett_luce_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    asked = plackett_luce_probs(probs, torch.tensor([[1, 0]]))
    assert asked[0].tolist() == pytest.approx([0.3, 0.5 / 0.7])


def test_plackett_luce_slates_come_as_often_as_their_propensities_say():
    draws = 40_000
    probs = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(draws, 4)
    decision = sample_slate(probs, 2, seeded())
    share = frequencies(decision.slate, 4)
    for a, b in [(0, 1), (1, 0), (2, 0), (0, 2), (1, 2), (2, 1)]:
        chance = float(plackett_luce_probs(probs[:1], torch.tensor([[a, b]])).prod())
        slack = 5 * math.sqrt(chance / draws)
        assert share[a + 4 * b] == pytest.approx(chance, abs=slack)
    assert torch.equal(decision.propensity, plackett_luce_probs(probs, decision.slate))


def test_a_tiny_probability_keeps_its_digits_below_a_big_one():
    probs = torch.tensor([[1.0 - 3e-12, 2e-12, 1e-12]], dtype=torch.float64)
    asked = plackett_luce_probs(probs, torch.tensor([[0, 1, 2]]))
    assert asked[0].tolist() == pytest.approx([1.0, 2 / 3, 1.0])  # 1 - p would have lost this


def test_softmax_uniform_by_hand_and_its_direction():
    scores = torch.tensor([[0.0, math.log(3.0), 9.0]])
    allowed = torch.tensor([[True, True, False]])
    probs = softmax_uniform(scores, allowed, 1.0, 0.2)
    assert probs[0].tolist() == pytest.approx([0.8 / 4 + 0.1, 0.8 * 3 / 4 + 0.1, 0.0])
    assert softmax_uniform(scores, allowed, 0.1, 0.2)[0, 1] > probs[0, 1]  # colder is greedier


def test_too_few_allowed_items_are_refused_in_words():
    with pytest.raises(ValueError, match="a slate of 3 needs 3 allowed items, row 1 has 2"):
        epsilon_greedy_slate(
            torch.zeros(2, 4),
            torch.tensor([[True] * 4, [True, True, False, False]]),
            3,
            0.5,
            seeded(),
        )
    with pytest.raises(ValueError, match="row 0 has 1"):
        sample_slate(torch.tensor([[1.0, 0.0]]), 2, seeded())


def test_scores_that_are_not_numbers_are_refused():
    scores = torch.tensor([[0.0, torch.nan, 1.0]])
    for call in (
        lambda: epsilon_greedy_slate(scores, everything(1, 3), 2, 0.5, seeded()),
        lambda: epsilon_greedy_slate_probs(scores, everything(1, 3), torch.tensor([[0, 2]]), 0.5),
        lambda: epsilon_greedy_probs(scores, everything(1, 3), 0.5),
        lambda: sample_slate(scores, 2, seeded()),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            call()


def test_an_item_outside_the_catalogue_is_refused():
    with pytest.raises(ValueError, match=r"in 0\.\.2"):
        plackett_luce_probs(torch.ones(1, 3) / 3, torch.tensor([[3]]))


def test_equal_scores_are_not_ordered_by_id_and_near_ones_are_not_swapped():
    order = break_ties(torch.zeros(1000)).argsort(descending=True)
    rank = torch.corrcoef(torch.stack([order.double(), torch.arange(1000.0).double()]))[0, 1]
    assert abs(float(rank)) < 0.15
    assert torch.equal(break_ties(torch.zeros(1000)).argsort(descending=True), order)
    base = torch.tensor([1.0, -1.0, 1e-3, -5e7]).repeat_interleave(500)
    above = torch.nextafter(base, torch.full_like(base, torch.inf))  # the next float32
    noisy = break_ties(torch.cat([base, above]))
    assert (
        noisy[: len(base)].view(4, -1).max(dim=1).values
        < noisy[len(base) :].view(4, -1).min(dim=1).values
    ).all()


def test_seeded_ranks_keep_the_order_and_draw_ties():
    scores = torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0, 3.0])
    ranks = seeded_ranks(scores, seeded(0))
    assert ranks[0] == 5
    assert ranks[5] == 4
    assert sorted(ranks.tolist()) == [0, 1, 2, 3, 4, 5]
    assert len({tuple(seeded_ranks(scores, seeded(s)).tolist()) for s in range(30)}) > 10
