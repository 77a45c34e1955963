"""Users fitted to impressions answer as the log's do: rates, order, minutes, leaving."""

from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from feeds import ITEMS, catalog_of, clicks_of, feed

from encoders.state import EMPTY
from envs.rewards import Weighted
from simulators.base import SimSpec
from simulators.draws import Draws
from simulators.exposed import ExposureSimulator, visitors
from simulators.exposure_calibration import activity, calibration, clustered_error
from simulators.exposure_features import lift
from simulators.impressions import impressions_from_logs
from simulators.testing import check_simulator

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared/data/kuairand_pure_sample"


@pytest.fixture(scope="module")
def logs():
    return feed()


@pytest.fixture(scope="module")
def halves(logs):
    return logs.split_users(0.5, 0)


@pytest.fixture(scope="module")
def catalog(logs):
    return catalog_of(logs)


@pytest.fixture(scope="module")
def sim(halves, catalog):
    return ExposureSimulator.fit(SimSpec(halves[0], catalog))


def play(sim, count, slate, steps=1, seed=0, stay=True):
    """Responses to slates (K,) of one item each or drawn (None), of `count` users."""
    users = torch.arange(count) % len(sim.users)
    episode, root = torch.arange(count), Draws.root(seed)
    state = sim.start(users, root.at(users, episode, torch.zeros_like(users)))
    generator, found = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        shown = slate
        if slate is None:
            shown = torch.randint(ITEMS, (count, 1), generator=generator)
        response, state = sim.respond(state, shown, root.at(users, episode, users * 0 + step))
        found.append((state, response))
    return found


def rates(response):
    return {name: float(chosen.float().mean()) for name, chosen in response.chosen.items()}


def test_what_is_known_before_a_cut_does_not_depend_on_what_comes_after(halves, catalog):
    mine, moment = halves[0], pd.Timestamp(catalog.as_of, unit="D")
    events = mine.events.copy()
    later = (events["time"] >= moment).to_numpy()
    events.loc[later, "item"] = events.loc[later, "item"].to_numpy()[::-1]
    one = ExposureSimulator.fit(SimSpec(mine, catalog), epochs=1)
    other = ExposureSimulator.fit(SimSpec(replace(mine, events=events), catalog), epochs=1)
    assert torch.equal(one.items, other.items)
    assert torch.equal(one.users.profile, other.users.profile)


def test_the_simulator_keeps_the_contract(sim):
    assert check_simulator(sim) == []


def test_behaviours_are_those_of_the_log_the_most_frequent_first(sim):
    assert sim.behaviours == ("click", "like", "hate")


def test_every_behaviour_is_as_frequent_as_in_the_log(sim, halves, catalog):
    read = impressions_from_logs(
        halves[0].before(pd.Timestamp(catalog.as_of, unit="D")), catalog.ids
    )
    first = read.nth == 0
    logged = dict(zip(read.behaviours, read.answers[first].mean(axis=0), strict=True))
    ((_, response),) = play(sim, 20_000, None)
    for name, rate in rates(response).items():
        error = (logged[name] / 20_000 + logged[name] / first.sum()) ** 0.5
        assert abs(rate - logged[name]) < 4 * error, name


