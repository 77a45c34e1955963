"""Help and typos answer before anything heavy is imported, and name the nearest right word."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A configuration folder with two envs and two agents."""
    files = {
        "train.yaml": "defaults:\n  - env: shop\n  - agent: dqn\n"
        "  - override hydra/job_logging: x\n  - _self_\n\nsteps: 100  # of training\n"
        "seed: 0\nname: ${hydra:runtime.choices.env}\n"
        "hydra:\n  run:\n    dir: .\n",
        "env/shop.yaml": "data: null\nsession: {slate_size: 1}\nweights: {}\n",
        "env/cinema.yaml": "seats: 3\n",
        "agent/dqn.yaml": "_target_: agents.DQN\ngamma: 0.9\nnet: {width: 8}\n",
        "agent/random.yaml": "_target_: agents.Random\n",
        "agent/logged.yaml": "# Learns from a log: offline\n_target_: agents.Logged\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def refusal(argv: list[str], conf: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which a command line is refused; it must be refused."""
    with pytest.raises(SystemExit) as stop:
        cli.check("train", "Train.", argv, conf)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["env=shopp"],
            "error: env=shopp: there is no such env, did you mean 'shop'?; there are: c",
        ),
        (["agent=dnq"], "did you mean 'dqn'?; there are: dqn, logged, random"),
        (["agent=dqn,rando", "-m"], "agent=rando: there is no such agent, did you mean 'random'?"),
        (["stepz=5"], "stepz: there is no such key, did you mean 'steps'?"),
        (["+stepps=5"], "+stepps: there is no such key, did you mean 'steps'?"),
        (["++sed=5"], "++sed: there is no such key, did you mean 'seed'?"),
        (["+foo=1"], "+foo: there is no such key; there are: env, agent, steps, seed, name"),
        (["~stepps"], "~stepps: there is no such key"),
        (["+agnt.lr=1"], "+agnt.lr: there is no such key, did you mean 'agent'?"),
        (["agent.gama=1"], "agent.gama: there is no such key, did you mean 'gamma'?"),
        (["agent.net.widht=1"], "did you mean 'net.width'?"),
        (
            ["agent=random", "agent.gamma=1"],
            "agent.gamma: there is no such key; agent has: none",
        ),
        (["env.session.slate=2"], "did you mean 'session.slate_size'?"),
        (["dqn"], "expected key=value, got 'dqn', did you mean 'agent=dqn'?"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is no folder"),
        (["--config-dir=nowhere"], "--config-dir nowhere is no folder"),
    ],
)
def test_a_typo_is_refused_with_the_nearest_right_word(
    argv: list[str], message: str, conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(argv, conf, capsys)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["env=cinema", "env.seats=4", "agent=random", "steps=5", "seed=1,2", "-m"],
        ["agent.gamma=0.5", "agent.net.width=4", "+agent.lr=1", "env.session.slate_size=2"],
        ["env.data.path=x", "env.weights.click=1"],  # inside what the yaml leaves open
        ["hydra.verbose=true", "hydra/launcher=basic", "--cfg", "job", "-cd", "."],
        ["agent=choice(dqn,random)", "~agent.net"],
        ["agent._target_=mine.DQN"],  # a plug-in in the place of what the yaml names
    ],
)
def test_what_is_right_passes(argv: list[str], conf: Path) -> None:
    cli.check("train", "Train.", argv, conf)


def test_hydra_gets_the_words_as_it_wants_them(conf: Path) -> None:
    words = ["env.data.path=x", "seed=1,2", "-m", "+env.data.more=1", "+agent.lr=1"]
    given = cli.check("train", "Train.", words, conf)
    assert given == ["-m", "++env.data.path=x", "seed=1,2", "+env.data.more=1", "+agent.lr=1"]


def test_a_broken_yaml_is_named(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (conf / "agent/dqn.yaml").write_text("a: [1\n")
    assert "dqn.yaml is no valid yaml" in refusal([], conf, capsys)


def test_options_of_a_plug_in_folder_count(
    conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plug = tmp_path / "plug"
    (plug / "env").mkdir(parents=True)
    (plug / "env" / "circus.yaml").write_text("clowns: 3\n")
    for flag in (["--config-dir", str(plug)], [f"--config-dir={plug}"], ["-cd", str(plug)]):
        cli.check("train", "Train.", [*flag, "env=circus", "env.clowns=4"], conf)
        assert "did you mean 'clowns'" in refusal(
            [*flag, "env=circus", "env.clown=4"], conf, capsys
        )
    refusal(["env=circus"], conf, capsys)
    with pytest.raises(SystemExit):
        cli.check("train", "Train.", ["--config-dir", str(plug), "--help"], conf)
    assert "env=cinema | circus | shop   (default shop)" in capsys.readouterr().out


def test_help_lists_options_keys_and_defaults(
    conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.check("train", "Train an agent.", ["-h"], conf)
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert said.startswith("Train an agent.")
    assert "agent=dqn | logged* | random   (default dqn)" in said
    assert "* learns from a log" in said
    assert "steps: 100  # of training" in said
    assert "hydra" not in said


def test_help_of_the_script_is_quick_and_imports_nothing_heavy() -> None:
    heavy = (
        "torch",
        "transformers",
        "hydra",
        "stable_baselines3",
        "sklearn",
        "pandas",
        "gymnasium",
    )
    program = (
        "import runpy, sys\n"
        "sys.argv = ['train_agent.py', '--help']\n"
        "try: runpy.run_path('experiments/train_agent.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        f"    sys.exit(stop.code or [m for m in {heavy} if m in sys.modules])\n"
        "sys.exit('no exit')\n"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    took = time.perf_counter() - begun
    assert (done.returncode, done.stderr.strip()) in [(0, ""), (1, "[]")]
    assert "agent=" in done.stdout
    assert took < 1.5


@pytest.mark.parametrize("argv", [["env=no"], ["stepz=1"], ["+foo=1"]])
def test_an_error_of_the_script_is_quick_too(argv: list[str]) -> None:
    begun = time.perf_counter()
    script = [sys.executable, "experiments/train_agent.py", *argv]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert time.perf_counter() - begun < 1.5


def test_a_value_error_becomes_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECPLAY_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop, cli.plain_errors():
        raise ValueError("steps must be positive")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: steps must be positive\n"
    monkeypatch.setenv("RECPLAY_DEBUG", "1")
    with pytest.raises(ValueError, match="positive"), cli.plain_errors():
        raise ValueError("steps must be positive")


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(TypeError), cli.plain_errors():
        len(3)  # type: ignore[arg-type]


def test_an_interrupt_is_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, cli.plain_errors():
        raise KeyboardInterrupt("all is in runs/x")
    assert stop.value.code == 130
    assert "all is in runs/x" in capsys.readouterr().err


def test_a_target_that_the_yaml_does_not_have_is_refused(
    conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "env._target_: there is no such key" in refusal(["env._target_=mine.Shop"], conf, capsys)


def failing(**_):
    return 1 / 0


def test_a_plug_in_that_raises_is_told_with_its_line(capsys):
    from hydra.utils import instantiate

    with pytest.raises(SystemExit) as stop, cli.plain_errors():
        instantiate({"_target_": f"{__name__}.failing", "classes": 0})
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "failing failed with ZeroDivisionError: division by zero" in said
    assert "return 1 / 0" in said
    assert "test_cli.py line" in said
