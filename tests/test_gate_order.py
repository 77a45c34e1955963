"""Orders of policies: which pairs are clear, which keep their sign, which assumptions are tried."""

from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments import gate_order
from experiments.gate_order import (
    Agreed,
    otherwise,
    row_of,
    same_order,
    sensitivity,
    sensitivity_lines,
)


def rewards(**means):
    """Rewards of 400 sessions with a little noise of their own."""
    rng = np.random.default_rng(0)
    return {name: mean + rng.normal(0, 0.1, 400) for name, mean in means.items()}


def test_pairs_that_are_clear_here_are_asked_for_there():
    here, there = rewards(a=3, b=2, c=1), rewards(a=3, b=1, c=2)
    assert same_order(here, there) == Agreed(clear=3, same=2)
    assert same_order(here, here) == Agreed(3, 3)
    vague = {"a": here["a"], "b": here["a"] + np.tile([1.01, -1.0], 200), "c": here["c"]}
    assert same_order(vague, here) == Agreed(2, 2)  # a and b cannot be told apart
    assert same_order(here, here) + same_order(here, there) == Agreed(6, 5)
    assert Agreed(4, 3).share().value == 0.75
    assert np.isnan(Agreed(0, 0).share().value)


def config(slate=1, **simulator):
    return OmegaConf.create({
        "env": {"simulator": {"_target_": "users.make", **simulator},
                "session": {"slate_size": slate}},
        "policies": ["a", "b"], "progress": False,
    })  # fmt: skip


def named(found):
    return {(name, value) for name, _, value in found}


def test_what_is_on_is_halved_doubled_and_turned_off():
    cfg = config(patience=0.1, exposure=0.4)
    assert named(otherwise(cfg, SimpleNamespace())) == {
        ("patience", 0.0), ("patience", 0.05), ("patience", 0.2),
        ("exposure", 0.0), ("exposure", 0.2), ("exposure", 0.8),
    }  # fmt: skip
    assert ("patience", 1.0) in named(otherwise(config(patience=0.7), SimpleNamespace()))


def test_what_is_off_is_turned_on_at_two_sizes():
    assert named(otherwise(config(drift=0.0), SimpleNamespace())) == {("drift", 0.1),
                                                                      ("drift", 0.2)}  # fmt: skip


def test_slots_matter_only_where_there_are_several():
    assert otherwise(config(position=0.0), SimpleNamespace()) == []
    assert named(otherwise(config(2, position=0.2), SimpleNamespace())) == {
        ("position", 0.0), ("position", 0.1), ("position", 0.4)
    }  # fmt: skip
    assert named(otherwise(config(choice="logit"), SimpleNamespace())) == {
        ("choice", "independent")
    }
    assert named(otherwise(config(2, choice="cascade"), SimpleNamespace())) == {
        ("choice", "logit"), ("choice", "independent")
    }  # fmt: skip


def test_what_the_log_says_is_halved_from_there_and_words_are_turned_off():
    fitted = SimpleNamespace(satiation=-0.5)
    assert named(otherwise(config(satiation=None), fitted)) == {
        ("satiation", 0.0), ("satiation", -0.25), ("satiation", -1.0)
    }  # fmt: skip
    assert named(otherwise(config(satiation=None), SimpleNamespace())) == {("satiation", 0.0)}
    assert named(otherwise(config(exposure="display"), fitted)) == {
        ("exposure", 0.0), ("exposure", 0.5)
    }  # fmt: skip
    measured = SimpleNamespace(exposure=0.34)
    assert named(otherwise(config(exposure="display"), measured)) == {
        ("exposure", 0.0), ("exposure", 0.17), ("exposure", 0.68)
    }  # fmt: skip


def test_every_change_is_played_with_the_fit_made_anew_for_it(monkeypatch):
    usual, turned = rewards(a=2, b=1), rewards(a=1, b=2)
    made = []

    def play(cfg, simulator, spec, policies):
        assert policies == ["a", "b"]
        return turned if simulator == "off" else usual

    def make(simulator, spec, patience, _convert_):
        assert spec == "spec"
        made.append(patience)
        return "off" if patience == 0 else "other"

    monkeypatch.setattr(gate_order, "played", play)
    monkeypatch.setattr(gate_order, "instantiate", make)
    rows = sensitivity(config(patience=0.1), SimpleNamespace(), "spec", None)
    assert made == [0.0, 0.05, 0.2]
    assert [row["same"] for row in rows] == [1, 0, 1, 1]
    assert [row["best"] for row in rows] == ["a", "b", "a", "a"]
    said = sensitivity_lines(rows)
    assert "as configured" in said[0]
    assert "patience off (0)" in said[1]
    assert "0 of 1 clear pairs as configured, best b (" in said[1]


def test_a_best_policy_that_is_not_clearly_so_is_said_to_be():
    usual = rewards(a=2, b=2)
    usual["b"] = usual["a"] + np.tile([0.5, -0.5], 200) - 0.001
    row = row_of("drift", "on", usual, usual)
    assert row["best"] == "a"
    assert not row["best_is_clear"]
    assert sensitivity_lines([row])[0].endswith("not clearly")
    assert row["mean"]["a"] == pytest.approx(2.0, abs=0.05)
