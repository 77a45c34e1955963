"""Agents that learn from logs: known answers, and no item that nobody showed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offline_toys import SHRUNK, steps, taught, toy_obs, toy_spec

from agents.bcq import BCQ, constrained, relative_chance
from agents.behaviour_cloning import BehaviourCloning
from agents.cql import CQL, conservative_loss
from agents.iql import IQL, advantage_weight, expectile_loss
from agents.offline import mean_of_shown, shown_or_allowed, slate_nll
from encoders.state import EMPTY


def by_hand(logits: torch.Tensor, allowed: torch.Tensor, slate: torch.Tensor) -> torch.Tensor:
    """Minus log chances, item by item."""
    out = torch.zeros(slate.shape)
    for b in range(len(slate)):
        left = allowed[b].clone()
        for k, item in enumerate(slate[b].tolist()):
            if item == EMPTY:
                continue
            out[b, k] = -(logits[b, item] - logits[b][left.clone()].logsumexp(0))
            left[item] = False
    return out


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_a_slate_is_as_likely_as_its_items_drawn_one_by_one(seed: int, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = 5.0 * torch.randn(4, 7, generator=g)
    slate = torch.rand(4, 7, generator=g).argsort(dim=1)[:, :k]
    allowed = (torch.rand(4, 7, generator=g) < 0.5).scatter(1, slate, True)
    slate = torch.where(torch.rand(4, k, generator=g) < 0.2, EMPTY, slate)
    assert torch.allclose(
        slate_nll(logits, allowed, slate), by_hand(logits, allowed, slate), atol=1e-4
    )


def test_the_gradient_of_a_slate_is_that_of_its_formula_and_finite_at_its_edges() -> None:
    logits = torch.tensor([[3.0, -1.0, 0.5, 40.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    allowed = torch.tensor([[True, True, True, False], [True, True, False, False]])
    slate = torch.tensor([[2, EMPTY], [1, 0]])  # an empty slot; nothing left behind the last one
    (mine,) = torch.autograd.grad(slate_nll(logits, allowed, slate).sum(), logits)
    (theirs,) = torch.autograd.grad(by_hand(logits, allowed, slate).sum(), logits)
    assert torch.allclose(mine, theirs, atol=1e-6)
    assert mine[0, 3] == 0.0


def test_what_was_shown_could_be_shown_whatever_the_mask_says() -> None:
    batch = steps([0, 1], [[1], [EMPTY]], [[0.0], [0.0]], mask=torch.tensor([[1, 2], [0, EMPTY]]))
    allowed = shown_or_allowed(batch, 3)
    assert allowed.tolist() == [[True, True, False], [False, True, True]]


def test_a_mean_leaves_out_what_was_not_shown() -> None:
    values = torch.tensor([[1.0, 50.0], [3.0, 4.0]])
    real = torch.tensor([[True, False], [True, False]])
    assert float(mean_of_shown(values, real)) == 2.0
    assert float(mean_of_shown(values, real & False)) == 0.0


def test_cloning_finds_the_chances_of_the_log() -> None:
    state = torch.arange(100) % 2
    slate = torch.where(state == 0, (torch.arange(100) % 20 >= 16).long(), 2)[:, None]
    agent = taught(BehaviourCloning, toy_spec(), steps(state, slate, torch.zeros(100, 1)), 60)
    probs = agent.action_probs(toy_obs(torch.tensor([0, 1])), None)
    assert probs[0].tolist() == pytest.approx([0.8, 0.2, 0.0], abs=0.03)
    assert probs[1, 2] > 0.95
    calm = agent.action_probs(toy_obs(torch.tensor([0])), None, explore=False)
    assert calm.tolist() == [[1.0, 0.0, 0.0]]


def test_cloning_a_slate_learns_its_order() -> None:
    slate = torch.tensor([[2, 0]]).expand(64, 2)
    batch = steps(torch.zeros(64, dtype=torch.int64), slate, torch.zeros(64, 2))
    agent = taught(BehaviourCloning, toy_spec(4, 2), batch, 100)
    obs = toy_obs(torch.tensor([0]))
    assert agent.act(obs, None, explore=False).slate.tolist() == [[2, 0]]
    assert float(agent.slate_probs(obs, None, torch.tensor([[2, 0]])).prod()) > 0.8
    assert agent.act(obs, torch.tensor([[2]]), explore=False).slate[0, 0] == 0


def test_a_temperature_sharpens_or_flattens_what_is_drawn() -> None:
    spec = toy_spec()
    batch = steps([0] * 10, [[0]] * 7 + [[1]] * 3, [[0.0]] * 10)
    obs = toy_obs(torch.tensor([0]))
    for kind, calm in ((BehaviourCloning, {}), (IQL, {"beta": 1e-3})):
        sharp, flat = (
            float(
                taught(kind, spec, batch, 40, temperature=t, **calm).action_probs(obs, None).max()
            )
            for t in (0.2, 5.0)
        )
        assert sharp > 0.9
        assert flat < 0.6


def test_conservative_values_by_hand() -> None:
    q = torch.tensor([[1.0, 2.0, 5.0]])
    allowed = torch.tensor([[True, True, False]])
    loss, gap = conservative_loss(q, allowed, torch.tensor([[0]]), torch.tensor([[3.0]]), 0.5)
    assert gap.item() == pytest.approx(1.31326, abs=1e-4)  # log(e + e^2) - 1
    assert loss.item() == pytest.approx(1.5 + 0.5 * 1.31326, abs=1e-4)


def test_conservative_values_have_their_known_answer() -> None:
    q = torch.zeros(1, 3, requires_grad=True)
    slate, target = torch.tensor([[0], [1]]), torch.tensor([[1.0], [0.5]])
    optimizer = torch.optim.SGD([q], lr=1.5)
    for _ in range(1500):
        loss, _ = conservative_loss(q.expand(2, 3), torch.ones(2, 3).bool(), slate, target, 1.0)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    best, second, unseen = q[0].tolist()
    assert (best, second) == pytest.approx((0.876, 0.625), abs=0.005)
    assert unseen < -6.0


def test_cql_thinks_less_of_what_was_not_shown_than_of_all_that_was() -> None:
    batch = steps([0] * 64, [[0], [1]] * 32, [[1.0], [0.5]] * 32)
    obs = toy_obs(torch.tensor([0]))
    q = taught(CQL, toy_spec(), batch, 100, alpha=1.0).scores(obs)[0]
    assert q[2] < q[:2].min()
    assert q[1] < q[0]
    plain = taught(CQL, toy_spec(), batch, 100, alpha=0.0).scores(obs)[0]
    assert plain[:2].tolist() == pytest.approx([1.0, 0.5], abs=0.03)


@pytest.mark.parametrize("kind", [BCQ, CQL])
def test_values_follow_the_log_through_time_and_stop_where_users_left(kind: Any) -> None:
    # state 0 -> state 1 -> gone; item 0 then pays 1 in state 1 alone
    first = steps([0] * 32, [[0]] * 32, [[0.0]] * 32, later=[1] * 32)
    last = steps([1] * 32, [[0]] * 32, [[1.0]] * 32)
    knobs = {"alpha": 0.0} if kind is CQL else {}
    agent = kind(toy_spec(), gamma=0.9, lr=2e-2, tau=0.2, width=16, memory=False, **SHRUNK[kind],
                 **knobs)  # fmt: skip
    only = torch.tensor([[1, 2]]).expand(32, 2)  # what was never shown is no way to go on
    for _ in range(60):
        agent.update(replace(first, next_mask=only))
        agent.update(last)
    q = agent.scores(toy_obs(torch.tensor([0, 1])))
    assert q[:, 0].tolist() == pytest.approx([0.9, 1.0], abs=0.05)


def test_a_relative_chance_is_one_for_the_likeliest_allowed_item() -> None:
    logits = torch.tensor([[2.0, 2.0 - 0.6931, 9.0]])
    chance = relative_chance(logits, torch.tensor([[True, True, False]]))
    assert chance[0].tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-3)


@given(st.integers(0, 10_000), st.floats(0.0, 0.99))
def test_items_without_support_are_below_all_others_likelier_first(seed: int, tau: float) -> None:
    g = torch.Generator().manual_seed(seed)
    q, logits = torch.randn(1, 9, generator=g), 2.0 * torch.randn(1, 9, generator=g)
    chance = relative_chance(logits, torch.ones(1, 9).bool())
    values = constrained(q, chance, tau)
    kept = chance > tau
    assert torch.equal(values[kept], q[kept])
    assert kept.any()
    if (~kept).any():
        assert values[~kept].max() < values[kept].min()
        order = chance[~kept].argsort(descending=True)
        assert (values[~kept][order].diff() <= 0).all()
    assert values.isfinite().all()


def praise(agent: BCQ, item: int) -> None:
    """Make one item look best by far."""
    net = agent.means["q"]
    with torch.no_grad():
        net.bias.weight += 100.0 * net.items[item]


def test_bcq_never_shows_what_nobody_showed_however_good_it_looks() -> None:
    batch = steps([0] * 64, [[0], [1]] * 32, [[0.2], [0.1]] * 32)
    agent = taught(BCQ, toy_spec(), batch, 80)
    praise(agent, 2)
    obs = toy_obs(torch.zeros(50, dtype=torch.int64))
    plain = agent.means["q"](obs)
    assert (plain.argmax(dim=1) == 2).all()
    for explore in (True, False):
        assert (agent.act(obs, None, explore=explore).slate == 0).all()
        assert (agent.action_probs(obs, None, explore=explore)[:, 2] == 0).all()
    only = torch.tensor([[0, 1]]).expand(50, 2)
    assert (agent.act(obs, only).slate == 2).all()  # unless nothing else may be shown
    loose = taught(BCQ, toy_spec(), batch, 5, threshold=0.0)
    praise(loose, 2)
    assert (loose.act(obs, None).slate == 2).all()


def test_the_expectile_of_a_coin_is_the_published_one() -> None:
    v = torch.tensor(0.5, requires_grad=True)
    coin = torch.tensor([1.0] + [0.0] * 4)
    optimizer = torch.optim.SGD([v], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        expectile_loss(coin - v, 0.9).mean().backward()
        optimizer.step()
    assert float(v.detach()) == pytest.approx(0.69231, abs=1e-4)
    mean = expectile_loss(torch.tensor([-2.0, 2.0]), 0.5)
    assert mean.tolist() == [2.0, 2.0]


def test_iql_values_are_between_the_mean_and_the_best_of_the_log() -> None:
    batch = steps([0] * 64, [[0], [1]] * 32, [[1.0], [0.0]] * 32)
    seen = toy_obs(torch.tensor([0]))
    values = []
    for expectile in (0.5, 0.9):
        agent = taught(IQL, toy_spec(), batch, 100, expectile=expectile, tau=0.2)
        values.append(float(agent.value(agent.q.read(seen)).detach()))
    assert values == pytest.approx([0.5, 0.9], abs=0.04)


def test_iql_prefers_what_was_better_and_never_what_was_not_shown() -> None:
    batch = steps([0] * 64, [[0], [1], [1], [1]] * 16, [[1.0], [0.0], [0.0], [0.0]] * 16)
    obs = toy_obs(torch.tensor([0]))
    agent = taught(IQL, toy_spec(), batch, 120, beta=2.0)
    assert agent.act(obs, None, explore=False).slate.item() == 0
    assert float(agent.action_probs(obs, None)[0, 2]) < 0.05
    cloned = taught(BehaviourCloning, toy_spec(), batch, 120)
    assert cloned.act(obs, None, explore=False).slate.item() == 1


def test_weights_of_advantage_are_the_same_in_cents_and_in_units() -> None:
    advantage, square = torch.tensor([[0.5, -0.5, 70.0]]), torch.tensor(0.25)
    weight = advantage_weight(advantage, square, 2.0)
    assert weight[0].tolist() == pytest.approx([7.389, 0.1353, 100.0], rel=1e-3)
    assert torch.allclose(advantage_weight(100 * advantage, 1e4 * square, 2.0), weight)
    assert advantage_weight(0 * advantage, 0 * square, 2.0).tolist() == [[1.0] * 3]


def test_the_spread_of_returns_is_a_running_mean() -> None:
    agent = IQL(toy_spec(), tau=0.25, width=8)
    squares = []
    for reward in (3.0, 0.0):  # V starts near zero, and ends each step near it
        agent.update(steps([0, 1], [[0], [1]], [[reward], [reward]]))
        squares.append(float(agent.square))
    assert squares == pytest.approx([9.0, 0.75 * 9.0], abs=0.5)
