"""Words where numbers are meant are refused by their key, and every yaml of ours passes."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import prepare, train_agent
from experiments.kinds import declared, fits, refuse_words

CONF = Path(__file__).resolve().parents[1] / "experiments" / "conf"
YAMLS = sorted([*CONF.glob("env/*.yaml"), *CONF.glob("agent/*.yaml"), *CONF.glob("data/*.yaml")])


def numbers(part, place=()):
    """Places of a yaml whose target declares them as numbers and nothing else."""
    kinds = declared(part["_target_"]) if "_target_" in part else {}
    for key, value in part.items():
        if isinstance(value, dict):
            yield from numbers(value, (*place, key))
        elif kinds.get(key) and not set(kinds[key]) & {str, bool}:
            yield ".".join((*place, key))


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_yaml_of_ours_passes_and_a_word_for_any_of_its_numbers_does_not(path):
    config = OmegaConf.load(path)
    refuse_words(config, path.parent.name)  # as it stands: no error
    places = list(numbers(OmegaConf.to_container(config)))
    for place in places:
        wrong = config.copy()
        OmegaConf.update(wrong, place, "word")
        with pytest.raises(ValueError, match=rf"{path.parent.name}\.{place} must be .*'word'"):
            refuse_words(wrong, path.parent.name)
    if path.parent.name == "env" and path.stem != "gym":
        assert len(places) > 3


@pytest.mark.parametrize(
    ("env", "key", "value", "message"),
    [
        ("custom", "simulator.patience", "lots", "env.simulator.patience must be a number, got 'l"),
        ("custom", "simulator.satiation", "lots", "satiation must be a number or null, got 'lots'"),
        ("custom", "simulator.window", None, "env.simulator.window must be a number, got None"),
        ("custom", "simulator.epochs", 2.5, "env.simulator.epochs must be a whole number, got 2.5"),
        ("custom", "simulator.choice", 3, "env.simulator.choice must be a word, got 3"),
        ("custom", "catalog.size", "many", "env.catalog.size must be a whole number, got 'many'"),
        ("custom", "catalog.cut", True, "env.catalog.cut must be a number, got True"),
        ("tiny", "simulator.items", "sixty", "env.simulator.items must be a whole number"),
        ("video", "data.positive", "good", "env.data.positive must be"),
    ],
)  # fmt: skip
def test_a_word_for_a_number_is_refused_by_its_key(env, key, value, message):
    config = OmegaConf.load(CONF / "env" / f"{env}.yaml")
    OmegaConf.update(config, key, value)
    with pytest.raises(ValueError, match=message):
        refuse_words(config, "env")


def test_what_is_a_number_though_written_otherwise_passes():
    config = OmegaConf.load(CONF / "env" / "custom.yaml")
    for key, value in (("window", 120), ("patience", 0), ("satiation", None), ("exposure", 1e-3)):
        OmegaConf.update(config, f"simulator.{key}", value)
    refuse_words(config, "env")
    assert not fits(True, (int,))
    assert fits(True, (bool, int))


def nested(spec: object, *, size: int, names: list[str] | None = None) -> None:
    """A target with a parameter that is of no plain type."""


def test_nested_targets_are_looked_into_and_unknown_ones_left_alone():
    part = {"_target_": "test_kinds.nested", "size": 3, "names": "x", "more": "word"}
    refuse_words(OmegaConf.create({"a": {"b": part}}), "agent")
    with pytest.raises(ValueError, match=r"agent\.a\.b\.size must be a whole number, got 'x'"):
        refuse_words(OmegaConf.create({"a": {"b": part | {"size": "x"}}}), "agent")
    refuse_words(OmegaConf.create({"_target_": "no.such.thing", "size": "x"}), "agent")
    assert declared("no.such.thing") == {}
    assert declared("test_kinds.nested") == {"size": (int,)}


def test_the_commands_look_before_they_work(monkeypatch, capsys):
    env = OmegaConf.load(CONF / "env" / "tiny.yaml")
    env.simulator.households = "some"
    with pytest.raises(ValueError, match=r"env\.simulator\.households must be a whole number"):
        prepare.prepare(OmegaConf.create({"env": env, "env_name": "tiny"}), "cpu")
    monkeypatch.setattr(train_agent, "arena", None)  # not reached
    words = ["env=tiny", "agent=dqn", "agent.gamma=high", "progress=false"]
    monkeypatch.setattr(sys, "argv", ["train_agent.py", *words])
    with pytest.raises(SystemExit):
        train_agent.main()
    assert "agent.gamma must be a number, got 'high'" in capsys.readouterr().err
