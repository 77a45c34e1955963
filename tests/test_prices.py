"""Elasticities are those that made the log, and are nothing where prices do nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from simulators.fitted import FittedSimulator
from simulators.habits import Habits
from simulators.offers import read_offers
from simulators.prices import Elasticity, fit_elasticity, held_out_slope, price_cells, said
from simulators.visits import Lines

ITEMS, WEEKS, USERS = 60, 40, 400


def shop(shelf=0.0, discount=0.0, *, seed=0, own=0.0, discounts=True):
    """Receipts whose purchases answer to prices; `own`: a household pays less for what it wants."""
    rng = np.random.default_rng(seed)
    fame = rng.normal(-3.0, 0.7, ITEMS)
    step = np.where(rng.random((ITEMS, WEEKS)) < 0.3, 0.2, 0.0)  # log shelf price over usual
    left = np.where(rng.random((ITEMS, WEEKS)) < 0.3, np.log(0.7), 0.0)
    lines = []
    for week in range(WEEKS):
        theta = fame + shelf * step[:, week] + discount * left[:, week]
        wish = rng.normal(0, 0.5, (USERS, ITEMS)) if own else np.zeros((USERS, ITEMS))
        user, item = np.nonzero(rng.random((USERS, ITEMS)) < np.exp(theta + wish))
        price = np.exp(step[item, week] + left[item, week] - own * wish[user, item]) * (1 + item)
        lines.append(pd.DataFrame({
            "user": user, "visit": user + USERS * week, "time": 20_000.5 + 7 * week,
            "item": item, "value": price, "price": price,
            "discount": 1 - np.exp(left[item, week]) if discounts else np.nan,
        }))  # fmt: skip
    table = pd.concat(lines).sort_values(["user", "time", "item"])
    return Lines(*(table[name].to_numpy() for name in Lines.__dataclass_fields__))


@pytest.mark.parametrize(("shelf", "discount"), [(-0.6, -1.5), (0.0, 0.0), (-2.0, -0.5)])
def test_the_elasticities_that_made_a_log_are_found(shelf, discount):
    found = fit_elasticity(shop(shelf, discount))
    assert abs(found.shelf - shelf) < 3.5 * found.shelf_error
    assert abs(found.discount - discount) < 3.5 * found.discount_error
    assert 0.01 < found.shelf_error < 0.2
    assert 0.01 < found.discount_error < 0.15


def test_the_interval_covers_as_often_as_it_says():
    off = []
    for seed in range(40):
        found = fit_elasticity(shop(-0.5, -1.0, seed=seed))
        off.append((found.discount + 1.0) / found.discount_error)
    assert 0.85 <= np.mean(np.abs(off) < 1.96) <= 1.0
    assert abs(np.mean(off)) < 0.55  # 3.5 standard errors of the mean of 40


def test_what_a_household_pays_for_its_own_wishes_is_not_an_effect_of_prices():
    found = fit_elasticity(shop(own=0.3))
    assert abs(found.shelf) < 3.5 * found.shelf_error


def test_without_discounts_the_price_paid_speaks_for_both():
    found = fit_elasticity(shop(-1.0, -1.0, discounts=False))
    assert found.shelf == found.discount
    assert abs(found.shelf + 1.0) < 3.5 * found.shelf_error


def test_prices_that_never_change_or_are_not_logged_tell_nothing():
    lines = shop()
    assert fit_elasticity(replace(lines, price=np.full(len(lines), np.nan))) is None
    still = replace(lines, price=1.0 + lines.item, discount=np.zeros(len(lines)))
    assert fit_elasticity(still) is None
    assert "too few or too constant" in said(None)


def test_no_lines_tell_nothing():
    lines = shop()
    none = Lines(*(column[:0] for column in vars(lines).values()))
    assert fit_elasticity(none) is None


def test_a_household_drawn_twice_counts_twice():
    lines = shop()
    times = np.ones(USERS)
    times[3] = 2.0
    once, twice = price_cells(lines), price_cells(lines, times)
    assert twice.sold.sum() > once.sold.sum()
    times[3] = 0.0
    without = price_cells(lines, times)
    assert without.sold.sum() < once.sold.sum()


def test_prices_come_from_the_other_half():
    lines = shop()
    half = pd.util.hash_array(lines.user) % 2
    dear = replace(lines, price=np.where(half == 0, 3.0 * lines.price, lines.price))
    before, after = price_cells(lines), price_cells(dear)
    told = after.price[:, 0] - before.price[:, 0]
    other = before.stratum // 10_000 % 2 == 1  # cells of half 1 know what half 0 paid
    np.testing.assert_allclose(told[other], np.log(3.0))
    np.testing.assert_allclose(told[~other], 0.0, atol=1e-12)


def test_the_slope_held_out_is_one_where_nothing_changed_and_none_where_prices_do_nothing():
    found = Elasticity(-0.6, 0.1, -1.5, 0.1, 1000)
    same, nothing = (held_out_slope(found, shop(*x, seed=2)) for x in ((-0.6, -1.5), (0.0, 0.0)))
    assert same.low < 1.0 < same.high
    assert nothing.low < 0.0 < nothing.high
    assert held_out_slope(found, Lines(*(c[:0] for c in vars(shop()).values()))) is None


def test_words_tell_how_much_more_is_sold():
    text = said(Elasticity(-1.0, 0.1, -2.0, 0.1, 1234))
    assert "sells 1.11 times (1.09 to 1.13)" in text  # 0.9 ** -1
    assert "1.56 times (1.50 to 1.63) at a discount of 20 %" in text  # 0.8 ** -2


def offered(shelf, fitted, tmp_path, text, **assumed):
    (tmp_path / "offers.csv").write_text(text)
    habits = replace(fitted.habits, elasticity=Elasticity(-0.5, 0.1, -2.0, 0.1, 1000))
    parts = shelf, fitted.preference, habits, fitted.users
    return FittedSimulator(*parts, offers=tmp_path / "offers.csv", **assumed)


def test_an_offer_is_bought_more_often_and_paid_less_for(shelf, fitted, tmp_path):
    from fitted_users import at

    item = int(shelf.popularity.argmax())
    usual = float(shelf.price[item])
    text = f"item,discount\n{shelf.ids[item]},0.5\n"
    sim = offered(shelf, fitted, tmp_path, text)
    rows = torch.arange(len(fitted.users))
    before, after = (s.relevance(s.start(rows, at(rows))) for s in (fitted, sim))
    more = after.logit() - before.logit()
    torch.testing.assert_close(more[:, item], torch.full((len(rows),), 2 * np.log(2.0)).float())
    others = torch.arange(len(shelf)) != item
    torch.testing.assert_close(after[:, others], before[:, others])
    assert float(sim.catalog.price[item]) == pytest.approx(0.5 * usual)
    slate = torch.full((len(rows), 1), item)
    answers = []
    for s in (fitted, sim):
        draws = at(rows)
        answers.append(s.respond(s.start(rows, draws), slate, draws)[0])
    bought = [a.chosen["buy"][:, 0] for a in answers]
    assert bought[1].sum() > bought[0].sum()
    assert (bought[1] | ~bought[0]).all()  # the same draws: nobody buys less
    np.testing.assert_allclose(answers[1].value[:, 0][bought[1]], 0.5 * usual, rtol=1e-5)


def test_a_price_is_held_against_the_usual_one(shelf, fitted, tmp_path):
    usual = float(shelf.price[4])
    text = f"item,price,discount\n{shelf.ids[4]},{2 * usual},\n{shelf.ids[5]},,0.25\n"
    sim = offered(shelf, fitted, tmp_path, text)
    assert float(sim.offered[4]) == pytest.approx(-0.5 * np.log(2.0), rel=1e-4)
    assert float(sim.offered[5]) == pytest.approx(-2.0 * np.log(0.75), rel=1e-4)
    assert float(sim.catalog.price[4]) == pytest.approx(2 * usual)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("item,price\nnothing,1\n", "1 of 1 items are not in the catalogue"),
        ("item,cost\n1,1\n", "expected the columns item, and price.*got item, cost"),
        ("thing,price\n1,1\n", "expected the columns item.*got thing, price"),
        ("item;price\n1;1\n", "separator must be a comma"),
        ("", "cannot be read: No columns.*give a CSV"),
        ("item,price\n", "has no lines"),
        ("item,discount\n{0},1.5\n", r"line 2: discount must be a share from 0 to 0.95, got '1.5'"),
        ("item,discount\n{0},20%\n", "discount must be a share from 0 to 0.95, got '20%'"),
        ("item,price\n{0},1\n{1},-2\n", "line 3: price must be a number above 0"),
        ('item,price\n{0},"3,50"\n', r"a number above 0 \(3.50\).*got '3,50'"),
        ("item,price\n{0},1\n{0},2\n", "stands there twice"),
    ],
)
def test_offers_that_cannot_be_read_are_refused(shelf, tmp_path, text, words):
    file = tmp_path / "offers.csv"
    file.write_text(text.format(*shelf.ids))
    with pytest.raises(ValueError, match=words):
        read_offers(file, shelf)


def test_offers_need_a_file_and_a_log_with_prices(shelf, fitted, tmp_path):
    with pytest.raises(ValueError, match=r"offers must be a CSV file.*there is no such file"):
        read_offers(tmp_path / "none.csv", shelf)
    silent = replace(fitted.habits, elasticity=None)
    with pytest.raises(ValueError, match="does not tell how purchases answer to prices"):
        FittedSimulator(
            shelf, fitted.preference, silent, fitted.users, offers=tmp_path / "none.csv"
        )


def test_elasticities_survive_being_stored(fitted):
    habits = replace(fitted.habits, elasticity=Elasticity(-0.5, 0.1, -2.0, 0.1, 1000))
    assert Habits.of(habits.plain()).elasticity == habits.elasticity
