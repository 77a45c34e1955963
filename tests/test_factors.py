"""ALS, BPR and MF-SGD: folded-in users are the optimum, and known structure is found."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from agents import factors
from agents.factors import ALS, BPR, als_users, bpr_users, cells, chunks, spaced
from agents.interactions import Interactions, history, popular_ranks, weighed
from agents.mf_sgd import MFSGD, cell_values, epoch, loss_of, start, tastes
from encoders.state import EMPTY

MODELS = [ALS, BPR, MFSGD]


def two_worlds(users=60, items=12, seed=0):
    """Counts (U, N): even users have even items, odd ones odd items, with a little noise."""
    rng = np.random.default_rng(seed)
    same = (np.arange(users)[:, None] + np.arange(items)[None, :]) % 2 == 0
    had = rng.random((users, items)) < np.where(same, 0.6, 0.05)
    return csr_matrix(had * rng.integers(1, 5, (users, items)).astype(float))


def ratings(seed=0, users=80, items=30):
    """Ratings (n,) of a taste with one dimension plus a bias per item."""
    rng = np.random.default_rng(seed)
    had = rng.random((users, items)) < 0.4
    taste, kind = rng.choice([-1.0, 1.0], users), rng.choice([-1.0, 1.0], items)
    user, item = np.nonzero(had)
    value = (
        3.0 + 0.5 * taste[user] * kind[item] + 0.5 * np.sin(item) + 0.1 * rng.normal(size=len(user))
    )
    return Interactions(user, item, np.full(len(user), np.nan), value, users, items)


SOME = [[0, 2], [1, 3, 5], [], [4], [11, 0, 6, 8]]


@pytest.mark.parametrize("model", MODELS)
def test_a_row_does_not_depend_on_its_batch_nor_on_padding(model):
    fitted, obs = model(two_worlds()), history(SOME)
    together = fitted.scores(obs)
    alone = torch.cat([fitted.scores(history([row])) for row in SOME])
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_an_empty_history_is_shown_popularity(model):
    past = Interactions.of(two_worlds())
    assert torch.equal(model(past, seed=3).scores(history([[]]))[0], popular_ranks(past, 3))


@pytest.mark.parametrize("model", MODELS)
def test_the_same_seed_gives_the_same_scores_and_another_does_not(model):
    past = ratings() if model is MFSGD else two_worlds()
    obs = history([[0, 2], [1]])
    first, again, other = (model(past, seed=s).scores(obs) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("model", MODELS)
def test_a_saved_model_scores_the_same_after_loading(model):
    past, other = two_worlds(), two_worlds(seed=9)
    saved = io.BytesIO()
    torch.save(model(past).state_dict(), saved)
    saved.seek(0)
    loaded = model(other, seed=5)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(loaded.scores(history(SOME)), model(past).scores(history(SOME)))
    smaller = model(two_worlds(items=11))
    with pytest.raises(ValueError, match="catalogue of 12 items, this one has 11"):
        smaller.load_state_dict(model(past).state_dict())


@pytest.mark.parametrize("model", [ALS, BPR])
def test_an_unseen_user_gets_the_items_of_their_kind(model):
    scores = model(two_worlds(), factors=4).scores(history([[0, 2, 4], [1, 3, 5]]))
    even = scores[:, 6::2].mean(dim=1) - scores[:, 7::2].mean(dim=1)
    assert even[0] > 0 > even[1]


@pytest.mark.parametrize("weight", ["binary", "log", "count"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 7.0])
def test_als_users_are_the_closed_form_of_each(weight, alpha):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(12, 5)).astype(np.float32)
    counts = two_worlds(users=20)
    obs = Interactions.of(counts).histories()
    c = alpha * weighed(counts, weight).toarray()
    got = als_users(obs.past, alpha * weighed(obs.past_count, weight), torch.from_numpy(y), 0.3)
    for user in range(20):
        have = c[user] > 0
        extra = np.where(have, c[user] - 1.0, 0.0)
        left = y.T @ y + 0.3 * np.eye(5) + y.T @ (extra[:, None] * y)
        expected = np.linalg.solve(left, y.T @ c[user])
        np.testing.assert_allclose(got[user], expected, rtol=1e-5, atol=1e-6)


def test_als_folds_in_as_the_library_recalculates():
    from implicit.cpu.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    counts = two_worlds()
    with threadpool_limits(1, "blas"):
        theirs = AlternatingLeastSquares(
            factors=6, regularization=2.0, alpha=3.0, num_threads=1, random_state=0
        )
        theirs.fit(weighed(counts.astype(np.float32), "log"), show_progress=False)
        users = theirs.recalculate_user(
            np.arange(60), weighed(counts.astype(np.float32), "log")
        )  # (U, f)
    mine = ALS(counts, factors=6, regularization=2.0, alpha=3.0)
    np.testing.assert_allclose(mine.items, theirs.item_factors, atol=1e-6)
    have = np.flatnonzero(np.diff(counts.indptr))
    got = mine.scores(Interactions.of(counts).histories())[have]
    np.testing.assert_allclose(got, (users @ theirs.item_factors.T)[have], atol=1e-4)


def test_als_adds_what_was_chosen_in_the_session_to_the_count_before():
    model = ALS(two_worlds())
    before = history([[2, 0]], count=[[3.0, 1.0]])
    fields = {"history": torch.tensor([[2]]), "feedback": torch.ones(1, 1, 1)}
    session = type(before)(**{**before.__dict__, **fields})
    torch.testing.assert_close(
        model.scores(session), model.scores(history([[2, 0]], count=[[4.0, 1.0]]))
    )


def test_more_regularisation_makes_users_smaller():
    y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    obs = history([[0, 2, 7]])
    sizes = [als_users(obs.past, obs.past_count, y, r).norm() for r in (0.1, 1.0, 10.0)]
    assert sizes == sorted(sizes, reverse=True)


def bpr_loss(x, own, others, y, bias, regularization):
    """The objective of one user, by loops."""
    pairs = [-torch.nn.functional.logsigmoid(x @ (y[i] - y[j]) + bias[i] - bias[j])
             for i in own for j in others]  # fmt: skip
    return torch.stack(pairs).mean() + regularization / 2.0 * x @ x


def test_bpr_users_are_the_optimum_of_their_own_pairs(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    y, bias = torch.randn(12, 4, generator=generator), torch.randn(12, generator=generator)
    items = torch.tensor([[0, 3, 5, EMPTY], [7, EMPTY, EMPTY, EMPTY]])
    losses = []
    for steps in (1, 5, factors.STEPS, 500):
        monkeypatch.setattr(factors, "STEPS", steps)
        users = bpr_users(items, y, bias, torch.arange(12), torch.ones(12), 0.1)
        for x, own in zip(users, ([0, 3, 5], [7]), strict=True):
            others = [j for j in range(12) if j not in own]
            free = x.clone().requires_grad_()
            losses.append(bpr_loss(free, own, others, y, bias, 0.1))
            (slope,) = torch.autograd.grad(losses[-1], free)
            assert steps < 500 or slope.abs().max() < 1e-4
    for user in (losses[0::2], losses[1::2]):
        assert user == sorted(user, reverse=True)
        assert user[2] < 1.001 * user[3]


def test_bpr_folded_in_ranks_as_the_library_ranks_its_own_users():
    from implicit.cpu.bpr import BayesianPersonalizedRanking

    counts = two_worlds(users=200)
    theirs = BayesianPersonalizedRanking(
        factors=4, learning_rate=0.05, regularization=0.05, iterations=100, num_threads=1,
        random_state=0,
    )  # fmt: skip
    theirs.fit(counts, show_progress=False)
    mine = BPR(counts, factors=4, learning_rate=0.05)
    have = np.flatnonzero(np.diff(counts.indptr) > 1)
    got = mine.scores(Interactions.of(counts).histories(have)).numpy()
    known = theirs.user_factors[have] @ theirs.item_factors.T
    alike = [np.corrcoef(a, b)[0, 1] for a, b in zip(got, known, strict=True)]
    assert np.mean(alike) > 0.9


def test_spaced_items_stand_for_the_mass_of_all():
    mass = torch.tensor([0, 3, 1, 0, 4])
    items, often = spaced(mass, 0)
    assert items.tolist() == [1, 2, 4]
    share = often / factors.NEGATIVES
    assert (share - torch.tensor([3.0, 1.0, 4.0]) / 8.0).abs().max() <= 1.0 / factors.NEGATIVES


def test_a_user_who_had_everything_is_no_failure():
    counts = csr_matrix(np.ones((3, 4)))
    for model in (ALS, BPR):
        assert model(counts, factors=2).scores(history([[0, 1, 2, 3]])).isfinite().all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(-1, 6), min_size=5, max_size=5), min_size=1, max_size=9))
def test_cells_keep_each_item_once_and_its_whole_count(rows):
    items = torch.tensor(rows)
    count = torch.arange(1.0, items.numel() + 1.0).reshape(items.shape)
    once, total = cells(items, count)
    for row, owns, kept, sums in zip(items, count, once, total, strict=True):
        for item in set(row.tolist()) - {EMPTY}:
            assert (kept == item).sum() == 1
            assert sums[kept == item] == owns[row == item].sum()
        assert set(kept.tolist()) - {EMPTY} == set(row.tolist()) - {EMPTY}
        assert (sums[kept == EMPTY] == 0).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 900))
def test_chunks_hold_every_row_once_and_cut_off_no_item(sizes, room):
    items = torch.full((len(sizes), 9), EMPTY)
    for row, size in enumerate(sizes):
        items[row, :size] = 1
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "CHUNK", room)
        for rows, m in chunks(items, 3):
            assert (items[rows, m:] == EMPTY).all()
            assert len(rows) == 1 or len(rows) * (m + 3) * 3 <= room
            parts += rows.tolist()
    assert sorted(parts) == list(range(len(sizes)))


def test_small_chunks_change_no_score(monkeypatch):
    obs = Interactions.of(two_worlds()).histories()
    whole = [model(two_worlds()).scores(obs) for model in (ALS, BPR)]
    monkeypatch.setattr(factors, "CHUNK", 1)
    for expected, model in zip(whole, (ALS, BPR), strict=True):
        torch.testing.assert_close(model(two_worlds()).scores(obs), expected, rtol=1e-5, atol=1e-5)


def test_mf_sgd_learns_tastes_and_its_error_falls():
    model = MFSGD(ratings(), log=False, regularization=1.0, epochs=40)
    assert model.losses[-1] < 0.6 * model.losses[0]
    untrained = MFSGD(ratings(), log=False, epochs=1)
    assert model.losses[-1] < untrained.losses[0]


def test_mf_sgd_predicts_a_value_without_the_item_itself():
    weights = start(2, 4, 3, seed=0)
    weights["item_bias"] += torch.tensor([0.1, 0.2, 0.3, 0.4])
    user, item = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([2, 0, 3, 1, 2])
    level = torch.tensor([0.5, -0.5, 1.0, 0.0, -1.0])
    _, error = loss_of(weights, user, item, level, 0.0)
    expected = []
    for own in ([0, 1], [2, 3, 4]):
        for k in own:
            rest = [item[j] for j in own if j != k]
            taste = sum(weights["had"][j] for j in rest) / len(rest) ** 0.5
            i = item[k]
            expected.append(weights["item_bias"][i] + weights["item"][i] @ taste - level[k])
    assert float(error) == pytest.approx(float(torch.stack(expected).square().mean()), rel=1e-5)


def test_an_epoch_of_mf_sgd_sees_every_value_once():
    past = ratings(users=70)
    user, item, value = cell_values(past, False)
    weights = start(70, 30, 4, seed=0)
    rows = (torch.from_numpy(user), torch.from_numpy(item), torch.from_numpy(value).float())
    frozen = torch.optim.SGD([w.requires_grad_() for w in weights.values()], lr=0.0)
    mean = epoch(weights, rows, frozen, 0.0, np.random.default_rng(0))
    assert mean == pytest.approx(float(loss_of(weights, *rows, 0.0)[1].detach()), rel=1e-4)


def test_tastes_count_an_item_of_session_and_past_once():
    had = torch.tensor([[1.0], [10.0], [100.0], [0.0]])
    items = torch.tensor([[1, 0, 1], [EMPTY, 2, EMPTY], [EMPTY, EMPTY, EMPTY]])
    assert tastes(items, had).squeeze(1).tolist() == pytest.approx([11.0 / 2.0**0.5, 100.0, 0.0])


def test_mf_sgd_adds_up_money_and_takes_its_log():
    past = Interactions(
        np.array([0, 0, 1]), np.array([2, 2, 0]), np.zeros(3), np.array([3.0, 4.0, 0.0]), 2, 3
    )
    user, item, value = cell_values(past, True)
    assert (user.tolist(), item.tolist()) == ([0, 1], [2, 0])
    assert value.tolist() == pytest.approx([np.log(8.0), 0.0])


def test_mf_sgd_of_equal_values_is_popularity():
    past = Interactions.of((two_worlds() > 0).astype(float))
    scores = MFSGD(past).scores(history([[0, 1]]))
    assert torch.equal(scores.argsort(), popular_ranks(past, 0).argsort()[None])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: ALS(p, factors=0), "factors must be a whole number of at least 1, got 0"),
        (lambda p: ALS(p, iterations=1.5), "iterations must be a whole number"),
        (lambda p: ALS(p, regularization=0.0), "regularization must be above 0 and finite"),
        (lambda p: ALS(p, alpha=float("nan")), "alpha must be above 0"),
        (lambda p: ALS(p, weight="sqrt"), "weight must be one of"),
        (lambda p: BPR(p, learning_rate=0.0), "learning_rate must be above 0"),
        (lambda p: BPR(p, factors=-1), "factors must be"),
        (lambda p: BPR(csr_matrix((3, 4))), "need interactions, got none"),
        (lambda p: ALS(csr_matrix((3, 4))), "need interactions, got none"),
        (lambda p: ALS(np.ones((3, 4))), "scipy sparse matrix"),
        (lambda p: MFSGD(p, epochs=0), "epochs must be"),
        (lambda p: MFSGD(p, lr=0.0), "lr must be above 0"),
        (lambda p: MFSGD(p, lr=1e30), "lower lr"),
        (lambda p: ALS(p).scores(history([[40]])), "got 40 in row 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make(two_worlds())


def test_refunds_have_no_log():
    refund = Interactions(
        np.array([0, 1]), np.array([0, 1]), np.zeros(2), np.array([2.0, -3.0]), 2, 2
    )
    with pytest.raises(ValueError, match="drop refunds"):
        MFSGD(refund)
    assert MFSGD(refund, log=False).scores(history([[0]])).isfinite().all()
