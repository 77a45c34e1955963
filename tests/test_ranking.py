"""Ranked lists and what they are worth: by hand, and against loops over users."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_tables import NAMES, looked_up, of, problems
from scipy.sparse import csr_array, csr_matrix

from encoders.state import EMPTY
from evaluation.ranking import (
    Ranking,
    bootstrap,
    catalogue,
    cold_recall,
    evaluate,
    highest,
    metrics,
    paired,
    rank,
    tie_order,
    top_k,
)
from experiments.rank_speed import batched, one_by_one, world

LOG3 = math.log2(3)


def loop_top(scores, forbidden, k, order):
    """One row: all allowed items sorted by score, then by the drawn order."""
    left = [i for i in range(len(scores)) if i not in forbidden]
    best = sorted(left, key=lambda i: (-scores[i], order[i]))[:k]
    return best + [EMPTY] * (k - len(best))


def loop_metrics(top, wanted):
    """One list, place by place as the definitions read."""
    if not wanted:
        return dict.fromkeys(NAMES, math.nan)
    k, best = len(top), min(len(top), len(wanted))
    hits = [place for place, item in enumerate(top, start=1) if item in wanted]
    return {
        "precision": len(hits) / k,
        "recall": len(set(top) & wanted) / len(wanted),
        "ndcg": sum(1 / math.log2(p + 1) for p in hits)
        / sum(1 / math.log2(p + 1) for p in range(1, best + 1)),
        "map": sum(len([h for h in hits if h <= p]) / p for p in hits) / best,
        "mrr": 1 / hits[0] if hits else 0.0,
        "hit": 1.0 if hits else 0.0,
    }


def loop_catalogue(top, wanted, counts, vectors):
    """The figures of the catalogue, by loops."""
    n, total = len(counts), sum(counts)
    lists = [[i for i in row if i != EMPTY] for row in top]
    shown = [sum(i in row for row in lists) for i in range(n)]
    gaps = sum(abs(a - b) for a in shown for b in shown)
    bits = [[-math.log2((counts[i] + 1) / (total + n)) for i in row] for row in lists if row]
    sold = [np.mean([counts[i] for i in row]) for row in lists if row]
    bought = [np.mean([counts[i] for i in row]) for row in wanted if row]
    unit = [v / np.linalg.norm(v) if np.any(v) else None for v in vectors]
    spread = []
    for row in lists:
        told = [unit[i] for i in row if unit[i] is not None]
        far = [1 - a @ b for j, a in enumerate(told) for b in told[:j]]
        spread += [np.mean(far)] if far else []
    return {
        "coverage": sum(c > 0 for c in shown) / n,
        "gini": gaps / (2 * n * sum(shown)),
        "novelty": np.mean([np.mean(b) for b in bits]),
        "diversity": np.mean(spread) if spread else math.nan,
        "popularity_bias": np.mean(sold) / np.mean(bought) if np.mean(bought) else math.nan,
    }


def sets(dense):
    return [set(np.flatnonzero(row).tolist()) for row in dense]


@given(problems, st.integers(0, 99), st.integers(1, 5))
@settings(max_examples=150)
def test_ranking_equals_a_loop_over_users_with_ties_and_masks(problem, seed, chunk):
    scores, relevant, known, k, _ = problem
    order = tie_order(scores.shape[1], seed).tolist()
    expected = [loop_top(s, f, k, order) for s, f in zip(scores, sets(known), strict=True)]
    top = top_k(torch.tensor(scores), torch.tensor(~known), k, seed=seed)
    assert top.dtype == torch.int64
    assert top.tolist() == expected
    some, rows = rank(looked_up(scores), csr_matrix(relevant), csr_matrix(known), k=k, seed=seed,
                      chunk=chunk)  # fmt: skip
    assert rows.tolist() == np.flatnonzero(relevant.any(axis=1)).tolist()
    assert torch.equal(some, top[rows])
    free, _ = rank(looked_up(scores), csr_array(relevant), None, k=k, seed=seed, chunk=chunk)
    assert free.tolist() == [loop_top(scores[u], set(), k, order) for u in rows]
    assert torch.equal(top_k(torch.tensor(scores), None, k, seed=seed)[rows], free)


@given(problems)
def test_metrics_equal_a_loop_over_users(problem):
    scores, relevant, known, k, rng = problem
    top = top_k(torch.tensor(scores), torch.tensor(~known), k)
    top[rng.random(len(top)) < 0.2] = EMPTY  # lists of nothing
    values = metrics(top, csr_matrix(relevant))
    assert tuple(values) == NAMES
    for user, (items, wanted) in enumerate(zip(top.tolist(), sets(relevant), strict=True)):
        for name, value in loop_metrics(items, wanted).items():
            assert values[name][user].item() == pytest.approx(value, abs=1e-12, nan_ok=True)


@given(problems, st.integers(0, 6))
def test_figures_of_the_catalogue_equal_loops(problem, cold):
    scores, relevant, known, k, rng = problem
    counts = rng.integers(9, size=scores.shape[1])
    vectors = rng.normal(size=(scores.shape[1], 3)) * (rng.random((scores.shape[1], 1)) < 0.7)
    top = top_k(torch.tensor(scores), torch.tensor(~known), k)
    found = catalogue(top, popularity=counts, vectors=torch.tensor(vectors),
                      num_items=len(counts), relevant=csr_matrix(relevant))  # fmt: skip
    expected = loop_catalogue(top.tolist(), sets(relevant), counts.tolist(), vectors)
    if not math.isfinite(expected["popularity_bias"]):  # nobody ever bought what was relevant
        assert not math.isfinite(found.pop("popularity_bias"))
        expected.pop("popularity_bias")
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
    recall = cold_recall(top, csr_matrix(relevant), counts, cold=cold)
    for user, wanted in enumerate(sets(relevant)):
        few = {i for i in wanted if counts[i] <= cold}
        share = len(few & set(top[user].tolist())) / len(few) if few else math.nan
        assert recall[user].item() == pytest.approx(share, nan_ok=True)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_looking_into_the_highest_blocks_finds_what_looking_everywhere_does(seed):
    rng = np.random.default_rng(seed)
    k, n = rng.integers(1, 4), rng.integers(700, 1200)
    scores = rng.integers(rng.choice([1, 3, 800, 10**6]), size=(3, n)).astype("f4")
    scores[rng.random(scores.shape) < rng.choice([0.0, 0.5, 1.0])] = -np.inf
    value, item = highest(torch.tensor(scores), int(k))
    assert torch.equal(value, torch.tensor(scores).topk(int(k)).values)
    assert torch.equal(torch.tensor(scores).gather(1, item), value)
    assert all(len(set(row)) == k for row in item.tolist())
    own = rng.random(scores.shape) < 0.1
    order = tie_order(n, seed % 97).tolist()
    top = top_k(torch.tensor(scores), torch.tensor(~own), int(k), seed=seed % 97)
    assert top.tolist() == [
        loop_top(s, f, k, order) for s, f in zip(scores, sets(own), strict=True)
    ]


def test_metrics_by_hand():
    top = torch.tensor([[3, 1, 0], [2, 5, 4], [4, EMPTY, EMPTY]])
    values = metrics(top, of({0, 1, 2, 5}, {1}, {4}))
    expected = {
        "precision": [2 / 3, 0, 1 / 3],
        "recall": [2 / 4, 0, 1],
        "ndcg": [(1 / LOG3 + 1 / 2) / (1 + 1 / LOG3 + 1 / 2), 0, 1],  # four relevant, three places
        "map": [(1 / 2 + 2 / 3) / 3, 0, 1],
        "mrr": [1 / 2, 0, 1],
        "hit": [1, 0, 1],
    }
    for name in NAMES:
        assert values[name].dtype == torch.float64
        assert values[name].tolist() == pytest.approx(expected[name], abs=1e-15)


def test_figures_of_the_catalogue_by_hand():
    top = torch.tensor([[0, 1], [0, 2]])
    vectors = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [9.0, 9.0]])
    found = catalogue(top, popularity=[7, 3, 1, 1], vectors=vectors, num_items=4,
                      relevant=of({1}, {2, 3}, items=4))  # fmt: skip
    assert found == pytest.approx(
        {
            "coverage": 3 / 4,
            "gini": 3 / 8,  # shown 0, 1, 1, 2 times
            "novelty": ((1 + 2) / 2 + (1 + 3) / 2) / 2,  # shares 8, 4, 2 of 16
            "diversity": (1 + 2) / 2,  # at right angles; opposite
            "popularity_bias": 4.5 / 2,  # (5 + 4) / 2 over (3 + 1) / 2
        }
    )
    bare = catalogue(top, popularity=[7, 3, 1, 1], vectors=None, num_items=4)
    assert math.isnan(bare["diversity"])
    assert math.isnan(bare["popularity_bias"])
    assert bare["gini"] == found["gini"]


def test_cold_recall_by_hand():
    relevant, counts = of({0, 1, 2}, {0}, {2, 5}), [50, 10, 3, 0, 0, 11]
    top = torch.tensor([[1, 0], [0, 3], [5, 4]])
    recall = cold_recall(top, relevant, counts)
    assert recall.tolist() == pytest.approx([1 / 2, math.nan, 0], nan_ok=True)
    assert cold_recall(top, relevant, counts, cold=11).tolist()[2] == 1 / 2


def test_cells_given_twice_or_as_zero_count_as_they_should():
    odd = csr_matrix(
        (np.array([1.0, 2.0, 0.0]), np.array([3, 3, 1]), np.array([0, 3])), shape=(1, 6)
    )
    values = metrics(torch.tensor([[1, 3]]), odd)
    assert (values["recall"].item(), values["mrr"].item()) == (1.0, 0.5)
    assert odd.nnz == 3  # the caller's matrix is as it was
    figures = [catalogue(torch.tensor([[1, 3]]), popularity=range(6), vectors=None, num_items=6,
                         relevant=r)["popularity_bias"] for r in (odd, of({3}))]  # fmt: skip
    assert figures == pytest.approx([2 / 3, 2 / 3])


def test_the_bootstrap_agrees_with_the_normal_interval():
    values = torch.from_numpy(np.random.default_rng(0).normal(2.0, 3.0, size=900))
    mean, low, high = bootstrap(values, seed=1)
    half = 1.96 * values.std().item() / 30
    assert mean == pytest.approx(values.mean().item())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.1)
    assert bootstrap(values, seed=1) == (mean, low, high)
    assert bootstrap(values, seed=2)[1:] != (low, high)
    narrow = bootstrap(values, seed=1, alpha=0.5)
    assert low < narrow[1] < mean < narrow[2] < high
    gone = torch.cat([values, torch.full((50,), torch.nan)])
    assert bootstrap(gone, seed=1) == (mean, low, high)
    assert bootstrap(torch.tensor([0.3]))[1:] == (-math.inf, math.inf)


def test_a_pair_is_compared_user_by_user():
    rng = np.random.default_rng(0)
    skill = rng.normal(size=400)
    a, b = skill + 0.1 + rng.normal(0, 0.1, 400), skill + rng.normal(0, 0.1, 400)
    gap, low, high, p = paired(a, torch.from_numpy(b))
    assert gap == pytest.approx(np.mean(a - b))
    assert 0 < low < gap < high < 0.2  # alone, each is only known to +- .1
    assert p == pytest.approx(2 / 2001)
    assert paired(b, a)[0] == -gap
    assert paired(a, a) == (0.0, 0.0, 0.0, 1.0)
    noise = [paired(*np.random.default_rng(s).normal(size=(2, 60)), replicates=200)[3]
             for s in range(300)]  # fmt: skip
    assert np.mean(np.array(noise) < 0.1) == pytest.approx(0.1, abs=0.06)


def small(k=(2, 3), **changed) -> Ranking:
    table = np.array([[0.0, 0, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
    given = {"popularity": [40, 30, 20, 10, 9, 0], "vectors": torch.eye(6), **changed}
    return evaluate(looked_up(table), of(set(), {1, 5}, {3, 4}), of({1}, {0}, set()), k=k, **given)


def test_evaluation_by_hand():
    found = small()
    assert found.k == (2, 3)
    assert found.rows.tolist() == [1, 2]  # the first user has nothing to find
    assert found.top.tolist() == [[1, 2, 3], [5, 4, 3]]
    assert found.values[2]["recall"].tolist() == [1 / 2, 1 / 2]
    assert found.values[3]["recall"].tolist() == [1 / 2, 1]
    row, longer = found.row(2), found.row(3)
    assert row["users"] == 2
    assert (row["recall"], row["recall_low"], row["recall_high"]) == (1 / 2, 1 / 2, 1 / 2)
    assert longer["recall"] == pytest.approx(3 / 4)
    assert (longer["recall_low"], longer["recall_high"]) == (1 / 2, 1)
    best = 1 + 1 / LOG3
    assert row["ndcg"] == pytest.approx((1 / best + (1 / LOG3) / best) / 2)
    assert row["ndcg_low"] == pytest.approx(1 / LOG3 / best)
    assert row["ndcg_high"] == pytest.approx(1 / best)
    assert row["precision"] == pytest.approx(1 / 2)
    assert row["map"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert row["mrr"] == pytest.approx(3 / 4)
    assert row["hit"] == 1
    assert row["cold_recall"] == pytest.approx((0 + 1 / 2) / 2)  # items 3, 4 and 5
    assert row["coverage"] == pytest.approx(4 / 6)
    assert row["diversity"] == pytest.approx(1)
    assert row["popularity_bias"] == pytest.approx((25 + 4.5) / (15 + 9.5))
    assert row["predict_ms_per_user"] == pytest.approx(1e3 * found.seconds / 2)
    assert found.seconds >= 0
    assert all(isinstance(x, float | int) for x in row.values())
    assert longer["coverage"] == pytest.approx(5 / 6)
    assert small(k=(3, 2, 3)).row(2).keys() == row.keys()


def test_recall_of_some_items_is_of_the_shortest_list():
    found = small()
    chosen = torch.zeros(6, dtype=torch.bool)
    assert found.recall_of(chosen) is None
    chosen[5] = True  # one user wants it and does not get it
    assert found.recall_of(chosen) == 0.0
    chosen[[1, 3]] = True  # 3 is third in the list of the other
    assert found.recall_of(chosen) == pytest.approx((1 / 2 + 0) / 2)


def test_what_cannot_be_said_is_none():
    row = small(vectors=None, cold=-1).row(2)
    assert row["diversity"] is None
    assert row["cold_recall"] is None
    one = evaluate(looked_up(np.eye(3)[:1]), of({0}, items=3), None, k=(1,), popularity=[1, 1, 1])
    assert (one.row(1)["recall"], one.row(1)["recall_low"]) == (1.0, None)


def test_the_batched_ranking_equals_the_loop_it_is_timed_against():
    scores, relevant, known = world(40, 200, 30, 25, seed=1)
    ours, loop = (f(scores, relevant, known, 10) for f in (batched, one_by_one))
    assert ours.keys() == loop.keys()
    assert loop["recall"].mean() > 0
    assert all(torch.allclose(ours[name], loop[name], rtol=0, atol=1e-12) for name in loop)
