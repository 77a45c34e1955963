"""Neighbours: cosines, walks and alike users against loops, top-k in blocks, save and load."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

import agents.neighbours
from agents.interactions import history
from agents.neighbours import ItemKNN, RP3beta, UserKNN, item_similarity, walks
from agents.testing import synthetic_spec

MODELS = [ItemKNN, RP3beta, UserKNN]
# even users buy even items, odd users odd ones: what goes with what can be seen
CHECKERBOARD = csr_matrix((np.add.outer(np.arange(40), np.arange(24)) % 2 == 0).astype(float))


def table(seed, users=12, items=8):
    """Counts 0..3, two in five not zero, the last item never."""
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 4, (users, items)) * (rng.random((users, items)) < 0.4)
    x[:, -1] = 0
    return x.astype(float)


def cosines(x, shrink):
    """Dense, as the formula reads."""
    norm = np.sqrt((x**2).sum(axis=0))
    below = np.outer(norm, norm) + shrink
    return np.divide(x.T @ x, below, out=np.zeros_like(below), where=below > 0)


def test_similarity_by_hand():
    counts = csr_matrix(np.array([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
    near = item_similarity(counts, shrink=1.0).toarray()
    root = 2.0**0.5
    assert near == pytest.approx(
        np.array([[2 / (2 + 1), 2 / (2 * root + 1), 0], [2 / (2 * root + 1), 4 / 5, 0], [0, 0, 0]])
    )


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([0.0, 0.5, 10.0]))
def test_only_the_nearest_are_kept_whatever_the_blocks(seed, neighbours, shrink):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (12, 8)) * (rng.random((12, 8)) < 0.4).astype(float)
    whole = cosines(x, shrink)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents.neighbours, "ENTRIES", 8 * int(rng.integers(1, 9)))
        near = item_similarity(csr_matrix(x), neighbours, shrink)
    assert near.shape == (8, 8)
    assert np.diff(near.indptr).max() <= neighbours
    best = -np.sort(-whole, axis=1)[:, :neighbours]
    assert -np.sort(-near.toarray(), axis=1)[:, :neighbours] == pytest.approx(best)
    kept = near.toarray() > 0
    assert near.toarray()[kept] == pytest.approx(whole[kept])


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_an_item_is_no_neighbour_of_its_own_unless_told_so(seed, neighbours):
    x = table(seed)
    whole = cosines(x, 1.0)
    np.fill_diagonal(whole, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents.neighbours, "ENTRIES", 24)
        near = item_similarity(csr_matrix(x), neighbours, 1.0, own=False).toarray()
    assert (np.diag(near) == 0).all()
    best = -np.sort(-whole, axis=1)[:, :neighbours]
    assert -np.sort(-near, axis=1)[:, :neighbours] == pytest.approx(best)


@pytest.mark.parametrize(("weight", "worth"), [
    ("log", np.log1p), ("count", lambda x: x), ("binary", lambda x: np.minimum(x, 1.0)),
])  # fmt: skip
def test_item_scores_are_similarities_weighted_by_what_counts_are_worth(monkeypatch, weight, worth):
    x = table(1)
    obs = history([[5, 2, 3]], count=[[7.0, 1.0, 2.0]])
    near = item_similarity(csr_matrix(worth(x)), 100, 10.0).toarray()
    expected = sum(near[i] * worth(float(c)) for i, c in zip([5, 2, 3], [7, 1, 2], strict=True))
    model = ItemKNN(csr_matrix(x), weight=weight)
    assert model.scores(obs)[0].numpy() == pytest.approx(expected, abs=2e-6)
    monkeypatch.setattr(agents.neighbours, "GATHERED", 1)  # one place of the history at a time
    assert model.scores(obs)[0].numpy() == pytest.approx(expected, abs=2e-6)


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([0.0, 0.5, 1.0]))
def test_pulls_are_chances_of_random_walks(seed, neighbours, beta):
    x = table(seed)
    user, item = x.sum(axis=1), x.sum(axis=0)
    whole = np.zeros((8, 8))
    for i in range(8):
        for j in range(8):
            if i == j or not item[i] or not item[j]:
                continue
            steps = [x[u, i] / item[i] * x[u, j] / user[u] for u in range(12) if user[u]]
            whole[i, j] = sum(steps) / item[j] ** beta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents.neighbours, "ENTRIES", 24)
        near = walks(csr_matrix(x), 1.0, beta, neighbours).toarray()
    best = -np.sort(-whole, axis=1)[:, :neighbours]
    assert -np.sort(-near, axis=1)[:, :neighbours] == pytest.approx(best)
    assert near[near > 0] == pytest.approx(whole[near > 0])


def test_a_walk_ends_somewhere_and_its_steps_are_raised_to_alpha():
    x = table(3)
    chance = walks(csr_matrix(x), 1.0, 0.0, 8).toarray().sum(axis=1)
    assert (chance <= 1.0).all()  # what is missing came back to where it began
    two = csr_matrix(np.array([[1.0, 3.0], [1.0, 0.0]]))
    # from item 0 to user 0 by 1/2, from there to item 1 by 3/4
    assert walks(two, 0.5, 0.0, 8)[0, 1] == pytest.approx((1 / 2) ** 0.5 * (3 / 4) ** 0.5)
    assert walks(two, 0.5, 1.0, 8)[0, 1] == pytest.approx((3 / 8) ** 0.5 / 3)


def test_rp3beta_sums_pulls_whose_strongest_is_one():
    x = table(4)
    pull = walks(csr_matrix(x), 0.8, 0.6, 300).toarray()
    expected = (pull[2] + pull[5]) / pull.max()
    model = RP3beta(csr_matrix(x), weight="count")
    assert model.scores(history([[2, 5]]))[0].numpy() == pytest.approx(expected, abs=2e-6)


@given(st.integers(0, 10_000), st.integers(1, 14), st.sampled_from([0.0, 3.0]))
def test_user_scores_are_those_of_a_loop_over_users(seed, neighbours, shrink):
    rng = np.random.default_rng(seed)
    x = rng.random((12, 8)) * (rng.random((12, 8)) < 0.5)  # no two users are equally near
    x[x > 0] = np.round(x[x > 0] * 1000) + 1
    items = rng.permutation(8)[:4]
    count = rng.integers(1, 1000, 4)
    own = np.zeros(8)
    own[items] = count
    near = []
    for row in x:
        below = np.linalg.norm(row) * np.linalg.norm(own) + shrink
        near.append(row @ own / below if below > 0 else 0.0)
    best = sorted(range(12), key=lambda u: -near[u])[:neighbours]
    expected = sum(near[u] * x[u] for u in best)
    model = UserKNN(csr_matrix(x), neighbours=neighbours, shrink=shrink, weight="count")
    got = model.scores(history([items.tolist()], count=[count.tolist()]))[0].numpy()
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_users_are_compared_in_chunks_of_any_size(monkeypatch):
    model = UserKNN(csr_matrix(table(2)), neighbours=3)
    obs = history([[0, 1], [2], [3, 4, 5], [], [6]])
    whole = model.scores(obs)
    monkeypatch.setattr(agents.neighbours, "ENTRIES", 1)
    assert torch.allclose(model.scores(obs), whole, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", [0, 1])
def test_the_checkerboard_is_continued(model, kind):
    scores = model(CHECKERBOARD).scores(history([[kind]]))[0]
    alike = torch.arange(24) % 2 == kind
    new = torch.arange(24) != kind
    assert scores[alike & new].min() > scores[~alike].max()


@pytest.mark.parametrize("model", MODELS)
def test_a_stranger_is_served_as_a_user_of_the_log_with_the_same_history(model):
    spec = synthetic_spec()
    fitted = model(spec.events)
    known = spec.events.histories(np.array([3]))
    past, count = known.past[0].tolist(), known.past_count[0].tolist()
    stranger = history([past[::-1]], count=[count[::-1]])  # the order says nothing to neighbours
    assert torch.allclose(fitted.scores(stranger), fitted.scores(known), atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_more_neighbours_than_there_are_is_all_of_them(model):
    x, obs = csr_matrix(table(5)), history([[0, 3], [1]])
    many, all_ = (model(x, neighbours=k).scores(obs) for k in (10**6, 12))
    assert torch.equal(many, all_)


@pytest.mark.parametrize("model", MODELS)
def test_without_a_history_the_popular_and_of_equals_a_seeded_order(model):
    x = np.zeros((5, 24))
    x[:4, 7], x[:3, 3] = 1, 1
    orders = [
        model(csr_matrix(x), seed=seed).scores(history([[]]))[0].argsort(descending=True).tolist()
        for seed in (0, 0, 1, 2, 3)
    ]
    assert [order[:2] for order in orders] == [[7, 3]] * 5
    assert orders[0] == orders[1]
    assert len({order[2] for order in orders}) > 1


@pytest.mark.parametrize("model", MODELS)
def test_it_can_be_saved_and_nobody_needs_to_have_bought_anything(model):
    obs = history([[0, 3], [1]])
    fitted = model(csr_matrix(table(6)))
    other = model(csr_matrix(table(7, users=20)), seed=4)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.scores(obs), fitted.scores(obs))
    nothing = model(csr_matrix((3, 8))).scores(obs)
    assert nothing.isfinite().all()
    with pytest.raises(ValueError, match="of 5 items, this one has 8"):
        fitted.load_state_dict(model(csr_matrix(np.ones((2, 5)))).state_dict())


@pytest.mark.parametrize("model", MODELS)
def test_what_it_cannot_learn_from_is_refused(model):
    x = csr_matrix(table(0))
    with pytest.raises(ValueError, match="neighbours must be at least 1, got 0"):
        model(x, neighbours=0)
    with pytest.raises(ValueError, match="weight must be one of binary, log, count, got 'tfidf'"):
        model(x, weight="tfidf")
    with pytest.raises(ValueError, match="finite and at least 0"):
        model(csr_matrix(np.array([[-1.0]])))
    with pytest.raises(ValueError, match=r"a history must hold items in 0\.\.7 or -1"):
        model(x).scores(history([[8]]))


def test_knobs_out_of_range_are_refused():
    x = csr_matrix(table(0))
    for model in (ItemKNN, UserKNN):
        with pytest.raises(ValueError, match="shrink must be at least 0, got -1"):
            model(x, shrink=-1.0)
    with pytest.raises(ValueError, match="finite and at least 0"):
        item_similarity(csr_matrix(np.array([[-1.0]])))
    with pytest.raises(ValueError, match="alpha must be at least 0, got -1"):
        RP3beta(x, alpha=-1.0)
    with pytest.raises(ValueError, match="beta must be at least 0, got nan"):
        RP3beta(x, beta=float("nan"))


def test_of_equally_similar_neighbours_none_is_kept_for_its_id():
    near = item_similarity(csr_matrix(np.ones((30, 60))), 6, 0.0, own=False)
    kept = near.indices.reshape(60, 6)[0]  # all are as near as any other
    assert sorted(kept) != [1, 2, 3, 4, 5, 6]
    assert kept.mean() > 10
