"""Blends: one model is itself, votes by hand, weights find the better model."""

from functools import partial

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from agents.blend import Blend, blended, comparable, last_held_out, ndcg, simplex
from agents.explore import break_ties
from agents.factors import ALS
from agents.interactions import Interactions, history, popular_ranks
from agents.linear import EASE
from agents.testing import synthetic_spec


class Noise:
    """A model that knows nothing."""

    def __init__(self, past, *, device="cpu", seed=0):
        self.draw = torch.rand(past.num_items, generator=torch.Generator().manual_seed(7))

    def scores(self, obs):
        return self.draw.expand(len(obs), -1)

    def state_dict(self):
        return {"draw": self.draw}

    def load_state_dict(self, state):
        self.draw = state["draw"]


def two_worlds(users=80, items=40, seed=0, twice=False):
    """Interactions in time: even users have even items, odd ones odd items."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), 8)
    picks = [rng.choice(np.arange(u % 2, items, 2), 8, twice) for u in range(users)]
    item = np.concatenate(picks)
    return Interactions(user, item, np.arange(len(user)) / 24.0, np.ones(len(user)), users, items)


SOME = [[0, 2], [1, 3, 5], [], [4]]
EASY = partial(EASE, lam=5.0)


@pytest.mark.parametrize("how", ["average", "vote"])
@pytest.mark.parametrize("weights", [None, [3.0]])
def test_a_blend_of_one_model_ranks_as_it_does(how, weights):
    alone, obs = EASY(two_worlds()), history(SOME)
    blend = Blend(two_worlds(), models=[EASY], how=how, weights=weights)
    order = break_ties(alone.scores(obs)).argsort(dim=1)  # equal scores as agents order them
    assert (blend.scores(obs).gather(1, order).diff(dim=1) >= 0).all()


def test_averages_by_hand():
    a, b = torch.tensor([[0.0, 2.0]]), torch.tensor([[300.0, 100.0]])
    total = blended([a, b], torch.tensor([0.75, 0.25]).double(), "average")
    assert total.tolist() == [[pytest.approx(-0.5), pytest.approx(0.5)]]


def test_votes_by_hand():
    a, b = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.1, 0.3, 0.2]])
    total = blended([a, b], torch.tensor([0.5, 0.5]).double(), "vote")[0]
    expected = [1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62]
    assert total.tolist() == pytest.approx([x / 2 for x in expected])


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 100.0), st.floats(-50.0, 50.0), st.sampled_from(["average", "vote"]))
def test_the_scale_of_a_model_changes_no_blend(scale, shift, how):
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(1)).double()
    moved = comparable(scores * scale + shift, how)
    torch.testing.assert_close(moved, comparable(scores, how), rtol=1e-6, atol=1e-6)


def test_a_vote_does_not_see_how_far_the_first_is_ahead():
    near, far = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[900.0, 2.0, 1.0]])
    assert torch.equal(comparable(near, "vote"), comparable(far, "vote"))
    assert not torch.equal(comparable(near, "average"), comparable(far, "average"))


@pytest.mark.parametrize("how", ["average", "vote"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("timed", [False, True])
def test_tuned_weights_prefer_the_model_that_knows_to_noise(how, twice, timed):
    past = two_worlds(twice=twice)
    past = past if timed else Interactions.of(past.counts())
    blend = Blend(past, models=[Noise, EASY], how=how)
    assert blend.weights.sum() == pytest.approx(1.0)
    assert blend.weights[1] >= 0.75


def test_equally_good_models_share_the_weight():
    blend = Blend(two_worlds(), models=[EASY, EASY, EASY])
    assert blend.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_the_models_kept_are_fitted_to_all():
    past = two_worlds()
    blend = Blend(past, models=[EASY, ALS])
    assert torch.equal(blend.models[0].pull, EASY(past).pull)


def test_held_out_is_the_last_event_and_no_other():
    past = Interactions(
        np.array([0, 0, 0, 2, 3, 3]), np.array([1, 2, 1, 0, 3, 0]), np.arange(6.0), np.ones(6), 4, 4
    )
    rest, users, items, now = last_held_out(past, 0)
    assert now.tolist() == [2.0, 5.0]
    assert (users.tolist(), items.tolist()) == ([0, 3], [1, 0])
    assert (rest.user.tolist(), rest.item.tolist()) == ([0, 0, 2, 3], [1, 2, 0, 3])
    assert rest.num_users == 4


def test_without_times_the_held_out_item_is_drawn_not_the_last_id():
    counts = csr_matrix(np.ones((300, 10)))
    _, _, items, _ = last_held_out(Interactions.of(counts), 0)
    assert np.bincount(items, minlength=10).min() > 10


def test_ndcg_of_one_wanted_item_by_hand():
    scores = torch.arange(20.0, 0.0, -1.0).expand(3, -1)
    got = ndcg(scores, torch.tensor([0, 2, 10]))
    assert got.tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert ndcg(torch.zeros(1, 3), torch.tensor([0])).tolist() == pytest.approx([1 / np.log2(3)])


@given(st.integers(1, 5))
def test_the_grid_sums_to_one_and_has_every_model_alone(size):
    grid = simplex(size)
    assert torch.allclose(grid.sum(dim=1), torch.ones(len(grid)).double())
    assert (grid >= 0).all()
    for model in range(size):
        assert ((grid[:, model] == 1.0).sum() >= 1).item()


def test_an_empty_history_is_shown_popularity():
    past = two_worlds()
    scores = Blend(past, models=[EASY, ALS], weights=[1.0, 1.0]).scores(history([[]]))[0]
    assert torch.equal(scores.argsort(), popular_ranks(past, 0).argsort())


@pytest.mark.parametrize("how", ["average", "vote"])
def test_a_row_is_the_same_alone_and_in_a_batch(how):
    blend = Blend(two_worlds(), models=[EASY, ALS], how=how, weights=[0.3, 0.7])
    alone = torch.cat([blend.scores(history([row])) for row in SOME])
    torch.testing.assert_close(blend.scores(history(SOME)), alone, rtol=1e-5, atol=1e-5)


def test_a_saved_blend_scores_the_same_after_loading(tmp_path):
    blend = Blend(two_worlds(), models=[EASY, ALS], weights=[0.2, 0.8])
    torch.save(blend.state_dict(), tmp_path / "blend")
    loaded = Blend(two_worlds(seed=5), models=[EASY, ALS], weights=[1.0, 1.0])
    loaded.load_state_dict(torch.load(tmp_path / "blend", weights_only=True))
    assert torch.equal(loaded.scores(history(SOME)), blend.scores(history(SOME)))


def test_hydra_builds_a_blend_of_nested_models():
    config = {
        "_target_": "agents.static.Static",
        "model": {
            "_target_": "agents.blend.Blend",
            "_partial_": True,
            "models": [{"_target_": "agents.linear.EASE", "_partial_": True, "lam": 7.0},
                       {"_target_": "agents.factors.ALS", "_partial_": True, "factors": 3}],
        },
    }  # fmt: skip
    agent = instantiate(config, synthetic_spec())
    assert agent.model.models[1].items.shape[1] == 3
    assert agent.act(history([[0], []]), None).slate.shape == (2, 2)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"models": []}, "at least one model"),
        ({"models": [EASY], "weights": [0.5, 0.5]}, "one for each of 1 models, got 2"),
        ({"models": [EASY, ALS], "weights": [1.0, -1.0]}, "at least 0 and not all 0"),
        ({"models": [EASY, ALS], "weights": [0.0, 0.0]}, "null tunes them"),
        ({"models": [EASY, ALS], "weights": [1.0, float("nan")]}, "finite"),
        ({"models": [EASY], "how": "max"}, "how must be one of average, vote, got 'max'"),
    ],
)
def test_what_cannot_be_meant_is_refused(knobs, words):
    with pytest.raises(ValueError, match=words):
        Blend(two_worlds(), **knobs)


def test_a_checkpoint_of_more_models_is_refused():
    two, one = (Blend(two_worlds(), models=[EASY] * k, weights=[1.0] * k) for k in (2, 1))
    with pytest.raises(ValueError, match="of 2 models, this blend has 1"):
        one.load_state_dict(two.state_dict())
