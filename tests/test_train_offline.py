"""The offline command on the logs of a tiny run: what it leaves, says and refuses."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.testing import synthetic_spec
from evaluation import decisions
from experiments import compared_runs, evaluate_policies, train_agent, train_offline
from experiments.logged_transitions import Logged
from experiments.prepare import Worlds
from experiments.train_offline import told

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "train_offline.py"
TRAIN = ["env=tiny", "agent=popularity", "steps=1024", "num_envs=64", "evaluators=2", "seed=3",
         "eval_users=40", "frozen_users=60", "progress=false",
         "env.simulator.items=30"]  # fmt: skip
SMALL = ["updates=40", "batch_size=32", "log_every=20", "eval_every=20", "progress=false",
         "agent.width=16"]  # fmt: skip


def command(script: Any, *words: str) -> None:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
        script.main()


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message with which the command stops; it must stop with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        command(train_offline, *SMALL, *words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policy shows what is popular, and explores nothing while it trains."""
    folder = tmp_path_factory.mktemp("runs") / "popularity"
    command(train_agent, *TRAIN, f"run_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def learnt(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the offline command leaves of the run's frozen log."""
    folder = tmp_path_factory.mktemp("offline") / "cql"
    command(train_offline, *SMALL, f"run={run}", "agent=cql", "logs=decisions", "seed=1",
            f"run_dir={folder}", f"out={folder}.json")  # fmt: skip
    return folder


def test_the_table_compares_with_the_policy_that_wrote_the_log(learnt: Path) -> None:
    result = json.loads((learnt / "result.json").read_text())
    rows = {row["policy"]: row for row in result["table"]}
    assert list(rows) == ["random", "popularity", "logging popularity", "cql-offline", "oracle"]
    assert rows["logging popularity"]["diff_to_logging popularity"] == 0.0
    same = "mean_reward"  # the run's agent is popularity itself
    assert rows["logging popularity"][same] == pytest.approx(rows["popularity"][same], abs=0.05)
    assert all("diff_ci_low" in row for row in rows.values())
    about = {k: result[k] for k in ("env", "agent", "seed", "updates")}
    assert about == {"env": "tiny", "agent": "cql-offline", "seed": 1, "updates": 40}
    assert json.loads(learnt.with_suffix(".json").read_text()) == result


def test_the_result_says_how_much_log_there_was(learnt: Path, run: Path) -> None:
    logged = json.loads((learnt / "result.json").read_text())["logged"]
    frame = decisions.read(run / "decisions")
    assert logged["steps"] == len(frame)
    assert logged["episodes"] == 60
    assert logged["cut"] == 0
    assert logged["session_reward"] == pytest.approx(frame.reward.sum() / 60)
    assert logged["explored"] == pytest.approx((1 - frame.propensity).mean(), rel=1e-5)


def test_curves_are_over_updates(learnt: Path) -> None:
    events = EventAccumulator(str(learnt / "tensorboard")).Reload()
    tags = {"train/loss", "train/q_mean", "train/learning_rate", "offline/conservative_gap",
            "eval/mean_reward"}  # fmt: skip
    assert set(events.Tags()["scalars"]) >= tags
    for tag in ("train/loss", "eval/mean_reward"):
        assert [e.step for e in events.Scalars(tag)] == [20, 40]


def test_the_folder_is_a_run_as_others_are(learnt: Path, run: Path) -> None:
    assert {p.name for p in learnt.iterdir()} == {
        "config.yaml", "versions.json", "result.json", "tensorboard", "checkpoint", "decisions",
    }  # fmt: skip
    found = compared_runs.runs_in(learnt, OmegaConf.load(learnt / "config.yaml").env)
    assert [(r.policy, r.seed) for r in found] == [("cql-offline", 1)]
    assert found[0].curve()[0].tolist() == [20, 40]
    env = OmegaConf.load(learnt / "config.yaml").env
    assert env == OmegaConf.load(run / "config.yaml").env
    assert decisions.meta(learnt / "decisions")["policy"] == "frozen cql-offline"


def test_the_evaluator_judges_it_on_the_run_s_log_and_on_its_own(
    learnt: Path, run: Path, tmp_path: Path
) -> None:
    run_folder = OmegaConf.load(learnt / "config.yaml").offline.run
    config = OmegaConf.create({"agent_name": "cql"})
    (line,) = train_offline.next_steps(Path(run_folder), learnt, config, [run / "training"])[1:]
    other = shlex.split(line.partition("python ")[2])[-1]  # as it is printed
    quick = ["progress=false", "reward_model=null", "log.baselines=[random]"]
    command(evaluate_policies, "log=run", f"log.path={run}", other, *quick,
            f"run_dir={tmp_path / 'one'}")  # fmt: skip
    rows = json.loads((tmp_path / "one" / "table.json").read_text())["rows"]
    assert "cql" in {row["policy"] for row in rows}
    command(evaluate_policies, "log=run", f"log.path={learnt}", *quick,
            f"run_dir={tmp_path / 'two'}")  # fmt: skip
    rows = json.loads((tmp_path / "two" / "table.json").read_text())["rows"]
    assert "cql-offline at 0.25" in {row["policy"] for row in rows}


def test_the_learnt_agent_comes_back_as_it_was_saved(learnt: Path) -> None:
    agent: Any = train_offline.learnt(str(learnt))
    (home,) = (learnt / "checkpoint").glob("step-*")
    saved = torch.load(home / "agent.pt", weights_only=True)
    assert saved["updates"] == agent.updates == 40
    for name, value in agent.target.state_dict().items():
        assert torch.equal(value, saved["target"][name])


def test_a_log_that_hardly_explored_is_warned_of_and_the_same_seed_repeats(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for name in ("one", "two"):
        command(train_offline, *SMALL, f"run={run}", "agent=behaviour_cloning", "eval_every=0",
                "evaluators=1", "eval_users=20", "frozen_users=0", "baselines=[]",
                "agent.schedule=cosine", f"run_dir={tmp_path / name}")  # fmt: skip
        tables.append(json.loads((tmp_path / name / "result.json").read_text())["table"])
    said = capsys.readouterr().out
    assert "WARNING: the log's policy hardly explored (0.00%)" in said
    assert "dropped where the log breaks off" in said
    assert "evaluate_policies.py log=run" in said
    assert tables[0] == tables[1]
    assert [row["policy"] for row in tables[0]] == [
        "logging popularity", "behaviour_cloning-offline", "oracle",
    ]  # fmt: skip
    assert not (tmp_path / "one" / "decisions").exists()


def test_a_log_that_explored_is_not_warned_of() -> None:
    logged = Logged(("dqn",), 10, 9, 1, 0, 3, 2, explored=0.3, coverage=0.5, session_reward=1.0)
    assert not any("WARNING" in line for line in told(logged))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["agent=dqn"], "agent=dqn does not learn from a log"),
        ([], "run=RUN_DIR is needed"),
        (["run=/nowhere"], "run=/nowhere is no run folder"),
        (["updates=0", "run=RUN"], "updates must be a whole number of at least 1, got 0"),
        (["evaluators=0", "run=RUN"], "evaluators must be"),
        (["run=RUN", "logs=/nowhere"], "no decision log in /nowhere"),
        (["run=RUN", "baselines=ease"], "baselines must be a list"),
        (["run=RUN", "agent.alpha=-1"], "alpha must be at least 0"),
        (["run=RUN", "run_dir=RUN"], "holds a run already"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    words = [w.replace("RUN", str(run)) if "=RUN" in w else w for w in words]
    agent = [] if any(w.startswith("agent=") for w in words) else ["agent=cql"]
    assert said in refusal(capsys, *agent, *words)


def test_a_run_without_logs_or_of_another_shop_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "training")
    assert "train with log_training=true, or take logs=decisions" in refusal(capsys, f"run={bare}")
    other = OmegaConf.load(bare / "config.yaml")
    other.env.simulator.world_seed = 5
    OmegaConf.save(other, bare / "config.yaml")
    assert "another catalogue" in refusal(capsys, f"run={bare}", "logs=decisions")


def test_help_and_typos_answer_at_once() -> None:
    asked = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    assert "agent=" in asked.stdout
    assert "cql" in asked.stdout
    assert "updates: 5000" in asked.stdout
    for word, said in {"update=3": "did you mean 'updates'?", "log=both": "logs=training"}.items():
        wrong = subprocess.run([sys.executable, str(SCRIPT), word], capture_output=True, text=True)
        assert wrong.returncode == 2
        assert said in wrong.stderr


def test_who_wrote_any_frozen_log_does_not_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds = Worlds(train=None, test=["writer", "other"], events=None, replay=None, fidelity={},
                    notes=[])  # fmt: skip
    arena = SimpleNamespace(worlds=worlds)
    monkeypatch.setattr(decisions, "meta", lambda folder: {"adaptive": folder.name == "training"})
    logs = {"training": ["writer", "other"], "decisions": ["other"], "both": ["other"]}
    for name, judges in logs.items():
        folders = [Path(part) for part in train_offline.LOGS[name]]
        assert train_offline.unseen(arena, folders).test == judges


def test_the_policy_compared_with_is_the_one_that_the_run_judged(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "run"
    whole.mkdir()
    shutil.copy(run / "config.yaml", whole)
    for name in ("checkpoint", "best"):  # it stopped early, at a step before the last one
        (whole / name / "step-000000000001").mkdir(parents=True)
    taken: list[Path] = []
    monkeypatch.setattr(train_offline, "load_checkpoint", lambda home, *_: taken.append(home))
    world = SimpleNamespace(spec=synthetic_spec(), catalog="shop")
    cfg = OmegaConf.create({"baselines": []})
    assert list(train_offline.others(cfg, whole, world)[0]) == ["logging popularity"]
    assert taken == [whole / "best"]
