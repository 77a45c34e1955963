"""How fast the evaluator is, against obp's estimators and a bare scan by Polars.

Each case runs in a fresh process on one thread and counts CPU seconds. The estimators of obp 0.4.1
are read from its wheel: the package itself is not installed, nor are its other modules imported.
"""

import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from evaluation import DecisionLog, Target, evaluate
from experiments.bench_rows import Row, Speed, alone, fixed, in_turn, peak_mib, row

Array = np.ndarray
OBP = "obp 0.4.1's"
LAMBDAS = (1.0, 10.0, 100.0, 1000.0, 10_000.0)
BLOCK = 20_000  # rows of a dense world drawn at once
FULL: Row = {"rows": 1_000_000, "dense": 100_000, "actions": 100, "samples": 10_000, "files": 50,
        "file_rows": 400_000, "line": (100_000, 1_000_000, 10_000_000)}  # fmt: skip
QUICK: Row = {"rows": 20_000, "dense": 5000, "actions": 10, "samples": 1000, "files": 5,
         "file_rows": 20_000, "line": (10_000, 20_000, 40_000)}  # fmt: skip
FAR = 1_000_000_000  # rows that nobody waits for: extrapolated
ROWS, ANSWERS = "rows per CPU-second", "answers per CPU-second"
BEGUN = time.perf_counter()  # of the process where a case runs alone, but for its first imports
MEMORY = 400  # MiB that no number of rows is to need


def rows(
    repeats: int,
    seconds: float,
    seed: int,
    quick: bool,
    device: str = "cpu",
    curves: bool = True,
    obp: str | None = None,
) -> list[Row]:
    """All figures; those of obp only where its wheel is given."""
    wheel = found_wheel(obp)
    size = {**(QUICK if quick else FULL), "repeats": repeats, "seed": seed, "wheel": wheel}
    size["actions"] = affordable(size["rows"], size["actions"])
    cases = ("columns", "shrinkage", "bootstrap")
    found = [entry for case in cases for entry in alone("ope_speed", case, size)]
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), size["files"], size["file_rows"], seed)
        found += files_rows(Path(folder), size)
    return found + (line_rows(size) if curves else [])


def found_wheel(obp: str | None) -> str | None:
    """Where obp is; without it a line says how to get it."""
    if obp is not None and Path(obp).exists():
        return str(Path(obp).resolve())
    why = "is not given" if obp is None else f"{obp} is not there"
    print(
        f"bench=ope without its peer: obp=PATH {why}; `pip download --no-deps obp==0.4.1` fetches "
        "it, then give obp=obp-0.4.1-py3-none-any.whl", flush=True,
    )  # fmt: skip
    return None


