"""What a configuration alone tells is wrong is said before a log is read, by the key typed."""

import re
import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

import sources.complete_journey
from experiments import (
    check_simulator,
    compare,
    early,
    evaluate_policies,
    fit_simulator,
    policy_truth,
    prepare,
    rank_baselines,
    train_agent,
    train_offline,
)
from experiments.run_folder import refuse_taken, refuse_unwritable

CONF = Path(__file__).resolve().parents[1] / "experiments" / "conf"
SHOPS = [path for path in sorted(CONF.glob("env/*.yaml")) if path.stem != "gym"]


def config(env="ecommerce", **changes):
    """An environment's yaml with other values at dotted keys."""
    whole = OmegaConf.create({"env": OmegaConf.load(CONF / "env" / f"{env}.yaml"), "env_name": env})
    for key, value in changes.items():
        OmegaConf.update(whole.env, key.replace("__", "."), value, merge=False, force_add=True)
    return whole


def two_arguments(response, more):
    """No reward: it wants more than a response."""


@pytest.fixture
def nothing_is_read(monkeypatch):
    def load(**settings):
        raise AssertionError("the log was read")

    load.__module__ = "sources.complete_journey"
    monkeypatch.setattr(sources.complete_journey, "load", load)


@pytest.mark.parametrize("path", SHOPS, ids=lambda p: p.stem)
def test_every_shop_of_ours_passes(path):
    early.refuse_early(config(path.stem))


