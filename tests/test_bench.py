"""The benchmark command measures, writes its table, and refuses what makes no sense."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from encoders.state import EMPTY
from experiments import bench, cli, env_speed
from simulators.settings import Assumptions

ROOT = Path(__file__).resolve().parents[1]


def config(*overrides: str) -> DictConfig:
    """The benchmark's configuration with some keys changed."""
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose("bench", overrides=list(overrides))


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    script = ROOT / "experiments" / "bench.py"
    return subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, timeout=60
    )


def test_the_table_has_a_row_with_median_and_spread(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run(
        "bench=env", "users=64", "items=60", "max_steps=6", "seconds=.1", "repeats=3", f"out={out}"
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    for row, users in zip(rows, ["TinyWorld", "fitted users, everything on"], strict=True):
        assert set(row) == {"bench", "case", "product", "unit", "min", "max", "repeats"}
        assert (row["bench"], row["unit"]) == ("env", "user-slates per CPU-second")
        assert f"{users}, 64 users, 60 items, slate 10" in row["case"]
        assert 0 < row["min"] <= row["product"] <= row["max"]
        assert f"{row['product']:,.0f}" in done.stdout


def test_every_step_counts_all_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "calls_per_second", lambda call, seconds: call() and 7.0)
    rows = bench.bench_env(config("users=8", "items=60", "slate_size=2", "repeats=2"))
    assert [row["product"] for row in rows] == [7.0 * 8] * 2


def test_fitted_users_do_all_they_can() -> None:
    users = env_speed.fitted(config("items=60"))
    off = Assumptions()
    for name in ("trips", "drift", "exposure", "position"):
        assert getattr(users.assumed, name) > getattr(off, name)
    assert users.assumed.patience > 0
    assert users.company is not None  # both from the log: it has baskets and trips enough
    assert users.habits.returns is not None
    assert users.preference.bias.shape[1] > 1  # members
    assert (users.users.past[:, 0] != EMPTY).float().mean() > 0.9


def test_time_is_that_of_the_processor() -> None:
    def sleep_and_work() -> None:
        time.sleep(0.02)
        until = time.process_time() + 0.01
        while time.process_time() < until:
            pass

    assert 60 < bench.calls_per_second(sleep_and_work, 0.05) < 110  # 33 by the clock on the wall


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bench=moon", f"bench must be one of {', '.join(bench.BENCHES)}, got 'moon'"),
        ("users=0", "users must be a whole number of at least 1, got 0"),
        ("items=1.5", "items must be a whole number of at least 2, got 1.5"),
        ("repeats=0", "repeats must be a whole number of at least 1, got 0"),
        ("quick=7", "quick must be true or false, got 7"),
        ("seconds=0", "seconds must be above 0, got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.checked(config(override))


def test_help_names_the_keys_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom experiments import cli\n"
        "try:\n    cli.check('bench', 'Measure.', ['--help'])\n"
        "except SystemExit:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "slate_size: 10" in done.stdout
    assert "options of your own" not in done.stdout  # it has none
