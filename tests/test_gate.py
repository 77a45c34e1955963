"""The gate: what must pass passes, what is wrong fails, and the command says both."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import HashedTexts

import simulators.catalog
from experiments import check_simulator
from experiments.from_logs import gate_line, remember_gate
from simulators.fidelity import priced
from simulators.fit import moment
from simulators.gate import (
    THRESHOLDS,
    above,
    at_least,
    at_most,
    by_chance,
    calibration_checks,
    halves_diverge,
    left_out,
    lines,
    users_with_past,
    walk_checks,
    walked,
    within,
)
from simulators.organic import fit_alone, table_at
from simulators.realism import Distance, jensen_shannon
from simulators.trips import trips_from_logs
from simulators.verdicts import MARKS
from simulators.visits import Lines, lines_of

ENV = """
name: shop
data: {_target_: synthetic.load}
catalog: {_target_: simulators.catalog.catalog_from_logs, size: 60, cut: 0.8, dim: 8}
simulator:
  _target_: simulators.fitted.FittedSimulator.fit
  window: 120.0
  epochs: 2
  hidden: 8
session:
  slate_size: 1
  max_steps: 5
  reward: {_target_: hydra.utils.get_method, path: envs.rewards.units}
"""


def test_each_kind_of_check_has_its_side():
    limits = {"a": 0.1}
    assert at_most("a", 0.1, limits, "").passed
    assert at_most("a", -0.1, limits, "").passed
    assert not at_most("a", -0.11, limits, "").passed
    assert above("a", Distance(0.3, 0.11, 0.5), limits, "").passed
    assert not above("a", Distance(0.3, 0.1, 0.5), limits, "").passed
    assert at_least("a", 0.1, limits, "").passed
    assert not at_least("a", 0.09, limits, "").passed
    assert not at_most("a", float("nan"), limits, "").passed
    assert not at_least("a", float("nan"), limits, "").passed
    ratio = {"a": 1.25}
    assert [within("a", x, ratio, "").passed for x in (0.79, 0.8, 1.25, 1.26)] == [0, 1, 1, 0]


def test_the_gate_as_text_counts_what_passed():
    checks = [at_most("a", 0.2, {"a": 0.1}, "too far"), at_least("b", 1.0, {"b": 0.9}, "fine")]
    said = lines(checks)
    assert said[0].startswith("FAIL  a")
    assert said[1].startswith("PASS  b")
    assert said[-1] == "1 of 2 checks passed"


@pytest.fixture(scope="module")
def held(fitted, shop, shelf):
    trips = trips_from_logs(shop, shelf.ids, since=shelf.as_of)
    return priced(fitted.preference, trips[~np.isnan(trips.gap)])


def test_calibration_fails_where_all_chances_are_doubled(held, fitted):
    log_rate = fitted.preference.log_rate
    right, found = calibration_checks(held, log_rate, THRESHOLDS)
    assert len(found["activity_deciles"]) == 10
    doubled = replace(held, theta=held.theta + np.log(2.0))
    wrong, more = calibration_checks(doubled, log_rate, THRESHOLDS)
    assert [check.passed for check in wrong] == [False] * 3
    ratio = np.array(more["activity_deciles"]) / np.array(found["activity_deciles"])
    assert ((ratio > 0.45) & (ratio < 0.75)).all()
    assert {c.check for c in right} == {"calibration_error", "calibration_decile",
                                        "activity_decile"}  # fmt: skip


def test_activity_is_how_often_a_user_came(held, fitted):
    came = held.trips.profile[:, 1] + held.trips.profile[:, 2]  # log trips so far
    often = torch.from_numpy(came > np.median(came))
    tilted = replace(held, theta=held.theta + np.log(2.0) * often[:, None])
    (_, right), (_, wrong) = (
        calibration_checks(x, fitted.preference.log_rate, THRESHOLDS) for x in (held, tilted)
    )
    change = np.array(wrong["activity_deciles"]) / np.array(right["activity_deciles"])
    assert (change[:4] > 0.95).all()
    assert (change[6:] < 0.75).all()


@pytest.fixture(scope="module")
def on_foot(fitted, shop, shelf):
    alone = fit_alone(fitted.preference, shop, shelf, window=120.0)
    return walked(alone, shop, shelf)


def test_real_visits_against_themselves_pass(on_foot, shelf):
    same = replace(on_foot, simulated=on_foot.real, simulated_lines=on_foot.real_lines)
    checks, _ = walk_checks(same, shelf, THRESHOLDS)
    assert all(check.passed for check in checks if check.check != "two_sample_auc")
    assert {c.check for c in checks} >= {"ks_size", "repeat_share", "js_items", "two_sample_auc"}
    for check in checks:
        assert check.check in THRESHOLDS
        assert abs(check.value - (1 if check.check == "visits_per_user" else 0)) < 0.02 or (
            check.check == "two_sample_auc"
        )


@pytest.fixture
def no_judge(monkeypatch):
    """The dearest line, answered at once."""
    monkeypatch.setattr("simulators.gate.told_apart", lambda *_: (Distance(0.5, 0.4, 0.6), {}))
    monkeypatch.setattr("simulators.gate.DRAWS", 40)
    monkeypatch.setattr("simulators.realism.DRAWS", 40)


def test_visits_of_users_who_take_the_same_few_fail(on_foot, shelf, no_judge):
    rng = np.random.default_rng(0)
    few = replace(on_foot.simulated_lines, item=rng.integers(0, 10, len(on_foot.simulated_lines)))
    wrong = replace(on_foot, simulated_lines=few)
    by_name = {c.check: c for c in walk_checks(wrong, shelf, THRESHOLDS)[0]}
    assert not by_name["js_items"].passed
    assert by_name["js_items"].value > 2 * walk_value(on_foot, shelf, "js_items")


def walk_value(found, shelf, name):
    return {c.check: c.value for c in walk_checks(found, shelf, THRESHOLDS)[0]}[name]


def test_both_sides_are_of_the_same_users_and_days(on_foot, shop, shelf):
    day = float(np.ceil(shelf.as_of))
    assert on_foot.real_lines.time.min() >= day
    assert on_foot.real_lines.time.max() < day + on_foot.days
    assert on_foot.simulated_lines.time.max() < day + on_foot.days
    users = users_with_past(table_at(shop, shelf.ids, day))
    assert on_foot.users == len(users)
    later = shop.since(moment(day)).before(moment(day + on_foot.days))
    assert len(lines_of(later, shelf.ids, users.ids)) == len(on_foot.real_lines)


def test_curves_that_the_log_cannot_be_asked_about_are_left_out(on_foot, shelf, no_judge):
    assert left_out(on_foot, shelf) == {}
    at_noon = {"hour": 12, "price": np.nan}
    tables = [t.assign(**at_noon) for t in (on_foot.real, on_foot.simulated)]
    same = replace(on_foot, real=tables[0], simulated=tables[1])
    assert left_out(same, shelf) == {
        "hour": "ks_hour: hours are the same in all visits, real and simulated",
        "price": "ks_price: no visit of the log after the cut has mean price",
    }
    one = replace(shelf, category=torch.zeros_like(shelf.category))
    assert "all items of the catalogue are of one category" in left_out(same, one)["js_category"]
    checks, _ = walk_checks(same, one, THRESHOLDS)
    assert not {"ks_hour", "ks_price", "js_category"} & {c.check for c in checks}
    # users who come at all hours where the log's come at noon are wrong
    wrong = replace(same, simulated=same.simulated.assign(hour=on_foot.simulated["hour"]))
    assert "hour" not in left_out(wrong, shelf)
    by_name = {c.check: c for c in walk_checks(wrong, shelf, THRESHOLDS)[0]}
    assert by_name["ks_hour"].passed is False


def test_users_of_a_log_too_small_to_tell_are_not_failed(on_foot, shelf, no_judge):
    """Other real visits in place of simulated ones are as right as users can be."""
    rng = np.random.default_rng(0)
    table = on_foot.real
    verdicts = []
    for _ in range(5):
        half = rng.permutation(len(table)) < len(table) // 2
        few = replace(on_foot, real=table[half], simulated=table[~half])
        verdicts += [c.passed for c in walk_checks(few, shelf, THRESHOLDS)[0]
                     if c.check.startswith("ks_")]  # fmt: skip
    assert verdicts.count(None) > 5
    assert verdicts.count(False) <= 0.1 * len(verdicts)
    late = table.assign(gap=table["gap"] + 1.0)  # far off, in however few visits
    wrong = replace(on_foot, real=table[half], simulated=late[~half])
    by_name = {c.check: c for c in walk_checks(wrong, shelf, THRESHOLDS)[0]}
    assert by_name["ks_gap"].passed is False


def test_what_differs_by_chance_falls_as_visits_grow():
    rng = np.random.default_rng(1)
    few, many = (by_chance(rng.normal(size=n), rng) for n in (100, 10_000))
    assert few == pytest.approx(1.36 * (2 / 100) ** 0.5, rel=0.25)  # as Kolmogorov has it
    assert many == pytest.approx(1.36 * (2 / 10_000) ** 0.5, rel=0.25)


def test_the_mix_of_two_halves_diverges_by_what_a_sample_does():
    rng, kinds = np.random.default_rng(2), 20
    drawn = []
    for _ in range(40):  # two logs of 1,000 visits of one item each
        drawn.append(jensen_shannon(*rng.multinomial(1000, np.full(kinds, 1 / kinds), size=2)))
    item, zero = rng.integers(kinds, size=1000), np.zeros(1000)
    one = Lines(zero.astype(int), np.arange(1000), zero, item, zero, zero, zero)
    found = halves_diverge(one, np.arange(kinds), kinds, rng)
    assert found == pytest.approx(np.percentile(drawn, 95), rel=0.3)


@pytest.fixture
def plug(tmp_path, monkeypatch):
    monkeypatch.setattr(simulators.catalog, "TextEncoder", HashedTexts)
    monkeypatch.setattr("experiments.from_logs.TextEncoder", HashedTexts)
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "shop.yaml").write_text(ENV)
    return tmp_path


def command(monkeypatch, plug, *words):
    argv = ["check_simulator.py", "--config-dir", str(plug), "env=shop", "progress=false", *words]
    monkeypatch.setattr(sys, "argv", argv)
    check_simulator.main()


def test_the_command_prints_writes_and_remembers(plug, monkeypatch, capsys, tmp_path):
    out = tmp_path / "gate.json"
    command(monkeypatch, plug, "policies=[random,popularity,buy_again]", "eval_users=60",
            "sensitivity=true", "+env.simulator.patience=0.1",
            f"out={out}", f"out_dir={tmp_path / 'page'}", "++thresholds.ks_hour=null",
            "++thresholds.ks_size=0.9")  # fmt: skip
    said = capsys.readouterr().out
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"check", "value", "low", "high", "threshold", "passed"} <= set(found[0])
    names = [row["check"] for row in found]
    assert "ks_hour" not in names
    assert {"hit10_new_over_ease", "ranking_agreement", "two_sample_auc"} <= set(names)
    by_name = {row["check"]: row for row in found}
    assert by_name["ks_size"]["threshold"] == 0.9
    assert by_name["ks_size"]["passed"]
    for row in found:
        assert f"{MARKS[row['passed']]}  {row['check']}" in said
    failed = sum(not row["passed"] for row in found)
    assert f"{len(found) - failed} of {len(found)} checks passed" in said
    assert "patience double (0.2)" in said
    assert "left out: segment" in said
    html = (tmp_path / "page" / "gate.html").read_text()
    assert "If an assumption is wrong" in html
    assert "left out: segment" in html
    assert f"{len(found) - failed} of {len(found)} checks passed" in html
    assert (tmp_path / "page" / "gate.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["++thresholds.ks_sise=0.1"], "did you mean 'ks_size'"),
        (["++thresholds.ks_size=small"], "must be a number or null"),
        (["eval_users=1"], "at least 2"),
        (["sensitivity=yes please"], "sensitivity must be true or false"),
        (["sensitivity=true", "policies=[random]"], "name two or more"),
        (["policies=[poplarity]"], "did you mean 'popularity'"),
        (["env.data=null"], "no log"),
    ],
)
def test_bad_words_are_refused(words, message, plug, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, plug, *words)
    assert message in capsys.readouterr().err


def test_training_says_what_the_gate_said(fitted):
    assert "not been held against" in gate_line("shop", fitted)
    passed, failed = at_most("a", 0.0, {"a": 1}, ""), at_most("b", 2.0, {"b": 1}, "")
    remember_gate(fitted.fit_key, [passed, failed])
    assert "FAILED 1 of 2 checks (b)" in gate_line("shop", fitted)
    remember_gate(fitted.fit_key, [passed])
    assert "passed all 1 checks" in gate_line("shop", fitted)
    assert gate_line("tiny", torch) == ""  # users of another kind have no such gate
