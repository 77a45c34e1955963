"""The comparison: trained side by side, judged alike, told in one page; what is over is kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf
from tiny_shop import tiny

from experiments.compared_checks import checked
from experiments.compared_play import (
    ORACLE,
)
from experiments.compared_runs import runs_in

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["env=tiny", "steps=600", "eval_every=300", "num_envs=50", "eval_users=40", "evaluators=2",
         "sensitivity_users=20", "sensitivity_simulators=1", "frozen_users=120", "progress=false",
         "assumptions=[patience]", "examples=1"]  # fmt: skip


def run(script: str, *words: str, **given: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **given}
    return subprocess.run([sys.executable, str(ROOT / "experiments" / script), *words],
                          capture_output=True, text=True, timeout=240, env=env)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One comparison of a learner with two seeds and three static policies."""
    folder = tmp_path_factory.mktemp("compare")
    words = [*WORDS, "agents=[dqn,ease,itemknn,popularity]", "seeds=2", f"out_dir={folder}"]
    ran = run("compare.py", *words)
    assert ran.returncode == 0, ran.stderr
    return SimpleNamespace(
        folder=folder, words=words, out=ran.stdout,
        report=json.loads((folder / "comparison.json").read_text()),
        page=(folder / "report.html").read_text(),
    )  # fmt: skip


def test_every_policy_has_its_row_and_its_difference(done) -> None:
    names = {row["policy"] for row in done.report["policies"]}
    assert names == {"dqn", "ease", "item_knn", "popularity", ORACLE}
    base = done.report["baseline"]
    assert base in ("ease", "item_knn", "popularity")
    rows = {row["policy"]: row for row in done.report["policies"]}
    assert rows[base]["reward"] == max(rows[n]["reward"] for n in done.report["statics"])
    for gap in done.report["differences"]:
        expected = rows[gap["policy"]]["reward"] - rows[base]["reward"]
        assert gap["difference"] == pytest.approx(expected, abs=1e-9)
    assert rows["dqn"]["seeds"] == 2


def test_the_curve_is_of_both_seeds_at_the_same_steps(done) -> None:
    curve = done.report["curves"]["dqn"]
    assert curve["seeds"] == 2
    assert curve["step"] == [300, 600]
    assert all(np.isfinite(curve["iqm"]))
    assert curve["low"] == [None, None]  # two seeds are too few for a band


def test_assumptions_are_tried_at_half_and_double_and_other_choices(done) -> None:
    labels = [row["label"] for row in done.report["sensitivity"]["rows"]]
    assert labels == ["", "half (0.1)", "double (0.4)", "independent"]
    plain, half = done.report["sensitivity"]["rows"][:2]
    assert plain["differences"] != half["differences"]


def test_the_report_holds_all_its_parts(done) -> None:
    report = done.report
    assert {row["policy"] for row in report["new_users"]} == {
        "dqn",
        "ease",
        "item_knn",
        "popularity",
    }
    assert report["new_items"] is None  # nothing is known of when an item was first sold
    assert [part["kind"] for part in report["exposure"]] == ["popularity", "category"]
    assert report["ab"]["rows"]
    assert report["sessions_told"][0]["steps"]
    assert report["off_policy"]["baseline"] == "dqn"
    assert {row["ope"]["verdict"] for row in report["policies"] if row.get("ope")} <= {
        "identified", "partially identified", "not identified"}  # fmt: skip
    assert [row["name"] for row in report["assumptions"]]
    for part in report["exposure"]:
        for name in ("dqn", "ease"):
            assert sum(g["shown"][name] for g in part["groups"]) == pytest.approx(1.0)


def test_the_page_needs_nothing_from_outside(done) -> None:
    assert len(done.page) < 3_000_000
    for word in ("<script", "src=", "@import", "<link", 'href="http'):
        assert word not in done.page
    for name in ("dqn", "ease", "item_knn", "popularity"):
        assert name in done.page


