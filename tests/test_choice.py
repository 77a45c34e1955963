"""Choices come as often as their exact probabilities say."""

import torch

from simulators import choice

TRIALS = 200_000
EMPTY_SLOT = -torch.inf


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).clamp(min=1e-7)


def draw(theta, seed=0):
    """Theta of one slate (K,) to many draws: theta (T, K), noise (T, K), outside (T,)."""
    many = torch.tensor(theta).expand(TRIALS, -1)
    noise = choice.gumbel(uniform(TRIALS, len(theta), seed=seed))
    return many, noise, choice.gumbel(uniform(TRIALS, seed=seed + 1))


def agree(frequency, probability):
    """Within five standard errors."""
    error = (probability * (1 - probability) / TRIALS).sqrt()
    return bool(((frequency - probability).abs() <= 5 * error + 1e-9).all())


def test_logit_chooses_with_the_exact_probabilities():
    theta = [0.5, -1.0, EMPTY_SLOT, 1.5, -3.0]
    weights = torch.tensor(theta).exp()
    by_hand = weights / (1 + weights.sum())
    assert torch.allclose(choice.choice_probabilities(torch.tensor([theta]))[0], by_hand)
    chosen = choice.logit(*draw(theta))
    assert chosen.sum(dim=1).max() == 1  # at most one
    assert agree(chosen.float().mean(dim=0), by_hand)


def test_a_slate_of_one_is_bought_with_sigmoid():
    for theta in (-2.0, 0.0, 1.0):
        assert agree(choice.logit(*draw([theta])).float().mean(), torch.tensor(theta).sigmoid())


def test_organic_has_sigmoid_margins_and_contains_what_is_chosen():
    theta, noise, outside = draw([0.5, -1.0, EMPTY_SLOT, 1.5])
    organic = choice.organic(theta, noise, outside)
    assert agree(organic.float().mean(dim=0), theta[0].sigmoid())
    chosen = choice.logit(theta, noise, outside)
    assert not (chosen & ~organic).any()
    shifted = choice.logit(theta + 1.0, noise, outside)  # being shown helps: some buy only for that
    assert (shifted & ~organic).any()


def test_independent_buys_each_with_sigmoid_whatever_else_is_shown():
    theta = torch.tensor([2.0, -1.0, EMPTY_SLOT, 0.0])
    chosen = choice.independent(theta.expand(TRIALS, 4), uniform(TRIALS, 4)).float()
    assert agree(chosen.mean(dim=0), theta.sigmoid())
    assert agree((chosen[:, 0] * chosen[:, 3]).mean(), theta[0].sigmoid() * theta[3].sigmoid())


def test_cascade_takes_the_first_wanted_from_the_top():
    theta = torch.tensor([0.3, EMPTY_SLOT, -0.5, 1.0])
    chosen = choice.cascade(theta.expand(TRIALS, 4), uniform(TRIALS, 4))
    assert chosen.sum(dim=1).max() == 1
    p = theta.sigmoid()
    unwanted = torch.cat([torch.ones(1), (1 - p).cumprod(dim=0)[:-1]])
    assert agree(chosen.float().mean(dim=0), p * unwanted)


def test_empty_slots_are_never_chosen_even_when_all_are_empty():
    theta = torch.full((1000, 3), EMPTY_SLOT)
    noise, outside = choice.gumbel(uniform(1000, 3)), choice.gumbel(uniform(1000))
    assert not choice.logit(theta, noise, outside).any()
    assert not choice.organic(theta, noise, outside).any()
    assert not choice.independent(theta, uniform(1000, 3)).any()
    assert not choice.cascade(theta, uniform(1000, 3)).any()
    assert torch.equal(choice.choice_probabilities(theta), torch.zeros(1000, 3))


def test_attention_fades_downwards_and_only_if_asked():
    theta = torch.tensor([[1.0, 1.0, EMPTY_SLOT]])
    assert choice.position(theta, 0.5).tolist() == [[1.0, 0.5, EMPTY_SLOT]]
    assert torch.equal(choice.position(theta, 0.0), theta)


def test_gumbel_noise_has_gumbel_mean_and_variance():
    noise = choice.gumbel(uniform(TRIALS)).double()
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - torch.pi**2 / 6) < 0.05
