"""Popularity and buy-again: orders by hand, by moment, by due date, and what they cannot do."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from agents.interactions import Interactions, history
from agents.popular import LAPSED, BuyAgain, Popularity, gaps, log_hazard
from encoders.state import EMPTY, calendar


def counts(*row):
    return csr_matrix(np.array([row], dtype=float))


def at(obs, *days):
    """The same at these days since 1970-01-01."""
    return replace(obs, context=calendar(torch.tensor(days, dtype=torch.float64)))


def timed(rows, num_users=1, num_items=3):
    """(user, item, day) rows as interactions."""
    user, item, day = (
        np.array(x) for x in zip(*sorted(rows, key=lambda r: (r[0], r[2])), strict=True)
    )
    return Interactions(user, item, day.astype(float), np.ones(len(user)), num_users, num_items)


def ranked(model, obs, k):
    return model.scores(obs).argsort(dim=1, descending=True)[:, :k].tolist()


def test_popularity_is_the_order_of_events_for_everybody():
    model = Popularity(counts(1, 5, 3, 4))
    assert ranked(model, history([[0], []]), 4) == [[1, 3, 2, 0]] * 2


@pytest.mark.parametrize(("by", "gap"), [("weekday", 1.0), ("hour", 1 / 24)])
def test_popularity_by_moment_prefers_what_is_bought_then(by, gap):
    monday = 4.0  # 1970-01-05
    rows = [(0, 0, monday + 7 * w) for w in range(40)]
    rows += [(0, 1, monday + gap + 7 * w) for w in range(60)]
    model = Popularity(timed(rows), by=by)
    obs = at(history([[], [], []]), monday + 700, monday + gap + 700, monday + 3 * gap + 700)
    assert ranked(model, obs, 2) == [[0, 1], [1, 0], [1, 0]]  # the last: nothing then, overall
    assert ranked(Popularity(timed(rows)), obs, 2) == [[1, 0]] * 3


def test_a_large_prior_is_popularity_overall_and_a_rare_item_is_not_lifted():
    rows = [(0, 0, 4.0 + 7 * w) for w in range(5)] + [(0, 1, 5.0 + 7 * w) for w in range(9)]
    obs = at(history([[]]), 4.0)
    assert ranked(Popularity(timed(rows), by="weekday", prior=0.1), obs, 1) == [[0]]
    assert ranked(Popularity(timed(rows), by="weekday", prior=1e9), obs, 1) == [[1]]


def test_every_hour_is_that_of_the_clock():
    rows = [(0, hour, 10.0 + hour / 24) for hour in range(24)]
    model = Popularity(timed(rows, num_items=24), by="hour", prior=0.01)
    for minute in (0, 30, 59):
        days = [100 + (hour + minute / 60) / 24 for hour in range(24)]
        obs = at(history([[]] * 24), *days)
        assert model.scores(obs).argmax(dim=1).tolist() == list(range(24))


def test_buy_again_ranks_by_count_then_recency_then_popularity_then_the_rest_by_popularity():
    model = BuyAgain(counts(90, 80, 1, 30, 20, 0, 25))
    obs = history([[5, 2, 3, 4, 6]], count=[[7, 2, 2, 2, 1]], age=[[300.0, 9.0, 50.0, 50.0, 0.0]])
    assert ranked(model, obs, 7) == [[5, 2, 3, 4, 6, 0, 1]]
    assert model.scores(obs)[0, [6, 4, 3, 2, 5]].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert ranked(model, history([[]]), 3) == [[0, 1, 3]]


def test_what_was_chosen_in_the_session_counts_once_more_and_is_the_latest():
    model = BuyAgain(counts(9, 8, 7, 6))
    obs = history([[2, 3]], count=[[2, 2]], age=[[5.0, 9.0]])
    shown, chosen = torch.tensor([[3, 1, 0]]), torch.tensor([[[1.0], [1.0], [0.0]]])
    later = replace(obs, history=shown, feedback=chosen)
    assert ranked(model, obs, 4) == [[2, 3, 0, 1]]
    assert ranked(model, later, 4) == [[3, 2, 1, 0]]  # 3 is had three times now
    assert model.scores(later)[0].tolist()[1:] == [1.0, 2.0, 3.0]


def test_recent_weighs_counts_by_age_and_never_underflows():
    obs = history([[0, 1, 2]], count=[[1, 4, 100]], age=[[1.0, 31.0, 900_000.0]])
    assert ranked(BuyAgain(counts(1, 1, 1), order="recent"), obs, 3) == [[1, 0, 2]]
    # 4 / e^(30 / tau) falls below 1 where tau < 30 / ln 4 = 21.6
    assert ranked(BuyAgain(counts(1, 1, 1), order="recent", tau=21.0), obs, 3) == [[0, 1, 2]]
    assert ranked(BuyAgain(counts(1, 1, 1), order="recent", tau=22.0), obs, 3) == [[1, 0, 2]]
    old = replace(obs, past_age=obs.past_age + 1e5)
    assert ranked(BuyAgain(counts(1, 1, 1), order="recent"), old, 3) == [[1, 0, 2]]


def test_due_items_stand_before_those_just_bought_and_those_long_given_up():
    weekly = [(u, 0, 7.0 * w + u % 2) for u in range(30) for w in range(9)]
    monthly = [(u, 1, 30.0 * m + u % 3) for u in range(30) for m in range(9)]
    model = BuyAgain(timed(weekly + monthly, num_users=30), order="due")

    def order(*ages):
        return ranked(model, history([[0, 1]], age=[list(ages)]), 2)[0]

    assert order(7.0, 1.0) == [0, 1]
    assert order(1.0, 30.0) == [1, 0]
    assert order(400.0, 30.0) == [1, 0]
    assert order(7.0, 400.0) == [0, 1]
    assert ranked(model, history([[0]], age=[[1.0]]), 3)[0][0] == 0  # its own before any other


def test_gaps_are_those_of_days_drawn_to_all():
    rows = [(0, 0, d) for d in (0.0, 0.5, 7.0, 14.0)] + [(0, 1, 0.0), (1, 1, 4.0), (1, 1, 32.0)]
    mean, spread = gaps(timed(rows, num_users=2))
    logs = np.log([7.0, 7.0, 28.0])
    overall = logs.mean()
    assert mean.tolist() == pytest.approx([
        (2 * math.log(7) + 5 * overall) / 7, (math.log(28) + 5 * overall) / 6, overall
    ])  # fmt: skip
    assert spread[2] == pytest.approx(logs.std())
    first = (2 * (math.log(7) - mean[0]) ** 2 + 5 * logs.var()) / 7
    assert spread[0] == pytest.approx(math.sqrt(first))


def test_the_rate_is_density_over_survivors_and_lapsed_far_into_the_tail():
    from scipy.stats import lognorm

    age = np.array([1.0, 5.0, 7.0, 30.0, 200.0])
    law = lognorm(s=0.5, scale=7.0)
    got = log_hazard(torch.from_numpy(age).log(), torch.tensor(math.log(7.0)), torch.tensor(0.5))
    expected = law.logpdf(age) - np.log(law.sf(age) + LAPSED)
    assert got.numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.isfinite(log_hazard(torch.tensor(20.0), torch.tensor(0.0), torch.tensor(0.25)))


@given(st.integers(0, 10_000), st.sampled_from(["count", "recent", "due"]))
def test_own_items_stand_first_whatever_the_order_the_padding_and_the_batch(seed, order):
    rng = np.random.default_rng(seed)
    rows = [(u, i, float(d)) for u in range(4) for i in range(8) for d in rng.integers(0, 90, 3)]
    model = BuyAgain(timed(rows, num_users=4, num_items=8), order=order)
    pasts = [rng.permutation(8)[: rng.integers(0, 9)].tolist() for _ in range(3)]
    obs = history(
        pasts,
        count=[rng.integers(1, 5, len(p)).tolist() for p in pasts],
        age=[np.sort(rng.integers(0, 90, len(p))).tolist() for p in pasts],
    )
    chosen = torch.from_numpy(rng.integers(0, 2, (3, 2, 1))).float()
    shown = torch.from_numpy(np.stack([rng.permutation(8)[:2] for _ in range(3)]))
    obs = replace(obs, history=shown, feedback=chosen)
    scores = model.scores(obs)
    alone = torch.cat([model.scores(obs[row : row + 1]) for row in range(3)])
    assert torch.equal(scores, alone)
    wide = replace(
        obs,
        past=torch.nn.functional.pad(obs.past, (0, 3), value=EMPTY),
        past_count=torch.nn.functional.pad(obs.past_count, (0, 3)),
        past_age=torch.nn.functional.pad(obs.past_age, (0, 3)),
    )
    assert torch.equal(scores, model.scores(wide))
    for row, past in enumerate(pasts):
        had = set(past) | {int(i) for i, c in zip(shown[row], chosen[row, :, 0], strict=True) if c}
        own = sorted(scores[row, i].item() for i in had)
        assert own == list(range(1, len(had) + 1))
        assert all(scores[row, i] < 1.0 for i in range(8) if i not in had)


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="by must be null or one of weekday, hour, got 'month'"):
        Popularity(counts(1), by="month")
    with pytest.raises(ValueError, match="prior must be above 0 events, got 0"):
        Popularity(counts(1), prior=0.0)
    with pytest.raises(ValueError, match=r"counts without times: fit it on Logs.*by=null"):
        Popularity(counts(1), by="hour")
    with pytest.raises(ValueError, match="order must be one of count, recent, due, got 'new'"):
        BuyAgain(counts(1), order="new")
    with pytest.raises(ValueError, match="tau must be above 0 days, got 0"):
        BuyAgain(counts(1), tau=0.0)
    with pytest.raises(ValueError, match=r"counts without times: fit it on Logs.*order=count"):
        BuyAgain(counts(1), order="due")
    with pytest.raises(ValueError, match="these interactions have none: choose order=count"):
        BuyAgain(timed([(0, 0, 1.0), (0, 0, 1.2), (0, 1, 5.0)]), order="due")
    with pytest.raises(ValueError, match=r"a history must hold items in 0\.\.2 or -1"):
        BuyAgain(counts(1, 1, 1)).scores(history([[3]]))