def test_a_second_call_trains_nothing_anew_and_says_the_same(done) -> None:
    stamp = (done.folder / "dqn" / "seed0" / "result.json").stat().st_mtime_ns
    again = run("compare.py", *done.words, "sensitivity=false", "off_policy=false", "examples=0")
    assert again.returncode == 0, again.stderr
    assert "2 of 2 runs are in" in again.stdout
    assert (done.folder / "dqn" / "seed0" / "result.json").stat().st_mtime_ns == stamp
    other = json.loads((done.folder / "comparison.json").read_text())
    assert other["policies"][0]["reward"] == done.report["policies"][0]["reward"]
    assert other["sensitivity"] is None


def test_runs_of_another_configuration_are_refused(done) -> None:
    other = run("compare.py", *[w if w != "steps=600" else "steps=700" for w in done.words])
    assert other.returncode == 2
    assert "holds a run with another steps: choose another folder" in other.stderr
    cfg, _ = tiny()
    assert {(r.policy, r.seed) for r in runs_in(done.folder, cfg.env)} == {("dqn", 0), ("dqn", 1)}
    cfg.env.session.slate_size = 2
    with pytest.raises(ValueError, match=r"env\.session\.slate_size was 1, is 2"):
        runs_in(done.folder, cfg.env)


def test_a_folder_without_runs_is_named(tmp_path) -> None:
    cfg, _ = tiny()
    with pytest.raises(ValueError, match="holds no finished run"):
        runs_in(tmp_path, cfg.env)
    with pytest.raises(ValueError, match="is no folder"):
        runs_in(tmp_path / "none", cfg.env)


def test_an_agent_that_is_not_there_is_named() -> None:
    ran = run("compare.py", "agents=[dqm]")
    assert ran.returncode == 2
    assert "there is no agent 'dqm', did you mean 'dqn'?" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"agents": []}, "agents must be a list of at least one"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        ({"examples": -1}, "examples must be a whole number of at least 0"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"sensitivity": "no"}, "sensitivity must be true or false, got 'no'"),
        ({"assumptions": ["patiance"]}, "none called 'patiance', did you mean 'patience'?"),
        ({"frozen_temperature": -1}, "frozen_temperature must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed, said) -> None:
    with pytest.raises(ValueError, match=said):
        checked(tiny(**changed)[0])


def test_a_multirun_ends_with_one_report_of_its_runs(tmp_path) -> None:
    done = run("train_agent.py", "-m", "env=tiny", "agent=dqn,popularity", "steps=300",
               "eval_every=150", "eval_users=20", "evaluators=1", "frozen_users=60",
               "progress=false", f"run_dir={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "tiny").glob("*-?")) == ["dqn-0", "popularity-1"]
    assert f"report: {tmp_path}/tiny/report.html" in done.stdout
    found = json.loads((tmp_path / "tiny" / "comparison.json").read_text())
    assert found["learners"] == ["dqn"]  # popularity was in the sweep and does not learn
    assert {"popularity", "buy_again", "ease", "random"} <= {*found["statics"]}


def test_runs_with_other_settings_are_other_policies_and_a_copy_is_no_seed(done, tmp_path) -> None:
    cfg, _ = tiny()
    one = done.folder / "dqn" / "seed0"
    for name, gamma in (("a", 0.8), ("b", 0.3)):
        shutil.copytree(one, tmp_path / name)
        config = OmegaConf.load(tmp_path / name / "config.yaml")
        config.agent.gamma = gamma
        OmegaConf.save(config, tmp_path / name / "config.yaml")
    found = [run.policy for run in runs_in(tmp_path, cfg.env)]
    assert found == ["dqn gamma=0.8", "dqn gamma=0.3"]
    shutil.copytree(one, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"are the same run, dqn gamma=0\.8 with seed 0"):
        runs_in(tmp_path, cfg.env)
