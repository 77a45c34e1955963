"""Measure how fast things are, beside peers and limits, and how right the evaluator is.

python experiments/bench.py bench=env
python experiments/bench.py bench=train
python experiments/bench.py bench=ope obp=WHEEL
python experiments/bench.py bench=ope_accuracy
python experiments/bench.py bench=all out=docs/performance.json
python experiments/bench.py bench=page out=docs/performance.json
python experiments/bench.py bench=check
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("bench", __doc__, sys.argv[1:])  # before torch: at once

import importlib
import json
import subprocess
import tempfile
import time
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from experiments.bench_check import compared
from experiments.bench_page import hardware, write_page
from experiments.bench_rows import Row, table
from experiments.run_folder import ROOT, refuse_unwritable, write_json

BENCHES = {  # in the order of bench=all: each a module with `rows(...)`, and what else it takes
    "env": ("env_speed", ("curves", "size")),
    "train": ("train_speed", ()),
    "encode": ("encode_speed", ()),
    "fit": ("fit_speed", ()),
    "scoring": ("scoring_speed", ()),
    "ope": ("ope_speed", ("curves", "obp")),
    "rank": ("rank_speed", ()),
    "bandits": ("bandit_speed", ()),
    "startup": ("startup_speed", ()),
}  # fmt: skip
OTHERS = ("ope_accuracy", "all", "page", "check")
REPEATS, ACCURACY, FEW = 5, 100, 3  # windows; logs a world of ope_accuracy; windows of a check
COMMITTED = ROOT / "docs" / "performance.json"
PASSED_ON = ("seconds", "repeats", "quick", "curves", "obp", "device", "threads", "seed")


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="bench")
def main(cfg: DictConfig) -> None:
    """Run one benchmark and print its table, or all."""
    with cli.plain_errors():
        checked(cfg)
        refuse_unwritable(cfg.out, "out", file=True)
        torch.set_num_threads(cfg.threads)
        if cfg.bench == "ope_accuracy":
            accuracy(cfg)
        elif cfg.bench == "page":
            print(f"wrote {write_page(Path(cfg.out), read(Path(cfg.out)))}")
        elif cfg.bench == "all":
            measure_all(cfg)
        elif cfg.bench == "check":
            check(cfg)
        else:
            before = there(cfg.out)  # refused, if it is something else, before the work
            rows = measured(cfg)
            print(table(rows))
            if cfg.out:
                found = {"hardware": {cfg.bench: hardware(cfg.threads, cfg.device)}, "rows": rows}
                write_json(Path(cfg.out), merged(before, found))


def measured(cfg: DictConfig) -> list[Row]:
    """The rows of one benchmark."""
    name, more = BENCHES[cfg.bench]
    module = importlib.import_module(f"experiments.{name}")
    extra = {key: cfg[key] for key in more if key != "size"}
    if "size" in more:
        keys = ("users", "items", "slate_size", "dim", "max_steps")
        extra["size"] = module.Size(**{key: cfg[key] for key in keys})
    repeats = REPEATS if cfg.repeats is None else cfg.repeats
    rows: list[Row] = module.rows(
        repeats, float(cfg.seconds), cfg.seed, cfg.quick, cfg.device, **extra
    )
    return rows


def accuracy(cfg: DictConfig) -> None:
    """Bias, RMSE, coverage and choices of every off-policy estimator in worlds of known truth."""
    from experiments import ope_accuracy

    repeats = ACCURACY if cfg.repeats is None else cfg.repeats
    rows = ope_accuracy.accuracy(repeats, cfg.seed, cfg.quick)
    print(ope_accuracy.text(rows))
    if cfg.out:
        write_json(Path(cfg.out), rows)


def measure_all(cfg: DictConfig) -> None:
    """Run every benchmark in a process of its own, then write table and page.

    What one of them could not measure is kept from the table that is there.
    """
    out, before = Path(cfg.out), there(cfg.out)
    for found in runs(cfg):
        before = merged(before, found)
        write_json(out, before)  # after each: an interrupted run keeps what it has
    print(f"wrote {out} and {write_page(out, before)}")


def runs(cfg: DictConfig) -> Any:
    """What each benchmark found, one after the other; a line for one that failed."""
    words = [f"{key}={'null' if cfg[key] is None else cfg[key]}" for key in PASSED_ON]
    for i, bench in enumerate(BENCHES, start=1):
        print(f"[{i}/{len(BENCHES)}] bench={bench}", flush=True)
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, str(Path(__file__)), f"bench={bench}", f"out={file}", *words]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            took = f"{time.perf_counter() - begun:.0f} s"
            if done.returncode or not file.exists():
                said = (done.stderr.strip().splitlines() or ["no word why"])[-1]
                print(f"bench={bench} failed after {took}: {said}", flush=True)
                continue
            print(f"bench={bench} took {took}", flush=True)
            yield read(file)


def merged(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The table with the rows of the benchmarks that were run in place of their old ones."""
    kept = [row for row in before["rows"] if row["bench"] not in found["hardware"]]
    rows = sorted([*kept, *found["rows"]], key=lambda row: list(BENCHES).index(row["bench"]))
    return {"hardware": {**before["hardware"], **found["hardware"]}, "rows": rows}


