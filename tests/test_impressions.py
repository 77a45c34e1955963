"""Impressions are read with their answers and sessions; what cannot be fitted is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from feeds import ITEMS, catalog_of, feed
from hydra.utils import instantiate
from omegaconf import OmegaConf

from encoders.state import EMPTY
from simulators.base import SimSpec
from simulators.draws import Draws
from simulators.exposed import ExposureSimulator, visitors
from simulators.impressions import before, impressions_from_logs, user_table
from simulators.testing import check_simulator
from sources.kuairand import ANSWERS
from sources.logs import Logs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def logs():
    return feed()


@pytest.fixture(scope="module")
def catalog(logs):
    return catalog_of(logs)


def test_impressions_hold_their_answers_in_sessions():
    moment = pd.Timestamp("2024-01-01 10:00")
    rows = [
        ("u", 1, moment, "shown", 0.0), ("u", 1, moment + pd.Timedelta(minutes=2), "click", 3.0),
        ("u", 2, moment + pd.Timedelta(minutes=20), "shown", 0.0),
        ("u", 1, moment + pd.Timedelta(hours=2), "shown", 0.0),
        ("v", 1, moment, "shown", 0.0), ("v", 2, moment, "click", 9.0),
    ]  # fmt: skip
    events = pd.DataFrame(rows, columns=["user", "item", "time", "behaviour", "value"])
    read = impressions_from_logs(Logs.create(events, purchases=("click",)), np.array([1, 2]))
    assert read.users[read.user].tolist() == ["u", "u", "u", "v"]
    assert read.item.tolist() == [0, 1, 0, 0]
    assert read.answers[:, 0].tolist() == [True, False, False, False]  # v saw no item 2
    assert read.value.tolist() == [3.0, 0.0, 0.0, 0.0]
    assert read.nth.tolist() == [0, 1, 0, 0]
    assert read.last.tolist() == [False, True, True, True]
    assert read.ended.tolist() == [True, True, False, True]  # the log ends at u's last


def test_events_that_were_not_shown_are_left_out(logs):
    events = logs.events.assign(shown=logs.events["item"] < 20)
    read = impressions_from_logs(replace(logs, events=events), np.arange(ITEMS))
    assert read.item.max() == 19


def test_sums_before_are_those_of_a_loop():
    rng = np.random.default_rng(1)
    group, time = rng.integers(0, 4, 60), rng.integers(0, 9, 60).astype(float)
    what = rng.integers(0, 5, (60, 2)).astype(float)
    at, when = rng.integers(0, 4, 30), rng.integers(-1, 11, 30).astype(float)
    slow = [what[(group == g) & (time < t)].sum(axis=0) for g, t in zip(at, when, strict=True)]
    assert (before(group, time, what, at, when) == np.array(slow)).all()


def test_a_user_begins_with_what_was_clicked_before_and_how_often(logs):
    read = impressions_from_logs(logs, np.arange(ITEMS))
    rows = np.flatnonzero(read.nth == 0)[5:60:7]
    table = user_table(read, rows, np.zeros((len(rows), 1)), ITEMS)
    for place, row in enumerate(rows):
        mine = (read.user == read.user[row]) & (read.time < read.time[row]) & read.answers[:, 0]
        items, counts = np.unique(read.item[mine], return_counts=True)
        past = table.past[place]
        known = past != EMPTY
        assert sorted(past[known].tolist()) == items.tolist()
        often = dict(zip(items.tolist(), counts.tolist(), strict=True))
        assert [often[i] for i in past[known].tolist()] == table.past_count[place][known].tolist()
        ages = table.past_age[place][known]
        assert (ages.diff() >= 0).all()  # the latest first
        if len(ages):
            assert float(ages[0]) == pytest.approx(read.time[row] - read.time[mine].max(), abs=1e-4)


def test_a_log_with_one_answer_only_has_no_later_behaviours(logs, catalog):
    events = logs.events[logs.events["behaviour"].isin(["shown", "click"])]
    sim = ExposureSimulator.fit(SimSpec(replace(logs, events=events), catalog), epochs=1)
    assert sim.behaviours == ("click",)
    assert check_simulator(sim) == []


def test_without_users_items_places_and_values_the_log_alone_is_used(logs):
    events = logs.events.drop(columns="place").assign(value=0.0)
    bare = Logs.create(events, name="bare", purchases=("click",))
    catalog = replace(catalog_of(logs), category=torch.zeros(ITEMS).long(), category_names=[""])
    sim = ExposureSimulator.fit(SimSpec(bare, catalog), epochs=1)
    assert check_simulator(sim) == []
    users = torch.arange(500) % len(sim.users)
    at = Draws.root(0).at(users, torch.arange(500), users * 0)
    response, _ = sim.respond(sim.start(users, at), torch.arange(8).expand(500, -1), at)
    assert (response.value == 0).all()
    assert 0.35 < float(response.chosen["click"].float().mean()) < 0.6


def test_missing_attributes_are_no_attributes(logs, catalog):
    users = logs.users.copy()
    users.loc[::2, "keen"] = np.nan
    users.loc[::3, "sex"] = None
    sim = ExposureSimulator.fit(SimSpec(replace(logs, users=users), catalog), epochs=1)
    assert sim.users.profile.isfinite().all()


def test_users_with_one_session_and_no_past_are_served(logs, catalog):
    read = impressions_from_logs(logs, np.arange(ITEMS))
    once = pd.Series(read.time, index=read.users[read.user]).groupby(level=0).min()
    day = logs.events["time"] - pd.to_timedelta(
        logs.events["user"].map(once - 19_723.0), unit="D"
    ).dt.floor("s")  # everybody comes first on 2024-01-01
    events = logs.events[day < pd.Timestamp("2024-01-01 00:20")]
    sim = ExposureSimulator.fit(
        SimSpec(replace(logs, events=events), replace(catalog, as_of=20_000.0)), epochs=1
    )
    assert check_simulator(sim) == []
    assert (sim.users.past == EMPTY).all()


def only(logs, *behaviours):
    return replace(logs, events=logs.events[logs.events["behaviour"].isin(behaviours)])


def everything_clicked(logs):
    shown = logs.events[logs.events["behaviour"] == "shown"]
    events = pd.concat([shown, shown.assign(behaviour="click")]).sort_values("time")
    return replace(logs, events=events.reset_index(drop=True))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: only(x, "click", "like"), {}, "no event is an impression 'shown', behaviours"),
        (everything_clicked, {}, "with and without it"),
        (lambda x: only(x, "shown"), {}, "an impression alone says nothing of what users like"),
        (lambda x: x, {"behaviours": ("click", "buy")}, r"each once, got \['click', 'buy'\]"),
        (lambda x: x, {"behaviours": ("click", "click")}, "each once"),
        (lambda x: x, {"impression": "view"}, "no event is an impression 'view'"),
        (lambda x: x, {"gap": 0.0}, "gap must be above 0 minutes"),
        (lambda x: x, {"hidden": 0}, "hidden must be at least 1"),
        (lambda x: replace(x, events=x.events[:10]), {}, "are too few to fit users to|no answer"),
    ],
)
def test_what_cannot_be_fitted_is_refused(logs, catalog, change, options, message):
    with pytest.raises(ValueError, match=message):
        ExposureSimulator.fit(SimSpec(change(logs), catalog), **options)


def test_answers_to_other_items_than_those_shown_are_refused(logs, catalog):
    events = logs.events.copy()
    elsewhere = (events["behaviour"] != "shown").to_numpy()
    events.loc[elsewhere, "time"] -= pd.Timedelta(days=300)
    with pytest.raises(ValueError, match="comes within 30 minutes of an impression"):
        ExposureSimulator.fit(SimSpec(replace(logs, events=events), catalog))


def test_too_many_behaviours_are_refused(logs, catalog):
    events = logs.events.copy()
    events["behaviour"] = [f"b{i % 9}" if b != "shown" else b
                           for i, b in enumerate(events["behaviour"])]  # fmt: skip
    with pytest.raises(ValueError, match=r"9 behaviours .* are more than 8"):
        ExposureSimulator.fit(SimSpec(replace(logs, events=events), catalog))


def test_users_of_another_description_and_a_day_without_sessions_are_refused(logs, catalog):
    spec = SimSpec(logs, catalog)
    sim = ExposureSimulator.fit(spec, epochs=1)
    users = replace(sim.users, profile=sim.users.profile[:, 1:])
    with pytest.raises(ValueError, match="users must be 1 or more with profiles of"):
        ExposureSimulator.fit(replace(spec, users=users), epochs=1)
    with pytest.raises(ValueError, match="no session begins on or after"):
        visitors(sim, logs, since=40_000.0)
    with pytest.raises(ValueError, match="need logs and a catalogue"):
        ExposureSimulator.fit(SimSpec(None, None))


def test_the_yaml_makes_this_simulator(logs, catalog):
    env = OmegaConf.load(ROOT / "experiments/conf/env/kuairand.yaml")
    made = instantiate(env.simulator, SimSpec(logs, catalog), epochs=1, _convert_="all")
    assert isinstance(made, ExposureSimulator)
    reward = instantiate(env.session.reward, _convert_="all")
    assert set(reward.weights) <= set(ANSWERS.values())
