"""The parts of a comparison: assumptions tried, figures by hand, what is said of it."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny_shop import tiny

from agents.testing import synthetic_observation, synthetic_spec
from encoders.state import EMPTY
from evaluation.online import Sessions
from experiments.compared_parts import (
    ab_test,
    assumed,
    differences,
    exposed,
    exposed_by_seed,
    exposure,
    listed,
    new_items,
)
from experiments.compared_play import (
    Played,
    Stranger,
    Tally,
    play_all,
    together,
    variants,
)
from experiments.compared_runs import alone
from experiments.compared_words import ago, introduced, nearest, times, without
from experiments.sweep import report_command

ROOT = Path(__file__).resolve().parents[1]


def played(reward, shown=None, chosen=None) -> Played:
    reward = np.asarray(reward, dtype=float)
    some = np.ones(4, dtype=np.int64)
    return Played(reward, np.ones_like(reward), reward, 0.5,
                  np.stack([some if shown is None else np.array(shown)] * len(reward)),
                  some if chosen is None else np.array(chosen))  # fmt: skip


def test_each_assumption_that_is_off_is_tried_on() -> None:
    cfg, worlds = tiny()
    found = {(v.assumption, v.label): v.value for v in variants(cfg, worlds.test[0])}
    assert found["patience", "half (0.1)"] == pytest.approx(0.1)
    assert found["drift", "on, 0.2 (is off)"] == pytest.approx(0.2)
    assert found["drift", "on, 0.1 (is off)"] == pytest.approx(0.1)
    assert ("choice", "cascade") not in found  # of a slate of one it is the same as independent
    cfg.env.session.slate_size = 3
    found = {(v.assumption, v.label): v.value for v in variants(cfg, worlds.test[0])}
    assert found["choice", "cascade"] == "cascade"
    cfg.env.simulator.patience = 0.6
    found = {(v.assumption, v.label): v.value for v in variants(cfg, worlds.test[0])}
    assert found["patience", "double (1)"] == 1.0  # a probability
    assert ("position", "half (0)") not in found


def fitted_shop(**given):
    """A configuration of users fitted to a log, and what such a simulator says of itself."""
    cfg, worlds = tiny()
    assumed = {"patience": 0.1, "satiation": None, "drift": 0.0, "exposure": 0.0, "position": 0.0}
    cfg.env.simulator = {**assumed, "choice": "logit", **given}
    return cfg, worlds


def test_what_is_no_number_is_tried_off_and_named_for_what_it_is() -> None:
    cfg, _ = fitted_shop(exposure="display")
    baskets = SimpleNamespace(satiation=None, exposure=0.27)
    found = {(v.assumption, v.label): v.value for v in variants(cfg, baskets)}
    assert {k: v for k, v in found.items() if k[0] in ("satiation", "exposure")} == {
        ("satiation", "off (is from the log)"): 0.0,
        ("exposure", "off (is display, 0.27)"): 0.0,
        ("exposure", "half (0.135)"): 0.135,
        ("exposure", "double (0.54)"): 0.54,
    }
    assert found["patience", "double (0.2)"] == pytest.approx(0.2)
    unmeasured = SimpleNamespace(satiation=None, exposure=None)
    found = {(v.assumption, v.label): v.value for v in variants(cfg, unmeasured)}
    assert found["exposure", "off (is display)"] == 0.0
    assert found["exposure", "on, 0.5 (is display)"] == 0.5, "of a word nobody measured, a constant"
    one_number = SimpleNamespace(satiation=0.3, exposure=0.27)  # baskets were too few
    found = {(v.assumption, v.label): v.value for v in variants(cfg, one_number)}
    assert found["satiation", "half (0.15)"] == pytest.approx(0.15)
    assert ("satiation", "off (is from the log)") not in found


def test_what_the_log_says_and_what_was_measured_is_listed_as_that() -> None:
    cfg, worlds = fitted_shop(exposure="display")
    baskets = SimpleNamespace(satiation=None, exposure=0.27)
    found = {row["name"]: row for row in assumed(cfg, replace(worlds, test=[baskets]))}
    assert (found["satiation"]["value"], found["satiation"]["kind"]) == ("from the log", "fitted")
    assert found["exposure"]["value"] == "display (0.27)"
    assert found["exposure"]["kind"] == "assumed"
    number = SimpleNamespace(satiation=0.3, exposure=0.27)
    found = {row["name"]: row for row in assumed(cfg, replace(worlds, test=[number]))}
    assert found["satiation"]["value"] == "0.3"


def test_patience_that_doubles_shortens_sessions() -> None:
    from agents.random import Random
    from experiments.compared_play import Variant, simulators_with
    from experiments.policies import agent_spec

    cfg, worlds = tiny(sensitivity_simulators=1)
    agents = {"random": [Random(agent_spec(cfg, worlds, "cpu"))]}
    vectors = worlds.events.vectors
    hasty = simulators_with(cfg, worlds, Variant("patience", "", 0.8))
    calm = play_all(cfg, worlds.test[:1], agents, vectors, 60, "", oracle=False)
    short = play_all(cfg, hasty, agents, vectors, 60, "", oracle=False)
    assert short["random"].length.mean() < calm["random"].length.mean() - 0.5


def test_a_stranger_shows_everybody_the_same_and_leaves_the_observation() -> None:
    from agents.popular import BuyAgain
    from agents.static import Static

    spec = synthetic_spec(slate_size=2)
    obs = synthetic_observation(spec, 5, torch.Generator().manual_seed(0))
    obs = without(obs, ("history", "feedback"))
    past = obs.past.clone()
    agent = Stranger(Static(spec, model=BuyAgain), obs.profile)
    slate = agent.act(obs, None, explore=False).slate
    assert (slate == slate[0]).all()
    assert torch.equal(obs.past, past)


def test_a_tally_counts_revenue_choices_and_diversity() -> None:
    tally = Tally(2, torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]))
    rows = torch.tensor([0, 1])
    chosen = torch.tensor([[True, False], [False, False]])
    response = SimpleNamespace(chosen={"buy": chosen}, value=torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    tally.see(rows, None, {"slate": torch.tensor([[0, 1], [0, EMPTY]]), "response": response})
    later = SimpleNamespace(chosen={"buy": chosen & False}, value=torch.full((2, 2), 2.0))
    slate = torch.tensor([[1, EMPTY], [2, EMPTY]])
    tally.see(rows, None, {"slate": slate, "response": later})
    assert tally.revenue.tolist() == [7.0, 4.0]  # 3, then twice 2; twice 2
    assert tally.chosen.tolist() == [1, 0, 0]
    # items 0, 1, 1: of three pairs two are orthogonal; items 0 and 2 point the same way
    assert tally.diversity().tolist() == pytest.approx([2 / 3, 0.0])
    session = Sessions(torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(3))
    both = together([[(session, tally)], [(session, tally)]])
    assert both.reward.shape == (2, 1, 2)
    assert both.diversity == pytest.approx(1 / 3)
    assert both.shown.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_coverage_is_that_of_one_seed_not_of_all_together() -> None:
    figures = exposed_by_seed(np.array([[4, 0], [0, 4]]), np.array([1, 1]))
    assert figures["coverage"] == 0.5


def test_a_folder_is_held_by_one_comparison(tmp_path) -> None:
    with alone(tmp_path), pytest.raises(ValueError, match="in use by another comparison"):
        alone(tmp_path).__enter__()
    (tmp_path / "in-use").write_text("999999999")  # of a process that was killed
    with alone(tmp_path):
        assert (tmp_path / "in-use").read_text() == str(os.getpid())
    assert not (tmp_path / "in-use").exists()


def test_exposure_figures_by_hand() -> None:
    figures = exposed(np.array([3, 1, 0, 0]), np.array([6, 1, 0, 1]))
    assert figures["coverage"] == 0.5
    assert figures["gini"] == pytest.approx((-3 * 0 - 1 * 0 + 1 * 1 + 3 * 3) / (4 * 4))
    bits = -np.log2(np.array([7, 2]) / 12)
    assert figures["novelty"] == pytest.approx((3 * bits[0] + bits[1]) / 4)


def test_differences_are_paired_and_ab_sizes_fall_with_the_square() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(1.0, 1.0, (1, 2, 300))
    all_ = {"a": played(base), "b": played(base + 0.05), "c": played(base + 0.1)}
    gaps = {g["policy"]: g for g in differences(all_, np.arange(300), "a")}
    assert gaps["b"]["low"] == pytest.approx(0.05)  # the same noise: nothing unsure
    assert gaps["b"]["claim"] == "better than a"
    sizes = {r["policy"]: r for r in ab_test(all_, "a")["rows"]}
    assert sizes["b"]["per_arm"] == pytest.approx(4 * sizes["c"]["per_arm"], rel=0.01)
    assert sizes["b"]["per_arm_one_percent"] == sizes["c"]["per_arm_one_percent"]


def test_thirds_of_sales_and_newest_items_are_what_they_say() -> None:
    _, worlds = tiny()
    n = worlds.events.num_items
    shown = np.arange(n)
    found = exposure(worlds, {"a": played([[[1.0]]], shown, shown)})[0]
    sales = [g["sales_share"] for g in found["groups"]]
    assert sum(sales) == pytest.approx(1.0)
    assert all(0.2 < s < 0.45 for s in sales)
    shares = [g["catalogue_share"] for g in found["groups"]]
    assert shares == sorted(shares)  # few items make the first third of sales
    assert new_items(worlds, {"a": played([[[1.0]]], shown, shown)}, {}) is None
    worlds = replace(worlds, replay=object())  # as if it came from a log
    fresh = new_items(worlds, {"a": played([[[1.0]]], shown, shown)}, {})
    assert fresh["items"] == round(0.1 * n)
    assert 0 < fresh["rows"][0]["shown_share"] < 1


def test_what_is_assumed_is_listed_with_its_value() -> None:
    cfg, worlds = tiny()
    found = {row["name"]: row for row in assumed(cfg, worlds)}
    assert found["patience"]["value"] == "0.2"
    assert found["drift"]["value"] == "0, off"
    assert all(row["kind"] == "assumed" for row in found.values())


def test_words_for_a_past_and_lists_of_items() -> None:
    assert (ago(0.2), ago(1.0), ago(9.7)) == ("today", "1 day ago", "10 days ago")
    assert (times(1.0), times(3.0)) == ("once", "3 times")
    spec = synthetic_spec()
    obs = synthetic_observation(spec, 1, torch.Generator().manual_seed(0))
    blank = without(obs, ("past", "past_count"))
    assert (blank.past == EMPTY).all()
    assert (blank.past_count == 0).all()
    catalog = SimpleNamespace(texts=[f"thing {i}" for i in range(spec.num_items)])
    unit = torch.eye(spec.num_items)
    own = int(obs.past[0, 0])
    assert nearest(catalog, unit, obs, own).startswith("bought before")
    other = next(i for i in range(spec.num_items) if i not in obs.past[0].tolist())
    assert "new to the user, most like thing" in nearest(catalog, unit, obs, other)
    assert listed(torch.tensor([[2, EMPTY], [0, 1]]), 3).toarray().tolist() == [
        [0, 0, 1],
        [1, 1, 0],
    ]


def test_who_came_is_told_by_their_latest_purchases_wherever_they_stand() -> None:
    spec = synthetic_spec()
    obs = synthetic_observation(spec, 1, torch.Generator().manual_seed(0))
    past = torch.full_like(obs.past, EMPTY)
    count, age = torch.zeros_like(obs.past_count), torch.zeros_like(obs.past_age)
    past[0, 1:4] = torch.tensor([5, 6, 7])  # the first place is empty
    count[0, 1:4] = torch.tensor([2.0, 1.0, 4.0])
    age[0, 1:4] = torch.tensor([40.0, 3.0, 9.0])
    obs = replace(obs, past=past, past_count=count, past_age=age)
    catalog = SimpleNamespace(texts=[f"thing {i}" for i in range(spec.num_items)])
    users = SimpleNamespace(ids=np.array([77]))
    said = introduced(SimpleNamespace(catalog=catalog, users=users), 0, obs)
    assert "user 77, who bought 3 different items before" in said
    assert said.endswith(
        "thing 6 (3 days ago, once); thing 7 (9 days ago, 4 times); thing 5 (40 days ago, 2 times)"
    )
    told = nearest(catalog, torch.eye(spec.num_items), obs, 7)
    assert told == "bought before: 4 times, the last time 9 days ago"


def test_what_was_swept_is_not_typed_again_for_the_report(tmp_path) -> None:
    typed = ["seed=0,1", "steps=100,200", "eval_users=20", "env.session.max_steps=3", "+x.y=1"]
    config = OmegaConf.create({"hydra": {"runtime": {"config_sources": []},
                                         "overrides": {"task": typed}}})  # fmt: skip
    words = report_command(tmp_path / "tiny", config)
    assert {"env=tiny", "eval_users=20", "env.session.max_steps=3"} <= {*words}
    assert not any(w.startswith(("steps=", "seed=", "+x")) for w in words)
