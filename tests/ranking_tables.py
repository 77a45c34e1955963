"""Tables of scores, and of who wants what, for tests of rankings."""

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

NAMES = ("precision", "recall", "ndcg", "map", "mrr", "hit")


def of(*users, items=6):
    """Lists of items to ones in (U, N)."""
    dense = np.zeros((len(users), items))
    for user, wanted in enumerate(users):
        dense[user, list(wanted)] = 1
    return csr_matrix(dense)


def looked_up(table):
    """Scores of users by row of a table (U, N)."""
    return torch.as_tensor(table).__getitem__


def problem_of(seed):
    """Few items, few distinct scores, any share of relevant and known items, -inf among scores."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(1, 8), rng.integers(2, 13)
    scores = rng.integers(rng.choice([1, 2, 4, 1000]), size=(users, items)).astype(float)
    if rng.random() < 0.5:
        scores = np.log(scores, where=scores > 0, out=np.full_like(scores, -np.inf))
    kind = rng.random((users, items))
    relevant, known = kind < rng.choice([0.1, 0.5]), kind > rng.random()
    relevant[0, 0], known[:, 0] = True, False  # somebody to test, an item for everybody
    dtype = rng.choice(["f4", "f8"])
    return scores.astype(dtype), relevant, known & ~relevant, int(rng.integers(1, items + 1)), rng


problems = st.integers(0, 2**32 - 1).map(problem_of)
