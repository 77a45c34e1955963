"""How long users take to be fitted to a log, against its number of events, with memory.

A point has a process of its own. Least-squares factors by the library implicit on the same counts
are a yardstick of what one pass over a log costs, not a peer: they fit nothing of trips, baskets or
habits. EASE is the dense yardstick, of the items alone.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from agents.factors import ALS
from agents.linear import EASE
from experiments.bench_rows import Row, alone, fixed, forget_peak, peak_mib, row
from experiments.env_speed import catalog_of, log_of_regulars
from simulators.base import SimSpec
from simulators.fitted import FittedSimulator
from sources.logs import Logs

ITEMS, DIM = 1000, 64
SHARES = (0.125, 0.25, 0.5, 1.0)  # of the households whose events are fitted to
QUICK_ITEMS, QUICK_SHARES = 60, (0.03, 0.06)
UNIT = "events per CPU-second"
WAYS = ("fitted users", "ALS of implicit", "EASE")


def rows(
    repeats: int = 3, seconds: float = 2.0, seed: int = 0, quick: bool = False, device: str = "cpu"
) -> list[Row]:
    """A curve of the fit over events, its largest point beside both yardsticks."""
    items, shares = (QUICK_ITEMS, QUICK_SHARES) if quick else (ITEMS, SHARES)

    def point(way: str, share: float) -> dict[str, Any]:
        size = {"items": items, "share": share, "seed": seed, "device": device}
        found: dict[str, Any] = alone("fit_speed", way, size)
        return found

    times = max(1, min(repeats, 2))  # a fit is long, and varies little
    found, last = [], shares[-1]
    for share in shares:
        ours = [point(WAYS[0], share) for _ in range(times if share == last else 1)]
        events = ours[0]["events"]
        found.append(
            row("fit", f"FittedSimulator.fit, {events:,} events of {items:,} items", UNIT,
                fixed(*(events / one["seconds"] for one in ours)),
                memory_mib=ours[0]["memory"], curve="events", at=float(events))
        )  # fmt: skip
    for way in WAYS[1:]:
        one = point(way, last)
        found.append(
            row("fit", f"FittedSimulator.fit beside {way}, {events:,} events", UNIT,
                fixed(*(events / one_of["seconds"] for one_of in ours)),
                peer=fixed(events / one["seconds"]), peer_name=f"{way}, a yardstick",
                memory_mib=ours[0]["memory"])
        )  # fmt: skip
    return found


def measured(way: str, size: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of one fit in this process, events, and how much memory it took at most, MiB."""
    torch.set_num_threads(1)
    logs = part_of(log_of_regulars(size["items"], size["seed"]), size["share"])
    catalog = catalog_of(logs, size["items"], DIM, size["seed"]).to(size["device"])
    spec = SimSpec(logs, catalog, seed=size["seed"], device=size["device"])
    counts = counts_of(logs, size["items"])
    works: dict[str, Callable[[], Any]] = {
        WAYS[0]: lambda: FittedSimulator.fit(spec),
        WAYS[1]: lambda: ALS(counts),
        WAYS[2]: lambda: EASE(counts),
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RECPLAY_CACHE"] = folder  # an empty one: a fit that is kept would only be read
        forget_peak()
        held, begun = peak_mib(), time.process_time()
        works[way]()
        spent = time.process_time() - begun
    return {"events": len(logs.events), "seconds": spent, "memory": peak_mib() - held}


def part_of(logs: Logs, share: float) -> Logs:
    """The events of so many of the households."""
    users = np.sort(logs.events["user"].unique())
    kept = users[: max(2, round(share * len(users)))]
    events = logs.events[logs.events["user"].isin(kept)].reset_index(drop=True)
    return Logs.create(events, logs.items, roles=logs.roles, name=logs.name)


def counts_of(logs: Logs, num_items: int) -> Any:
    """Purchases (users, items), CSR."""
    from scipy.sparse import csr_matrix

    _, user = np.unique(logs.events["user"].to_numpy(), return_inverse=True)
    item = logs.events["item"].to_numpy().astype(np.int64)
    ones = np.ones(len(user), dtype=np.float32)
    return csr_matrix((ones, (user, item)), shape=(user.max() + 1, num_items))


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], json.loads(sys.argv[2]))))
