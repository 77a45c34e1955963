"""The main command, end to end on the tiny world: what it leaves, repeats and refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.base import Decision, Transition
from encoders.state import Observation
from evaluation.decisions import meta, read, seen_by
from experiments import cli, train_agent
from experiments.checkpoints import folders, newest
from experiments.curves import Curves
from experiments.run_folder import open_folder

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["env=tiny", "evaluators=2", "eval_users=80", "frozen_users=50", "num_envs=64",
         "log_every=256", "eval_every=500", "progress=false"]  # fmt: skip
KEYS = ["policy", "mean_reward", "ci_low", "ci_high", "diff_to_popularity", "diff_ci_low",
        "diff_ci_high", "session_length", "coverage", "replay_value"]  # fmt: skip
TAGS = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/coverage", "rollout/regret_mean",
        "rollout/ctr", "time/fps", "train/loss", "eval/mean_reward",
        "eval/mean_ep_length"}  # fmt: skip


def command(folder: Path, *words: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the command in this process; its result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_agent.py", *flags, *SMALL, *words, f"run_dir={folder}"])
        train_agent.main()
    return json.loads((folder / "result.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    """The message with which the command stops; it must stop with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        command(folder, *words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the DQN, as a user starts it, from another folder."""
    folder = tmp_path_factory.mktemp("run")
    words = [
        *SMALL,
        "agent=dqn",
        "steps=1500",
        f"run_dir={folder}",
        f"out={folder}/copy/table.json",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "train_agent.py"), *words],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def test_the_result_has_a_row_for_every_policy(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert [list(row) for row in result["table"]] == [KEYS] * 5
    policies = [row["policy"] for row in result["table"]]
    assert policies == ["random", "popularity", "buy_again", "dqn", "oracle"]
    assert all(row["ci_low"] < row["mean_reward"] < row["ci_high"] for row in result["table"])
    about = {k: result[k] for k in ("env", "agent", "seed", "steps", "fidelity")}
    assert about == {"env": "tiny", "agent": "dqn", "seed": 0, "steps": 1500, "fidelity": {}}
    assert {"prepare", "train", "evaluate", "log"} <= set(result["seconds"])
    assert json.loads((run / "copy" / "table.json").read_text()) == result


def test_the_oracle_beats_random_and_popularity(run: Path) -> None:
    rows = json.loads((run / "result.json").read_text())["table"]
    reward = {row["policy"]: row["mean_reward"] for row in rows}
    assert reward["oracle"] > reward["popularity"] > reward["random"]


def test_the_last_lines_are_the_table_and_the_tensorboard_command(run: Path) -> None:
    lines = (run / "said.txt").read_text().rstrip().splitlines()
    assert lines[-1] == f"tensorboard --logdir {run / 'tensorboard'}"
    assert lines[-7].startswith("random ")
    assert len({len(line) for line in lines[-8:-2]}) == 1  # aligned


def test_the_curves_have_their_names_over_env_steps(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    steps = [e.step for e in events.Scalars("rollout/ep_rew_mean")]
    assert steps == [256, 512, 768, 1024, 1280, 1536]
    reward, length = (
        [e.value for e in events.Scalars(f"rollout/{name}")]
        for name in ("ep_rew_mean", "ep_len_mean")
    )
    assert all(0 <= r <= n for r, n in zip(reward, length, strict=True))  # one unit a step at most
    assert all(0 < e.value < 1 for e in events.Scalars("rollout/regret_mean"))
    assert [e.step for e in events.Scalars("eval/mean_reward")] == [512, 1024, 1536]


def test_the_run_folder_says_what_ran(run: Path) -> None:
    versions = json.loads((run / "versions.json").read_text())
    assert versions["torch"].startswith("2.")
    assert "commit" in versions
    assert "env_name: tiny" in (run / "config.yaml").read_text()
    left = {p.name for p in run.iterdir()}
    assert left == {
        "config.yaml", "versions.json", "result.json", "tensorboard", "checkpoint", "training",
        "decisions", "copy", "said.txt",
    }  # fmt: skip


def test_every_training_decision_is_kept_and_marked_adaptive(run: Path) -> None:
    frame, about = read(run / "training"), meta(run / "training")
    assert about["adaptive"] is True
    assert len(frame) == 1536
    assert frame.groupby(["user", "episode", "step"]).size().max() == 1
    assert frame["reward"].sum() == frame["buy"].sum()


def test_the_frozen_log_can_be_recomputed(run: Path) -> None:
    frame, about = read(run / "decisions"), meta(run / "decisions")
    assert about["adaptive"] is False
    assert about["policy"] == "frozen dqn"
    assert len(frame.groupby(["user", "episode"])) == 50
    assert (
        frame.groupby(["user", "episode"])[["terminated", "truncated"]].sum().sum(axis=1) == 1
    ).all()
    obs, excluded = seen_by(run / "decisions")
    assert len(obs) == len(frame)
    assert ((excluded >= 0).sum(dim=1).numpy() == frame["step"].to_numpy()).all()
    assert (torch.tensor(frame["item"].to_numpy())[:, None] != excluded).all()
    assert frame["propensity"].between(0.1 / 60, 1.0).all()  # a tenth is uniform
    start = pd.Timestamp("2000-01-01")
    assert (frame["time"] > start).all()


def test_the_checkpoint_goes_on_where_it_stopped(run: Path, tmp_path: Path) -> None:
    saved = newest(run / "checkpoint")
    assert saved is not None
    assert saved.step == 1536
    again = command(tmp_path / "b", "agent=dqn", "steps=64", f"checkpoint={run / 'checkpoint'}")
    before = json.loads((run / "result.json").read_text())["table"]
    assert again["table"][3]["mean_reward"] > 0.8 * before[3]["mean_reward"]


def test_weights_whose_schedule_is_over_are_not_trained_in_vain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["agent=dqn", "frozen_users=0", "eval_every=0", "agent.learning_starts=64"]
    command(tmp_path / "a", *words, "steps=256")
    more = [*words, "agent.schedule=linear", f"checkpoint={tmp_path / 'a' / 'checkpoint'}"]
    assert "256 env steps behind it" in refusal(capsys, tmp_path / "b", *more, "steps=256")
    assert not (tmp_path / "b").exists()
    command(tmp_path / "b", *more, "steps=512")


def test_the_same_seed_gives_the_same_table_to_the_last_bit(run: Path, tmp_path: Path) -> None:
    first = json.loads((run / "result.json").read_text())["table"]
    assert command(tmp_path / "a", "agent=dqn", "steps=1500")["table"] == first
    other = command(tmp_path / "b", "agent=dqn", "steps=1500", "seed=1")["table"]
    assert other[3] != first[3]
    assert other[4]["mean_reward"] == first[4]["mean_reward"]  # the judges are the same


def test_slates_of_ten_work_with_every_static_agent(tmp_path: Path) -> None:
    few = ["env.session.slate_size=10", "env.session.max_steps=5", "steps=128"]
    for agent in ("random", "popularity"):
        rows = command(tmp_path / agent, f"agent={agent}", *few)["table"]
        assert [row["policy"] for row in rows] == ["random", "popularity", "buy_again", "oracle"]
        frame = read(tmp_path / agent / "decisions")
        assert frame.groupby("decision").size().eq(10).all()


def test_an_interrupt_leaves_checkpoint_and_logs_readable(tmp_path: Path) -> None:
    words = [*SMALL, "agent=dqn", "steps=100000000", f"run_dir={tmp_path}", "checkpoint_every=512"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "experiments" / "train_agent.py"), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    home = tmp_path / "checkpoint"
    while not folders(home) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert str(tmp_path) in said
    assert "Traceback" not in said
    saved = newest(tmp_path / "checkpoint")
    assert saved is not None
    assert saved.step >= 512
    assert len(read(tmp_path / "training")) == saved.step
    assert not (tmp_path / "result.json").exists()


def test_a_checkpoint_of_another_catalogue_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("agent=dqn", f"checkpoint={run / 'checkpoint'}", "env.simulator.world_seed=7")
    said = refusal(capsys, tmp_path, *words)
    where = run / "checkpoint" / "step-000000001536"
    assert said.startswith(f"error: the checkpoint {where} is of another")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=abc", "steps must be a whole number of at least 1, got 'abc'"),
        ("steps=0", "steps must be a whole number of at least 1, got 0"),
        ("frozen_temperature=0", "frozen_temperature must be above 0, got 0"),
        ("num_envs=1.5", "num_envs must be a whole number"),
        ("device=tpu", "device must be auto, cpu or cuda, got 'tpu'"),
        ("agent.gamma=7", "gamma"),
        ("+agent.gama=1", "agents.dqn.DQN takes no 'gama', did you mean 'gamma'?"),
        ("agent._target_=agents.dqn.DQNN", "agents.dqn has no 'DQNN', did you mean 'DQN'?"),
        ("env.session.slate_size=100", "slate"),
        ("baselines=[randm]", "there is no agent 'randm', did you mean 'random'?; there are: "),
        ("checkpoint=nowhere", "no checkpoint in nowhere"),
        ("agent.gamma=abc", "gamma must be a number, got 'abc'"),
        ("env.session.slate_size=abc", "env.session.slate_size must be a whole number"),
        ("env.session.max_steps=0", "env.session.max_steps must be a whole number of at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    word: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, tmp_path, "agent=dqn", "steps=64", word)
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["env=tiny"], ["env=gym", "env.id=CartPole-v1"], ["env=kuairand"]]
)
def test_no_second_opinion_on_users_that_were_not_fitted_to_trips(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, tmp_path / "run", *words, "second_opinion=true")
    assert "second_opinion=true is for users fitted to trips" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "device=cuda, but torch sees no CUDA device" in refusal(capsys, tmp_path, "device=cuda")


def test_an_agent_from_outside_needs_one_file_and_one_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf" / "agent").mkdir(parents=True)
    (tmp_path / "conf" / "agent" / "mine.yaml").write_text("_target_: outside_agent.Mine\n")
    (tmp_path / "outside_agent.py").write_text("from agents.random import Random as Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ("agent=mine", "baselines=[mine]", "steps=64", "log_training=false")
    result = command(tmp_path / "run", *words, flags=("--config-dir", str(tmp_path / "conf")))
    assert result["agent"] == "mine"
    assert [row["policy"] for row in result["table"]] == ["mine", "popularity", "oracle"]
    assert not (tmp_path / "run" / "training").exists()


def test_points_of_the_curves_are_of_the_episodes_that_ended(tmp_path: Path) -> None:
    curves = Curves(tmp_path, num_envs=2, num_items=4, every=4)
    no, yes = torch.tensor([False, False]), torch.tensor([True, False])
    obs = Observation(*(torch.zeros(2, 0) for _ in range(7)))
    for done, left, reward in ((no, no, [1.0, 5.0]), (yes, no, [2.0, 5.0]), (no, yes, [7.0, 5.0])):
        slate, chosen = torch.tensor([[0], [2]]), torch.tensor([[True], [False]])
        decision = Decision(slate, torch.ones(2, 1))
        gained = torch.tensor(reward)
        step = Transition(
            obs, None, decision, gained, chosen, gained[:, None], obs, None, left, done
        )
        curves.add(step, {"train/loss": gained[0]})
        if curves.due:
            curves.write(torch.tensor([0.25, 0.75]))
    curves.write(torch.zeros(2))
    curves.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    points = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert points["rollout/ep_rew_mean"] == [3.0, 7.0]  # 1 + 2, then a new episode of 7
    assert points["rollout/ep_len_mean"] == [2.0, 1.0]
    assert points["rollout/coverage"] == [0.5, 0.5]
    assert points["rollout/ctr"] == [0.5, 0.5]
    assert points["rollout/regret_mean"] == [0.5, 0.0]
    assert points["train/loss"] == [2.0, 7.0]
    assert [e.step for e in events.Scalars("rollout/ctr")] == [4, 6]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["env.session.max_steps=100"], "max_steps=100"),  # found before the folder is touched
        (["+env.session.foo=1"], "foo"),
        (["seed=99999999999"], "seed must be below"),
        (["baselines=popularity"], "baselines must be a list"),
        (["out=/proc/nope/x.json"], "out=/proc/nope/x.json cannot be written"),
        (["env.session.reward.path=envs.rewards.unts"], "has no 'unts', did you mean 'units'?"),
    ],
)
def test_bad_words_are_refused_and_nothing_is_touched(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed() -> None:
        checked = cli.check("train_agent", "", [*SMALL, *words])  # as the script does, first of all
        command(tmp_path / "run", *checked[len(SMALL) :])

    with pytest.raises(SystemExit) as stop:
        typed()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_run_takes_the_folder_of_another(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    cfg = OmegaConf.create(
        {"run_dir": str(tmp_path), "env_name": "e", "agent_name": "a", "seed": 0}
    )
    open_folder(cfg)
    (tmp_path / "result.json").write_text("old")
    with pytest.raises(ValueError, match=r"holds a run already.*another folder"):
        open_folder(cfg)
    assert (tmp_path / "result.json").read_text() == "old"
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cfg = OmegaConf.create(
        {"run_dir": str(tmp_path / "file"), "env_name": "e", "agent_name": "a", "seed": 0}
    )
    with pytest.raises(ValueError, match=r"run_dir=.*file.*choose another folder"):
        open_folder(cfg)
