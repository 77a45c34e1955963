"""How fast the evaluator is, against obp's estimators and a bare scan by Polars.

Each case runs in a fresh process on one thread and counts CPU seconds. The estimators of obp 0.4.1
are read from its wheel: the package itself is not installed, nor are its other modules imported.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from evaluation import DecisionLog, Target, evaluate

Array = np.ndarray
Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
LAMBDAS = (1.0, 10.0, 100.0, 1000.0, 10_000.0)
BLOCK = 20_000  # rows of a dense world drawn at once
FULL: Row = {"rows": 1_000_000, "dense": 100_000, "actions": 100, "samples": 10_000, "files": 50,
        "file_rows": 400_000}  # fmt: skip
QUICK: Row = {"rows": 20_000, "dense": 5000, "actions": 10, "samples": 1000, "files": 5,
         "file_rows": 20_000}  # fmt: skip
MIB = 1 << 20


def speed(obp: str | None, repeats: int, seed: int, quick: bool) -> list[Row]:
    """All figures."""
    wheel = str(checked_wheel(obp))
    size = {**(QUICK if quick else FULL), "repeats": repeats, "seed": seed, "wheel": wheel}
    size["actions"] = affordable(size["rows"], size["actions"])
    rows = [row for case in ("columns", "shrinkage", "bootstrap") for row in alone(case, size)]
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), size["files"], size["file_rows"], seed)
        return rows + files_rows(Path(folder), size)


def checked_wheel(obp: str | None) -> Path:
    """Where obp is, or how to get it."""
    if obp is None or not Path(obp).exists():
        found = "is not given" if obp is None else f"{obp} is not there"
        raise ValueError(
            f"bench=ope_speed compares with obp 0.4.1, and obp=PATH {found}: fetch it with "
            "`pip download --no-deps obp==0.4.1` and give obp=obp-0.4.1-py3-none-any.whl"
        )
    return Path(obp).resolve()


def affordable(rows: int, actions: int) -> int:
    """As many actions as obp's dense arrays leave room for, else 10."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return actions  # not said on this system
    return actions if 3 * 8 * rows * actions < free else min(actions, 10)


def alone(case: str, size: Row) -> Any:
    """What a case found in a fresh process of one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.ope_speed", case, json.dumps(size)],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **dict.fromkeys(THREADS, "1")},
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"case {case} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def obp_estimators(wheel: str) -> ModuleType:
    """The module obp.ope.estimators of a wheel or folder.

    Its packages' own __init__ files import what is not there or no longer fits: they are passed by.
    """
    for name in ("obp", "obp.ope"):
        package = ModuleType(name)
        package.__path__ = [str(Path(wheel, *name.split(".")))]
        sys.modules[name] = package
    return importlib.import_module("obp.ope.estimators")


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds, after a call that nobody times."""
    call()
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        found.append(time.process_time() - begun)
    return statistics.median(found)


def dense_world(n: int, actions: int, seed: int) -> dict[str, Array]:
    """A log with the target's whole distribution (n, A, 1), as obp wants it, and a model's q."""
    rng = np.random.default_rng(seed)
    pi, q = np.empty((n, actions)), rng.uniform(0.0, 0.2, size=(min(n, BLOCK), actions))
    action, propensity = np.empty(n, dtype=np.int64), np.empty(n)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        logging = rng.exponential(size=(rows.stop - start, actions)) + 0.05
        logging /= logging.sum(axis=1, keepdims=True)
        drawn = rng.random((len(logging), 1))
        taken = np.minimum((logging.cumsum(axis=1) < drawn).sum(axis=1), actions - 1)
        action[rows], propensity[rows] = taken, logging[np.arange(len(taken)), taken]
        pi[rows] = logging * rng.gamma(2.0, size=logging.shape)
        pi[rows] /= pi[rows].sum(axis=1, keepdims=True)
    reward = (rng.random(n) < 0.1).astype(float)
    return {"action": action, "reward": reward, "pscore": propensity, "pi": pi, "q": q}


def theirs(world: dict[str, Array]) -> dict[str, Array]:
    """A world as obp wants it."""
    return {**{key: world[key] for key in ("action", "reward", "pscore")},
            "action_dist": world["pi"][:, :, None]}  # fmt: skip


def logged(world: dict[str, Array], **more: Any) -> DecisionLog:
    """A world as we want it."""
    return DecisionLog.from_arrays(
        action=world["action"], reward=world["reward"], propensity=world["pscore"], **more
    )


def agreed(ours: Sequence[float], obp: Sequence[float]) -> None:
    """Refuse to time what does not say the same."""
    if not np.allclose(ours, obp, rtol=1e-9, atol=0):
        raise ValueError(f"the estimates differ: ours {ours}, obp's {obp}")


