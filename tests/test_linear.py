"""EASE against a constrained ridge per column, PureSVD against the projection it is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

import agents.linear
from agents.interactions import history
from agents.linear import EASE, PureSVD, axes, ease
from agents.testing import synthetic_spec

MODELS = [EASE, PureSVD]


def table(seed, users=15, items=7):
    """Counts 0..3, two in five not zero."""
    rng = np.random.default_rng(seed)
    return (rng.integers(1, 4, (users, items)) * (rng.random((users, items)) < 0.4)).astype(float)


@given(st.integers(0, 10_000), st.sampled_from([0.5, 10.0]), st.sampled_from(["binary", "count"]))
def test_ease_is_the_ridge_of_each_item_on_all_others(seed, lam, weight):
    x = table(seed)
    used = x if weight == "count" else np.minimum(x, 1.0)
    pull = ease(csr_matrix(x), lam, weight)
    for j in range(7):
        others = np.delete(np.arange(7), j)
        a = used[:, others]
        ridge = np.linalg.solve(a.T @ a + lam * np.eye(6), a.T @ used[:, j])
        assert pull[others, j] == pytest.approx(ridge, abs=1e-5)
        assert pull[j, j] == 0.0


def test_ease_scores_are_history_times_pull():
    x = table(2)
    pull = ease(csr_matrix(x), 300.0)
    expected = pull[5] * np.log2(1 + 3) + pull[1]
    model = EASE(csr_matrix(x))
    obs = history([[5, 1]], count=[[3, 1]])
    assert model.scores(obs)[0].numpy() == pytest.approx(expected, abs=1e-6)


def test_a_larger_ridge_pulls_less():
    x = csr_matrix(table(3))
    norms = [np.abs(ease(x, lam)).sum() for lam in (1.0, 10.0, 1000.0)]
    assert norms[0] > norms[1] > norms[2]


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([(15, 7), (6, 30), (30, 12)]))
def test_the_axes_are_those_of_the_whole_decomposition_and_project(seed, factors, shape):
    x = table(seed, *shape)
    v = axes(csr_matrix(x), factors, "count")
    size = np.linalg.svd(x, compute_uv=False)
    rank = min(factors, int((size > 1e-9 * size.max()).sum()))
    assert v.shape == (shape[1], rank)
    assert v.T @ v == pytest.approx(np.eye(rank), abs=1e-8)
    onto = v @ v.T
    assert onto @ onto == pytest.approx(onto, abs=1e-8)
    kept = (x @ onto - x) ** 2
    assert kept.sum() == pytest.approx((size[rank:] ** 2).sum(), abs=1e-6)  # Eckart and Young


def test_pure_svd_scores_are_the_projection_of_the_history():
    x = table(4)
    v = axes(csr_matrix(x), 3, "log")
    own = np.zeros(7)
    own[[5, 1]] = [2.0, 1.0]
    got = PureSVD(csr_matrix(x), factors=3).scores(history([[5, 1]], count=[[3, 1]]))[0].numpy()
    assert got == pytest.approx(own @ v @ v.T, abs=1e-6)


def test_with_as_many_axes_as_items_a_history_is_its_own_projection():
    x = np.eye(7) * 3
    scores = PureSVD(csr_matrix(x), factors=100).scores(history([[2], [0, 6]]))
    assert torch.equal(scores, torch.tensor([[0.0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1]]))


@pytest.mark.parametrize("model", MODELS)
def test_a_stranger_is_served_as_a_user_of_the_log_with_the_same_history(model):
    spec = synthetic_spec()
    fitted = model(spec.events)
    known = spec.events.histories(np.array([3]))
    past, count = known.past[0].tolist(), known.past_count[0].tolist()
    stranger = history([past[::-1]], count=[count[::-1]])
    assert torch.allclose(fitted.scores(stranger), fitted.scores(known), atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_without_a_history_the_popular_stand_first_and_nobody_needs_to_have_bought(model):
    x = table(5)
    x[:, 3] = 3.0
    scores = model(csr_matrix(x)).scores(history([[], [0]]))
    assert scores[0].argmax() == 3
    assert sorted(scores[0].tolist()) == pytest.approx([i / 7 for i in range(7)])
    assert model(csr_matrix((4, 7))).scores(history([[], [0]])).isfinite().all()


@pytest.mark.parametrize("model", MODELS)
def test_it_can_be_saved_and_is_the_same_again(model):
    obs = history([[0, 3], [1]])
    fitted, again = (model(csr_matrix(table(6, 40, 30)), seed=2) for _ in range(2))
    assert torch.equal(fitted.scores(obs), again.scores(obs))
    other = model(csr_matrix(table(7, 40, 30)))
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.scores(obs), fitted.scores(obs))
    with pytest.raises(ValueError, match="of 7 items, this one has 30"):
        fitted.load_state_dict(model(csr_matrix(table(6))).state_dict())


def test_what_cannot_be_meant_is_refused(monkeypatch):
    x = csr_matrix(table(0))
    with pytest.raises(ValueError, match="lam must be above 0, got 0"):
        EASE(x, lam=0.0)
    with pytest.raises(ValueError, match="factors must be at least 1, got 0"):
        PureSVD(x, factors=0)
    for model in MODELS:
        with pytest.raises(ValueError, match="weight must be one of binary, log, count"):
            model(x, weight="tfidf")
        with pytest.raises(ValueError, match=r"a history must hold items in 0\.\.6 or -1"):
            model(x).scores(history([[7]]))
    monkeypatch.setattr(agents.linear, "LARGEST", 6)
    with pytest.raises(ValueError, match="at most 6 items, got 7: choose als"):
        EASE(x)
