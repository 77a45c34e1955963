"""ItemKNN shows what goes with the past: cosines by hand, the checkerboard, seeded ties."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

import agents.item_knn
from agents.item_knn import ItemKNN, item_similarity
from agents.testing import synthetic_observation, synthetic_spec
from encoders.state import EMPTY

# even users buy even items, odd users odd ones: what goes with what can be seen
CHECKERBOARD = csr_matrix((np.add.outer(np.arange(40), np.arange(24)) % 2 == 0).astype(float))


def household(spec, past, count=None):
    """One user with this past."""
    obs = synthetic_observation(spec, 1, torch.Generator().manual_seed(0))
    pad = spec.past_size - len(past)
    counts = torch.tensor([(count or [1.0] * len(past)) + [0.0] * pad])
    return replace(obs, past=torch.tensor([past + [EMPTY] * pad]), past_count=counts)


def board(**changed):
    return replace(synthetic_spec(slate_size=4), interactions=CHECKERBOARD, **changed)


def cosines(x, shrink):
    """Dense, as the formula reads."""
    norm = np.sqrt((x**2).sum(axis=0))
    below = np.outer(norm, norm) + shrink
    return np.divide(x.T @ x, below, out=np.zeros_like(below), where=below > 0)


@pytest.mark.parametrize("kind", [0, 1])
def test_the_checkerboard_is_continued(kind):
    spec = board()
    decision = ItemKNN(spec).act(household(spec, [kind]), torch.tensor([[kind]]))
    assert (decision.slate % 2 == kind).all()
    assert kind not in decision.slate
    assert (decision.propensity == 1.0).all()


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
        patch.setattr(agents.item_knn, "ENTRIES", 8 * int(rng.integers(1, 9)))
        near = item_similarity(csr_matrix(x), neighbours, shrink)
    assert near.shape == (8, 8)
    assert np.diff(near.indptr).max() <= neighbours
    best = -np.sort(-whole, axis=1)[:, :neighbours]
    assert -np.sort(-near.toarray(), axis=1)[:, :neighbours] == pytest.approx(best)
    kept = near.toarray() > 0
    assert near.toarray()[kept] == pytest.approx(whole[kept])


def test_scores_are_similarities_weighted_by_log_counts(monkeypatch):
    spec = synthetic_spec()
    obs = household(spec, [5, 2, 9], [7.0, 1.0, 2.0])
    near = item_similarity(spec.interactions.log1p(), 100, 10.0).toarray()
    expected = sum(near[item] * np.log1p(c) for item, c in zip([5, 2, 9], [7, 1, 2], strict=True))
    assert ItemKNN(spec).scores(obs)[0].numpy() == pytest.approx(expected, abs=2e-6)
    monkeypatch.setattr(agents.item_knn, "GATHERED", 1)  # one place of the past at a time
    assert ItemKNN(spec).scores(obs)[0].numpy() == pytest.approx(expected, abs=2e-6)


def test_without_a_past_the_popular_and_of_equals_a_seeded_order():
    spec = synthetic_spec(slate_size=3)
    popular = torch.zeros(24)
    popular[[7, 3]] = torch.tensor([0.5, 0.4])
    shown = [
        ItemKNN(replace(spec, popularity=popular, seed=seed)).act(household(spec, []), None).slate
        for seed in (0, 0, 1, 2, 3)
    ]
    assert [slate[0, :2].tolist() for slate in shown] == [[7, 3]] * 5
    assert shown[0][0, 2] == shown[1][0, 2]
    assert len({int(slate[0, 2]) for slate in shown}) > 1


def test_probabilities_are_certain_and_follow_the_mask():
    spec = board()
    obs, agent = household(spec, [0]), ItemKNN(board())
    best = agent.act(obs, None).slate
    assert agent.slate_probs(obs, None, best).tolist() == [[1.0] * 4]
    assert agent.slate_probs(obs, best[:, :1], best)[0, 0] == 0.0
    assert agent.action_probs(obs, best[:, :1])[0, best[0, 1]] == 1.0


def test_what_it_cannot_learn_from_is_refused():
    with pytest.raises(ValueError, match="needs none, such as popularity"):
        ItemKNN(replace(synthetic_spec(), interactions=None))
    with pytest.raises(ValueError, match="of 5 items, the spec of 24"):
        ItemKNN(replace(synthetic_spec(), interactions=csr_matrix(np.ones((3, 5)))))
    with pytest.raises(ValueError, match="neighbours must be at least 1, got 0"):
        ItemKNN(synthetic_spec(), neighbours=0)
    with pytest.raises(ValueError, match="shrink must be at least 0, got -1"):
        ItemKNN(synthetic_spec(), shrink=-1.0)
    with pytest.raises(ValueError, match="finite and at least 0"):
        item_similarity(csr_matrix(np.array([[-1.0]])))
    small = ItemKNN(synthetic_spec(num_items=12)).state_dict()
    with pytest.raises(ValueError, match="of 12 items, this one has 24"):
        ItemKNN(synthetic_spec()).load_state_dict(small)
