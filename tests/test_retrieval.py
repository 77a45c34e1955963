"""Candidates: exact where all lists are looked at, good where few are, and never what is masked."""

import pytest
import torch

from agents.dqn import DQN
from agents.explore import row_blocks
from agents.retrieval import Index, among, greedy_probs
from encoders.state import EMPTY
from experiments.scoring_speed import K, around_topics, shop, stirred

faiss = pytest.importorskip("faiss", reason="faiss is an extra: pip install 'recplay[retrieval]'")
ITEMS = 3000


def agents(candidates, seed=0, users=60):
    spec, obs = shop(users, ITEMS, seed, "cpu")
    exact, quick = DQN(spec), DQN(spec, candidates=candidates)
    for agent in (exact, quick):
        stirred(agent, seed)
        with torch.no_grad():
            agent.target.recall.add_(0.3)  # what was bought before is worth more
    return exact, quick, obs


def test_with_all_lists_the_search_is_that_by_brute_force():
    vectors = around_topics(2000, 0)
    wishes = torch.randn(30, vectors.shape[1], generator=torch.Generator().manual_seed(1))
    index = Index(vectors, probes=10_000)
    assert index.probes == index.lists > 1
    value, item = index.search(wishes, 10)
    wanted = (wishes @ vectors.T).topk(10, dim=1)
    assert torch.equal(item, wanted.indices)
    assert torch.allclose(value, wanted.values, atol=1e-5)


def test_more_probes_find_more_of_the_best():
    vectors = around_topics(20_000, 0)
    pick = torch.randint(20_000, (100,), generator=torch.Generator().manual_seed(1))
    wishes = vectors[pick]
    wanted = (wishes @ vectors.T).topk(10, dim=1).indices
    found = []
    for probes in (1, 8, 64):
        item = Index(vectors, probes=probes).search(wishes, 10)[1]
        found.append((item[:, :, None] == wanted[:, None, :]).any(dim=1).float().mean().item())
    assert found == sorted(found)
    assert found[0] < 0.9 < 0.95 < found[2]


def test_greedy_slates_are_the_exact_ones_where_all_lists_are_looked_at():
    exact, quick, obs = agents(candidates=50)
    quick.index = Index(quick.target.read.described(), probes=10_000)
    for mask in (None, obs.past, exact.act(obs, None, explore=False).slate):
        wanted = exact.act(obs, mask, explore=False)
        got = quick.act(obs, mask, explore=False)
        assert torch.equal(got.slate, wanted.slate)
        assert torch.equal(got.propensity, torch.ones(len(obs), K))
    bought = (exact.act(obs, None, explore=False).slate[:, :, None] == obs.past[:, None, :]).any()
    assert bought  # items of the past are among the best, with what that adds


def test_what_is_masked_is_not_shown_even_where_all_candidates_are():
    exact, quick, obs = agents(candidates=K)
    quick.index = Index(quick.target.read.described(), probes=10_000)
    best = exact.target.ranking(exact.target.read(obs)).topk(100, dim=1).indices
    got = quick.act(obs, best, explore=False).slate
    assert torch.equal(got, exact.act(obs, best, explore=False).slate)
    assert not among(got, best).any()


def test_probabilities_are_those_of_what_is_shown():
    _, quick, obs = agents(candidates=100)
    slate = quick.act(obs, None, explore=False).slate
    assert torch.equal(quick.slate_probs(obs, None, slate, explore=False), torch.ones(60, K))
    other = slate.flip(1)
    assert (quick.slate_probs(obs, None, other, explore=False)[:, 0] == 0).all()
    first = quick.action_probs(obs, None, explore=False)
    assert torch.equal(first.argmax(dim=1), slate[:, 0])
    assert torch.equal(first.sum(dim=1), torch.ones(60))


def test_while_it_explores_all_items_are_looked_at(monkeypatch):
    exact, quick, obs = agents(candidates=100)
    assert torch.equal(exact.act(obs, None).slate, quick.act(obs, None).slate)
    assert quick.index is None
    assert list(row_blocks(5, 10)) == [slice(0, 5)]


def test_greedy_probs_by_hand():
    greedy = torch.tensor([[4, 7, 9]] * 3)
    slate = torch.tensor([[4, 7, 9], [7, 4, 9], [5, 4, 7]])
    assert greedy_probs(greedy, slate).tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]


def test_among_looks_in_the_same_row():
    items, others = torch.tensor([[1, 2], [1, 2]]), torch.tensor([[2, EMPTY, 5], [9, 9, 1]])
    assert among(items, others).tolist() == [[False, True], [True, False]]
    assert not among(items, others[:, :0]).any()


def test_what_no_index_can_serve_is_refused(monkeypatch):
    spec, obs = shop(4, ITEMS, 0, "cpu")
    with pytest.raises(ValueError, match="head=dot with quantiles=1"):
        DQN(spec, candidates=50, head="dense")
    with pytest.raises(ValueError, match=r"10\.\.3000, from a slate to the catalogue, got 5"):
        DQN(spec, candidates=5)
    agent = DQN(spec, candidates=50)
    with pytest.raises(ValueError, match=r"in 0\.\.2999 or -1"):
        agent.act(obs, torch.full((4, 2), ITEMS), explore=False)
    with pytest.raises(ValueError, match="probes must be at least 1"):
        Index(spec.item_vectors, probes=0)
    monkeypatch.setattr("agents.retrieval.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'recplay"):
        DQN(spec, candidates=50)