def affordable(rows: int, actions: int) -> int:
    """As many actions as obp's dense arrays leave room for, else 10."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return actions  # not said on this system
    return actions if 3 * 8 * rows * actions < free else min(actions, 10)


def obp_estimators(wheel: str) -> ModuleType:
    """The module obp.ope.estimators of a wheel or folder.

    Its packages' own __init__ files import what is not there or no longer fits: they are passed by.
    """
    for name in ("obp", "obp.ope"):
        package = ModuleType(name)
        package.__path__ = [str(Path(wheel, *name.split(".")))]
        sys.modules[name] = package
    return importlib.import_module("obp.ope.estimators")


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


def raced(size: Row, done: int, ours: Callable[[], Any], obp: Callable[[], Any]) -> list[Speed]:
    """Speeds of both in turn, `done` units a call; of ours alone where obp is not here."""

    def work(call: Callable[[], Any]) -> int:
        call()
        return done

    works = {"ours": partial(work, ours)}
    if size["wheel"]:
        works["obp"] = partial(work, obp)
    return list(in_turn(works, size["repeats"], 0.0).values())


def compared(case: str, unit: str, speeds: Sequence[Speed], goal: float, against: str) -> Row:
    """A row of the table: how many times faster we are."""
    return row("ope", case, unit, speeds[0], peer=speeds[1] if speeds[1:] else None,
               peer_name=f"{OBP} {against}", peer_goal=goal)  # fmt: skip


def columns_case(size: Row) -> list[Row]:
    """IPS and SNIPS with intervals, from one column of probabilities."""
    n = size["rows"]
    world = dense_world(n, size["actions"], size["seed"])
    given = theirs(world)
    column = world["pi"][np.arange(n), world["action"]]  # (n,) what a policy logs of itself

    def ours() -> Any:
        target = Target.from_probabilities(column)
        return evaluate(logged(world), {"target": target}, estimators=["ips", "snips"])

    estimators = []
    if size["wheel"]:
        obp = obp_estimators(size["wheel"])
        estimators = [
            obp.InverseProbabilityWeighting(), obp.SelfNormalizedInverseProbabilityWeighting()
        ]  # fmt: skip
        values = [float(e.estimate_policy_value(**given)) for e in estimators]
        agreed([float(x) for x in ours().frame()["value"]], values)
    speeds = raced(size, n, ours, lambda: [e.estimate_policy_value(**given) for e in estimators])
    case = f"ips + snips with clt and verdict, {n:,} rows"
    against = f"IPW + SNIPW, no interval, {size['actions']} actions"
    return [compared(case, ROWS, speeds, 50, against)]


def shrinkage_case(size: Row) -> list[Row]:
    """DR with optimistic shrinkage over a grid, from whole distributions and a whole model."""
    n, actions = size["dense"], size["actions"]
    world = dense_world(n, actions, size["seed"])
    q = np.resize(world["q"], (n, actions))
    given = {**theirs(world), "estimated_rewards_by_reg_model": q[:, :, None]}
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

    if size["wheel"]:
        obp = obp_estimators(size["wheel"])
        grid = [obp.DoublyRobustWithShrinkage(lambda_=lam) for lam in LAMBDAS]
        agreed([float(x) for x in ours().frame()["value"]], tuned())
    case = f"dros at {len(LAMBDAS)} lambdas from dense arrays, {n:,} rows x {actions} actions"
    against = "DoublyRobustWithShrinkage, mean and variance"
    return [compared(case, ROWS, raced(size, n, ours, tuned), 25, against)]


def bootstrap_case(size: Row) -> list[Row]:
    """Intervals: each time is that of the whole answer, from columns to interval."""
    n = size["dense"]
    world = dense_world(n, 10, size["seed"])
    given, column = theirs(world), world["pi"][np.arange(n), world["action"]]
    user = np.random.default_rng(size["seed"]).integers(n // 10, size=n)

    def ours(interval: str, **more: Any) -> Any:
        target = {"target": Target.from_probabilities(column)}
        return evaluate(logged(world, **more), target, estimators=["ips"], intervals=[interval])

    alone_size = {**size, "wheel": None}
    [clt] = raced(alone_size, 1, lambda: ours("clt"), lambda: None)
    [cluster] = raced(alone_size, 1, lambda: ours("bootstrap", cluster=user), lambda: None)
    rows, took = [], {}
    for samples in dict.fromkeys((1000, size["samples"])):
        if size["wheel"]:  # once: it takes minutes
            ips = obp_estimators(size["wheel"]).InverseProbabilityWeighting()
            begun = time.process_time()
            ips.estimate_interval(**given, n_bootstrap_samples=samples, random_state=size["seed"])
            took[samples] = [fixed(1 / max(time.process_time() - begun, 1e-9))]
        case = f"ips with clt, {n:,} rows, beside a bootstrap of {samples:,}"
        against = f"IPW, bootstrap of {samples:,}"
        rows += [compared(case, ANSWERS, [clt, *took.get(samples, [])], 1000, against)]
    case = f"ips with cluster bootstrap of 1,000, {n:,} rows"
    both = [cluster, *took.get(1000, [])]
    return [*rows, compared(case, ANSWERS, both, 5, "IPW, bootstrap of 1,000 (of rows)")]


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
    few, done = max(1, size["files"] // 10), size["files"] * size["file_rows"]
    case = f"ips + snips, {done:,} rows in {size['files']} files"
    where = {"where": f"{folder}/*.parquet"}
    # one process after the other, in turn: what else the machine does falls on both
    pairs = [(alone("ope_speed", "files", where), alone("ope_speed", "polars", where))
             for _ in range(size["repeats"])]  # fmt: skip
    agreed([p[0]["value"] for p in pairs], [p[1]["value"] for p in pairs])
    first = [str(p) for p in sorted(folder.glob("*"))[:few]]
    small = alone("ope_speed", "files", {"where": first})
    ours, bare = ([pair[i] for pair in pairs] for i in (0, 1))
    limit: dict[str, Any] = {"limit_name": "the same sums by Polars", "limit_goal": 0.5}
    peak = max(x["peak"] for x in ours)
    found = [
        row("ope", case, ROWS, scanned(ours, done), limit=scanned(bare, done), memory_mib=peak,
            **limit),
        row("ope", f"{case}, imports included", ROWS, scanned(ours, done, "imports"),
            limit=scanned(bare, done, "imports"), **limit),
    ]  # fmt: skip
    peaks = ((case, peak), (f"ips + snips, {few * size['file_rows']:,} rows", small["peak"]))
    return found + [
        row("ope", f"{name}: peak memory", "answers per MiB", fixed(1 / mib), limit=1 / MEMORY,
            limit_name=f"{MEMORY} MiB", limit_goal=1.0, absolute=True, memory_mib=mib)
        for name, mib in peaks
    ]  # fmt: skip


def scanned(runs: Sequence[Row], done: int, also: str | None = None) -> Speed:
    """Rows per CPU-second and per second of processes that each scanned `done` rows."""
    cpu = [x["seconds"] + (x[also] if also else 0.0) for x in runs]
    wall = [x["wall"] + (x["imports_wall"] if also else 0.0) for x in runs]
    return Speed(tuple(done / s for s in cpu), tuple(done / s for s in wall))


def line_rows(size: Row) -> list[Row]:
    """Rows per CPU-second at several sizes, and what their line says of a billion rows."""
    found, times = [], []
    for n in size["line"]:
        with tempfile.TemporaryDirectory() as folder:
            files = max(1, n // size["file_rows"])
            write_files(Path(folder), files, n // files, size["seed"])
            where = {"where": f"{folder}/*.parquet"}
            runs = [alone("ope_speed", "files", where) for _ in range(max(3, size["repeats"]))]
        done = n // files * files
        times += [(done, x["seconds"]) for x in runs]
        found.append(row("ope", f"curve of rows: ips + snips, {n:,} rows in Parquet files", ROWS,
                         scanned(runs, done), memory_mib=max(x["peak"] for x in runs),
                         curve="rows", at=n))  # fmt: skip
    seconds, error = extrapolated(np.array(times), FAR)
    far = [FAR / s for s in (seconds, seconds + error, max(seconds - error, 1e-9))]
    least = found[-1]["product"]
    return [*found, row(
        "ope", f"ips + snips, {FAR:,} rows, extrapolated from the line (± 2 standard errors)",
        ROWS, fixed(*far), limit=least, limit_name="the largest measured",
    )]  # fmt: skip


def extrapolated(points: Array, far: int) -> tuple[float, float]:
    """CPU seconds of `far` rows by the line through (rows, seconds), (m, 2), and twice their error.

    Least squares of the relative residuals: a long run strays by more seconds than a short one.
    """
    n, seconds = points.T  # (m,) each
    weight = 1.0 / seconds  # (m,)
    design = np.stack([np.ones_like(n), n], axis=1) * weight[:, None]  # (m, 2)
    inverse = np.linalg.inv(design.T @ design)
    both = inverse @ design.T @ (seconds * weight)  # (2,) what a run and what a row takes
    residual = seconds * weight - design @ both  # (m,)
    variance = residual @ residual / max(len(n) - 2, 1)
    at = np.array([1.0, far])
    return float(at @ both), float(2.0 * np.sqrt(variance * (at @ inverse @ at)))


def files_case(size: Row) -> Row:
    """Evaluate a target that is a column of Parquet files."""
    import polars

    imports, wall = time.process_time(), time.perf_counter()
    log = DecisionLog.scan(
        size["where"], columns={"action": "item", "reward": "click", "propensity": "p"},
        extra=["pi_e"],
    )  # fmt: skip
    target = {"agent": Target.from_probabilities(pi_logged="pi_e")}
    rows = evaluate(log, target, estimators=["ips", "snips"]).rows
    return {"seconds": time.process_time() - imports, "wall": time.perf_counter() - wall,
            "imports": imports, "imports_wall": wall - BEGUN, "peak": peak_mib(),
            "value": rows[0]["value"], "polars": polars.__version__}  # fmt: skip


def polars_case(size: Row) -> Row:
    """The sums of the same columns and nothing else."""
    import polars as pl

    imports, wall = time.process_time(), time.perf_counter()
    weight, reward = pl.col("pi_e") / pl.col("p"), pl.col("click").cast(pl.Float64)
    both = weight * reward
    frame = pl.scan_parquet(size["where"]).select(
        n=pl.len(), item=pl.col("item").max(), w=weight.sum(), w2=(weight * weight).sum(),
        r=reward.sum(), wr=both.sum(), w2r=(weight * both).sum(), w2r2=(both * both).sum(),
        most=weight.max(), least=weight.min(),
    ).collect(engine="streaming")  # fmt: skip
    return {"seconds": time.process_time() - imports, "wall": time.perf_counter() - wall,
            "imports": imports, "imports_wall": wall - BEGUN, "peak": peak_mib(),
            "value": frame["wr"].item() / frame["n"].item()}  # fmt: skip


CASES: dict[str, Callable[[Row], Any]] = {
    "columns": columns_case, "shrinkage": shrinkage_case, "bootstrap": bootstrap_case,
    "files": files_case, "polars": polars_case,
}  # fmt: skip

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]](json.loads(sys.argv[2]))))
