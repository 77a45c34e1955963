"""The two-tower scorer learns planted tastes, places new items by text, and keeps its promises."""

import io

import numpy as np
import pytest
import torch

from agents.interactions import Interactions, history
from agents.two_tower import HISTORY, TwoTower, item_features, latest, looked_back
from encoders.state import EMPTY

N = 20
SMALL = {"dim": 8, "hidden": 16, "epochs": 8, "negatives": 16, "batch_size": 64, "lr": 0.01}


def kinds(users: int = 60, length: int = 8, seed: int = 0) -> Interactions:
    """Even users have even items, odd users odd ones; items 18 and 19 nobody had yet."""
    rng = np.random.default_rng(seed)
    item = np.concatenate([2 * rng.integers(0, 9, length) + u % 2 for u in range(users)])
    user = np.repeat(np.arange(users), length)
    time = np.tile(np.arange(length, dtype=float), users)
    text = torch.zeros(N, 4)
    text[torch.arange(N), torch.arange(N) % 2] = 1.0  # the text says the kind
    text += 0.1 * torch.randn(N, 4, generator=torch.Generator().manual_seed(seed))
    return Interactions(user, item, time, np.ones(len(user)), users, N, text)


def asked(*rows: list[int]):
    return history([list(reversed(row)) for row in rows])


@pytest.mark.parametrize("deep", [True, False])
def test_each_kind_of_user_is_scored_its_kind_of_items(deep) -> None:
    model = TwoTower(kinds(), deep=deep, **SMALL)
    scores = model.scores(asked([2, 4, 6], [3, 5, 7]))
    for row, kind in enumerate((0, 1)):
        own, other = scores[row, kind:18:2], scores[row, 1 - kind : 18 : 2]
        assert own.mean() > other.mean() + 1.0


def test_an_item_that_nobody_had_is_placed_by_its_text() -> None:
    scores = TwoTower(kinds(), deep=False, **SMALL).scores(asked([2, 4, 6], [3, 5, 7]))
    assert scores[0, 18] > scores[0, 19]
    assert scores[1, 19] > scores[1, 18]


def test_without_texts_it_learns_from_who_had_what() -> None:
    past = kinds()
    plain = Interactions(past.user, past.item, past.time, past.value, past.num_users, N)
    scores = TwoTower(plain, **SMALL).scores(asked([2, 4, 6], [3, 5, 7]))
    assert scores[0, 0:18:2].mean() > scores[0, 1:18:2].mean() + 1.0


def test_the_sigmoid_is_the_chance_to_be_next_up_to_the_catalogue() -> None:
    """With nothing to tell users apart, exp(logit) is the share of events of each item."""
    rng = np.random.default_rng(0)
    share = np.array([0.5, 0.3, 0.15, 0.05])
    item = rng.choice(4, 6000, p=share)
    user = np.repeat(np.arange(300), 20)
    time = np.tile(np.arange(20.0), 300)
    past = Interactions(user, item, time, np.ones(6000), 300, 4)
    model = TwoTower(past, deep=False, dim=2, epochs=4, negatives=64, lr=0.01)
    found = model.scores(past.histories(np.arange(50))).exp().mean(dim=0).numpy()
    np.testing.assert_allclose(found, share, rtol=0.25)


def test_features_are_centred_and_an_item_without_text_has_none() -> None:
    past = kinds()
    vectors = past.vectors.clone()
    vectors[3] = 0.0
    x = item_features(Interactions(past.user, past.item, past.time, past.value, 60, N, vectors))
    assert x.shape == (N, 5)
    assert (x[3, :4] == 0).all()
    assert x[:, 4].mean().abs() < 1e-5


def test_an_example_looks_back_on_its_own_user_only() -> None:
    past = kinds(users=3, length=4)
    place = np.tile(np.arange(4), 3)
    items, age = looked_back(past, np.array([5, 11]), place)
    first, second = past.item[4].item(), past.item[10:7:-1].tolist()
    assert items.tolist() == [[first, EMPTY, EMPTY], second]
    assert age.tolist() == [[1.0, 0.0, 0.0], [1.0, 2.0, 3.0]]


def test_only_the_latest_of_a_long_history_are_read() -> None:
    many = HISTORY + 30
    items = torch.arange(many)[None]
    age = torch.arange(many, dtype=torch.float32)[None]
    kept, _, ages = latest(items, torch.ones(1, many), age)
    assert kept.shape == (1, HISTORY)
    assert ages.max() == HISTORY - 1


def test_batches_seeds_saving_and_popularity() -> None:
    before = torch.get_rng_state()
    kw = {**SMALL, "epochs": 1}
    one, two = TwoTower(kinds(), **kw), TwoTower(kinds(), **kw)
    rows = [[2, 4], [], [3], [5, 7, 9, 11, 1]]
    together = one.scores(asked(*rows))
    assert torch.equal(together, two.scores(asked(*rows)))
    assert torch.equal(together[1], one.ranks)
    for row, scores in zip(rows, together, strict=True):
        assert torch.allclose(one.scores(asked(row))[0], scores, atol=1e-5)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    fresh = TwoTower(kinds(seed=3), seed=4, **kw)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.scores(asked(*rows)), together)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_it_cannot_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="TwoTower learns from what came next"):
        TwoTower(kinds().counts())
    with pytest.raises(ValueError, match="negatives must be at least 1"):
        TwoTower(kinds(), negatives=0)
