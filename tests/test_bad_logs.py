"""Logs with something missing or odd: the commands fit and train, or say what is wrong."""

import json
import re
import sys
import warnings
from pathlib import Path

import bad_logs
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from synthetic import HashedTexts

import experiments.from_logs
import simulators.catalog
from experiments import fit_simulator, train_agent
from experiments.from_logs import held_out_trips, visits_since
from simulators.catalog import catalog_from_logs, load_catalog
from simulators.fitted import FittedSimulator
from sources.generated import load as generated
from sources.logs import Logs

CONF = Path(__file__).resolve().parents[1] / "experiments" / "conf"
FIT = ["progress=false", "dim=8", "epochs=1", "hidden=8", "window=100.0"]
TRAIN = [
    "agent=linucb", "steps=64", "num_envs=16", "evaluators=1", "eval_users=12", "frozen_users=4",
    "log_every=64", "eval_every=0", "progress=false", "log_training=false",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory, alone):
    """A folder of configurations, one for each log; texts as hashes: BERT is tested elsewhere."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulators.catalog, "TextEncoder", HashedTexts)
        patch.setattr(experiments.from_logs, "TextEncoder", HashedTexts)
        yield folder


def config(place: Path, log: str) -> None:
    for group in ("data", "env"):
        (place / group).mkdir(exist_ok=True)
    env = OmegaConf.load(CONF / "env" / "custom.yaml")
    env.data = {"_target_": f"bad_logs.{log}"}
    env.catalog.dim = env.simulator.hidden = 8
    env.simulator.window, env.simulator.epochs = 100.0, 1
    OmegaConf.save(env, place / "env" / f"{log}.yaml")
    (place / "data" / f"{log}.yaml").write_text(f"_target_: bad_logs.{log}\nmodels: {{}}\n")


def run(place: Path, monkeypatch: pytest.MonkeyPatch, log: str, *words: str) -> None:
    """Fit (without words) or train (with them) on a log; a warning of NumPy's is an error."""
    config(place, log)
    command = train_agent if words else fit_simulator
    given = [f"data={log}", f"out={place / log}", *FIT]
    if words:
        given = [f"env={log}", *TRAIN, *words]
    argv = [f"{command.__name__}.py", "--config-dir", str(place), *given]
    monkeypatch.setattr(sys, "argv", argv)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        command.main()


def fitted(place: Path, log: str) -> FittedSimulator:
    catalog = load_catalog(place / log / "catalog.pt")
    return FittedSimulator.load(place / log / "users.pt", catalog)


SOUND = ("browsed", "never_bought", "constant", "midnight")  # the first lacks all it can


@pytest.mark.parametrize("log", SOUND)
def test_what_a_log_lacks_is_done_without(log, place, monkeypatch, capsys):
    run(place, monkeypatch, log)
    said = capsys.readouterr().out
    assert "held out: " in said
    assert "nan" not in said.split("held out: ")[1].split("took ")[0].lower()
    users = fitted(place, log)
    assert torch.isfinite(users.users.profile).all()
    assert torch.isfinite(users.catalog.vectors).all()
    for value in users.preference.state_dict().values():
        assert not value.is_floating_point() or torch.isfinite(value).all()


@pytest.mark.parametrize("log", ["bare", "empty_columns"])
def test_an_agent_learns_on_it_all_the_same(log, place, monkeypatch):
    folder = place / "runs" / log
    run(place, monkeypatch, log, f"run_dir={folder}")
    rows = json.loads((folder / "result.json").read_text())["table"]
    assert all(np.isfinite(row["mean_reward"]) for row in rows)
    assert {row["policy"] for row in rows} >= {"linucb", "oracle", "buy_again"}


def test_items_that_nobody_bought_are_no_part_of_the_catalogue_and_said():
    logs = bad_logs.never_bought()
    assert "40 items without events" in logs.notes
    catalog = catalog_from_logs(logs, dim=8)
    assert set(catalog.ids) <= set(range(40))
    assert torch.isfinite(catalog.vectors).all()


