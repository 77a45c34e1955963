"""The rows that benchmarks print: ours beside a peer and a limit, measured in turn in one run.

Rates are work per second of CPU time of this process, since only ratios within a run hold on a
machine that others use too; on a GPU they are per second of wall time, its queue emptied first.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
KEYS = (
    "bench", "case", "unit", "product", "low", "high", "repeats", "wall", "peer_name", "peer",
    "peer_goal", "ratio_to_peer", "limit_name", "limit", "limit_goal", "ratio_to_limit",
    "absolute", "memory_mib", "curve", "at",
)  # fmt: skip
Work = Callable[[], int]  # does some work and says how many units of it
MIB = 1 << 20
INSTALL = "pip install 'recplay[bench]'"


@dataclass(frozen=True)
class Speed:
    """Units of work per second, one number a window."""

    cpu: tuple[float, ...]  # per second of CPU time of this process; on a GPU as `wall`
    wall: tuple[float, ...]

    @property
    def rate(self) -> float:
        """The median window's."""
        return statistics.median(self.cpu)


def fixed(*numbers: float) -> Speed:
    """Numbers that were not taken in windows: one each for a repetition."""
    return Speed(numbers, numbers)


def in_turn(
    works: Mapping[str, Work], repeats: int, seconds: float, device: str = "cpu"
) -> dict[str, Speed]:
    """Speeds of several works, in `repeats` windows of `seconds` each, taken in turn.

    Each is done once before, untimed.
    """
    for work in works.values():
        work()
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            rates[name].append(window(work, seconds, device))
    return {
        name: Speed(tuple(r[0] for r in found), tuple(r[1] for r in found))
        for name, found in rates.items()
    }


def window(work: Work, seconds: float, device: str) -> tuple[float, float]:
    """Units per CPU-second and per second of one window, of one call at least."""
    done = 0
    cuda = device.startswith("cuda")
    if cuda:
        import torch  # not above: evaluator's processes are to be as small as users' are

        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    while not done or time.perf_counter() - wall < seconds:
        done += work()
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return done / (wall if cuda else max(cpu, 1e-9)), done / wall


def row(
    bench: str,
    case: str,
    unit: str,
    product: Speed,
    *,
    peer: Speed | None = None,
    peer_name: str | None = None,
    peer_goal: float | None = None,
    limit: Speed | float | None = None,
    limit_name: str | None = None,
    limit_goal: float | None = None,
    absolute: bool = False,
    memory_mib: float | None = None,
    curve: str | None = None,
    at: float | None = None,
) -> Row:
    """One row: medians, spread, ratios, and the goals they are held against.

    A row that is a point of a curve names the `curve` and where on its axis it lies, `at`. A limit
    that is so many seconds or bytes, whatever the machine, is `absolute`.
    """
    other = peer.rate if peer else None
    bound = limit.rate if isinstance(limit, Speed) else limit
    return {
        "bench": bench, "case": case, "unit": unit, "product": product.rate,
        "low": min(product.cpu), "high": max(product.cpu), "repeats": len(product.cpu),
        "wall": statistics.median(product.wall),
        "peer_name": peer_name, "peer": other, "peer_goal": peer_goal,
        "ratio_to_peer": product.rate / other if other else None,
        "limit_name": limit_name, "limit": bound, "limit_goal": limit_goal,
        "ratio_to_limit": product.rate / bound if bound else None,
        "absolute": absolute, "memory_mib": memory_mib, "curve": curve, "at": at,
    }  # fmt: skip


def reached(found: Row) -> bool | None:
    """Whether the row reaches its goals; None where it has none or the peer is missing."""
    held = [
        (found[f"ratio_to_{side}"], found[f"{side}_goal"])
        for side in ("peer", "limit")
        if found[f"ratio_to_{side}"] is not None and found[f"{side}_goal"] is not None
    ]
    return all(ratio >= goal for ratio, goal in held) if held else None


def table(rows: list[Row]) -> str:
    """The rows as lines: the figure, how far its windows lie apart, and both ratios."""
    return "\n".join(map(line, rows))


def line(found: Row) -> str:
    """One row."""
    said = (
        f"{found['case']}: {short(found['product'])} {found['unit']} "
        f"({short(found['low'])} to {short(found['high'])}; {short(found['wall'])} by the clock)"
    )
    for side in ("peer", "limit"):
        ratio, goal = found[f"ratio_to_{side}"], found[f"{side}_goal"]
        if ratio is not None:
            said += f"; {short(ratio)} x {found[f'{side}_name']} ({short(found[side])})"
            said += f", goal {goal:g}" if goal is not None else ""
        elif found[f"{side}_name"]:
            said += f"; {found[f'{side}_name']}: not here, {INSTALL}"
    if found["memory_mib"] is not None:
        said += f"; {found['memory_mib']:,.0f} MiB"
    verdict = reached(found)
    return said + ("" if verdict is None else "; reached" if verdict else "; NOT REACHED")


def short(x: float) -> str:
    """A number in three figures or so."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def peak_mib() -> float:
    """The most memory this process has held, MiB, its parent's not counted, as rusage does."""
    status = Path("/proc/self/status")
    if status.exists():
        words = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return float(words.split()[1]) / 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / MIB if sys.platform == "darwin" else most / 1024


def forget_peak() -> None:
    """Let `peak_mib` begin anew where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then what was needed to get there is counted too


def installed(module: str) -> bool:
    """Whether a peer is here."""
    return importlib.util.find_spec(module) is not None


def alone(module: str, case: str, size: Mapping[str, Any]) -> Any:
    """What `python -m experiments.MODULE CASE SIZE` prints as JSON: a fresh process, one thread."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", case, json.dumps(size)],
        capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, **dict.fromkeys(THREADS, "1")},
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"case {case} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
