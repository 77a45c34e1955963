"""The evaluation command on logs of every kind: what it prints, leaves, flags and refuses."""

import gzip
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation import DecisionLog, Target
from experiments import evaluate_policies, logged_policies, logged_runs, train_agent
from experiments.logged_policies import Settings, coat_policies, open_bandit_policies, own
from experiments.logged_runs import run_policies

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "evaluate_policies.py"
COAT = Path(__file__).resolve().parents[2] / "shared" / "data" / "coat"
ITEMS = 5
TRAIN = ["env=tiny", "agent=popularity", "steps=256", "num_envs=64", "evaluators=1", "eval_users=8",
         "frozen_users=600", "progress=false", "env.simulator.items=30", "env.simulator.stop=[0.6]",
         "frozen_temperature=2.0"]  # fmt: skip


def command(script: Any, words: list[str]) -> None:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        script.main()


def evaluated(folder: Path, *words: str) -> dict[str, Any]:
    """The table of the command."""
    command(evaluate_policies, [*words, f"run_dir={folder}"])
    return json.loads((folder / "table.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    """The message with which the command stops; it must stop with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        evaluated(folder, *words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def cell(table: dict[str, Any], policy: str, estimator: str) -> dict[str, Any]:
    """The first row of a policy and an estimator."""
    return next(r for r in table["rows"] if (r["policy"], r["estimator"]) == (policy, estimator))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of both policies in the Open Bandit format; item 1 is clicked by all, item 2 by some.

    bts shows items 0..4 with chances 6:3:1:1:1, but in the campaign women says 1e-6 of one row.
    """
    folder = tmp_path_factory.mktemp("obd")
    rng = np.random.default_rng(0)
    for campaign in ("men", "women"):
        for behaviour in ("random", "bts"):
            chance = (
                np.full(ITEMS, 0.2) if behaviour == "random" else np.array([6, 3, 1, 1, 1]) / 12
            )
            item = rng.choice(ITEMS, 3000, p=chance)
            user = rng.integers(0, 2, 3000)
            rate = np.where(item == 1, 0.4, np.where((item == 2) & (user == 1), 0.8, 0.05))
            frame = pd.DataFrame({
                "timestamp": pd.Timestamp("2019-11-24", tz="UTC")
                + pd.to_timedelta(rng.permutation(3000), unit="min"),
                "item_id": item, "position": rng.integers(1, 4, 3000),
                "click": (rng.random(3000) < rate).astype(int), "propensity_score": chance[item],
                **{f"user_feature_{i}": np.where(user, "a", "b") for i in range(4)},
                **{f"user-item_affinity_{i}": 0.0 for i in range(ITEMS)},
            })  # fmt: skip
            if campaign == "women" and behaviour == "bts":
                frame.loc[frame["timestamp"].idxmax(), "propensity_score"] = 1e-6
            where = folder / behaviour / campaign
            where.mkdir(parents=True)
            frame.to_csv(where / f"{campaign}.csv", index=False)
            items = {"item_id": range(ITEMS), "item_feature_0": 0.0}
            items |= {f"item_feature_{i}": list("abcde") for i in (1, 2, 3)}
            pd.DataFrame(items).to_csv(where / "item_context.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny world with slates of one item."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    command(train_agent, [*TRAIN, f"run_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def judged(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """men, random, judged, and the folder with all that it left."""
    folder = tmp_path_factory.mktemp("judged") / "run"
    words = ["campaign=men", "behaviour=random", f"log.path={shop}", f"out={folder}.json"]
    return evaluated(folder, *words), folder


def test_the_table_has_every_policy_by_estimator_and_compares_with_popularity(judged) -> None:
    table, _ = judged
    policies = list(dict.fromkeys(r["policy"] for r in table["rows"]))
    assert policies == ["logging", "random", "bts", "popularity", "item_knn"]
    assert {r["estimator"] for r in table["rows"]} == {"sndr", "dr", "snips", "dm"}
    assert {r["baseline"] for r in table["differences"]} == {"popularity"}
    assert {r["verdict"] for r in table["rows"]} == {"identified"}


def test_estimates_of_a_uniform_log_cover_what_the_other_policy_really_earned(judged, shop) -> None:
    table, _ = judged
    frame = pd.read_csv(shop / "bts" / "men" / "men.csv")
    row = cell(table, "bts", "dr")
    assert row["low"] < frame["click"].mean() < row["high"]
    assert cell(table, "item_knn", "dr")["value"] > cell(table, "random", "dr")["value"] + 0.05


def test_the_logging_policy_weighs_one_and_earns_the_mean(judged, shop) -> None:
    table, _ = judged
    frame = pd.read_csv(shop / "random" / "men" / "men.csv").sort_values("timestamp")[1000:]
    for estimator in ("sndr", "dr", "snips", "dm"):
        row = cell(table, "logging", estimator)
        assert row["value"] == pytest.approx(frame["click"].mean())
        assert row["ess"] == pytest.approx(2000)


def test_page_figure_numbers_and_margin_charts_are_left(judged) -> None:
    table, folder = judged
    assert b"item_knn" in (folder / "table.html").read_bytes()
    assert (folder / "forest.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(Path(f"{folder}.json").read_text()) == table
    assert "behaviour: random" in (folder / "config.yaml").read_text()
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    value = events.Scalars("ope/item_knn/dr/value")[0].value
    assert value == pytest.approx(cell(table, "item_knn", "dr")["value"], rel=1e-6)
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_a_log_that_cannot_tell_is_flagged_and_tells_nothing(shop, tmp_path, capsys) -> None:
    words = ["campaign=women", "behaviour=bts", f"log.path={shop}", "reward_model=null"]
    table = evaluated(tmp_path / "run", *words)
    assert table["diagnosed"]["random"]["verdict"] == "partially identified"
    assert cell(table, "random", "snips")["value"] is None
    assert cell(table, "logging", "snips")["value"] is not None
    assert "only in part" in capsys.readouterr().out


def test_what_learns_sees_the_first_third_only(shop, monkeypatch) -> None:
    seen: list[int] = []
    whole = logged_policies.rankers

    def spied(cells, action, liked, *rest):
        seen.append(len(action))
        return whole(cells, action, liked, *rest)

    monkeypatch.setattr(logged_policies, "rankers", spied)
    asked = open_bandit_policies(Settings(), campaign="men", behaviour="bts", path=str(shop))
    early = pd.read_csv(shop / "bts" / "men" / "men.csv").sort_values("timestamp")[:1000]
    assert seen == [1000]
    assert asked.log.num_rows == 2000
    assert f"{early['click'].sum()} clicks before" in asked.notes[0]


def test_item_knn_ranks_what_a_users_kind_clicked(shop) -> None:
    action, liked = np.array([1, 2, 1, 4, 4]), np.array([1.0, 1.0, 1.0, 1.0, 0.0])
    popular, similar = logged_policies.rankers(
        np.array([0, 0, 1, 2, 0]), action, liked, ITEMS, np.array([1, 3])
    )
    assert popular.tolist() == [0, 2, 1, 0, 1]
    assert similar[0].argsort()[-2:].tolist() == [2, 1]  # who clicked 1 clicked 2
    assert similar[0, 4] < 1e-6 < similar[0, 2]
    assert similar[1].argmax() == 1  # nobody like them before: the popular


def test_an_adaptive_log_gets_confidence_sequences_only(shop, tmp_path) -> None:
    words = ["campaign=men", "behaviour=bts", f"log.path={shop}", "adaptive=true"]
    table = evaluated(tmp_path / "run", *words)
    assert {r["interval"] for r in table["rows"]} <= {
        "confidence_sequence",
        "withheld",
        "worst case",
    }
    assert table["about"]["adaptive"] is True


def test_ranker_is_softened_as_far_as_the_log_allows(shop) -> None:
    asked = open_bandit_policies(Settings(), campaign="men", behaviour="random", path=str(shop))
    notes: list[str] = []
    scores = np.arange(ITEMS, dtype=float)
    hard = Settings(soften_ess=1_000_000.0)
    target = logged_policies.softened("x", scores, asked.log, hard, notes)
    assert isinstance(target, Target)
    assert "effective sample size of 1953.12: the log gives it no 1e+06" in notes[0]


@pytest.mark.skipif(not COAT.exists(), reason="the Coat files are not beside the checkout")
def test_coat_gives_the_published_answer(tmp_path) -> None:
    table = evaluated(tmp_path / "run", "log=coat", f"log.path={COAT}", "reward_model=null")
    assert cell(table, "logging", "ips")["value"] == pytest.approx(2.611, abs=5e-4)
    assert cell(table, "uniform", "ips")["value"] == pytest.approx(2.424, abs=5e-4)
    assert cell(table, "uniform", "snips")["value"] == pytest.approx(2.331, abs=5e-4)
    notes = " ".join(table["about"]["notes"])
    assert "uniform 2.229 (" in notes
    assert cell(table, "item_knn", "snips")["value"] > cell(table, "uniform", "snips")["value"]


def test_coat_policies_never_saw_the_users_they_serve(tmp_path) -> None:
    rng = np.random.default_rng(0)
    users, items = 30, 4
    for name in ("train", "test"):
        np.savetxt(tmp_path / f"{name}.ascii", rng.integers(1, 6, (users, items)), fmt="%d")
    with gzip.open(tmp_path / "propensities.ascii.gz", "wt") as file:
        np.savetxt(file, np.ones((users, items)))
    for kind, n in (("user", users), ("item", items)):
        np.savetxt(tmp_path / f"{kind}_features.ascii", np.ones((n, 1)), fmt="%d")
        (tmp_path / f"{kind}_features_map.txt").write_text("one")
    before = coat_policies(Settings(soften_ess=30), path=str(tmp_path))
    ratings = np.loadtxt(tmp_path / "train.ascii")
    ratings[7] = np.where(ratings[7] >= 4, 1, 5)  # one user likes what they did not
    np.savetxt(tmp_path / "train.ascii", ratings, fmt="%d")
    after = coat_policies(Settings(soften_ess=30), path=str(tmp_path))
    for name in ("popularity", "item_knn"):
        was, now = (q.targets[name].kind.scores.reshape(users, items, -1) for q in (before, after))
        changed = (was != now).any(axis=(1, 2))
        assert not changed[7]
        assert changed.any()


def test_the_frozen_agent_of_a_run_weighs_one_and_is_judged_by_session(run, tmp_path) -> None:
    table = evaluated(tmp_path / "run", "log=run", f"log.path={run}")
    names = list(table["diagnosed"])
    assert names == ["logging", "popularity at 1", "random", "popularity", "buy_again", "item_knn"]
    assert table["about"]["unit"] == "episode"
    assert table["about"]["units"] == 600
    row = cell(table, "logging", "wpdis")
    assert row["ess"] == pytest.approx(600, rel=1e-3)
    frame = pd.read_parquet(run / "decisions")
    assert row["value"] == pytest.approx(frame["reward"].sum() / 600, rel=1e-3)
    assert cell(table, "popularity", "snips")["value"] == cell(table, "logging", "snips")["value"]
    assert {r["baseline"] for r in table["differences"]} == {"logging"}
    assert cell(table, "random", "fqe")["value"] is not None


def test_asking_once_gives_what_asking_at_each_batch_gives(run, tmp_path, monkeypatch) -> None:
    words = ["log=run", f"log.path={run}", "reward_model=null", "log.baselines=[item_knn]"]
    once = evaluated(tmp_path / "once", *words)
    monkeypatch.setattr(logged_runs, "DENSE", 0)
    monkeypatch.setattr(logged_runs, "ASKED", 0)
    monkeypatch.setattr(logged_runs, "CHUNK", 7)
    often = evaluated(tmp_path / "often", *words)
    for policy in ("logging", "item_knn"):
        one, two = (cell(table, policy, "snips") for table in (once, often))
        assert one["value"] == pytest.approx(two["value"], rel=1e-4)
        assert one["ess"] == pytest.approx(two["ess"], rel=1e-4)


def test_a_run_of_slates_is_judged_by_slate(tmp_path) -> None:
    run = tmp_path / "run"
    command(train_agent, [*TRAIN, "env.session.slate_size=2", "env.session.max_steps=3",
                          f"run_dir={run}"])  # fmt: skip
    table = evaluated(tmp_path / "table", "log=run", f"log.path={run}", "log.baselines=[random]")
    assert table["about"]["unit"] == "slate"
    assert {r["estimator"] for r in table["rows"]} >= {"rips", "snrips", "sips"}
    frame = pd.read_parquet(run / "decisions")
    expected = frame.groupby("decision")["reward"].sum().mean()
    assert cell(table, "logging", "rips")["value"] == pytest.approx(expected, rel=1e-3)


def test_an_adaptive_log_is_refused_unless_asked_for(run, tmp_path, capsys) -> None:
    words = ["log=run", f"log.path={run / 'training'}"]
    message = refusal(capsys, tmp_path / "no", *words)
    assert "training is adaptive" in message
    assert "adaptive=true" in message
    assert not (tmp_path / "no").exists()
    table = evaluated(tmp_path / "yes", *words, "adaptive=true")
    assert {r["interval"] for r in table["rows"]} <= {
        "confidence_sequence",
        "withheld",
        "worst case",
    }
    assert "popularity at 1" not in table["diagnosed"]  # it learned from these rows
    assert any("not judged" in note for note in table["about"]["notes"])


def test_a_run_that_changed_since_is_refused(run, tmp_path, capsys) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    cfg = OmegaConf.load(other / "config.yaml")
    cfg.frozen_temperature = 0.5
    OmegaConf.save(cfg, other / "config.yaml")
    message = refusal(capsys, tmp_path / "x", "log=run", f"log.path={other}")
    assert "is not the policy that wrote the log" in message
    cfg.env.simulator.world_seed = 5
    OmegaConf.save(cfg, other / "config.yaml")
    message = refusal(capsys, tmp_path / "x", "log=run", f"log.path={other}")
    assert "of another catalogue" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["log=run"], "log.path=RUN_FOLDER"),
        (["log=run", "log.path=nowhere"], "nowhere is no run folder"),
        (["log=coat"], "log.path=FOLDER"),
        (["log=coat", "log.path=nowhere", "adaptive=true"], "was not written by a policy"),
        (["campaign=man"], "Did you mean 'men'?"),
        (["estimators=[drr]"], "unknown estimator 'drr', did you mean"),
        (["estimators=dr"], "estimators must be a list, got 'dr': estimators=[dr]"),
        (["intervals=[clr]"], "unknown interval 'clr', did you mean 'clt'?"),
        (["intervals=[]"], "intervals must name at least one"),
        (["intervals=[bootstrap]", "adaptive=true"], "only intervals=[confidence_sequence]"),
        (["reward_model=lin"], "model must be linear, boosting"),
        (["alpha=5"], "alpha must be in (0, 1), got 5"),
        (["seed=-1"], "seed must be a whole number"),
        (["soften_ess=0"], "soften_ess must be above 0, got 0"),
        (["adaptive=maybe"], "adaptive must be true or false"),
    ],
)
def test_what_makes_no_sense_is_refused_in_plain_words(words, message, tmp_path, capsys) -> None:
    assert message in refusal(capsys, tmp_path / "x", *words)
    assert not (tmp_path / "x").exists()


def test_an_unknown_baseline_is_named(shop, tmp_path, capsys) -> None:
    words = ["campaign=men", f"log.path={shop}", "baseline=itemknn", "reward_model=null"]
    message = refusal(capsys, tmp_path / "x", *words)
    assert "unknown baseline 'itemknn', did you mean 'item_knn'?" in message


def test_help_and_typos_answer_at_once() -> None:
    for words, code, said in (
        (["--help"], 0, "behaviour: random"),
        (["log=coatt"], 2, "did you mean 'coat'?"),
        (["campain=all"], 2, "did you mean 'campaign'?"),
        (["log.pth=x"], 2, "did you mean 'path'?"),
    ):
        begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert said in done.stdout + done.stderr
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun < 1.5


def test_own_policy_follows_the_order_of_the_log() -> None:
    log = DecisionLog.from_arrays(
        action=[0, 1, 0], reward=[1.0, 0.0, 2.0], propensity=[0.5, 0.25, 1.0], episode=[7, 8, 7],
        step=[1, 0, 0],
    )  # fmt: skip
    for batch in log.batches():
        logged = own(log).logged(batch)
        assert (logged.pi == batch.propensity).all()
        assert (logged.value == batch.reward).all()


def test_a_log_of_frozen_decisions_must_be_there(run, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(run / "config.yaml", other)
    with pytest.raises(ValueError, match="train with frozen_users=1000"):
        run_policies(Settings(), path=str(other))
