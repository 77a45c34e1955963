"""Fidelity figures by hand: what a perfect, a doubled and a blind model are told."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from encoders.items import interactions
from encoders.state import EMPTY, PAST
from simulators.fidelity import calibration, cosine, fidelity, lines, ranking
from simulators.fit import moment
from simulators.trips import Trips, trips_from_logs

CHANCE = torch.arange(1, 11) / 40  # of 10 items, far enough apart to be deciles of their own
VISITS = 400


def world() -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (400, 10) and purchases that are just as many in any 40 trips on end."""
    visit = torch.arange(VISITS)[:, None]
    bought = visit % 40 < (CHANCE * 40).round()  # (n, N)
    return CHANCE + 1e-7 * visit.double(), bought  # no ties: the order of pairs is known


def test_a_perfect_model_is_calibrated_everywhere():
    p, bought = world()
    figures = calibration(p.logit(), bought, CHANCE.log())
    assert figures["observed_over_predicted_deciles"] == pytest.approx([1.0] * 10, rel=2e-3)
    assert figures["observed_over_predicted_top_percent"] == pytest.approx(1.0, rel=2e-3)
    assert figures["calibration_error_over_base_rate"] < 2e-3
    assert figures["items_per_trip"] == pytest.approx(float(CHANCE.sum()))
    assert figures["items_per_trip_predicted"] == pytest.approx(float(CHANCE.sum()), rel=1e-3)
    assert figures["base_rate"] == pytest.approx(float(CHANCE.mean()))
    assert figures["log_loss_reduction"] == pytest.approx(0.0, abs=1e-4)


def test_promising_twice_as_much_halves_observed_over_predicted():
    p, bought = world()
    figures = calibration((2 * p).logit(), bought, CHANCE.log())
    assert figures["observed_over_predicted_deciles"] == pytest.approx([0.5] * 10, rel=2e-3)
    assert figures["calibration_error_over_base_rate"] == pytest.approx(1.0, rel=2e-3)
    assert figures["log_loss_reduction"] < -0.01


def test_errors_that_cancel_in_the_sum_do_not_cancel_in_the_calibration_error():
    p, bought = world()
    figures = calibration(p.mean().expand_as(p).logit(), bought, CHANCE.log())
    assert figures["items_per_trip_predicted"] == pytest.approx(figures["items_per_trip"], rel=1e-3)
    order = p.flip(1)  # the least wanted is promised most
    assert calibration(order.logit(), bought, CHANCE.log())[
        "calibration_error_over_base_rate"
    ] == pytest.approx(float((CHANCE - CHANCE.flip(0)).abs().sum() / CHANCE.sum()), rel=1e-2)


def test_log_loss_by_hand():
    theta = torch.tensor([[0.9, 0.2]]).logit()
    figures = calibration(theta, torch.tensor([[True, False]]), torch.tensor([0.5, 0.5]).log())
    assert figures["log_loss"] == pytest.approx(-(np.log(0.9) + np.log(0.8)) / 2, rel=1e-5)
    assert figures["log_loss_item_rate"] == pytest.approx(np.log(2), rel=1e-5)
    assert figures["calibration_error_over_base_rate"] == pytest.approx(0.1 + 0.2)


def visits(past: list[list[int]], count: list[list[float]]) -> Trips:
    """One trip of each household, with these pasts."""
    n = len(past)
    items, often = np.full((n, PAST), EMPTY, np.int32), np.zeros((n, PAST), np.float32)
    for row, (known, times) in enumerate(zip(past, count, strict=True)):
        items[row, : len(known)], often[row, : len(known)] = known, times
    return Trips(
        user=np.arange(n),
        time=np.zeros(n),
        past=items,
        count=often,
        age=np.zeros((n, PAST), np.float32),
        profile=np.zeros((n, 4), np.float32),
        gap=np.zeros(n, np.float32),
        pointer=np.zeros(n + 1, np.int64),
        bought=np.zeros(0, np.int32),
    )


RATE = torch.linspace(0.5, 0.05, 13).log()  # the first ten of 13 items are the most popular
PASTS = visits([[12], [0, 11], [3], [12]], [[2.0], [1.0, 4.0], [1.0], [1.0]])
COUNTS = csr_matrix(np.eye(13, dtype=np.float32))


def board(*items: int) -> torch.Tensor:
    """What each household bought, one item each, (h, 13)."""
    return torch.nn.functional.one_hot(torch.tensor(items), 13).bool()


