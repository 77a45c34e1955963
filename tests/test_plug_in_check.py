"""Users of somebody else's code are looked at before an agent is trained on them."""

import sys

import pytest
import torch
from omegaconf import OmegaConf
from test_testing_kit import FAULTS, Shop, with_bias

from experiments import cli, prepare, train_agent
from simulators.base import SimSpec

BREAKING = (
    "squeezes one slot away", "NaN in the state", "NaN money", "another device",
    "one state for ever",
    "writes the users", "memory in the simulator", "width of the batch", "item 0 for no item",
    "relevance is NaN", "raises", "lacks members", "one answer of two",
)  # fmt: skip


def faulty(spec, name):
    return FAULTS[name][0]


def right(spec):
    return Shop(spec)


def takes_nothing(spec):
    return with_bias(-12.0)


def config(target, **settings):
    env = OmegaConf.load("experiments/conf/env/tiny.yaml")
    env.simulator = {"_target_": target, **settings}
    return OmegaConf.create({"env": env, "env_name": "mine", "seed": 0, "evaluators": 1})


@pytest.mark.parametrize("name", BREAKING)
def test_users_that_break_the_contract_are_refused_in_plain_words(name):
    with pytest.raises(ValueError, match="cannot be trained on:") as refused:
        prepare.prepare(config("test_plug_in_check.faulty", name=name), "cpu")
    assert "test_plug_in_check.faulty" in str(refused.value)
    assert FAULTS[name][1] in str(refused.value)


def test_one_user_is_too_few_to_judge_with_and_said_before_any_training():
    cfg = config("simulators.worlds.TinyWorld", items=20, households=1)
    with pytest.raises(ValueError, match=r"TinyWorld, which has 1 user to judge with; intervals"):
        prepare.prepare(cfg, "cpu")


def test_right_users_are_passed_in_one_line():
    worlds = prepare.prepare(config("test_plug_in_check.right"), "cpu")
    (line,) = [note for note in worlds.notes if "check" in note]
    assert line == "test_plug_in_check.right: a quick check found nothing wrong with these users"


def test_users_who_are_odd_but_sound_may_be_trained_on():
    worlds = prepare.prepare(config("test_plug_in_check.takes_nothing"), "cpu")
    assert any("found nothing wrong" in note for note in worlds.notes)


def test_users_of_this_repository_are_not_checked_each_time(monkeypatch):
    monkeypatch.setattr(prepare, "check_simulator", None)
    cfg = config("simulators.worlds.TinyWorld", items=20, households=30)
    assert len(prepare.prepare(cfg, "cpu").train.users) == 30


def test_the_look_costs_no_random_number():
    before = torch.get_rng_state()
    prepare.prepare(config("test_plug_in_check.right"), "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plug_in_may_stand_in_the_place_of_a_yaml_s_users(monkeypatch, tmp_path, capsys):
    words = [
        "env=tiny", "env.simulator._target_=simulators.worlds.TinyWorld", "agent=random",
        "env.session.reward._target_=hydra.utils.get_method", "steps=64", "num_envs=8",
        "evaluators=1", "eval_users=8", "frozen_users=0", "progress=false", "log_training=false",
        "eval_every=0", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    typed = cli.check("train_agent", "", words)
    assert typed == words, "no plus is needed"
    monkeypatch.setattr(sys, "argv", ["train_agent.py", *typed])
    train_agent.main()
    assert "oracle" in capsys.readouterr().out
    typed = [w.replace("simulators.worlds.TinyWorld", "test_plug_in_check.faulty") for w in typed]
    words = [*typed[:-1], f"run_dir={tmp_path / 'other'}", "+env.simulator.name=raises"]
    monkeypatch.setattr(sys, "argv", ["train_agent.py", *words])
    with pytest.raises(SystemExit):
        train_agent.main()
    assert "test_plug_in_check.faulty takes no 'items'" in capsys.readouterr().err  # tiny's own


def test_the_kit_is_quick_where_it_is_asked_to_be():
    from simulators.testing import check_simulator

    odd = takes_nothing(SimSpec(None, None))
    assert check_simulator(odd, quick=True) == []
    assert "agents see no reward" in check_simulator(odd)[0]