def test_likes_follow_clicks_and_hate_does_not(sim):
    ((_, response),) = play(sim, 40_000, None)
    click, like, hate = (response.chosen[b] for b in ("click", "like", "hate"))
    assert float(like[click].float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(like[~click].float().mean()) < 0.005
    assert float(hate[click].float().mean()) == pytest.approx(0.01, abs=0.005)
    assert float(hate[~click].float().mean()) == pytest.approx(0.01, abs=0.005)


def test_keen_users_and_the_better_category_click_more_as_they_do_in_truth(sim, logs):
    keen = logs.users.set_index("user")["keen"].reindex(sim.users.ids).to_numpy()
    state = sim.start(torch.arange(len(sim.users)), Draws.root(0).at(
        torch.arange(len(sim.users)), torch.zeros(len(sim.users)).long(),
        torch.zeros(len(sim.users)).long()))  # fmt: skip
    found = sim.relevance(state).numpy()  # (U, N)
    truth = clicks_of(keen[:, None], np.arange(ITEMS)[None] % 4, 0)
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.9
    assert np.abs(found - truth).mean() < 0.08
    assert abs(found.mean() - truth.mean()) < 0.03


def test_users_never_seen_are_served_by_what_is_known_of_them(sim, halves, catalog, logs):
    others = visitors(sim, halves[1], since=catalog.as_of)
    assert not set(others.ids) & set(sim.users.ids)
    assert (others.start >= catalog.as_of).all()
    theirs = ExposureSimulator(catalog, sim.encoding, sim.funnel, sim.items, others, sim.reading)
    keen = logs.users.set_index("user")["keen"].reindex(others.ids).to_numpy()
    users = torch.arange(len(others))
    state = theirs.start(users, Draws.root(0).at(users, users, users))
    found = theirs.relevance(state).mean(dim=1).numpy()
    assert np.corrcoef(found, keen)[0, 1] > 0.8


def test_a_miss_makes_leave_sooner_as_in_the_log(sim):
    ((_, response),) = play(sim, 20_000, None)
    clicked = response.chosen["click"].any(dim=1)
    assert float(response.left[clicked].float().mean()) == pytest.approx(0.1, abs=0.03)
    assert float(response.left[~clicked].float().mean()) == pytest.approx(0.5, abs=0.05)


def test_minutes_are_distributed_as_in_the_log_and_nought_without_an_answer(sim):
    ((_, response),) = play(sim, 20_000, None)
    clicked = response.chosen["click"]
    minutes = response.value[clicked]
    any_answer = torch.stack(list(response.chosen.values())).any(dim=0)
    assert (response.value[~any_answer] == 0).all()
    assert float(minutes.mean()) == pytest.approx(np.exp(0.125), rel=0.06)
    spread = np.log(np.quantile(minutes.numpy(), [0.1, 0.5, 0.9]))
    assert np.allclose(spread, [-0.641, 0.0, 0.641], atol=0.08)


def test_a_slate_is_left_as_often_as_its_items_one_by_one(sim):
    users = torch.arange(4000) % len(sim.users)
    at = Draws.root(3).at(users, torch.arange(4000), users * 0)
    state = sim.start(users, at)
    slate = torch.arange(5).expand(4000, -1)
    response, after = sim.respond(state, slate, at)
    clicked = response.chosen["click"].float()  # (B, K)
    stay = torch.where(clicked > 0, 0.9, 0.5).prod(dim=1)
    assert float(response.left.float().mean()) == pytest.approx(float((1 - stay).mean()), abs=0.05)
    assert (after["shown"] == 5).all()
    assert torch.equal(after["clicks"], clicked.sum(dim=1))
    assert torch.equal(after["seen"].sum(dim=1), after["shown"])


def test_what_a_session_remembers_is_counted_by_hand(sim):
    users = torch.arange(300) % len(sim.users)
    episode, root = torch.arange(300), Draws.root(4)
    state = sim.start(users, root.at(users, episode, torch.zeros_like(users)))
    category = sim.catalog.category
    seen = torch.zeros(300, int(category.max()) + 1)
    liked, streak = torch.zeros_like(seen), torch.zeros(300)
    generator = torch.Generator().manual_seed(4)
    for step in range(3):
        slate = torch.rand(300, ITEMS, generator=generator).argsort(dim=1)[:, :3]
        slate[::2, step % 3] = EMPTY
        at = root.at(users, episode, torch.full_like(users, step))
        response, state = sim.respond(state, slate, at)
        clicked = response.chosen["click"]
        for row in range(300):
            for item, yes in zip(slate[row].tolist(), clicked[row].tolist(), strict=True):
                if item != EMPTY:
                    seen[row, category[item]] += 1
                    liked[row, category[item]] += yes
                    streak[row] = 0 if yes else streak[row] + 1
        assert torch.equal(state["seen"], seen)
        assert torch.equal(state["liked"], liked)
        assert torch.equal(state["streak"], streak)
        assert torch.equal(state["clicks"], liked.sum(dim=1))


def test_the_hour_of_a_session_counts(sim):
    users = torch.arange(20)
    at = Draws.root(0).at(users, users, torch.zeros_like(users))
    morning, night = (replace(sim.users, start=sim.users.start.floor() + h / 24) for h in (9, 21))
    told = []
    for table in (morning, night):
        other = copy(sim)
        other.users = table
        told.append(other.relevance(other.start(users, at)))
    assert not torch.allclose(told[0], told[1], atol=1e-4)


def test_nothing_shown_is_no_answer_and_no_reason_to_leave(sim):
    ((state, response),) = play(sim, 50, torch.full((50, 3), EMPTY))
    assert not response.left.any()
    assert not any(chosen.any() for chosen in response.chosen.values())
    assert (state["shown"] == 0).all()
    assert (state["last"] == 0).all()


def test_a_marker_keeps_its_user_slot_and_behaviour(sim):
    """Certain answers of one behaviour, item and user appear there and nowhere else."""
    funnel = sim.funnel
    later = torch.zeros_like(funnel.later)
    later[:, -1] = -100.0  # no later behaviour ever
    items = {name: value.clone() for name, value in sim.of_items.items()}
    items["first"] = torch.zeros_like(items["first"])
    items["first"][:, 0] = -100.0
    items["first"][7, 0] = 100.0  # item 7 is always clicked
    items["later"] = torch.zeros_like(items["later"])
    items["later"][3, 1] = 300.0  # item 3 always gets the third behaviour
    marked = ExposureSimulator(
        sim.catalog, sim.encoding, replace(funnel, later=later), sim.items, sim.users, sim.reading
    )
    marked.of_items = items
    slate = torch.tensor([[7, 1, 2], [0, 3, 7], [1, 2, 4]])
    ((_, response),) = play(marked, 3, slate)
    stacked = torch.stack([response.chosen[b] for b in marked.behaviours], dim=2)  # (B, K, F)
    expected = torch.zeros(3, 3, 3, dtype=torch.bool)
    expected[0, 0, 0] = expected[1, 2, 0] = expected[1, 1, 2] = True
    assert torch.equal(stacked, expected)


def test_probabilities_are_made_once(sim):
    """A sigmoid of a sigmoid would lift every rate to a half or more (KuaiSim)."""
    impossible = replace(sim.funnel, bias=torch.tensor(-100.0))
    never = ExposureSimulator(
        sim.catalog, sim.encoding, impossible, sim.items, sim.users, sim.reading
    )
    ((_, response),) = play(never, 1000, None)
    assert rates(response)["click"] < 0.001
    assert rates(response)["hate"] == pytest.approx(0.01, abs=0.02)


def test_chances_sum_all_chains(sim):
    """The chance of a later behaviour is the mean over draws of those before it."""
    generator = torch.Generator().manual_seed(0)
    first, rest = torch.tensor([0.3]), torch.tensor([[-1.0, -2.0]])
    chance = sim.funnel.chances(first, rest)[0]
    answers = torch.zeros(200_000, 3)
    for k in range(3):
        wide = rest.expand(200_000, -1)
        logit = sim.funnel.given(wide, answers, k) if k else first.expand(200_000)
        answers[:, k] = (torch.rand(200_000, generator=generator) < logit.sigmoid()).float()
    assert torch.allclose(answers.mean(dim=0), chance, atol=0.006)


def test_lower_slots_are_clicked_less_where_slots_are_logged():
    logs = feed(seed=2, slots=4)
    sim = ExposureSimulator.fit(SimSpec(logs, catalog_of(logs)), epochs=2)
    assert sim.encoding.positions
    assert check_simulator(sim) == []
    slate = torch.tensor([4, 8, 12, 16]).expand(20_000, -1)  # four items alike
    users = torch.arange(20_000) % len(sim.users)
    at = Draws.root(0).at(users, torch.arange(20_000), users * 0)
    response, _ = sim.respond(sim.start(users, at), slate, at)
    by_slot = response.chosen["click"].float().mean(dim=0)
    keen = logs.users.set_index("user")["keen"].reindex(sim.users.ids).to_numpy()
    truth = [clicks_of(keen, 0, slot).mean() for slot in range(4)]
    assert (by_slot.diff() < 0).all()
    assert np.allclose(by_slot.numpy(), truth, atol=0.06)


def test_without_slots_in_the_log_the_order_of_a_slate_changes_nothing(sim):
    users = torch.arange(200) % len(sim.users)
    at = Draws.root(0).at(users, users, users * 0)
    state, slate = sim.start(users, at), torch.arange(6).expand(200, -1)
    one, _ = sim.respond(state, slate, at)
    other, _ = sim.respond(state, slate.flip(1), at)
    for name in sim.behaviours:
        assert torch.equal(one.chosen[name], other.chosen[name].flip(1))


def test_rewards_of_behaviours_and_of_minutes_are_paid(sim):
    ((_, response),) = play(sim, 500, None)
    reward = Weighted({"click": 0.5, "hate": -1.0})(response)
    assert torch.equal(
        reward, 0.5 * response.chosen["click"].float() - response.chosen["hate"].float()
    )


def test_calibration_is_right_for_a_right_model_and_wrong_for_a_shifted_one(sim, halves):
    good = calibration(sim, halves[1])
    click = good["behaviours"]["click"]
    assert click["ece"] < 0.04
    assert click["log_loss"] < click["log_loss_constant"] - 0.02
    assert abs(click["predicted"] - click["rate"]) < 4 * click["error"]
    assert sum(d["rows"] for d in click["deciles"]) == good["impressions"]
    assert good["behaviours"]["value"]["predicted"] == pytest.approx(
        good["behaviours"]["value"]["mean"], rel=0.1
    )
    shifted = replace(sim.funnel, bias=sim.funnel.bias + 1.0)
    bad = ExposureSimulator(sim.catalog, sim.encoding, shifted, sim.items, sim.users, sim.reading)
    worse = calibration(bad, halves[1])["behaviours"]["click"]
    assert worse["ece"] > 0.12
    assert worse["worst_decile"] > 0.15


def test_calibration_refuses_a_log_that_ends_before_the_cut(sim, halves, catalog):
    with pytest.raises(ValueError, match="0 impressions of the catalogue on or after"):
        calibration(sim, halves[1].before(pd.Timestamp(catalog.as_of, unit="D")))


def test_deciles_of_activity_hold_as_many_users_and_rise():
    known = np.repeat(np.arange(100), np.arange(100))
    user = np.repeat(np.arange(100), 2)
    decile = activity(user, known, np.random.default_rng(0))
    assert np.bincount(decile).tolist() == [20] * 10
    assert (np.diff(decile) >= 0).all()


def test_the_error_of_a_rate_knows_that_answers_of_a_user_go_together():
    y, user = np.repeat([1.0, 0.0], 50), np.repeat(np.arange(10), 10)
    assert clustered_error(y, np.arange(100)) == pytest.approx(0.05)
    assert clustered_error(y, user) == pytest.approx(0.05 * 10**0.5)


def test_a_lift_is_nought_without_impressions_and_grows_with_answers():
    rate = np.array([0.2])
    lifts = lift(np.array([[0.0], [1.0], [50.0]]), np.array([0.0, 1.0, 100.0]), rate)[:, 0]
    assert lifts[0] == pytest.approx(0.0, abs=1e-6)
    assert 0 < lifts[1] < lifts[2] < np.log(0.5 / 0.5) - np.log(0.2 / 0.8)


def test_a_saved_simulator_answers_the_same(sim, catalog, tmp_path):
    sim.save(tmp_path / "users.pt")
    again = ExposureSimulator.load(tmp_path / "users.pt", catalog)
    ((_, one),) = play(sim, 300, None)
    ((_, other),) = play(again, 300, None)
    assert torch.equal(one.value, other.value)
    assert again.behaviours == sim.behaviours
    with pytest.raises(ValueError, match="fitted on another catalogue"):
        ExposureSimulator.load(tmp_path / "users.pt", replace(catalog, vectors=catalog.vectors + 1))


def test_another_sample_of_users_is_another_fit_and_a_fit_is_found_again(halves, catalog):
    spec = SimSpec(halves[0], catalog, seed=5)
    one, same = (ExposureSimulator.fit(spec, epochs=1) for _ in range(2))
    drawn = ExposureSimulator.fit(replace(spec, bootstrap=True), epochs=1)
    assert torch.equal(one.funnel.cross, same.funnel.cross)
    assert not torch.equal(one.funnel.cross, drawn.funnel.cross)
    assert abs(float(one.encoding.rate[0] - drawn.encoding.rate[0])) < 0.05


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/kuairand_pure_sample is not there")
def test_held_out_users_of_the_sample_click_as_often_as_promised():
    from sources.kuairand import load

    logs = load(REAL)
    logs = logs.only_users(logs.users["user"].iloc[::6])
    catalog = catalog_of(logs, logs.before(logs.cut(0.7)).top_items(1000))
    mine, others = logs.split_users(0.5, 0)
    sim = ExposureSimulator.fit(SimSpec(mine, catalog), behaviours=("click", "long_view"), epochs=2)
    found = calibration(sim, others)["behaviours"]
    for name in ("click", "long_view"):
        assert abs(found[name]["predicted"] / found[name]["rate"] - 1) < 0.1
        assert found[name]["log_loss"] < found[name]["log_loss_constant"]
