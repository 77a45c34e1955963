"""The benchmark command measures, writes tables and pages, and refuses what makes no sense."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments import bench, bench_rows, cli
from experiments.bench_rows import KEYS, Row, fixed, row

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {"cpu": "a CPU", "cores": 2, "memory_gib": 8, "threads": 1, "torch": "2", "python": "3",
           "gpu": None}  # fmt: skip


def config(*overrides: str) -> DictConfig:
    """The benchmark's configuration with some keys changed."""
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return compose("bench", overrides=list(overrides))


def found(bench_: str, case: str = "a case") -> dict[str, Any]:
    return {"hardware": {bench_: MACHINE}, "rows": [row(bench_, case, "u", fixed(1.0, 2.0, 6.0))]}


def test_a_row_has_medians_spread_and_ratios() -> None:
    speed = bench_rows.Speed((3.0, 1.0, 2.0), (1.0, 1.5, 0.5))
    made = row("env", "case", "steps", speed, peer=fixed(4.0), peer_name="P", peer_goal=0.5,
               limit=8.0, limit_name="L", limit_goal=0.3)  # fmt: skip
    assert tuple(made) == KEYS
    assert (made["product"], made["low"], made["high"], made["wall"]) == (2.0, 1.0, 3.0, 1.0)
    assert (made["ratio_to_peer"], made["ratio_to_limit"]) == (0.5, 0.25)
    assert bench_rows.reached(made) is False  # the peer's goal is met, the limit's is not
    assert "NOT REACHED" in bench_rows.table([made])
    assert bench_rows.reached({**made, "limit_goal": 0.25}) is True
    alone = row("env", "case", "steps", speed, peer_name="P")
    assert bench_rows.reached(alone) is None
    assert "P: not here, pip install 'recplay[bench]'" in bench_rows.table([alone])


def test_works_take_turns_and_time_is_that_of_the_processor() -> None:
    order: list[str] = []

    def busy() -> int:
        order.append("busy")
        time.sleep(0.02)
        until = time.process_time() + 0.01
        while time.process_time() < until:
            pass
        return 2

    def idle() -> int:
        order.append("idle")
        return 1

    speeds = bench_rows.in_turn({"busy": busy, "idle": idle}, 2, 0.0)
    assert order == ["busy", "idle"] * 3
    assert 120 < speeds["busy"].rate < 220  # 2 of 10 ms; 67 by the clock
    assert all(rate < 70 for rate in speeds["busy"].wall)


def test_a_process_of_its_own_says_what_failed() -> None:
    with pytest.raises(ValueError, match=r"(?s)case nothing failed: .*KeyError: 'nothing'"):
        bench_rows.alone("ope_speed", "nothing", {})


def test_memory_is_that_of_the_process_not_of_its_parent() -> None:
    held = bytearray(480 * bench_rows.MIB)  # the parent's
    code = "from experiments.bench_rows import peak_mib; print(peak_mib())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert 5 < float(done.stdout) < len(held) / bench_rows.MIB / 2
    assert bench_rows.peak_mib() > 480


def test_the_command_writes_rows_and_the_machine(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    out.write_text(json.dumps(found("env", "old")))
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "bench.py"), "bench=rank", "quick=true",
         "seconds=.01", "repeats=2", f"out={out}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = json.loads(out.read_text())
    assert set(table["hardware"]) == {"env", "rank"}  # what was there is kept
    assert table["hardware"]["rank"]["threads"] == 1
    assert [made["case"] for made in table["rows"] if made["bench"] == "env"] == ["old"]
    for made in (made for made in table["rows"] if made["bench"] == "rank"):
        assert set(made) == set(KEYS)
        assert made["case"] in done.stdout
        assert 0 < made["low"] <= made["product"] <= made["high"]


def test_a_file_that_is_no_table_is_not_written_over(tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    out.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"mine\.json is no table of benchmarks"):
        bench.there(str(out))
    assert bench.there(None) == bench.there(str(tmp_path / "none.json"))


def test_all_keeps_what_was_not_measured_and_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "perf.json"
    old = bench.merged(found("ope", "old"), found("env", "old"))
    out.write_text(json.dumps(old))

    def run(command: list[str], **given: Any) -> "subprocess.CompletedProcess[str]":
        name, file = command[2].partition("=")[2], Path(command[3].partition("=")[2])
        assert "quick=true" in [word.lower() for word in command]
        assert "obp=null" in command
        if name == "ope":
            return subprocess.CompletedProcess(command, 2, stderr="words\nno memory left\n")
        file.write_text(json.dumps(found(name, "new")))
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.measure_all(config("bench=all", f"out={out}", "quick=true"))
    table = json.loads(out.read_text())
    cases = {made["bench"]: made["case"] for made in table["rows"]}
    assert cases == {**dict.fromkeys(bench.BENCHES, "new"), "ope": "old"}
    assert list(cases) == list(bench.BENCHES)  # in their order, whatever was kept
    said = capsys.readouterr().out
    assert "bench=ope failed after 0 s: no memory left" in said
    assert "[1/9] bench=env" in said
    assert (tmp_path / "perf.md").exists()


def test_a_check_fails_on_a_loss_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def table(ours: float) -> dict[str, Any]:
        made: Row = row("env", "steps", "u", fixed(ours), peer=fixed(1.0), peer_name="P")
        return {"hardware": {"env": MACHINE}, "rows": [made]}

    out = tmp_path / "perf.json"
    out.write_text(json.dumps(table(10.0)))
    asked: list[Any] = []

    def runs(ours: float) -> Any:
        return lambda cfg: asked.append((cfg.repeats, cfg.curves)) or [table(ours)]

    monkeypatch.setattr(bench, "runs", runs(8.0))
    bench.check(config("bench=check", f"out={out}"))
    monkeypatch.setattr(bench, "runs", runs(6.0))
    with pytest.raises(SystemExit, match="1"):
        bench.check(config("bench=check", f"out={out}", "repeats=4"))
    assert asked == [(3, False), (4, False)]
    said = capsys.readouterr().out
    assert "LOST env: steps: 6 x P, 10 in the committed table (-40%)" in said
    assert "1 ratios: 1 lost more than they may, 0 absent on one side" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("bench=moon", r"bench must be one of env, .*, check, got 'moon'"),
        ("users=0", "users must be a whole number of at least 1, got 0"),
        ("items=1.5", "items must be a whole number of at least 2, got 1.5"),
        ("repeats=0", "repeats must be a whole number of at least 1, got 0"),
        ("quick=7", "quick must be true or false, got 7"),
        ("curves=maybe", "curves must be true or false, got 'maybe'"),
        ("seconds=0", "seconds must be above 0, got 0"),
        ("device=tpu", "device must be cpu or cuda, got 'tpu'"),
        ("bench=all", r"bench=all writes a table and a page .* give out=PATH.json, got out=None"),
        ("bench=page", "bench=page writes a table"),
    ],
)
def test_what_makes_no_sense_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.checked(config(override))


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist: python experiments/bench\.py bench=all"):
        bench.read(tmp_path / "no.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="no table of benchmarks: expected hardware and rows"):
        bench.read(tmp_path / "list.json")


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
