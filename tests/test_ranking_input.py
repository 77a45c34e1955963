"""What a ranking cannot be made of is refused, by name; long rows are ranked as by a sort."""

import numpy as np
import pytest
import torch
from test_ranking import loop_top, of, small

from encoders.state import EMPTY
from evaluation.ranking import (
    bootstrap,
    catalogue,
    evaluate,
    metrics,
    paired,
    rank,
    tie_order,
    top_k,
)

NAN = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])
NO, YES = of(set(), set(), items=2), of({0}, {1}, items=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(NAN, None, 1), "row 1 has NaN"),
        (
            lambda: top_k(torch.zeros(2, 999).index_fill(1, torch.tensor(500), torch.nan), None, 1),
            "row 0 has NaN",
        ),
        (lambda: top_k(torch.zeros(2, 3), None, 4), "k=4 is larger than the catalogue of 3"),
        (lambda: top_k(torch.zeros(2, 3), None, 0), "k must be at least 1, got 0"),
        (
            lambda: top_k(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), 1),
            "all items of row 1 are masked",
        ),
        (lambda: top_k(torch.zeros(2, 2), torch.ones(2, 3) > 0, 1), "allowed must say"),
        (lambda: top_k(torch.zeros(2, 2), torch.ones(2, 2), 1), "got torch.float32"),
        (lambda: rank(NAN.__getitem__, NO, None, k=1), "none of 2 users has a relevant item"),
        (lambda: rank(NAN.__getitem__, YES, None, k=3), "larger than the catalogue of 2"),
        (lambda: rank(NAN.__getitem__, YES, None, k=1, chunk=1), "row 1 has NaN"),
        (lambda: rank(lambda r: NAN[:1], YES, None, k=1), r"shape \(2, 2\), .* got \(1, 2\)"),
        (lambda: rank(NAN.__getitem__, YES, YES[:1], k=1), r"known must have .* got \(1, 2\)"),
        (
            lambda: rank(torch.eye(2).__getitem__, YES, of(set(), {0, 1}, items=2), k=1, chunk=1),
            "all items of row 1 are masked",
        ),
        (lambda: rank(NAN.__getitem__, YES.toarray(), None, k=1), "must be a scipy sparse matrix"),
        (lambda: metrics(torch.tensor([[0]]), YES), "a list for each of 2 users"),
        (lambda: metrics(torch.tensor([[0], [2]]), YES), r"items in 0..1 .* got 2 in row 1"),
        (lambda: metrics(torch.tensor([[0, 1], [1, 1]]), YES), "row 1 has 1 twice"),
        (lambda: small(k=()), "k must be one or more lengths"),
        (lambda: small(k=(0, 3)), "at least 1 each"),
        (lambda: small().row(5), r"k must be one that was ranked, \(2, 3\), got 5"),
        (lambda: small(vectors=torch.eye(7)), "a row for each of 6 items, got 7"),
        (lambda: small(popularity=[1, 2]), "a count for each of 6 items"),
        (lambda: small(popularity=[1, 2, 3, 4, 5, -1]), "at least 0"),
        (lambda: small().recall_of(torch.ones(6)), "True or False of each of 6 items"),
        (
            lambda: evaluate(torch.eye(2).__getitem__, YES, YES, k=(1,), popularity=[1, 1]),
            "2 are not, such as item 0 of row 0",
        ),
        (
            lambda: catalogue(torch.tensor([[EMPTY]]), popularity=[1], vectors=None, num_items=1),
            "all its places are empty",
        ),
        (lambda: bootstrap(torch.tensor([torch.nan])), "none has a value"),
        (lambda: paired([1.0], [1.0, 2.0]), "the same users, got 1 and 2"),
    ],
)
def test_a_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("levels", [3, 40, 10**6])
def test_long_rows_are_ranked_as_by_a_sort(levels):
    rng = np.random.default_rng(levels)
    scores = torch.from_numpy(rng.integers(0, levels, (60, 1003))).float()  # in groups, and a rest
    scores[rng.random((60, 1003)) < 0.1] = torch.inf if levels == 40 else 0.0
    allowed = torch.from_numpy(rng.random((60, 1003)) < rng.random((60, 1)) ** 4)
    allowed[:, 1002] = True
    order = tie_order(1003, 0).numpy()
    for row, top in enumerate(top_k(scores, allowed, 9).tolist()):
        forbidden = set((~allowed[row]).nonzero().flatten().tolist())
        assert top == loop_top(scores[row].tolist(), forbidden, 9, order)
    scores[7, 500] = torch.nan
    with pytest.raises(ValueError, match="row 7 has NaN"):
        top_k(scores, None, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(torch.zeros(3), None, 1), r"scores must be of shape \(B, N\), got \(3,\)"),
        (lambda: rank(torch.eye(2).__getitem__, YES, None, k=1, chunk=0), "chunk must be at least"),
        (lambda: metrics(torch.tensor([0, 1]), YES), r"lists of item numbers .* shape \(2,\)"),
        (lambda: metrics(torch.zeros(2, 1), YES), "got torch.float32"),
        (lambda: bootstrap(torch.zeros(3), alpha=1.5), "alpha=1.5"),
        (lambda: bootstrap(torch.zeros(3), replicates=0), "replicates=0"),
    ],
)
def test_what_has_another_shape_or_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