REWARD = "session__reward___target_"
PATH = "session__reward__path"
REFUSED = [
    ({PATH: "envs.rewards.unit"}, r"reward.path=envs.rewards.unit: .*did you mean 'units'\?; it h"),
    ({PATH: "envs.reward.units"}, "envs has no 'reward', did you mean 'rewards'"),
    ({PATH: "envz.rewards.units"}, "no 'envz' to import, did you mean 'envs'.*PYTHONPATH"),
    ({PATH: "units"}, "env.session.reward.path must be a dotted path such as envs.rewards.units"),
    ({PATH: "envs.rewards.Margin"}, "must be a function of one Response, got <class.*Margin"),
    ({PATH: "test_early.two_arguments"}, "must be a function of one Response, got <function two"),
    ({"session__reward": "revenue"}, "env.session.reward must be such as .*got 'revenue'"),
    ({"session__reward": None}, "env.session.reward must be such as .*got None"),
    ({"session__rewards": 1}, "env.session.rewards: there is no such key, did you mean 'reward'"),
    (
        {"session__reward": {"_target_": "envs.rewards.Weighted", "weigths": {}}},
        "env.session.reward.weigths: envs.rewards.Weighted takes no 'weigths', did you mean 'weig",
    ),
    (
        {"session__reward": {"_target_": "envs.rewards.Weighted", "weights": {"click": 1.0}}},
        r"env.session.reward weights name \['click'\], but .* behaviours are \['buy'\]",
    ),
    (
        {"session__reward": {"_target_": "envs.rewards.Weighted", "weights": {}}},
        "env.session.reward: .*must name at least one behaviour",
    ),
    (
        {"session__reward": {"_target_": "envs.rewards.Margin", "path": "no.csv"}},
        "env.session.reward: no.csv does not exist",
    ),
    (
        {"simulator___target_": "simulators.fitted.FitedSimulator.fit"},
        "env.simulator._target_=.*simulators.fitted has no 'FitedSim.*did you mean 'FittedSimul",
    ),
    ({"simulator___target_": "simulators.fitted"}, "is no class or function"),
    ({"simulator__patiense": 0.1}, "env.simulator.patiense: .* takes no 'patiense', did you mean"),
    ({"simulator__members": 0}, "env.simulator.members must be at least 1, got 0"),
    ({"simulator__window": -1.0}, "env.simulator.window must be above 0 days, got -1.0"),
    ({"simulator__exposure": "displays"}, "env.simulator.exposure must be a number or display, go"),
    ({"simulator__offers": "none.csv"}, "env.simulator.offers must be a CSV file of item.*no such"),
    ({"simulator__choice": "logits"}, "env.simulator.choice must be logit, independent or casc"),
    ({"simulator__patience": 1.5}, r"env.simulator.patience must be a probability in \[0, 1\]"),
    (
        {"pessimism": "abc"},
        "env.pessimism must be a finite number of at least 0.*, got 'abc'",
    ),
    ({"pessimism": -1}, "env.pessimism must be a finite number of at least 0 .0: off., got -1"),
    (
        {"pessimism": 1.0, "simulator__members": 1},
        "env.pessimism=1.0 takes the doubt.*members=1 has none.*give env.simulator.mem",
    ),
    ({"catalog__cut": 1.5}, r"env.catalog.cut must be a share of the time span inside \(0, 1\), g"),
    ({"catalog__size": 1}, "env.catalog.size must be at least 2, got 1"),
    ({"catalog__dim": 1}, "env.catalog.dim must be at least 2, got 1"),
    ({"session__slate_size": 0}, "env.session.slate_size must be a whole number of at least 1"),
    ({"session__max_steps": 5000}, "max_steps=5000 slates of 1 show 5000 different items"),
    ({"session__excluded": "no.csv"}, "env.session.excluded: no.csv does not exist"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_no_environment_can_be_is_refused_by_its_key(changes, message):
    with pytest.raises(ValueError, match=message):
        early.refuse_early(config(**changes))


def test_what_stands_and_falls_with_the_log_s_kind_is_refused_for_it():
    with pytest.raises(ValueError, match=r"exposure=display: movielens comes with no table of"):
        early.refuse_early(config("video", simulator__exposure="display"))
    early.refuse_early(config(simulator__exposure="display"))
    with pytest.raises(ValueError, match=r"env.simulator.gap must be above 0 minutes, got 0.0"):
        early.refuse_early(config("kuairand", simulator__gap=0.0))
    with pytest.raises(ValueError, match=r"env.pessimism=1.0 .* fitted to impressions state none"):
        early.refuse_early(config("kuairand", pessimism=1.0))
    with pytest.raises(ValueError, match=r"name \['follow', .*behaviours are \['click'\]"):
        early.refuse_early(config("kuairand", simulator__behaviours=["click"]))


class TheirOwn:
    """Users of somebody else's code, who do what they are told to when they are made."""

    behaviours = ("buy",)


def test_what_users_of_others_do_is_left_for_them_to_say():
    reward = {"_target_": "envs.rewards.Weighted", "weights": {"click": 1.0}}
    env = config("tiny", session__reward=reward)
    with pytest.raises(ValueError, match="weights name"):
        early.refuse_early(env)
    env.env.simulator = {"_target_": "test_early.TheirOwn"}
    early.refuse_early(env)


def test_a_table_of_margins_is_looked_at(tmp_path):
    table = tmp_path / "margins.csv"
    reward = {"_target_": "envs.rewards.Margin", "path": str(table)}
    for text, message in (
        ("item,profit\n1,2\n", r"lacks the column 'margin', it has \['item', 'profit'\]"),
        ("", "margins.csv cannot be read.*give a .csv or .parquet with the columns item and marg"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            early.refuse_early(config(session__reward=reward))
    table.write_text("item,profit\n1,2\n")
    early.refuse_early(config(session__reward=reward | {"column": "profit"}))


def test_all_of_it_is_said_before_the_log_is_read(nothing_is_read):
    with pytest.raises(ValueError, match=r"env\.pessimism must be"):
        prepare.prepare(config(pessimism="abc"), "cpu")
    cfg = OmegaConf.merge(config(), {"seed": 0, "evaluators": 1, "progress": False})
    with pytest.raises(InstantiationException, match="the log was read"):
        prepare.prepare(cfg, "cpu")


ALL = ("train_agent", "compare", "check_simulator")
HOLDS = "holds a run already: choose another folder"


@pytest.mark.parametrize(
    ("commands", "words", "message"),
    [
        (ALL, ["env.pessimism=-1"], "env.pessimism must be a finite number of at least 0"),
        (ALL, ["env.simulator.members=0"], "env.simulator.members must be at least 1, got 0"),
        (["train_agent"], ["run_dir=TAKEN"], f"run_dir=TAKEN {HOLDS}"),
        (["train_agent"], ["run_dir=TAKEN/config.yaml"], "config.yaml cannot be written"),
        (["train_agent"], ["out=TAKEN"], "out=TAKEN is a folder: give the name of a file"),
        (["train_agent"], ["agent=cql"], "cql learns from a decision log"),
        (["train_agent"], ["baselines=[poplarity]"], "did you mean 'popularity'"),
        (["train_agent"], ["early_stopping=2", "evaluators=1"], "got evaluators=1: at least 2"),
        (["train_offline"], ["run=TAKEN", "run_dir=TAKEN"], f"run_dir=TAKEN {HOLDS}"),
        (["train_offline"], ["run=TAKEN", "+agent.lrr=1"], "takes no 'lrr', did you mean 'lr'"),
        (
            ["evaluate_policies"],
            ["log=run", "log.path=no", "run_dir=TAKEN"],
            f"run_dir=TAKEN {HOLDS}",
        ),
        (["compare"], ["out_dir=TAKEN/config.yaml"], "out_dir=TAKEN/config.yaml cannot be writ"),
        (["compare"], ["out_dir=COMPARED", "agents=[dqn,random]"], "holds a run with another"),
        (["compare"], ["runs=TAKEN"], "runs=TAKEN holds no finished run"),
        (["compare"], ["+options.dqn.lrr=1"], "options.dqn.lrr: agents.dqn.DQN takes no 'lrr'"),
        (
            ["check_simulator"],
            ["env.simulator._target_=simulators.worlds.TinyWorld"],
            "the gate checks users of simulators.fitted and .* has TinyWorld",
        ),
        (["check_simulator"], ["out_dir=TAKEN/config.yaml"], "out_dir=.* cannot be written"),
        (["check_simulator"], ["out=TAKEN"], "out=TAKEN is a folder"),
        (["fit_simulator"], ["cut=1.5"], r"error: cut must be a share of the time span inside"),
        (["fit_simulator"], ["window=0"], r"window must be above 0 days"),
        (["fit_simulator"], ["out=TAKEN/config.yaml"], "out=.* cannot be written"),
        (["fit_simulator"], ["data._target_=sources.complete_journey.lod"], "mean 'load'"),
        (
            ["rank_baselines"],
            ["data=complete_journey", "data._target_=sources.complete_journey.lod"],
            "data._target_=.*did you mean 'load'",
        ),
        (
            ["rank_baselines"],
            ["data=complete_journey", "data.models.ease._target_=agents.linear.EAS"],
            "data.models.ease._target_=.*did you mean 'EASE'",
        ),
        (["policy_truth"], ["cut=0"], "cut must be a share of the time span"),
        (["policy_truth"], ["fit.epochs=0"], "fit.epochs must be at least 1, got 0"),
        (["policy_truth"], ["out=TAKEN"], "out=TAKEN is a folder"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list | tuple) else "",
)
def test_commands_refuse_before_the_log_is_read(
    commands, words, message, tmp_path, monkeypatch, capsys, nothing_is_read
):
    main = {"train_agent": train_agent, "compare": compare, "check_simulator": check_simulator,
            "train_offline": train_offline, "fit_simulator": fit_simulator,
            "policy_truth": policy_truth, "evaluate_policies": evaluate_policies,
            "rank_baselines": rank_baselines}  # fmt: skip
    taken, compared = tmp_path / "taken", tmp_path / "compared"
    taken.mkdir()
    (taken / "config.yaml").write_text("{}")
    done = compared / "dqn" / "seed0"
    (done / "checkpoint" / "step-1").mkdir(parents=True)
    (done / "config.yaml").write_text("seed: 0\n")
    (done / "result.json").write_text("{}")

    def real(word):
        return word.replace("TAKEN", str(taken)).replace("COMPARED", str(compared))

    for command in commands:
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *map(real, words)])
        with pytest.raises(SystemExit) as stop:
            main[command].main()
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert re.search(re.sub("TAKEN", str(taken), message), said), said
    assert {p.name for p in tmp_path.iterdir()} == {"taken", "compared"}  # nothing was made


def test_a_place_to_write_is_tried_and_left_as_it_was(tmp_path):
    refuse_unwritable(tmp_path / "a" / "b" / "c", "out_dir")
    refuse_unwritable(tmp_path / "a" / "x.json", "out", file=True)
    refuse_taken(None)
    refuse_taken(tmp_path)  # a folder without a run is no run's
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out_dir=.*file/x cannot be written .*choose another"):
        refuse_unwritable(tmp_path / "file" / "x", "out_dir")
