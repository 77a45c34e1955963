"""How many env steps a CPU-second learners make: beside SB3's DQN, and beside products alone.

The learners are those of `train_racers`. One thread, all in one process in turn, so that what else
the machine does falls on all. Ours races twice: as the algorithm that SB3 has, and as it comes,
with more arithmetic in it. The limit is matrix products alone: those of double DQN as it is
written, and the fewer that ours makes. What share of a step goes into the replay, TensorBoard and
the decision log is measured by clocks around their calls, in the loop of train_agent with users of
a synthetic world.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agents.base import AgentSpec, Transition
from agents.dqn import DQN
from agents.nets import BENDS, TRACES
from encoders.state import CONTEXT
from envs.recommend import RecommendVectorEnv
from evaluation.decisions import DecisionWriter
from evaluation.online import one_step
from experiments.bench_rows import Row, Speed, Work, forget_peak, in_turn, peak_mib, row
from experiments.curves import Curves
from experiments.train_racers import USERS, as_it_comes, ours, spec_of, through_adapter
from simulators.base import SimSpec
from simulators.worlds import TinyWorld

SAME: dict[str, Any] = {"double": False, "dueling": False, "memory": False}  # as SB3's DQN is
UNIT = "env steps per CPU-second"
SAID = {
    "same": "DQN without double, dueling and memory, which SB3's has not, replay ratio 1",
    "ours": "DQN as it comes, replay ratio 1",
    "adapter": f"SB3 DQN, {USERS} users through our adapter, replay ratio 1",
    "default": "SB3 DQN, one env in a DummyVecEnv, its defaults",
}
RACES = (  # ours, SB3's, and how many times ours is to be faster
    ("same", "adapter", 1.4),
    ("ours", "adapter", 1.4),
    ("ours", "default", 15.0),
)
RACERS: dict[str, Callable[[int, int, str], Work]] = {
    "same": partial(ours, **SAME), "ours": ours, "adapter": through_adapter, "default": as_it_comes,
}  # fmt: skip
CALL = {"same": 2048, "ours": 2048, "adapter": 2048, "default": 256}  # env steps between two looks
BOUNDS = {
    "written": "the products of double DQN as it is written, alone",
    "own": "the products that ours makes, alone",
}
RATIO, LARGE = 8, 2048  # replayed transitions an env step; of them in one update
RATIOS = (0.25, 0.5, 1, 2, 4, 8)
HEADS = ("dot", "dense", "two_tower")
SHARES = {"replay": 0.15, "TensorBoard": 0.02, "decision log": 0.10}  # of a step at most
ITEMS, LOG_EVERY = 2000, 5000  # of the shop and of train_agent


def rows(
    repeats: int = 3, seconds: float = 2.0, seed: int = 0, quick: bool = False, device: str = "cpu"
) -> list[Row]:
    """Races, the limit, shares of a step, and curves; on one thread, whatever torch has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [*races(repeats, seconds, seed, device), *limits(repeats, seconds, seed, device)]
        found += shares(repeats, seconds, seed, quick, device)
        return found + curves(repeats, seconds, seed, quick, device)
    finally:
        torch.set_num_threads(before)


def races(repeats: int, seconds: float, seed: int, device: str) -> list[Row]:
    """Ours beside SB3's."""
    works = {name: make(CALL[name], seed, device) for name, make in RACERS.items()}
    speed = in_turn(works, repeats, seconds, device)
    return [
        row("train", f"{SAID[mine]}, against {name}", UNIT, speed[mine], peer=speed[name],
            peer_name=SAID[name], peer_goal=goal)
        for mine, name, goal in RACES
    ]  # fmt: skip