def compared(case: str, ours: float, obp: float, goal: float, against: str) -> Row:
    """A row of the table: how many times faster we are."""
    return {"bench": "ope_speed", "case": case, "against": against, "ours": ours, "theirs": obp,
            "unit": "CPU s", "ratio": obp / ours, "goal": goal,
            "reached": obp / ours >= goal}  # fmt: skip


def columns_case(size: Row) -> list[Row]:
    """IPS and SNIPS with intervals, from one column of probabilities."""
    obp, n = obp_estimators(size["wheel"]), size["rows"]
    world = dense_world(n, size["actions"], size["seed"])
    given = theirs(world)
    column = world["pi"][np.arange(n), world["action"]]  # (n,) what a policy logs of itself
    estimators = (
        obp.InverseProbabilityWeighting(), obp.SelfNormalizedInverseProbabilityWeighting()
    )  # fmt: skip

    def ours() -> Any:
        target = Target.from_probabilities(column)
        return evaluate(logged(world), {"target": target}, estimators=["ips", "snips"])

    values = [float(e.estimate_policy_value(**given)) for e in estimators]
    agreed([float(x) for x in ours().frame()["value"]], values)
    mine = seconds(ours, size["repeats"])
    other = seconds(lambda: [e.estimate_policy_value(**given) for e in estimators], size["repeats"])
    case = f"ips + snips with clt and verdict, {n:,} rows"
    return [compared(case, mine, other, 50, f"IPW + SNIPW, no interval, {size['actions']} actions")]


def shrinkage_case(size: Row) -> list[Row]:
    """DR with optimistic shrinkage over a grid, from whole distributions and a whole model."""
    obp, n, actions = obp_estimators(size["wheel"]), size["dense"], size["actions"]
    world = dense_world(n, actions, size["seed"])
    q = np.resize(world["q"], (n, actions))
    given = {**theirs(world), "estimated_rewards_by_reg_model": q[:, :, None]}
    grid = [obp.DoublyRobustWithShrinkage(lambda_=lam) for lam in LAMBDAS]
    first = np.zeros(n, dtype=int)

    def ours() -> Any:
        place = np.arange(n) * actions + world["action"]
        target = Target.from_probabilities(
            world["pi"].ravel().take(place), value=np.vecdot(world["pi"], q),
            q_logged=q.ravel().take(place),
        )  # fmt: skip
        names = [f"dros(lam={lam:g})" for lam in LAMBDAS]
        return evaluate(logged(world), {"target": target}, estimators=names)

    def tuned() -> list[float]:
        """Mean and variance at each lambda, then the estimate at one: what SLOPE needs."""
        rounds = [e._estimate_round_rewards(**given, position=first) for e in grid]
        spread = [x.var() for x in rounds]
        grid[int(np.argmin(spread))].estimate_policy_value(**given)
        return [float(x.mean()) for x in rounds]

    agreed([float(x) for x in ours().frame()["value"]], tuned())
    case = f"dros at {len(LAMBDAS)} lambdas from dense arrays, {n:,} rows x {actions} actions"
    return [compared(case, seconds(ours, size["repeats"]), seconds(tuned, size["repeats"]), 25,
                     "DoublyRobustWithShrinkage, mean and variance")]  # fmt: skip


