"""Start-up is timed from outside, in processes; what cannot start is told."""

import sys
from subprocess import CompletedProcess
from typing import Any

import pytest

from experiments import bench_rows, startup_speed


def test_a_process_is_timed_by_its_own_processor_time_and_by_the_clock() -> None:
    code = "import time; b = time.process_time()\nwhile time.process_time() < b + .2: pass"
    cpu, wall = startup_speed.timed([sys.executable, "-c", f"{code}\ntime.sleep(.3)"])
    assert 0.2 <= cpu < 0.45
    assert wall > 0.5
    with pytest.raises(ValueError, match=r"(?s)failed: .*ZeroDivisionError"):
        startup_speed.timed([sys.executable, "-c", "1 / 0"])


def test_the_first_env_step_of_a_run_is_seen_from_the_start_of_its_process() -> None:
    found = startup_speed.first_step("tiny", 0, "cpu")
    assert found["seconds"] > found["cpu"] > 0.3  # imports alone take as long
    assert found["peak"] > 100


def test_what_cannot_start_is_told_in_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = CompletedProcess([], 2, stdout="", stderr="Traceback ...\nerror: no config\n")
    monkeypatch.setattr(startup_speed.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"^error: no config$"):
        startup_speed.first_step("custom", 0, "cpu")


def test_rows_hold_seconds_to_goals_and_skip_an_env_without_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(startup_speed, "timed", lambda command: (0.5, 2.0))
    steps = iter([{"seconds": 90.0, "cpu": 60.0, "peak": 1.0}]  # cold: fills the caches
                 + [{"seconds": 8.0, "cpu": 4.0, "peak": 7.0}] * 2)  # fmt: skip
    monkeypatch.setattr(startup_speed, "first_step", lambda *given: next(steps))
    found = startup_speed.rows(4, 0.0, 0, False)
    told = {r["case"]: r for r in found}
    help_ = told["train_agent.py --help, by the clock"]
    assert (help_["product"], help_["ratio_to_limit"], help_["absolute"]) == (0.5, 0.5, True)
    assert bench_rows.reached(help_) is False
    warm = told["first env step of a warm run, env=ecommerce, by the clock"]
    assert warm["ratio_to_limit"] == pytest.approx(10 / 8)
    assert warm["memory_mib"] == 7.0

    def absent(*given: Any) -> dict[str, float]:
        raise ValueError("no data here")

    monkeypatch.setattr(startup_speed, "first_step", absent)
    assert len(startup_speed.rows(1, 0.0, 0, False)) == len(found) - 2
    assert "first env step of env=ecommerce: skipped, no data here" in capsys.readouterr().out
