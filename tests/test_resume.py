"""A run that was killed goes on as if it had not been: weights, users, curves, decisions."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import register
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation.decisions import read
from experiments import train_agent
from experiments.arena import arena
from experiments.checkpoints import folders, newest, of_run, save_checkpoint
from experiments.compared_runs import runs_in
from experiments.watch import Watch

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["env=tiny", "evaluators=2", "eval_users=40", "frozen_users=20", "num_envs=32",
         "log_every=96", "eval_every=160", "progress=false", "checkpoint_every=320",
         "env.simulator.trips=2"]  # fmt: skip
DQN = ["agent=dqn", "agent.learning_starts=64", "agent.batch_size=32", "agent.capacity=700"]


class KilledError(BaseException):
    """As if the process had died: nothing is written any more."""


def command(folder: Path, *words: str) -> dict[str, Any]:
    """Run the command in this process; its result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_agent.py", *SMALL, *words, f"run_dir={folder}"])
        train_agent.main()
    return json.loads((folder / "result.json").read_text())


def killed(folder: Path, at: int, *words: str) -> None:
    """Run the command until it dies in the middle of step `at`."""
    whole = Watch.after

    def dying(self: Watch, *args: Any, **settings: Any) -> None:
        if self.step >= at:
            raise KilledError
        whole(self, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "after", dying)
        with pytest.raises(KilledError):
            command(folder, *words)
    assert not (folder / "result.json").exists()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All points but those of the clock, by name."""
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith("time/")]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def same_tensors(one: Any, other: Any, where: str = "") -> None:
    """Nested states are equal to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            same_tensors(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same_tensors(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def assert_same_run(one: Path, other: Path) -> None:
    """Checkpoints, curves, decisions and tables are the same."""
    a, b = newest(one / "checkpoint"), newest(other / "checkpoint")
    assert a is not None
    assert b is not None
    assert a.step == b.step
    assert a.meta["files"].keys() == b.meta["files"].keys() >= {"agent.pt", "env.pt", "watch.pt"}
    for name in a.meta["files"]:
        part = name.removesuffix(".pt")
        first, second = a.part(part), b.part(part)
        if part == "watch":  # parts of the log are cut where checkpoints are
            first["curves"], second["curves"] = dict(first["curves"]), dict(second["curves"])
        same_tensors(first, second, part)
    assert curves(one) == curves(other)
    if (one / "training").exists():
        assert read(one / "training").equals(read(other / "training"))
    tables = [json.loads((f / "result.json").read_text())["table"] for f in (one, other)]
    assert tables[0] == tables[1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    command(folder, *DQN, "steps=960")
    return folder


def test_a_killed_run_goes_on_bit_for_bit(straight: Path, tmp_path: Path, capsys: Any) -> None:
    killed(tmp_path, 500, *DQN, "steps=960")
    assert [f.name for f in folders(tmp_path / "checkpoint")] == ["step-000000000320"]
    command(tmp_path, *DQN, "steps=960", "resume=auto")
    assert f"resume {tmp_path} from step 320" in capsys.readouterr().out
    assert_same_run(straight, tmp_path)


def test_points_written_after_the_checkpoint_do_not_count_twice(tmp_path: Path) -> None:
    killed(tmp_path, 500, *DQN, "steps=960")
    assert curves(tmp_path)["rollout/ctr"][-1][0] == 480  # lost with the process
    command(tmp_path, *DQN, "steps=960", "resume=auto")
    steps = [step for step, _ in curves(tmp_path)["rollout/ctr"]]
    assert steps == sorted(set(steps))


def test_a_run_killed_twice_is_still_the_same(straight: Path, tmp_path: Path) -> None:
    killed(tmp_path, 500, *DQN, "steps=960")
    killed(tmp_path, 900, *DQN, "steps=960", "resume=auto")
    command(tmp_path, *DQN, "steps=960", "resume=auto")
    assert_same_run(straight, tmp_path)


def test_a_finished_run_can_be_made_longer(straight: Path, tmp_path: Path) -> None:
    command(tmp_path, *DQN, "steps=640")
    command(tmp_path, *DQN, "steps=960", "resume=auto")
    assert_same_run(straight, tmp_path)


def test_a_damaged_checkpoint_is_passed_over(straight: Path, tmp_path: Path, capsys: Any) -> None:
    killed(tmp_path, 900, *DQN, "steps=960")
    assert len(folders(tmp_path / "checkpoint")) == 2
    path = tmp_path / "checkpoint" / "step-000000000640" / "experience.pt"
    path.write_bytes(path.read_bytes()[:-100])
    command(tmp_path, *DQN, "steps=960", "resume=auto")
    said = capsys.readouterr().out
    assert "step-000000000640 is damaged: experience.pt" in said
    assert "from step 320" in said
    assert_same_run(straight, tmp_path)


def test_where_all_checkpoints_are_damaged_nothing_is_taken_away(
    tmp_path: Path, capsys: Any
) -> None:
    killed(tmp_path, 500, *DQN, "steps=960")
    for path in tmp_path.glob("checkpoint/*/agent.pt"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit):
        command(tmp_path, *DQN, "steps=960", "resume=auto")
    assert "every checkpoint of" in capsys.readouterr().err
    assert list((tmp_path / "training").glob("part-*"))


def test_kill_9_in_the_middle_leaves_what_resume_needs(tmp_path: Path) -> None:
    words = [*SMALL, *DQN, "steps=100000000", f"run_dir={tmp_path}"]
    script = str(ROOT / "experiments" / "train_agent.py")
    process = subprocess.Popen([sys.executable, script, *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(folders(tmp_path / "checkpoint")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    saved = newest(tmp_path / "checkpoint")
    assert saved is not None
    done = command(tmp_path, *DQN, f"steps={saved.step + 64}", "resume=auto")
    assert done["steps"] == saved.step + 64
    command(tmp_path / "straight", *DQN, f"steps={saved.step + 64}")
    assert_same_run(tmp_path, tmp_path / "straight")


def test_other_settings_are_refused(tmp_path: Path, capsys: Any) -> None:
    killed(tmp_path, 500, *DQN, "steps=960")
    with pytest.raises(SystemExit) as stop:
        command(tmp_path, *DQN, "steps=960", "resume=auto", "agent.gamma=0.5")
    assert stop.value.code == 2
    assert "agent.gamma was 0.8, now 0.5" in capsys.readouterr().err


def test_without_a_run_to_go_on_with_a_new_one_starts(tmp_path: Path, capsys: Any) -> None:
    command(tmp_path / "new", *DQN, "steps=64", "resume=auto", "frozen_users=0")
    assert "a new one starts" in capsys.readouterr().out


@pytest.fixture
def config() -> Any:
    return OmegaConf.create({"a": 1})


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path, config: Any) -> None:
    about = {"catalog": "c", "agent_kind": "DQN"}
    for step in (1, 2, 3):
        parts = {"agent": {"x": torch.ones(step)}}
        save_checkpoint(tmp_path, parts, config, step=step, about=about, keep=2)
    assert [f.name for f in folders(tmp_path)] == ["step-000000000002", "step-000000000003"]
    (tmp_path / "partial-000000000004").mkdir()  # as a process leaves it that dies while writing
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.part("agent")["x"].tolist() == [1, 1, 1]
    path = saved.folder / "agent.pt"
    whole = path.read_bytes()
    for broken, words in (
        (whole[:-1], "expected"),
        (whole[:50] + bytes([whole[50] ^ 1]) + whole[51:], "bits have changed"),
    ):
        path.write_bytes(broken)
        said: list[str] = []
        older = newest(tmp_path, say=said.append)
        assert older is not None
        assert older.step == 2
        assert words in said[0]
    path.unlink()
    said = []
    newest(tmp_path, say=said.append)
    assert "missing" in said[0]
    shutil.rmtree(tmp_path / "step-000000000002")
    assert newest(tmp_path, say=said.append) is None


def test_what_lies_ahead_of_a_run_that_goes_on_does_not_count(tmp_path: Path, config: Any) -> None:
    about, parts = {"catalog": "c", "agent_kind": "DQN"}, {"agent": {"x": torch.ones(1)}}
    save_checkpoint(tmp_path, parts, config, step=1000, about=about, keep=1)
    (tmp_path / "step-000000001000" / "agent.pt").write_bytes(b"damaged")
    assert newest(tmp_path, say=lambda words: None) is None  # so the run starts anew
    save_checkpoint(tmp_path, parts, config, step=400, about=about, keep=1)
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 400


def test_a_best_agent_that_a_killed_run_left_ahead_is_not_taken(tmp_path: Path) -> None:
    words = ["agent=random", "early_stopping=9", "eval_every=64", "evaluators=3",
             "checkpoint_every=64", "frozen_users=0", "steps=256"]  # fmt: skip
    best = dict.fromkeys((64, 128, 192, 256), 1.0)

    def run(at: int, *more: str) -> dict[str, Any]:
        judge = Watch.judge_best
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Watch, "judge_best", lambda self, value: judge(self, best[self.step]))
            return killed(tmp_path, at, *words) if at else command(tmp_path, *words, *more) or {}

    best[192] = 3.0
    run(200)
    for folder in folders(tmp_path / "checkpoint"):  # what came after 64 was lost
        if folder.name > "step-000000000064":
            shutil.rmtree(folder)
    best[128], best[192] = 2.0, 1.0  # another timeline: a device that rounds otherwise
    assert run(0, "resume=auto")["best_eval"] == {"value": 2.0, "step": 128}
    assert [f.name for f in folders(tmp_path / "best")] == ["step-000000000128"]
    assert of_run(tmp_path) == tmp_path / "best"


def test_the_agent_of_a_run_that_ended_early_is_its_best(tmp_path: Path) -> None:
    done = command(tmp_path, *DQN, "steps=100000", "early_stopping=2", "evaluators=3",
                   "checkpoint_every=0")  # fmt: skip
    last, judged = newest(tmp_path / "checkpoint"), newest(of_run(tmp_path))
    assert last is not None
    assert judged is not None
    assert judged.step == done["best_eval"]["step"] < last.step
    world = arena(OmegaConf.load(tmp_path / "config.yaml"), "cpu", 100_000)
    assert world.worlds is not None
    catalog = world.worlds.test[0].catalog
    (run,) = runs_in(tmp_path, OmegaConf.load(tmp_path / "config.yaml").env)
    same_tensors(run.agent(world.spec, catalog).state_dict(), judged.part("agent"))
    assert of_run(tmp_path / "none") == tmp_path / "none" / "checkpoint"


def test_a_run_of_sb3_cut_off_after_its_last_step_is_judged(tmp_path: Path) -> None:
    words = ["agent=sb3_dqn", "agent.batch_size=16", "agent.learning_starts=64", "steps=128"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "close", lambda self: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            command(tmp_path, *words)
    saved = newest(tmp_path / "checkpoint")
    assert saved is not None
    assert saved.step == 128
    done = command(tmp_path, *words, "resume=auto")
    assert "sb3_dqn" in [row["policy"] for row in done["table"]]


def test_episodes_cut_at_a_checkpoint_are_none_of_the_curves(tmp_path: Path) -> None:
    register("recplay-test/Ten-v0", entry_point=lambda: Ten())
    words = ["env=gym", "env.id=recplay-test/Ten-v0", "agent=random", "num_envs=4", "steps=400",
             "log_every=40", "eval_every=0", "eval_users=4", "progress=false"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["t", *words, "checkpoint_every=60", f"run_dir={tmp_path}"])
        train_agent.main()
    points = curves(tmp_path)
    assert {value for _, value in points["rollout/ep_len_mean"]} == {10.0}
    assert {value for _, value in points["rollout/ep_rew_mean"]} == {10.0}


class Ten(gym.Env):
    """A reward of 1 for each of ten steps."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.steps = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return np.zeros(1, dtype=np.float32), 1.0, self.steps == 10, False, {}


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"step": 3}))
    with pytest.raises(ValueError, match="of format 1, this version reads 2"):
        newest(tmp_path)


def test_a_loss_that_is_no_number_leaves_its_batch(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command(tmp_path, *DQN, "steps=20000", "agent.lr=1e30", "agent.grad_clip=1e30",
                "eval_every=0")  # fmt: skip
    said = capsys.readouterr().err
    assert "the loss is" in said
    assert str(tmp_path / "bad_batch.pt") in said
    batch = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    assert len(batch["transition"]["reward"]) == 32
    saved = newest(tmp_path / "checkpoint")
    assert saved is None or saved.step < 20_000


def test_training_ends_early_and_keeps_the_best(tmp_path: Path, capsys: Any) -> None:
    done = command(tmp_path, "agent=random", "steps=100000", "early_stopping=2", "eval_every=32",
                   "evaluators=3", "checkpoint_every=0", "frozen_users=0")  # fmt: skip
    saved = newest(tmp_path / "checkpoint")
    best = newest(tmp_path / "best")
    assert saved is not None
    assert best is not None
    points = dict(curves(tmp_path)["eval/mean_reward"])
    assert done["best_eval"]["step"] == best.step == max(points, key=lambda step: points[step])
    assert saved.step < 100_000
    assert list(points)[-3] == best.step  # two more, neither better
    said = capsys.readouterr().out
    assert f"stopped after {saved.step} of 100000 steps" in said
    assert f"that of step {best.step}, is judged" in said
    assert done["trained"] == saved.step
    assert "has not learnt" not in said  # nor is it meant to


def test_an_agent_that_was_given_too_few_steps_to_learn_is_told_of(
    tmp_path: Path, capsys: Any
) -> None:
    words = ["agent=ppo", "frozen_users=0", "eval_every=0", "num_envs=32"]
    command(tmp_path / "few", *words, "steps=96")
    assert "ppo has not learnt once in 96 steps" in capsys.readouterr().out
    command(tmp_path / "more", *words, "steps=576")
    assert "has not learnt" not in capsys.readouterr().out


def test_early_stopping_needs_a_simulator_that_does_not_judge(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command(tmp_path, "agent=random", "early_stopping=2", "evaluators=1")
    assert "at least 2" in capsys.readouterr().err


def test_resume_takes_one_word(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command(tmp_path, "agent=random", "resume=yes")
    assert "resume must be null or auto" in capsys.readouterr().err
