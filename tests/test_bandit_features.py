"""phi(s, a) in factors is phi(s, a) whole; contexts keep what fits; sampled slates are counted."""

import itertools
from dataclasses import replace

import pytest
import torch

from agents.bandit_features import (
    PairVectors,
    UserVectors,
    pair_products,
    pair_scores,
    pair_squares,
)
from agents.bandit_slates import (
    mixture_probs,
    mixture_slate,
    mixture_slate_probs,
    mixture_slates,
    seeded,
    tied_probs,
    tied_slate,
    tied_slate_probs,
)
from agents.nets import TRACES, Reader
from agents.testing import synthetic_observation, synthetic_spec
from encoders.state import EMPTY
from experiments.bandit_speed import bandit_spec, observed


def seen(rows=6):
    spec = synthetic_spec()
    obs = synthetic_observation(spec, rows, torch.Generator().manual_seed(3))
    features = PairVectors(spec, dim=5)
    every = features.of(obs, torch.arange(24).expand(rows, -1)).double()  # (B, N, d)
    return spec, obs, features, every


def test_factors_give_the_scores_squares_and_products_of_whole_vectors():
    _, obs, features, every = seen()
    g = torch.Generator().manual_seed(0)
    d, q, pairs = features.size, features.apart, features.factors(obs)
    weight = torch.randn(3, d, generator=g, dtype=torch.float64)
    base = torch.randn(3, 24, generator=g)
    wanted = torch.einsum("bnd,md->bmn", every, weight) + base
    assert torch.allclose(pair_scores(pairs, weight, q, base).double(), wanted, atol=1e-4)
    root = torch.randn(d, d, generator=g, dtype=torch.float64)
    cov = root @ root.T / d
    wanted = torch.einsum("bnd,de,bne->bn", every, cov, every)
    assert torch.allclose(pair_squares(pairs, cov, q).double(), wanted, rtol=1e-4)
    own = torch.randn(24, d, generator=g, dtype=torch.float64)
    wanted = torch.einsum("bnd,nd->bn", every, own)
    got = pair_products(pairs, own, features.alone[:-1], q)
    assert torch.allclose(got.double(), wanted, atol=1e-4)


def test_traces_are_of_the_very_item_in_the_past_and_on_this_trip():
    _, obs, features, every = seen(rows=1)
    past = torch.tensor([[4, 7] + [EMPTY] * 10])
    obs = replace(
        obs, past=past, past_count=(past >= 0).float() * 3, past_age=(past >= 0).float(),
        history=torch.tensor([[7, 9, 9, EMPTY, EMPTY, EMPTY]]),
        feedback=torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0]).reshape(1, 6, 1),
    )  # fmt: skip
    every = features.of(obs, torch.arange(24)[None])[0, :, -features.traced :]  # (N, T)
    touched = every.abs().sum(dim=1).nonzero().squeeze(1).tolist()
    assert touched == [4, 7, 9]
    trip = every[:, TRACES:]  # how often shown, how often chosen
    assert trip[[4, 7, 9]].tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 1.0]]
    assert every[9, :TRACES].abs().sum() == 0
    assert every[4, :TRACES].abs().sum() > 0
    places = features.factors(obs).places[0]
    real = places[places < 24]
    assert sorted(real.tolist()) == [4, 7, 9]  # each once


def test_an_empty_slot_has_no_vector_but_what_all_share():
    _, obs, features, _ = seen(rows=2)
    empty = features.of(obs, torch.full((2, 1), EMPTY))
    assert empty.abs().sum() == 0


def test_contexts_keep_the_profile_where_it_fits():
    spec = bandit_spec(0, arms=3, features=4)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    exact = UserVectors(spec, Reader(spec, memory=False), dim=5)
    assert torch.equal(exact(observed(x)), torch.cat([torch.ones(5, 1), x], dim=1))
    wide = UserVectors(spec, Reader(spec, memory=False), dim=50)
    assert wide.size < 50  # no dead numbers
    assert torch.equal(wide(observed(x))[:, 1:5], x)
    only = UserVectors(spec, Reader(spec, memory=False), dim=1)
    assert torch.equal(only(observed(x)), torch.ones(5, 1))


