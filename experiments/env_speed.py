"""How fast environments step: synthetic and fitted users beside SARDINE and a bare kernel.

Users are shown random slates drawn before the clock starts. Counted in a step: observations as ids,
draws, answers, rewards, and new users where old ones leave. A point of a curve has a process of its
own, whose memory is the most it held from its first step on.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from envs.recommend import RecommendVectorEnv
from experiments.bench_rows import (
    MIB,
    Row,
    Speed,
    Work,
    alone,
    fixed,
    forget_peak,
    in_turn,
    installed,
    peak_mib,
    row,
)
from experiments.env_limit import BareStep
from simulators.base import Catalog, SimSpec
from simulators.catalog import described
from simulators.fitted import FittedSimulator
from simulators.worlds import TinyWorld
from sources.logs import Logs, Roles

HOUSEHOLDS, DAYS, EVERY, BASKET = 800, 420, 9, 6  # of the log: trips are EVERY days apart
FAVOURITES, DEPARTMENTS, PER_KIND = 80, 20, 3  # items a household buys; items of a kind
EVERYTHING: dict[str, Any] = {  # what fitted users can do, beside what comes from the log
    "trips": 3, "drift": 0.1, "exposure": 0.3, "position": 0.1, "patience": 0.1,
}  # fmt: skip
UNIT = "user-slates per CPU-second"
POOL, POOL_CELLS = 32, 1 << 22  # slates of a user drawn ahead and shown in turn; numbers in all
WARM_UP = 20  # steps nobody times: rows desynchronise, so that users leave at every step
PEER, PEER_SIZE = "SARDINE SlateTopK-Bored", (1000, 10)  # its items and slate
LIMIT = "the bare torch kernel of the same arithmetic"
AXES: dict[str, tuple[int, ...]] = {
    "users": (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536),
    "items": (100, 1000, 10_000, 100_000, 1_000_000),
    "slate_size": (1, 5, 10, 20, 50),
}
QUICK: dict[str, tuple[int, ...]] = {"users": (1, 16), "items": (100, 1000), "slate_size": (1, 5)}
FLAT = (256, 16_384)  # users between which the cost of a user-step is to stay within 2 x
POINT = (3, 0.4)  # windows of a point of a curve, and their seconds
FEW = 40  # households of the curve of items: their pasts are drawn over the whole catalogue


@dataclass(frozen=True)
class Size:
    """What is served."""

    users: int = 4096  # at once
    items: int = 1000  # in the catalogue
    slate_size: int = 10
    dim: int = 64  # numbers of an item vector
    max_steps: int = 20  # slates after which a user is sent home
    households: int = 400
    seed: int = 0
    device: str = "cpu"

    @property
    def steps(self) -> int:
        """`max_steps`, or as many as the catalogue has different items for."""
        return min(self.max_steps, self.items // self.slate_size)

    def __str__(self) -> str:
        return (
            f"{self.users:,} user{'s' * (self.users > 1)}, {self.items:,} items, "
            f"slate {self.slate_size}"
        )


def rows(
    repeats: int,
    seconds: float,
    seed: int,
    quick: bool,
    device: str = "cpu",
    curves: bool = True,
    size: Size | None = None,
) -> list[Row]:
    """The headline figures in turn in one process, then the curves."""
    size = replace(size or Size(), seed=seed, device=device)
    if quick:
        size = replace(size, users=min(size.users, 64))
    found = headline(size, repeats, seconds)
    return found + (curve_rows(size, QUICK if quick else AXES) if curves else [])


def headline(size: Size, repeats: int, seconds: float) -> list[Row]:
    """Many users, 16, one, and fitted ones, against the peer and the bare kernel."""
    spec = SimSpec(None, None, seed=size.seed, device=size.device)
    world = TinyWorld(spec, items=size.items, dim=size.dim, households=size.households)
    bare = BareStep(
        world, num_envs=size.users, slate_size=size.slate_size, max_steps=size.steps, seed=size.seed
    )
    works: dict[str, Work] = {
        "TinyWorld": served(world, size),
        "bare": stepped(bare.step, random_slates(size), size),
        "fitted": served(fitted(size), size),
    }
    few = {users: replace(size, users=users) for users in (16, 1) if users < size.users}
    works |= {str(users): served(world, fewer) for users, fewer in few.items()}
    if (size.items, size.slate_size) == PEER_SIZE and installed("sardine"):
        works["peer"] = sardine(size.seed)
    speeds = in_turn(works, repeats, seconds, size.device)
    peer: dict[str, Any] = {"peer": speeds.get("peer"), "peer_name": PEER}
    ours = "RecommendVectorEnv, TinyWorld"
    goals = {16: 1.0, 1: 0.25}
    return [
        row("env", f"{ours}, {size}", UNIT, speeds["TinyWorld"], **peer, peer_goal=40.0,
            limit=speeds["bare"], limit_name=LIMIT, limit_goal=0.7),
        row("env", f"RecommendVectorEnv, fitted users with everything on, {size}", UNIT,
            speeds["fitted"], **peer),
        *(row("env", f"{ours}, {fewer}", UNIT, speeds[str(users)], **peer, peer_goal=goals[users])
          for users, fewer in few.items()),
    ]  # fmt: skip


def served(world: Any, size: Size) -> Work:
    """Steps of an environment that serves these users, warm."""
    env = RecommendVectorEnv(
        world, num_envs=size.users, slate_size=size.slate_size, max_steps=size.steps,
        observation="ids", output="torch", seed=size.seed,
    )  # fmt: skip
    env.reset()
    return stepped(env.step, random_slates(size), size)


def stepped(step: Any, slates: Sequence[Tensor], size: Size) -> Work:
    """One step a call, of slates shown in turn."""
    ahead = cycle(slates)

    def work() -> int:
        step(next(ahead))
        return size.users

    for _ in range(WARM_UP):
        work()
    return work


def random_slates(size: Size) -> list[Tensor]:
    """Random slates (B, K) of different items, one of each K-th part of the catalogue.

    Nothing here is as wide as the catalogue.
    """
    generator = torch.Generator().manual_seed(size.seed)
    many = max(2, min(POOL, POOL_CELLS // (size.users * size.slate_size)))
    edges = torch.arange(size.slate_size + 1) * size.items // size.slate_size  # (K + 1,)
    slots = torch.arange(size.slate_size)  # (K,)
    slates = []
    for _ in range(many):
        first = torch.randint(size.slate_size, (size.users, 1), generator=generator)
        part = (slots + first) % size.slate_size  # (B, K)
        share = torch.rand(size.users, size.slate_size, generator=generator, dtype=torch.float64)
        width = edges[part + 1] - edges[part]  # (B, K)
        slates.append((edges[part] + (share * width).long()).to(size.device))
    return slates


def sardine(seed: int) -> Work:
    """The peer: one user a step, random slates drawn ahead, sessions of 100 as it has them."""
    import gymnasium as gym
    import sardine  # noqa: F401  registers its environments

    env = gym.make("sardine/SlateTopK-Bored-v0")
    rng = np.random.default_rng(seed)
    ahead = cycle(rng.integers(PEER_SIZE[0], size=(1000, PEER_SIZE[1])))
    env.reset(seed=seed)

    def work() -> int:
        *_, terminated, truncated, _ = env.step(next(ahead))
        if terminated or truncated:
            env.reset()
        return 1

    return work


def curve_rows(size: Size, axes: dict[str, tuple[int, ...]]) -> list[Row]:
    """A row for each point of each axis, then what the curves are held to."""
    found, catalog = [], {}
    for axis, values in axes.items():
        for value in values:
            change: dict[str, Any] = {axis: value}
            at = replace(size, **change)
            if axis == "items":
                at = replace(at, households=FEW)
            if at.items < at.slate_size:
                continue
            point = alone("env_speed", "point", asdict(at))
            catalog[axis, value] = point["catalog"]
            speed = Speed(tuple(point["cpu"]), tuple(point["wall"]))
            case = f"curve of {axis.removesuffix('_size')}: TinyWorld, {at}"
            found.append(row("env", case, UNIT, speed, memory_mib=point["peak"], curve=axis,
                             at=value))  # fmt: skip
    return found + held_to(found, catalog)


def held_to(found: list[Row], catalog: dict[tuple[str, int], float]) -> list[Row]:
    """Rows that say how flat the curves are: the slowest point beside the fastest."""
    users = [r for r in found if r["curve"] == "users" and FLAT[0] <= r["at"] <= FLAT[1]]
    items = [r for r in found if r["curve"] == "items"]
    rows = []
    for case, among in ((f"from {FLAT[0]:,} to {FLAT[1]:,} users", users),
                        ("whatever the catalogue", items)):  # fmt: skip
        if len(among) > 1:
            rates = [r["product"] for r in among]
            rows.append(row("env", f"cost of a user-step, {case}: the dearest point", UNIT,
                            fixed(min(rates)),
                            limit=max(rates), limit_name="the cheapest point",
                            limit_goal=0.5))  # fmt: skip
    if len(items) > 1:
        few, many = items[-2:]
        added = many["at"] - few["at"]
        held = max((many["memory_mib"] - few["memory_mib"]) * 1024 / added, 1e-9)  # KiB an item
        least = (catalog["items", many["at"]] - catalog["items", few["at"]]) * 1024 / added
        rows.append(row("env", f"memory of items, {few['at']:,} to {many['at']:,}, "
                        f"{few['case'].split(', ')[1]}", "items per KiB", fixed(1 / held),
                        limit=1 / least, limit_name="the columns of the catalogue alone",
                        limit_goal=0.5))  # fmt: skip
    return rows


def point(size: Size) -> dict[str, Any]:
    """Rates and memory of one size in this process, and the MiB of what is known of its items."""
    torch.set_num_threads(1)
    spec = SimSpec(None, None, seed=size.seed, device=size.device)
    world = TinyWorld(spec, items=size.items, dim=size.dim, households=size.households)
    tables = [*vars(world.catalog).values(), *vars(world.truth).values()]
    columns = [x for x in tables if torch.is_tensor(x) and len(x) == size.items]
    forget_peak()
    speed = in_turn({"point": served(world, size)}, *POINT, size.device)["point"]
    peak = torch.cuda.max_memory_allocated() / MIB if size.device != "cpu" else peak_mib()
    return {"cpu": speed.cpu, "wall": speed.wall, "peak": peak,
            "catalog": sum(x.nbytes for x in columns) / MIB}  # fmt: skip


def fitted(size: Size) -> FittedSimulator:
    """Households fitted to a log of regular shoppers, with every assumption at work."""
    logs = log_of_regulars(size.items, size.seed)
    catalog = catalog_of(logs, size.items, size.dim, size.seed).to(size.device)
    spec = SimSpec(logs, catalog, seed=size.seed, device=size.device)
    return FittedSimulator.fit(spec, **EVERYTHING)


def log_of_regulars(num_items: int, seed: int) -> Logs:
    """A log of about 37,000 trips by households who buy their favourites of `num_items`."""
    rng = np.random.default_rng(seed)
    kinds = np.arange(num_items) // PER_KIND  # (N,)
    many = min(FAVOURITES, max(2, num_items // 2))
    key = rng.exponential(np.arange(10, num_items + 10), (HOUSEHOLDS, num_items))  # fame falls
    favourites = key.argsort(axis=1)[:, :many]  # (households, favourites)
    trips = rng.poisson(DAYS / EVERY, HOUSEHOLDS)
    user = np.repeat(np.arange(HOUSEHOLDS), trips)  # (trips,)
    time = np.round(rng.uniform(0, DAYS, len(user)) * 86_400)
    lines = 1 + rng.poisson(BASKET - 1, len(user))  # (trips,)
    trip = np.repeat(np.arange(len(user)), lines)  # (n,)
    item = favourites[user[trip], (many * rng.random(len(trip)) ** 2).astype(np.int64)]  # (n,)
    price = np.round(rng.uniform(1, 9, num_items), 2)
    events = pd.DataFrame(
        {
            "user": user[trip],
            "item": item,
            "time": pd.Timestamp("2024-01-01") + pd.to_timedelta(time[trip], unit="s"),
            "behaviour": "buy",
            "basket": trip,
            "value": price[item],
            "price": price[item],
        }
    ).drop_duplicates(["basket", "item"])
    items = pd.DataFrame(
        {
            "item": np.arange(num_items),
            "name": [f"thing {i}" for i in range(num_items)],
            "kind": [f"kind {k}" for k in kinds],
            "department": [f"department {k % DEPARTMENTS}" for k in kinds],
        }
    )
    roles = Roles(item_text=("name",), item_category=("kind", "department"))
    return Logs.create(events, items, roles=roles, name="regulars")


def catalog_of(logs: Logs, num_items: int, dim: int, seed: int) -> Catalog:
    """All items of the log at 90 % of its time, under vectors drawn at random: no BERT needed."""
    as_of = logs.cut(0.9)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_items, dim, generator=generator)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    ids = np.arange(num_items)
    return described(logs.before(as_of), ids, [f"thing {i}" for i in ids], vectors, as_of)


if __name__ == "__main__":
    print(json.dumps(point(Size(**json.loads(sys.argv[2])))))