def limits(repeats: int, seconds: float, seed: int, device: str) -> list[Row]:
    """Our dot head at replay ratio 8 beside products alone, in large and in small batches."""
    found = []
    for batch, goal in ((LARGE, 0.75), (USERS, None)):
        works = {
            "ours": ours(USERS, seed, device, replay_ratio=RATIO, batch_size=batch),
            "written": bare(seed, batch, device, own=False),
            "own": bare(seed, batch, device, own=True),
        }
        speed = in_turn(works, repeats, seconds, device)
        said = f"DQN, dot head, replay ratio {RATIO}, {batch} transitions an update"
        for which, name in BOUNDS.items():
            found.append(
                row("train", f"{said}, against {which} products", UNIT, speed["ours"],
                    limit=speed[which], limit_name=name,
                    limit_goal=goal if which == "written" else None)
            )  # fmt: skip
    return found


def bare(seed: int, batch: int, device: str, *, own: bool) -> Work:
    """The matrix products of `USERS` env steps at replay ratio 8, into memory that is there."""
    generator = torch.Generator(device).manual_seed(seed)

    def operand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    acting, learning = products(spec_of(seed, device), batch, own=own)
    ready = [
        (operand(*left), operand(*right), torch.empty(*left[:-1], right[-1], device=device))
        for left, right in [*acting, *learning * (RATIO * USERS // batch)]
    ]

    def work() -> int:
        for left, right, out in ready:
            torch.matmul(left, right, out=out)
        return USERS

    return work


def products(spec: AgentSpec, batch: int, *, own: bool) -> tuple[list[Any], list[Any]]:
    """Sizes of the products of acting for `USERS` and of one update, those of one column left out.

    As double DQN is written both nets value all items, whose layer is applied to them all. Ours
    (`own`) applies it to the users, and the target prices no more than what is chosen.
    """
    agent = DQN(spec)
    u, r = agent.net.read.size, agent.net.items.shape[1]
    w, n, h = agent.net.width, spec.num_items, spec.past_size

    def hidden(b: int) -> list[Any]:
        bends = [((BENDS, TRACES), (b, TRACES, h))] if h > 1 else []
        return [((b, u), (u, w)), ((b, w), (w, w)), ((b, w), (w, w)), *bends]

    def every(b: int) -> list[Any]:
        if own:
            return [*hidden(b), ((b, w), (w, r)), ((b, r + 1), (r + 1, n))]
        return [*hidden(b), ((n, r), (r, w)), ((b, w), (w, n))]

    shown = [*hidden(batch), ((batch, r), (r, w))]
    back = [((u, batch), (batch, w)), ((r, batch), (batch, w))]
    back += [((w, batch), (batch, w)), ((batch, w), (w, w))] * 2
    priced = shown if own else every(batch)
    return every(USERS), [*every(batch), *priced, *shown, *back]


class Clock:
    """Adds up the CPU time of calls; on a GPU the time until they are done."""

    def __init__(self, device: str) -> None:
        self.cuda, self.spent = device.startswith("cuda"), 0.0

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*given: Any, **named: Any) -> Any:
            begun = self.now()
            try:
                return call(*given, **named)
            finally:
                self.spent += self.now() - begun

        return timed


def shares(repeats: int, seconds: float, seed: int, quick: bool, device: str) -> list[Row]:
    """What a step would be worth without a part of it: the ratio is what the other parts take."""
    clocks = {name: Clock(device) for name in SHARES}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in SHARES}
    with training(clocks, seed, quick, device) as step:
        whole = Clock(device)
        for _ in range(repeats):
            for clock in (whole, *clocks.values()):
                clock.spent = 0.0
            steps, end = 0, time.perf_counter() + seconds
            while not steps or time.perf_counter() < end:
                steps += whole.around(step)(8)
            for name, clock in clocks.items():
                others = sum(c.spent for n, c in clocks.items() if n != name and n != "replay")
                base = whole.spent - others  # the step with this part, without the other extras
                rates[name].append((steps / base, steps / (base - clock.spent)))
    found = []
    for name, pairs in rates.items():
        with_it, without = (Speed(tuple(x), tuple(x)) for x in zip(*pairs, strict=True))
        found.append(
            row("train", f"train_agent's loop with {name}", UNIT, with_it, limit=without,
                limit_name="the same without (clocks around its calls)",
                limit_goal=1.0 - SHARES[name])
        )  # fmt: skip
    return found


