"""From a log to worlds: no household on both sides, replay after the cut, the same every time."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from synthetic import HashedTexts, load

import simulators.catalog
from encoders.items import interactions
from encoders.state import EMPTY
from experiments.from_logs import first_trips, from_logs, gate_line, remember_gate, summary
from experiments.prepare import JUDGES, prepare
from simulators.base import SimSpec
from simulators.fit import moment
from simulators.fitted import FittedSimulator
from simulators.gate import Check
from simulators.settings import Assumptions
from simulators.trips import Trips, trips_from_logs
from sources.logs import Logs, Roles


def config(data: str = "synthetic.load", **changes: object) -> DictConfig:
    """The e-commerce yaml in small, on the log of tests/synthetic.py."""
    cfg = {
        "env_name": "synthetic",
        "seed": 0,
        "evaluators": 2,
        "progress": False,
        "env": {
            "data": {"_target_": data},
            "catalog": {
                "_target_": "simulators.catalog.catalog_from_logs",
                "size": 60,
                "cut": 0.8,
                "dim": 8,
            },
            "simulator": {
                "_target_": "simulators.fitted.FittedSimulator.fit",
                "window": 120.0,
                "epochs": 1,
                "hidden": 8,
            },
            "session": {"slate_size": 1, "max_steps": 5},
        },
    }
    return OmegaConf.merge(cfg, changes)


@pytest.fixture(scope="module", autouse=True)
def no_bert():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulators.catalog, "TextEncoder", HashedTexts)
        yield


@pytest.fixture(scope="module")
def worlds(no_bert):
    return prepare(config(), "cpu")


def past_of(gap: list[float], user: list[int]) -> Trips:
    n = len(user)
    return Trips(
        user=np.array(user),
        time=np.arange(n, dtype=np.float64),
        past=np.full((n, 2), EMPTY, np.int32),
        count=np.zeros((n, 2), np.float32),
        age=np.zeros((n, 2), np.float32),
        profile=np.zeros((n, 4), np.float32),
        gap=np.array(gap, np.float32),
        pointer=np.zeros(n + 1, np.int64),
        bought=np.zeros(0, np.int32),
    )


def test_first_trips_are_the_first_with_something_before_them():
    trips = past_of([np.nan, 3.0, 4.0, 2.0, 5.0, np.nan], [1, 1, 1, 2, 2, 3])
    assert first_trips(trips).tolist() == [1, 3]  # 3 was never there before: nobody knows it


def test_no_household_trains_and_judges(worlds):
    ours, others = set(worlds.train.users.ids), set(worlds.test[0].users.ids)
    assert len(ours) > 50
    assert len(others) > 50
    assert not ours & others


def test_judges_serve_the_same_households_and_are_different_models(worlds):
    one, other = worlds.test
    for name, value in vars(one.users).items():
        same = getattr(other.users, name)
        assert np.array_equal(value, same) if name == "ids" else torch.equal(value, same)
    assert not torch.equal(one.preference.bias, other.preference.bias)
    assert len(set(one.users.ids)) == len(one.users)  # each at its first trip after the cut


def test_judges_are_fitted_to_the_households_nobody_trains_on(worlds, shop):
    users = set(worlds.train.users.ids)
    others = shop.only_users([u for u in shop.users["user"] if u not in users])
    spec = SimSpec(others, worlds.train.catalog, seed=JUDGES, bootstrap=True)
    alone = FittedSimulator.fit(spec, window=120.0, epochs=1, hidden=8)
    assert torch.equal(alone.preference.log_rate, worlds.test[0].preference.log_rate)


def test_judges_start_and_replay_runs_after_the_cut_and_training_before(worlds):
    cut = worlds.train.catalog.as_of
    assert (worlds.train.users.start < cut).all()
    assert all((judge.users.start >= cut).all() for judge in worlds.test)
    assert (worlds.replay.users.start >= cut).all()
    assert not set(worlds.replay.users.ids) & set(worlds.train.users.ids)


def test_replay_is_what_the_log_says_those_households_bought(worlds, shop):
    catalog, replay = worlds.train.catalog, worlds.replay
    assert (replay.bought != EMPTY).any(dim=1).all()
    events = shop.since(moment(catalog.as_of)).events
    day = events["time"].astype("int64") / 86_400e9
    for row in range(0, len(replay.bought), 37):
        user, start = replay.users.ids[row], float(replay.users.start[row])
        then = events[(events["user"] == user) & ((day - start).abs() < 1e-6)]
        bought = replay.bought[row].numpy()
        assert set(catalog.ids[bought[bought != EMPTY]]) == set(then["item"])


def test_interactions_are_counted_before_the_cut(worlds, shop):
    catalog = worlds.train.catalog
    before, _ = interactions(shop.before(moment(catalog.as_of)), catalog.ids)
    assert (worlds.events.counts() != before).nnz == 0
    assert len(worlds.events.user) < len(shop)


def test_the_same_configuration_gives_the_same_bits(worlds):
    again = from_logs(config(), "cpu")
    for one, other in zip([worlds.train, *worlds.test], [again.train, *again.test], strict=True):
        for name, value in one.preference.state_dict().items():
            assert torch.equal(value, other.preference.state_dict()[name]), name
        assert torch.equal(one.users.past, other.users.past)
    assert torch.equal(worlds.replay.bought, again.replay.bought)
    assert again.fidelity == worlds.fidelity


def test_the_training_seed_changes_whom_one_trains_on_but_not_who_judges(worlds):
    other = from_logs(config(seed=1, evaluators=1), "cpu")
    assert not torch.equal(other.train.preference.bias, worlds.train.preference.bias)
    assert torch.equal(other.test[0].preference.bias, worlds.test[0].preference.bias)
    assert set(other.train.users.ids) == set(worlds.train.users.ids)


def test_figures_are_of_households_known_before_the_cut(worlds, shop):
    catalog = worlds.train.catalog
    trips = trips_from_logs(shop, catalog.ids, since=catalog.as_of)
    known = shop.before(moment(catalog.as_of)).events["user"].unique()
    assert worlds.fidelity["trips"] == np.isin(trips.user, known).sum()
    assert set(worlds.seconds) == {"read", "encode", "fit"}


def one_of_a_kind() -> Logs:
    """The synthetic log with one household of a region of its own and no other attribute."""
    logs = load()
    region = np.where(logs.users["user"] == 0, "far", "near")
    users = logs.users[["user"]].assign(region=region)
    roles = Roles(("name",), ("kind", "brand"), user_category=("region",))
    return Logs.create(logs.events, logs.items, users, roles=roles, name="regions")


def test_profiles_match_though_a_level_is_of_one_half_and_replayed_trips_have_purchases():
    cfg = config("test_from_logs.one_of_a_kind", evaluators=1, env={"catalog": {"size": 20}})
    worlds = from_logs(cfg, "cpu")
    assert worlds.train.users.profile.shape[1] == worlds.test[0].users.profile.shape[1]
    assert worlds.replay.users.profile.shape[1] == worlds.train.users.profile.shape[1]
    assert (worlds.replay.bought != EMPTY).any(dim=1).all()  # 20 of 60 items: many bought none


def nobody_returns() -> Logs:
    """The synthetic log, of which nobody is seen on both sides of the cut."""
    logs = load()
    cut = logs.cut(0.8)
    events, early = logs.events, logs.events["user"] < 100
    before = events[early & (events["time"] < cut - pd.Timedelta(days=10))]
    after = events[~early & (events["time"] >= cut)].drop_duplicates("user", keep="last")
    events = pd.concat([before, after])
    return Logs.create(events, logs.items, logs.users, roles=logs.roles, name="strangers")


def test_a_cut_after_which_nobody_known_comes_says_so():
    with pytest.raises(ValueError, match=r"strangers.*after the cut.*earlier cut"):
        from_logs(config("test_from_logs.nobody_returns"), "cpu")


def test_the_yaml_repeats_the_defaults_of_the_code(request):
    env = OmegaConf.load(request.config.rootpath / "experiments/conf/env/ecommerce.yaml")
    code = {}
    for function in (FittedSimulator.fit, Assumptions):
        code |= {p.name: p.default for p in inspect.signature(function).parameters.values()}
    for knob, value in env.simulator.items():
        assert knob == "_target_" or code[knob] == value, knob
    catalog = inspect.signature(simulators.catalog.catalog_from_logs).parameters
    for knob, value in env.catalog.items():
        assert knob == "_target_" or catalog[knob].default == value, knob


def test_the_verdict_tells_failures_from_too_few_users(worlds):
    key = worlds.train.fit_key
    passed, failed, few = (Check(n, 0.1, 0, 1, 0.1, ok, "") for n, ok in
                           (("a", True), ("b", False), ("c", None)))  # fmt: skip
    remember_gate(key, [passed, failed, few])
    line = gate_line("shop", worlds.train)
    assert "FAILED 1 of 3 checks (b); too few users to tell in 1 more (c): python" in line
    remember_gate(key, [passed, few])
    line = gate_line("shop", worlds.train)
    assert line.startswith("these users passed 1 of 2 checks; too few users to tell in 1 more (c)")
    remember_gate(key, [passed])
    assert gate_line("shop", worlds.train).startswith("these users passed all 1 checks of python")


def test_the_summary_names_size_and_span(shop):
    line = summary(shop)
    assert f"{len(shop):,} events" in line
    assert "2024-01-" in line
