"""Users fitted blind to the log of a known world are held against it, policy by policy."""

import json
import sys

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from experiments import cli, policy_truth
from experiments.gate_order import Agreed
from experiments.policy_truth import blind_catalog, one_world, verdict
from simulators.base import SimSpec
from simulators.lived import shopping_log
from simulators.worlds import TODAY, TinyWorld

SMALL = ["households=240", "days=240", "eval_users=100", "progress=false", "fit.epochs=1",
         "policies=[random,popularity,buy_again,item_knn]"]  # fmt: skip


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["policy_truth.py", *SMALL, *words])
    policy_truth.main()


def config(*words):
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose("policy_truth", [*SMALL, *words], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        return cfg


def test_the_command_counts_pairs_that_truth_tells_apart(monkeypatch, capsys, tmp_path):
    out = tmp_path / "truth.json"
    command(monkeypatch, "worlds=1", f"out={out}")
    said = capsys.readouterr().out
    row = json.loads(out.read_text())
    assert row["check"] == "policy_truth"
    assert row["threshold"] == 0.9
    assert row["value"] > 0.7
    assert "world 0:" in said
    for name in ("random", "buy_again", "item_knn"):
        assert f"  {name} " in said


def test_users_who_want_the_opposite_are_in_the_wrong_order(monkeypatch):
    cfg = config("env.simulator.patience=0.3")
    fitted, truth = one_world(cfg, 0)
    assert set(fitted) == set(truth) == set(cfg.policies)
    assert all(len(r) == 100 for r in [*fitted.values(), *truth.values()])
    assert truth["buy_again"].mean() > truth["random"].mean() + 0.2
    right = policy_truth.same_order(truth, fitted)
    backwards = policy_truth.same_order(truth, {name: -r for name, r in fitted.items()})
    assert right.clear == backwards.clear > 3
    assert right.same == backwards.clear - backwards.same  # no ties
    assert right.same > backwards.same


def test_those_who_are_served_were_not_fitted_on(monkeypatch):
    seen = {}

    def noted(spec, **settings):
        seen.update(fitted=set(spec.logs.users["user"]), served=set(spec.users.ids),
                    start=spec.users.start.min().item(), cut=spec.catalog.as_of)  # fmt: skip
        raise StopIteration

    monkeypatch.setattr(policy_truth.FittedSimulator, "fit", noted)
    with pytest.raises(StopIteration):
        one_world(config(), 1)
    assert not seen["fitted"] & seen["served"]
    assert len(seen["fitted"]) == 120
    assert len(seen["served"]) > 100
    assert seen["start"] >= seen["cut"]


def test_a_blind_catalogue_counts_the_log_before_the_cut():
    world = TinyWorld(SimSpec(None, None, seed=3), households=60)
    logs = shopping_log(world, days=100.0)
    catalog = blind_catalog(world, logs, 0.5)
    assert catalog.as_of == pytest.approx(TODAY - 50, abs=1.0)
    before = logs.before(logs.cut(0.5)).events
    share = np.bincount(before["item"].astype(int), minlength=60) / before["basket"].nunique()
    assert catalog.popularity.numpy() == pytest.approx(share)
    assert not any(catalog.texts)


def test_a_share_of_a_few_pairs_is_too_few_to_tell():
    cfg = config()
    assert verdict(cfg, Agreed(100, 97)).passed is True
    assert verdict(cfg, Agreed(200, 150)).passed is False
    assert verdict(cfg, Agreed(8, 7)).passed is None
    assert verdict(cfg, Agreed(0, 0)).passed is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env=ecommerce"], "env=ecommerce has a log, so its truth is not known"),
        (["worlds=0"], "worlds must be a whole number of at least 1"),
        (["households=10"], "households must be a whole number of at least 50"),
        (["policies=[random]"], "two or more"),
        (["policies=[random,poplarity]"], "did you mean 'popularity'"),
    ],
)
def test_bad_words_are_refused(words, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, *words)
    assert message in capsys.readouterr().err