def test_a_projection_is_a_function_of_its_seed():
    spec = synthetic_spec()
    obs = synthetic_observation(spec, 4, torch.Generator().manual_seed(0))
    read = Reader(spec, memory=False)
    one, again, other = (UserVectors(spec, read, dim=6, seed=s)(obs) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


SCORES = torch.tensor([[2.0, 2.0, 1.0, 2.0, 0.0]])


def test_ties_are_shared_evenly_and_slates_sum_to_one():
    allowed = torch.tensor([[True, True, True, False, True]])
    assert tied_probs(SCORES, allowed, 0.0).tolist() == [[0.5, 0.5, 0.0, 0.0, 0.0]]
    for epsilon in (0.0, 0.3):
        total = torch.zeros(5)
        slates = torch.tensor(list(itertools.permutations(range(5), 3)))
        every = slates.shape[0]
        probs = tied_slate_probs(
            SCORES.expand(every, -1), allowed.expand(every, -1), slates, epsilon
        )
        chance = probs.prod(dim=1)
        assert chance.sum() == pytest.approx(1.0)
        total.index_add_(0, slates[:, 0], chance)
        assert torch.allclose(total, tied_probs(SCORES, allowed, epsilon)[0], atol=1e-6)


def test_drawn_slates_have_the_frequencies_and_propensities_that_are_said():
    users, g = 40_000, torch.Generator().manual_seed(0)
    scores, allowed = SCORES.expand(users, -1), torch.ones(users, 5, dtype=torch.bool)
    decision = tied_slate(scores, allowed, 2, 0.4, g)
    probs = tied_slate_probs(scores, allowed, decision.slate, 0.4)
    assert torch.allclose(decision.propensity, probs)
    often = torch.bincount(decision.slate[:, 0], minlength=5) / users
    assert torch.allclose(often, tied_probs(SCORES, allowed[:1], 0.4)[0], atol=0.01)
    first = (decision.slate[:, 0] == 0).nonzero().squeeze(1)
    second = torch.bincount(decision.slate[first, 1], minlength=5) / len(first)
    wanted = tied_slate_probs(
        SCORES.expand(4, -1), allowed[:4], torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4]]), 0.4
    )[:, 1]
    assert torch.allclose(second[1:], wanted, atol=0.015)


def test_a_slate_that_cannot_be_has_probability_zero():
    allowed = torch.tensor([[True, True, True, False, True]])
    slate = torch.tensor([[0, 0, 3]])
    assert tied_slate_probs(SCORES, allowed, slate, 0.5)[0, 1:].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="slate of 5 needs 5 allowed items, row 0 has 4"):
        tied_slate(SCORES, allowed, 5, 0.0, torch.Generator())


def test_a_mixture_counts_its_samples():
    slates = torch.tensor([[[0, 1], [0, 2], [0, 1], [3, 1]]])  # (1, M=4, K=2)
    asked = torch.tensor([[0, 1], [0, 2], [3, 1], [3, 2], [2, 1]])
    probs = mixture_slate_probs(slates.expand(5, -1, -1), asked)
    wanted = [[0.75, 2 / 3], [0.75, 1 / 3], [0.25, 1.0], [0.25, 0.0], [0.0, 0.0]]
    assert torch.allclose(probs, torch.tensor(wanted))
    assert mixture_probs(slates, 4).tolist() == [[0.75, 0.0, 0.0, 0.25]]
    decision = mixture_slate(slates.expand(20_000, -1, -1), torch.Generator().manual_seed(0))
    assert (decision.slate[:, 0] == 0).float().mean() == pytest.approx(0.75, abs=0.01)


def test_blocks_of_samples_do_not_change_the_slates(monkeypatch):
    scores = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(3, 5, dtype=torch.bool)
    allowed[:, 2] = False

    def sampled(first, last):
        return scores[:, first:last].clone()

    whole = mixture_slates(sampled, 7, allowed, 2)
    assert not (whole == 2).any()
    monkeypatch.setattr("agents.bandit_slates.BLOCK", 20)
    assert torch.equal(mixture_slates(sampled, 7, allowed, 2), whole)


def test_draws_of_another_seed_are_not_those_of_another_update():
    one, other, same = (
        torch.rand(4, generator=seeded(seed, version, "cpu"))
        for seed, version in ((0, 1), (1, 0), (0, 1))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