def there(out: str | None) -> dict[str, Any]:
    """The table that is at `out` already, or an empty one."""
    if out is None or not Path(out).exists():
        return {"hardware": {}, "rows": []}
    return read(Path(out))


def check(cfg: DictConfig) -> None:
    """Fail where a ratio lost more than it may against the committed table."""
    committed = read(Path(cfg.out) if cfg.out else COMMITTED)
    cfg.repeats, cfg.curves = FEW if cfg.repeats is None else cfg.repeats, False
    verdicts = compared(committed["rows"], [row for found in runs(cfg) for row in found["rows"]])
    print("\n".join(map(str, verdicts)))
    lost = sum(verdict.lost for verdict in verdicts)
    absent = sum(verdict.absent for verdict in verdicts)
    print(f"{len(verdicts)} ratios: {lost} lost more than they may, {absent} absent on one side")
    if lost:
        raise SystemExit(1)


def read(path: Path) -> dict[str, Any]:
    """A table as bench=all writes it."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: python experiments/bench.py bench=all out={path}")
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or set(found) != {"hardware", "rows"}:
        raise ValueError(
            f"{path} is no table of benchmarks: expected hardware and rows, as bench=all out=PATH "
            "writes them"
        )
    return found


def checked(cfg: DictConfig) -> None:
    """Refuse what makes no sense before any work."""
    names = (*BENCHES, *OTHERS)
    if cfg.bench not in names:
        raise ValueError(f"bench must be one of {', '.join(names)}, got {cfg.bench!r}")
    least = {"users": 1, "items": 2, "slate_size": 1, "dim": 1, "max_steps": 1, "repeats": 1,
             "threads": 1, "seed": 0}  # fmt: skip
    for key, bound in least.items():
        value = cfg[key]
        if key == "repeats" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{key} must be a whole number of at least {bound}, got {value!r}")
    for key in ("quick", "curves"):
        if not isinstance(cfg[key], bool):
            raise ValueError(f"{key} must be true or false, got {cfg[key]!r}")
    if not isinstance(cfg.seconds, int | float) or not cfg.seconds > 0:
        raise ValueError(f"seconds must be above 0, got {cfg.seconds!r}")
    if cfg.device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {cfg.device!r}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device: use device=cpu")
    if cfg.bench in ("all", "page") and not str(cfg.out).endswith(".json"):
        raise ValueError(
            f"bench={cfg.bench} writes a table and a page beside it: give out=PATH.json, got "
            f"out={cfg.out}"
        )


if __name__ == "__main__":
    main()