def test_the_order_of_the_lines_is_of_no_importance():
    """Days in any order, lines of one moment in theirs: the same log, to the last bit."""
    frame = bad_logs.plain()
    mixed = frame.iloc[
        np.lexsort((np.arange(len(frame)), -frame["time"].astype("int64").to_numpy()))
    ]
    assert mixed["time"].is_monotonic_decreasing
    one, other = Logs.create(frame), Logs.create(mixed)
    assert one.events["time"].is_monotonic_increasing
    pd.testing.assert_frame_equal(one.events, other.events)
    assert one.fingerprint() == other.fingerprint()


ONCE = "each of .* users comes on one day only.*id of a session"
REFUSED = {
    "once": ONCE,
    "ten": "are too few to fit users to .100 of each.: give a longer log",
    "one_moment": r"all \d+ events carry the time 2024-01-01.*which leaves no earlier and later",
    "one_item": "1 products were bought before the cut.*a catalogue needs 2",
    "too_early": "0 trips with 0 purchases of the catalogue in the 100 days before the cut",
}


@pytest.mark.parametrize("log", REFUSED)
@pytest.mark.parametrize("words", [(), ("run_dir=runs/never",)], ids=["fit", "train"])
def test_what_cannot_be_fitted_to_is_refused_in_words(log, words, place, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(place, monkeypatch, log, *words)
    assert stop.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    wanted = REFUSED[log]
    if log in ("ten", "too_early") and words:
        wanted = r"[01] of the \d+ households to judge with come after the cut.*intervals need 2"
    assert re.search(wanted, line), line


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("one_user", "share 0.5 of 1 users leaves one side without users"),
        ("two_users", "1 of the 1 households to judge with come after .* intervals need 2"),
        ("one_day", "households to judge with|nobody who comes after|too few"),
    ],
)
def test_too_few_to_judge_with_is_said_before_the_work(log, message, place, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(place, monkeypatch, log, "run_dir=runs/never")
    assert re.search(message, capsys.readouterr().err)


def test_a_rule_is_held_against_the_whole_log_before_the_fits(place, monkeypatch, capsys):
    monkeypatch.setattr(experiments.from_logs, "fit_all", None)  # not reached
    rule = place / "rule.csv"
    rule.write_text("user,item\n" + "".join(f"{u},{u % 40}\n" for u in (3, 4, 500, 501, 119)))
    with pytest.raises(SystemExit):
        run(place, monkeypatch, "bare", f"env.session.excluded={rule}", "run_dir=runs/never")
    said = capsys.readouterr().err
    assert "rule.csv: 2 of 5 users are not known, the first ['500', '501']" in said


def test_an_item_without_a_margin_is_known_before_the_fits(place, monkeypatch, capsys):
    monkeypatch.setattr(experiments.from_logs, "fit_all", None)  # not reached
    table = place / "margins.csv"
    table.write_text("item,margin\n" + "".join(f"{i},1\n" for i in range(39)))
    config(place, "bare")
    env = OmegaConf.load(place / "env" / "bare.yaml")
    env.session.reward = {"_target_": "envs.rewards.Margin", "path": str(table)}
    OmegaConf.save(env, place / "env" / "margins.yaml")
    words = ["--config-dir", str(place), "env=margins", *TRAIN, "run_dir=runs/never"]
    monkeypatch.setattr(sys, "argv", ["train_agent.py", *words])
    with pytest.raises(SystemExit):
        train_agent.main()
    said = capsys.readouterr().err
    assert "env.session.reward: " in said
    assert "for every item of the catalogue, 1 of 40 have none" in said


def test_money_without_prices_is_refused_before_any_text_is_encoded(place, monkeypatch, capsys):
    monkeypatch.setattr(simulators.catalog, "catalog_from_logs", bad_logs.unreached)
    with pytest.raises(SystemExit):
        run(place, monkeypatch, "bare", "env.session.reward.path=envs.rewards.revenue",
            "run_dir=runs/never")  # fmt: skip
    assert "reward is revenue, and no item of this log has a price" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epochs=many"], "epochs must be a whole number, got 'many'"),
        (["cut=late"], "cut must be a number, got 'late'"),
        (["window=0"], "window must be above 0 days"),
        (["size=2.5"], "size must be a whole number, got 2.5"),
    ],
)
def test_a_word_for_a_number_is_said_by_its_key(words, message, place, monkeypatch, capsys):
    config(place, "bare")
    argv = ["fit_simulator.py", "--config-dir", str(place), "data=bare", *FIT, *words]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        fit_simulator.main()
    assert message in capsys.readouterr().err


