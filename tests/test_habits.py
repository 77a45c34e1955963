"""Stop hazards and satiation are found again in trips made with known ones."""

import numpy as np
import pytest
import torch

from encoders.state import EMPTY, PAST
from simulators.habits import NTH, Habits, fit_habits, fit_satiation, fit_stop
from simulators.preference import ItemFacts, Preference
from simulators.trips import Trips

ITEMS = 20
CATEGORY = torch.arange(ITEMS) % 4
RATE = 0.1  # of every item on every trip


def sizes(hazard: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Purchases of trips (n,) that end after each with probability `hazard` (n,)."""
    return rng.geometric(hazard)


def made_of(baskets: list[np.ndarray]) -> Trips:
    """Trips of newcomers with these baskets."""
    n = len(baskets)
    return Trips(
        user=np.arange(n),
        time=np.full(n, 20_000.0),
        past=np.full((n, PAST), EMPTY, np.int32),
        count=np.zeros((n, PAST), np.float32),
        age=np.zeros((n, PAST), np.float32),
        profile=np.zeros((n, 4), np.float32),
        gap=np.full(n, np.nan, np.float32),
        pointer=np.cumsum([0, *map(len, baskets)]),
        bought=np.concatenate(baskets).astype(np.int32),
    )


def flat() -> Preference:
    """Every item is bought with RATE by everybody: an unfitted model is its item rates."""
    logit = float(np.log(RATE / (1 - RATE)))
    facts = ItemFacts(
        log_rate=torch.full((ITEMS,), logit),
        gap=torch.zeros(ITEMS),
        groups=CATEGORY[:, None],
        source=torch.zeros(ITEMS, 1),
        target=torch.zeros(ITEMS, 1),
        trend=torch.zeros(1, ITEMS),
        span=torch.zeros(2, dtype=torch.float64),
    )
    return Preference(facts, 4, 8)


def test_a_geometric_hazard_is_found_whatever_the_number_of_purchases():
    size = sizes(np.full(20_000, 0.3), np.random.default_rng(0))
    stop, slope = fit_stop(size, np.zeros(20_000), np.ones(20_000))
    assert stop.shape == (NTH,)
    assert stop[:5].sigmoid().tolist() == pytest.approx([0.3] * 5, abs=0.02)
    assert abs(slope) < 1e-3


def test_a_slope_over_the_households_basket_size_is_found():
    rng = np.random.default_rng(1)
    log_size = rng.normal(0.5, 0.7, 20_000)
    hazard = 1 / (1 + np.exp(-(0.4 - 1.2 * log_size)))
    stop, slope = fit_stop(sizes(hazard, rng), log_size, np.ones(20_000))
    assert slope == pytest.approx(-1.2, abs=0.06)
    assert float(stop[0]) == pytest.approx(0.4, abs=0.06)


def test_a_hazard_that_changes_with_the_purchases_is_found_by_hand():
    size = np.array([1] * 20 + [2] * 60 + [3] * 20)
    stop, _ = fit_stop(size, np.zeros(100), np.ones(100))
    assert stop[:2].sigmoid().tolist() == pytest.approx([0.2, 0.75], abs=0.01)
    assert stop.isfinite().all()  # also where no trip came so far


def test_trips_without_purchases_or_weight_say_nothing_of_stopping():
    size, weight = np.array([1, 2, 0, 7]), np.array([3.0, 1.0, 5.0, 0.0])
    stop, _ = fit_stop(size, np.zeros(4), weight)
    assert float(stop[0].sigmoid()) == pytest.approx(0.75, abs=0.01)


def test_weights_are_how_often_a_trip_counts():
    size, weight = np.array([1, 2, 3, 5]), np.array([2.0, 1.0, 3.0, 1.0])
    log_size = np.array([0.1, -0.4, 0.9, 0.3])
    repeated = [np.repeat(x, weight.astype(int)) for x in (size, log_size)]
    one, slope = fit_stop(size, log_size, weight)
    other, same = fit_stop(*repeated, np.ones(7))
    torch.testing.assert_close(one, other, atol=1e-2, rtol=1e-2)  # as far as it converges
    assert slope == pytest.approx(same, abs=1e-3)


def test_stop_hazard_is_that_of_the_nth_purchase_and_the_last_level_goes_on():
    habits = Habits(torch.arange(NTH) * 0.1, -0.5, 0.0)
    hazard = habits.stop_hazard(torch.tensor([1, 3, NTH, 40]), torch.tensor([0.0, 2.0, 0.0, 0.0]))
    expected = torch.tensor([0.0, 0.2 - 1.0, 0.1 * (NTH - 1), 0.1 * (NTH - 1)]).sigmoid()
    torch.testing.assert_close(hazard, expected)


def baskets(kind: str, rng: np.random.Generator) -> list[np.ndarray]:
    """2,000 trips of three items: all of one category, all of different ones, or any."""
    found = []
    for _ in range(2_000):
        if kind == "together":
            items = rng.choice(5, 3, replace=False) * 4 + rng.integers(4)
        elif kind == "apart":
            items = rng.integers(5, size=3) * 4 + rng.choice(4, 3, replace=False)
        else:
            items = rng.choice(ITEMS, 3, replace=False)
        found.append(np.sort(items))
    return found


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("together", -3, -0.5), ("apart", 0.5, 9), ("any", -0.1, 0.1)]
)
def test_what_is_bought_together_invites_and_what_is_bought_apart_satiates(kind, low, high):
    trips = made_of(baskets(kind, np.random.default_rng(2)))
    assert low < fit_satiation(flat(), trips, CATEGORY) < high


def test_without_categories_nothing_satiates():
    trips = made_of(baskets("together", np.random.default_rng(2)))
    nothing = torch.zeros(ITEMS, dtype=torch.int64)
    assert fit_satiation(flat(), trips, nothing) == 0.0


def test_habits_are_the_same_for_a_seed_and_leave_out_trips_without_weight():
    rng = np.random.default_rng(3)
    trips = made_of([*baskets("together", rng), *baskets("apart", rng)])
    first = np.repeat([1.0, 0.0], 2_000)
    one, again = (fit_habits(flat(), trips, first, CATEGORY, seed=5) for _ in range(2))
    assert torch.equal(one.stop, again.stop)
    assert one.satiation == again.satiation < -0.5
    assert fit_habits(flat(), trips, 1 - first, CATEGORY, seed=5).satiation > 0.5


def test_big_baskets_alone_are_no_invitation():
    trips = made_of(baskets("any", np.random.default_rng(4)))
    bigger = flat()
    bigger.log_rate -= 1.0  # trips hold more of everything than the model expects
    one, other = (fit_satiation(m, trips, CATEGORY) for m in (flat(), bigger))
    assert one == pytest.approx(other, abs=1e-3)