def bootstrap_case(size: Row) -> list[Row]:
    """Intervals: each time is that of the whole answer, from columns to interval."""
    obp, n = obp_estimators(size["wheel"]), size["dense"]
    world = dense_world(n, 10, size["seed"])
    given, column = theirs(world), world["pi"][np.arange(n), world["action"]]
    user = np.random.default_rng(size["seed"]).integers(n // 10, size=n)
    ips = obp.InverseProbabilityWeighting()

    def ours(interval: str, **more: Any) -> Any:
        target = {"target": Target.from_probabilities(column)}
        return evaluate(logged(world, **more), target, estimators=["ips"], intervals=[interval])

    clt = seconds(lambda: ours("clt"), size["repeats"])
    cluster = seconds(lambda: ours("bootstrap", cluster=user), size["repeats"])
    rows, took = [], {}
    for samples in dict.fromkeys((1000, size["samples"])):
        begun = time.process_time()
        ips.estimate_interval(**given, n_bootstrap_samples=samples, random_state=size["seed"])
        took[samples] = time.process_time() - begun
        case = f"ips with clt, {n:,} rows"
        rows += [compared(case, clt, took[samples], 1000, f"IPW, bootstrap of {samples:,}")]
    case = f"ips with cluster bootstrap of 1,000, {n:,} rows"
    return [*rows, compared(case, cluster, took[1000], 5, "IPW, bootstrap of 1,000 (of rows)")]


def write_files(folder: Path, files: int, rows: int, seed: int) -> None:
    """A log of several users in Parquet files."""
    import polars as pl

    rng = np.random.default_rng(seed)
    for file in range(files):
        propensity = rng.uniform(0.01, 0.2, rows)
        pl.DataFrame({
            "item": rng.integers(0, 1000, rows).astype(np.int32),
            "click": (rng.random(rows) < 0.1).astype(np.float32),
            "p": propensity,
            "pi_e": np.minimum(propensity * rng.gamma(4.0, 0.25, rows), 1.0),
            "user": rng.integers(0, 100_000, rows).astype(np.int32),
        }).write_parquet(folder / f"part-{file:03}.parquet")  # fmt: skip


def files_rows(folder: Path, size: Row) -> list[Row]:
    """Time against Polars, and the memory of all files and of a tenth."""
    few = max(1, size["files"] // 10)
    case = f"ips + snips, {size['files'] * size['file_rows']:,} rows in {size['files']} files"
    # one process after the other, in turn: what else the machine does falls on both
    pairs = [(alone("files", {"where": f"{folder}/*.parquet"}),
              alone("polars", {"where": f"{folder}/*.parquet"}))
             for _ in range(size["repeats"])]  # fmt: skip
    agreed([p[0]["value"] for p in pairs], [p[1]["value"] for p in pairs])
    ours, bare = ({key: statistics.median(p[i][key] for p in pairs)
                   for key in ("seconds", "imports", "peak")} for i in (0, 1))  # fmt: skip
    small = alone("files", {"where": [str(p) for p in sorted(folder.glob("*"))[:few]]})
    rows = [compared(case, ours["seconds"], bare["seconds"], 0.5, "the same sums by Polars")]
    whole, other = (x["seconds"] + x["imports"] for x in (ours, bare))
    rows += [compared(f"{case}, imports included", whole, other, 0.5, "the same sums by Polars")]
    peaks = ((case, ours), (f"ips + snips, {few * size['file_rows']:,} rows", small))
    return rows + [
        {"bench": "ope_speed", "case": f"{name}: peak memory", "against": "400 MiB",
         "ours": x["peak"] / MIB, "theirs": 400.0, "unit": "MiB", "ratio": 400.0 * MIB / x["peak"],
         "goal": 1.0, "reached": x["peak"] < 400 * MIB}
        for name, x in peaks
    ]  # fmt: skip


def files_case(size: Row) -> Row:
    """Evaluate a target that is a column of Parquet files."""
    import polars

    imports = time.process_time()
    log = DecisionLog.scan(
        size["where"], columns={"action": "item", "reward": "click", "propensity": "p"},
        extra=["pi_e"],
    )  # fmt: skip
    target = {"agent": Target.from_probabilities(pi_logged="pi_e")}
    rows = evaluate(log, target, estimators=["ips", "snips"]).rows
    return {"seconds": time.process_time() - imports, "imports": imports, "peak": peak(),
            "value": rows[0]["value"], "polars": polars.__version__}  # fmt: skip


def polars_case(size: Row) -> Row:
    """The sums of the same columns and nothing else."""
    import polars as pl

    imports = time.process_time()
    weight, reward = pl.col("pi_e") / pl.col("p"), pl.col("click").cast(pl.Float64)
    both = weight * reward
    frame = pl.scan_parquet(size["where"]).select(
        n=pl.len(), item=pl.col("item").max(), w=weight.sum(), w2=(weight * weight).sum(),
        r=reward.sum(), wr=both.sum(), w2r=(weight * both).sum(), w2r2=(both * both).sum(),
        most=weight.max(), least=weight.min(),
    ).collect(engine="streaming")  # fmt: skip
    return {"seconds": time.process_time() - imports, "imports": imports, "peak": peak(),
            "value": frame["wr"].item() / frame["n"].item()}  # fmt: skip


def peak() -> float:
    """Most bytes that this process has held; its parent's are not counted, as rusage does."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return float(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)


def text(rows: Sequence[Row]) -> str:
    """The table."""
    lines = []
    for row in rows:
        said = "reached" if row["reached"] else "not reached"
        lines += [
            f"{row['case']}: {row['ours']:.4g} {row['unit']}, {row['against']}: "
            f"{row['theirs']:.4g} {row['unit']}, {row['ratio']:,.3g} x (goal {row['goal']:g} x: "
            f"{said})"
        ]
    return "\n".join(lines)


CASES: dict[str, Callable[[Row], Any]] = {
    "columns": columns_case, "shrinkage": shrinkage_case, "bootstrap": bootstrap_case,
    "files": files_case, "polars": polars_case,
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]](json.loads(sys.argv[2]))))