def test_a_fit_says_what_each_stage_took(place, monkeypatch, capsys):
    run(place, monkeypatch, "browsed")
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("took ")]
    for stage in ("read", "encode", "fit", "check"):
        assert f"{stage} " in line
    costs: dict[str, fit_simulator.Cost] = {}
    with fit_simulator.measured("hold", costs):
        held = np.ones(50_000_000)  # 0.37 GiB, touched
    before = fit_simulator.peak_memory() - len(held) * 8 / 2**30
    assert costs["hold"].memory >= before
    assert 0 < costs["hold"].seconds < 60


def test_a_made_up_shop_has_the_size_that_was_asked_for():
    logs = generated(events=20_000, users=300, items=200, seed=1)
    assert len(logs) == pytest.approx(20_000, rel=0.1)
    assert (
        logs.fingerprint() == generated(events=20_000, users=300, items=200, seed=1).fingerprint()
    )
    assert (
        logs.fingerprint() != generated(events=20_000, users=300, items=200, seed=2).fingerprint()
    )
    assert logs.events["user"].nunique() <= 300
    pairs = logs.events.groupby("user")["item"].value_counts()
    assert (pairs.groupby("user").max() > 3).mean() > 0.5, "users come back to what they like"
    with pytest.raises(ValueError, match="users must be at least 1, got 0"):
        generated(users=0)


def test_of_too_many_held_out_trips_whole_households_are_drawn(monkeypatch):
    logs = bad_logs.bare()
    catalog = catalog_from_logs(logs, cut=0.6, dim=8)
    all_of_them = held_out_trips(logs, catalog)
    visits = visits_since(logs, catalog.as_of)
    known = np.unique(all_of_them.user)
    assert visits[known].sum() == len(all_of_them)
    monkeypatch.setattr(experiments.from_logs, "CHECKED", 300)
    some = held_out_trips(logs, catalog)
    assert 250 < len(some) <= 300
    for user in np.unique(some.user):
        mine, whole = some.user == user, all_of_them.user == user
        assert mine.sum() == whole.sum()
        assert np.array_equal(some.profile[mine], all_of_them.profile[whole])
        assert np.array_equal(some.past[mine], all_of_them.past[whole])


def test_a_fit_of_too_many_visits_is_made_from_whole_households(monkeypatch, capsys):
    logs = bad_logs.bare()
    since = catalog_from_logs(logs, dim=8).as_of - 100.0
    assert experiments.from_logs.households_to_fit(logs, since) is logs
    monkeypatch.setattr(experiments.from_logs, "LEARNT", 500)
    some = experiments.from_logs.households_to_fit(logs, since)
    assert 450 < visits_since(some, since).sum() <= 500
    count, before = (x.events["user"].value_counts() for x in (some, logs))
    assert (count == before[count.index]).all(), "whole households, what they did before included"
    assert len(some.users) == len(logs.users)
    assert "of 120 users, drawn at random" in capsys.readouterr().out


def test_training_draws_households_on_each_side(place, monkeypatch, capsys):
    monkeypatch.setattr(experiments.from_logs, "LEARNT", 400)
    run(place, monkeypatch, "bare", f"run_dir={place / 'drawn'}")
    said = capsys.readouterr().out
    assert len(re.findall(r"fit to \d+ of (?:60|120) users, drawn", said)) == 3
    assert "oracle" in said
