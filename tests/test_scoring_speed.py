"""Whole catalogues: the ways that are timed find the best, and so does the limit."""

import pytest
import torch

from agents.dqn import DQN
from agents.explore import _best, _best_exact, row_blocks
from experiments import scoring_speed
from experiments.bench_rows import KEYS
from experiments.scoring_speed import K, shop, stirred


@pytest.mark.parametrize("k", [1, 3, 10, 200])
@pytest.mark.parametrize("kind", ["different", "tied", "few", "none", "masked"])
def test_the_best_are_those_of_every_score_in_float64(k, kind):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(40, 1000, generator=generator)
    allowed = torch.ones(40, 1000, dtype=torch.bool)
    if kind == "tied":
        scores = (scores * 2).round() / 8
    elif kind == "few":
        scores[:, 5:] = 0.0
    elif kind == "none":
        scores = torch.zeros(40, 1000)
    elif kind == "masked":
        allowed = torch.rand(40, 1000, generator=generator) < 0.01
    value, item = _best(scores, allowed, k)
    wanted = _best_exact(scores, allowed, k)
    assert torch.equal(value, wanted[0])
    real = value.isfinite()
    assert torch.equal(item[real], wanted[1][real])


def test_blocks_cover_every_row_once():
    parts = list(row_blocks(100, 1000, 40_000))
    assert [part.start for part in parts] == [0, 40, 80]
    assert parts[-1].stop == 100
    assert list(row_blocks(3, 10**9)) == [slice(0, 3)]


def test_a_greedy_slate_is_the_same_in_blocks_and_whole(monkeypatch):
    spec, obs = shop(80, 500, 0, "cpu")
    agent = DQN(spec)
    stirred(agent, 0)
    whole = agent.act(obs, None, explore=False)
    monkeypatch.setattr(row_blocks, "__defaults__", (500 * 32,))
    parts = agent.act(obs, None, explore=False)
    assert torch.equal(whole.slate, parts.slate)
    given = agent.slate_probs(obs, None, parts.slate, explore=False)
    assert torch.equal(given, torch.ones(80, K))


def test_a_learner_ranks_as_its_values_do():
    spec, obs = shop(50, 500, 0, "cpu")
    agent = DQN(spec)
    stirred(agent, 0)
    slate = agent.act(obs, None, explore=False).slate
    q = agent.scores(obs)
    best = q.topk(K, dim=1).values
    assert torch.allclose(q.gather(1, slate), best, atol=1e-5)
    assert q.std() > 0.01  # it has opinions


def test_rows_of_a_quick_run():
    threads = torch.get_num_threads()
    found = scoring_speed.rows(1, 0.05, 0, True)
    assert torch.get_num_threads() == threads
    assert all(set(row) == set(KEYS) and row["bench"] == "scoring" for row in found)
    assert [row["limit_goal"] for row in found[:3]] == [0.77] * 3
    assert len({row["case"] for row in found}) == len(found)