@contextmanager
def training(
    clocks: dict[str, Clock], seed: int, quick: bool, device: str
) -> Iterator[Callable[[int], int]]:
    """The loop of train_agent by calls of so many steps of all users, with clocks around parts."""
    spec = SimSpec(None, None, device=device, seed=seed)
    world = TinyWorld(spec, items=200 if quick else ITEMS, households=800, dim=64)
    env = RecommendVectorEnv(
        world, num_envs=USERS, slate_size=1, max_steps=20, observation="ids", output="torch",
        seed=seed,
    )  # fmt: skip
    agent = DQN(agent_spec(world, seed, device))
    agent.replay.at = clocks["replay"].around(agent.replay.at)  # type: ignore[method-assign]
    agent.replay.draw = clocks["replay"].around(agent.replay.draw)  # type: ignore[method-assign]
    agent.net.read.pair = clocks["replay"].around(agent.net.read.pair)  # type: ignore[method-assign]
    obs, info = env.reset()
    users = torch.arange(USERS, device=device)  # (B,)
    with tempfile.TemporaryDirectory() as folder:
        about = {"catalog": "", "policy": "dqn", "env": {}, "adaptive": True}
        log = DecisionWriter(Path(folder) / "log", behaviours=world.behaviours, meta=about)
        points = Curves(
            Path(folder) / "curves", num_envs=USERS, num_items=env.num_items, every=LOG_EVERY,
            device=device,
        )  # fmt: skip
        board, write = clocks["TensorBoard"], clocks["decision log"].around(log.write)

        def count(transition: Transition, learnt: dict[str, Tensor]) -> None:
            points.add(transition, learnt)
            if points.due:
                points.write()

        count_timed = board.around(count)

        def play(steps: int) -> int:
            nonlocal obs, info
            for _ in range(steps):
                mask, at = info["mask"], env.time.clone()
                decision = agent.act(obs, mask)
                later, reward, terminated, truncated, info = env.step(decision.slate)
                transition = Transition(
                    obs, mask, decision, reward, next(iter(info["response"].chosen.values())),
                    info["slot_reward"], info.get("final_obs", later),
                    info.get("final_mask", info["mask"]), terminated, truncated,
                )  # fmt: skip
                learnt = agent.update(transition)
                said = one_step(env, users, decision, terminated, truncated, info)
                write(**said, obs=obs, excluded=mask, time=at)
                count_timed(transition, learnt)
                obs = later
            return steps * USERS

        play(20)  # beyond learning_starts
        yield play
        points.close()


def agent_spec(world: TinyWorld, seed: int, device: str) -> AgentSpec:
    """What a learner is told of a synthetic shop that shows one item at a time, 20 times."""
    n, users, kinds = len(world.catalog), world.users, len(world.behaviours)
    return AgentSpec(
        n, 1, world.catalog.vectors, world.catalog.category, world.catalog.popularity, None,
        users.profile.shape[1], users.past.shape[1], 20, kinds, CONTEXT, device, seed,
    )  # fmt: skip


def curves(repeats: int, seconds: float, seed: int, quick: bool, device: str) -> list[Row]:
    """Env steps against replay ratio for each head, with the memory a point needed at most."""
    found = []
    for head in HEADS:
        for ratio in RATIOS[2::3] if quick else RATIOS:
            forget_peak()
            work = ours(1024, seed, device, replay_ratio=ratio, head=head)
            speed = in_turn({"ours": work}, max(1, repeats - 2), seconds, device)["ours"]
            found.append(
                row("train", f"DQN, {head} head, replay ratio {ratio:g}", UNIT, speed,
                    memory_mib=peak_mib(), curve=f"replay ratio, {head} head", at=ratio)
            )  # fmt: skip
    return found