def test_hits_of_popularity_and_own_counts_by_hand():
    bought = board(12, 11, 3, 10)
    theta = torch.zeros(4, 13).masked_fill(~bought, -9.0)  # the model knows all
    figures = ranking(theta, bought, PASTS, COUNTS, RATE, seed=0)
    hits = figures["hit10_repeats"]
    assert hits["model"] == 1.0
    assert hits["popularity"] == 0.25  # only 3 is among the first ten
    assert hits["own counts"] == hits["decayed own counts"] == 0.75  # 10 was never bought before
    assert figures["hit10_repeats_households"] == 4


def test_new_items_are_ranked_among_new_items_only():
    bought = board(12, 11, 10, 10)  # the first two repeat: nothing new to find
    figures = ranking(torch.zeros(4, 13) + RATE, bought, PASTS, COUNTS, RATE, seed=0)
    assert figures["hit10_new_households"] == 2
    # 3 is known to the third, so 10 moves up to its tenth place; the fourth knows 12 only
    assert figures["hit10_new"]["popularity"] == 0.5
    assert figures["hit10_new"]["model"] == 0.5


def test_only_the_first_trip_ranks_and_all_later_purchases_count():
    twice = PASTS[np.array([0, 0, 1])]
    bought = board(1, 12, 11)  # household 0 buys 12 on its second trip
    theta = torch.full((3, 13), -5.0)
    theta[0, 12] = theta[2, 11] = 5.0
    theta[1, 12] = theta[0, 1] = -50.0  # its first purchase is not found, the later one is
    figures = ranking(theta, bought, twice, COUNTS, RATE, seed=0)
    assert figures["hit10_repeats_households"] == 2
    assert figures["hit10_repeats"]["model"] == 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_gain_is_positive_for_the_better_and_its_interval_holds_it(sign):
    bought = board(10, 10, 10, 12)
    theta = torch.zeros(4, 13).masked_fill(~bought, -9.0 * sign) + RATE
    gain = ranking(theta, bought, PASTS, COUNTS, RATE, seed=0)["hit10_repeats_gain"]
    assert gain["over"] == "own counts"
    assert gain["value"] == (0.75 if sign > 0 else -0.25)
    assert gain["low"] < gain["value"] < gain["high"]


def test_cosine_by_hand():
    counts = csr_matrix(np.array([[3, 1, 0], [1, 0, 0], [0, 2, 0]], np.float32))
    expected = [[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(cosine(counts), expected, atol=1e-6)


@pytest.fixture(scope="module")
def held_out(shop, shelf):
    past = shop.before(moment(shelf.as_of))
    trips = trips_from_logs(shop, shelf.ids, since=shelf.as_of)
    return trips[np.isin(trips.user, past.events["user"].unique())], interactions(past, shelf.ids)[
        0
    ]


def test_a_model_fitted_to_the_synthetic_shop_passes_its_gate(fitted, held_out):
    trips, counts = held_out
    rate = fitted.preference.log_rate
    figures = fidelity(fitted.preference, trips, counts, rate)
    assert figures["items_per_trip_predicted"] == pytest.approx(figures["items_per_trip"], rel=0.1)
    assert figures["calibration_error_over_base_rate"] < 0.3
    assert all(0.5 < r < 1.5 for r in figures["observed_over_predicted_deciles"][5:])
    assert figures["log_loss_reduction"] > 0.15
    assert figures["hit10_repeats"]["model"] > figures["hit10_repeats"]["popularity"]
    assert (figures["trips"], figures["items"]) == (len(trips), 60)
    assert fidelity(fitted.preference, trips, counts, rate) == figures
    text = "\n".join(lines(figures))
    assert f"held out: {len(trips)} trips" in text
    assert f"{figures['hit10_repeats']['own counts']:.3f}" in text
    assert "hardly better" not in text
    assert "hardly better" in "\n".join(lines(figures | {"log_loss_reduction": -0.1}))


def test_nothing_held_out_or_nothing_bought_is_refused(fitted, held_out):
    trips, counts = held_out
    rate = fitted.preference.log_rate
    with pytest.raises(ValueError, match=r"no trips after the cut.*earlier cut"):
        fidelity(fitted.preference, trips[:0], counts, rate)
    bare = replace(trips, pointer=np.zeros(len(trips) + 1, np.int64), bought=trips.bought[:0])
    with pytest.raises(ValueError, match="bought nothing of the 60 items"):
        fidelity(fitted.preference, bare, counts, rate)
