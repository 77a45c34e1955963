"""What changes no ranking and what must: other names, scores, users, ties and lengths."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_tables import NAMES, looked_up, of, problems
from scipy.sparse import csr_matrix

from evaluation.ranking import evaluate, metrics, rank, top_k


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_renaming_items_changes_nothing_where_no_scores_are_equal(seed):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(30.0), (8, 1)), axis=1)
    relevant, known = rng.random((2, 8, 30)) < 0.2
    relevant[:, 0], known[relevant] = True, False
    counts, vectors = rng.integers(1, 20, size=30), torch.tensor(rng.normal(size=(30, 4)))

    def all_of(new):
        """Item new[j] becomes item j."""
        return evaluate(
            looked_up(scores[:, new]), csr_matrix(relevant[:, new]), csr_matrix(known[:, new]),
            k=(3, 10), popularity=counts[new], vectors=vectors[new], seed=int(rng.integers(99)),
        )  # fmt: skip

    before, after = all_of(np.arange(30)), all_of(new := rng.permutation(30))
    assert np.array_equal(new[after.top], before.top)
    for k in (3, 10):
        assert after.figures[k] == pytest.approx(before.figures[k])
        for name, value in before.values[k].items():
            assert torch.allclose(after.values[k][name], value, rtol=0, atol=1e-12, equal_nan=True)


@given(problems)
def test_only_the_order_of_scores_matters(problem):
    scores, _, known, k, _ = problem
    exact = torch.tensor(scores, dtype=torch.float64)
    allowed = torch.tensor(~known)
    top = top_k(exact, allowed, k)
    assert torch.equal(top_k((exact / 8).exp(), allowed, k), top)  # -inf becomes 0
    assert torch.equal(top_k(exact.atan() * 7 - 3, allowed, k), top)
    assert torch.equal(top_k(exact.masked_fill(~allowed, 1e9), allowed, k), top)


def test_scores_that_differ_in_the_last_bit_are_not_tied():
    close = torch.tensor(np.array([[1.0, np.nextafter(1.0, 2.0), np.nextafter(1.0, 0.0)]]))
    assert all(top_k(close, None, 3, seed=s).tolist() == [[1, 0, 2]] for s in range(20))


def test_users_do_not_touch_each_other():
    rng = np.random.default_rng(3)
    scores = rng.integers(5, size=(9, 20)).astype(float)
    relevant = rng.random((9, 20)) < 0.3
    relevant[:, 0] = True
    order = rng.permutation(9)
    top, _ = rank(looked_up(scores), csr_matrix(relevant), None, k=6)
    moved, _ = rank(looked_up(scores[order]), csr_matrix(relevant[order]), None, k=6, chunk=2)
    assert torch.equal(moved, top[order])
    values, after = metrics(top, csr_matrix(relevant)), metrics(moved, csr_matrix(relevant[order]))
    assert all(torch.equal(after[name], values[name][order]) for name in NAMES)


def test_a_perfect_list_is_worth_one():
    relevant = np.random.default_rng(1).random((20, 30)) < 0.3
    relevant[:, 0] = True
    top, _ = rank(looked_up(relevant.astype(float)), csr_matrix(relevant), None, k=5)
    values = metrics(top, csr_matrix(relevant))
    enough = torch.tensor(relevant.sum(axis=1) >= 5)
    assert enough.any()
    assert not enough.all()
    for name in ("ndcg", "map", "mrr", "hit"):
        assert (values[name] == 1).all()
    assert (values["precision"][enough] == 1).all()
    assert (values["recall"][~enough] == 1).all()


def test_what_is_below_the_list_changes_nothing():
    rng = np.random.default_rng(2)
    scores, relevant = rng.random((6, 12)), rng.random((6, 12)) < 0.4
    relevant[:, 0] = True
    more = np.hstack([scores, np.full((6, 3), -5.0)])
    wider = np.hstack([relevant, np.zeros((6, 3), dtype=bool)])
    top, _ = rank(looked_up(scores), csr_matrix(relevant), None, k=4)
    after, _ = rank(looked_up(more), csr_matrix(wider), None, k=4)
    assert torch.equal(after, top)
    values, then = metrics(top, csr_matrix(relevant)), metrics(after, csr_matrix(wider))
    assert all(torch.equal(then[name], values[name]) for name in NAMES)


def test_a_shorter_list_is_the_beginning_of_a_longer_one():
    scores = torch.from_numpy(np.random.default_rng(5).integers(3, size=(40, 25)).astype("f4"))
    longest = top_k(scores, None, 25, seed=4)
    assert all(torch.equal(top_k(scores, None, k, seed=4), longest[:, :k]) for k in range(1, 25))


def test_equal_scores_favour_no_item():
    n, k, seeds = 20, 5, 2000
    table = torch.zeros(3, n)
    tops = [top_k(table, None, k, seed=seed) for seed in range(seeds)]
    assert all((top == top[0]).all() for top in tops)  # one order for all users
    count = torch.bincount(torch.stack([top[0] for top in tops]).flatten(), minlength=n)
    share = count.double() / seeds  # recall of a user who wants that one item
    error = math.sqrt(k / n * (1 - k / n) / seeds)
    assert (share - k / n).abs().max() < 4 * error
    slope = np.corrcoef(np.arange(n), share)[0, 1]
    assert abs(slope) < 0.6  # of 20 items: 3 standard errors are .67


def test_ties_are_broken_the_same_way_again():
    table = torch.zeros(1, 50)
    assert torch.equal(top_k(table, None, 9, seed=7), top_k(table, None, 9, seed=7))
    assert not torch.equal(top_k(table, None, 9, seed=7), top_k(table, None, 9, seed=8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_scores_are_left_as_they_are_and_may_be_shared_by_all_rows(dtype):
    popular = torch.tensor([5, 4, 3, 2, 1], dtype=dtype)
    shared = popular.expand(4, 5)
    known = of({0}, {0, 1}, {4}, {2}, items=5)
    top, _ = rank(lambda rows: shared[: len(rows)], of({1}, {2}, {0}, {0}, items=5), known, k=2)
    assert top.tolist() == [[1, 2], [2, 3], [0, 1], [0, 1]]
    assert popular.tolist() == [5, 4, 3, 2, 1]


def test_the_seed_of_an_evaluation_orders_ties():
    wanted, flat = of(*[range(40)] * 2, items=40), looked_up(np.zeros((2, 40)))
    first, again, other = (
        evaluate(flat, wanted, None, k=(9,), popularity=np.ones(40), seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(first.top, again.top)
    assert not torch.equal(first.top, other.top)
