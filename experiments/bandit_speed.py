"""How fast linear bandits decide and learn, and how much reward they miss while they learn.

A world of 100 arms and contexts of 64 numbers: an arm pays clip(.5 + 1.5 x theta, 0, 1) and noise
of standard deviation .1. Decisions come in batches of 256, each learnt from before the next. Clocks
run while a policy decides and learns, not while the world answers; the world is the same for all.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from agents.base import AgentSpec, Decision, Transition
from agents.epsilon_greedy import EpsilonGreedy
from agents.lints import LinTS
from agents.linucb import LinUCB
from encoders.state import EMPTY, Observation
from experiments.bench_rows import Row, Speed, fixed, row

ARMS, FEATURES, BATCH, DECISIONS = 100, 64, 256, 100_000
NOISE, ALPHA = 0.1, 0.5  # of a reward; of both LinUCBs, in the peer's unit
GOAL = 1.3  # times the peer's speed, with no more regret
PEER = "contextualbandits LinUCB"

Turn = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], None]]


def rows(repeats: int, seconds: float, seed: int, quick: bool, device: str = "cpu") -> list[Row]:
    """Every policy's decisions per CPU-second and its regret, beside the peer's.

    A window is a whole log of decisions, however many `seconds` it takes.
    """
    from threadpoolctl import threadpool_limits

    decisions = DECISIONS // 50 if quick else DECISIONS
    turns = policies()  # loads the peer: what is not loaded yet cannot be limited
    with threadpool_limits(1):  # its libraries would wait for each other on all cores
        runs = [{name: play(turn(seed), decisions, seed) for name, turn in turns.items()}
                for _ in range(repeats)]  # fmt: skip
    speeds = {name: Speed(tuple(run[name][0] for run in runs), tuple(run[name][1] for run in runs))
              for name in turns}  # fmt: skip
    regret = {name: runs[0][name][2] for name in turns}
    size = f"{ARMS} arms x {FEATURES} features, batches of {BATCH}, {decisions:,} decisions"
    found = []
    for name in turns:
        if name != PEER:
            goal = 1.0 if name == "LinUCB" else None  # the peer's algorithm at the peer's alpha
            found += [
                row("bandits", f"{name}: {size}", "decisions per CPU-second", speeds[name],
                    peer=speeds.get(PEER), peer_name=PEER, peer_goal=goal and GOAL),
                row("bandits", f"{name}: how many times less regret than random arms, {size}",
                    "x", fixed(1 / regret[name]), peer_name=PEER, peer_goal=goal,
                    peer=fixed(1 / regret[PEER]) if PEER in regret else None),
            ]  # fmt: skip
    return found


def policies() -> dict[str, Callable[[int], Turn]]:
    """Ours, and the peer where it is installed, at equal alpha."""
    size, spec = FEATURES + 1, bandit_spec
    found: dict[str, Callable[[int], Turn]] = {
        "LinUCB": lambda seed: of_agent(
            LinUCB(spec(seed), features="disjoint", dim=size, alpha=ALPHA, noise=1.0)
        ),
        "LinUCB, noise estimated": lambda seed: of_agent(
            LinUCB(spec(seed), features="disjoint", dim=size, alpha=1.0)
        ),
        "LinTS": lambda seed: of_agent(LinTS(spec(seed), features="disjoint", dim=size)),
        "epsilon-greedy .05": lambda seed: of_agent(
            EpsilonGreedy(spec(seed), features="disjoint", dim=size, epsilon=0.05)
        ),
    }
    try:
        from contextualbandits.online import LinUCB as Peer
    except ImportError:
        return found
    # seed 0 fails an assertion of the peer's
    found[PEER] = lambda seed: of_peer(
        Peer(nchoices=ARMS, alpha=ALPHA, method="chol", use_float=False, random_state=seed + 1)
    )
    return found


def bandit_spec(
    seed: int, *, arms: int = ARMS, features: int = FEATURES, slate_size: int = 1
) -> AgentSpec:
    """Arms without vectors, users of whom a profile is all that is known."""
    return AgentSpec(
        num_items=arms, slate_size=slate_size, item_vectors=torch.eye(arms),
        category=torch.zeros(arms, dtype=torch.int64), popularity=torch.ones(arms),
        interactions=None, profile_size=features, past_size=1, history_size=1, feedback_size=0,
        context_size=0, seed=seed,
    )  # fmt: skip


def observed(profile: Tensor) -> Observation:
    """Profiles (B, P) of users without past, history or context."""
    none, empty = profile.new_zeros(len(profile), 1), torch.full((len(profile), 1), EMPTY)
    return Observation(profile, empty, none, none, empty, none[:, :, None][:, :, :0], none[:, :0])


def of_agent(agent: LinUCB | LinTS | EpsilonGreedy) -> Turn:
    """How one of ours decides (B,) from contexts (B, P), and learns."""

    def decide(x: Tensor) -> Tensor:
        return agent.act(observed(x), None).slate[:, 0]

    def learn(x: Tensor, arm: Tensor, reward: Tensor) -> None:
        agent.update(step_of(x, arm[:, None], reward[:, None]))

    return decide, learn


def step_of(x: Tensor, slate: Tensor, slot_reward: Tensor) -> Transition:
    """What contexts (B, P) paid for slates (B, K), rewards (B, K); nothing comes after."""
    obs, off = observed(x), torch.zeros(len(x), dtype=torch.bool)
    decision = Decision(slate, torch.ones(slate.shape))
    return Transition(obs, None, decision, slot_reward.sum(dim=1), slot_reward > 0.0, slot_reward,
                      obs, None, off, off)  # fmt: skip


def of_peer(peer: Any) -> Turn:
    """How the peer decides (B,) from contexts (B, P), and learns."""

    def decide(x: Tensor) -> Tensor:
        return torch.as_tensor(peer.predict(x.double().numpy()).astype("int64"))

    def learn(x: Tensor, arm: Tensor, reward: Tensor) -> None:
        peer.partial_fit(x.double().numpy(), arm.numpy(), reward.double().numpy())

    return first_at_random(decide, peer), learn


def first_at_random(decide: Callable[[Tensor], Tensor], peer: Any) -> Callable[[Tensor], Tensor]:
    """Decide for a peer that cannot before it was fitted: any arm."""
    generator = torch.Generator().manual_seed(0)

    def any_then(x: Tensor) -> Tensor:
        if peer.is_fitted:
            return decide(x)
        return torch.randint(ARMS, (len(x),), generator=generator)

    return any_then


def play(turn: Turn, decisions: int, seed: int) -> tuple[float, float, float]:
    """Decisions per CPU-second and per second, and regret as a share of that of random arms."""
    decide, learn = turn
    cpu, wall, missed, even, made = 0.0, 0.0, 0.0, 0.0, 0
    for x, paid, noise in world(decisions, seed):
        begun, clock = time.process_time(), time.perf_counter()
        arm = decide(x)
        cpu, wall = cpu + time.process_time() - begun, wall + time.perf_counter() - clock
        mean = paid.gather(1, arm[:, None]).squeeze(1)  # (B,)
        begun, clock = time.process_time(), time.perf_counter()
        learn(x, arm, mean + noise)
        cpu, wall = cpu + time.process_time() - begun, wall + time.perf_counter() - clock
        best = paid.amax(dim=1)  # (B,)
        missed += (best - mean).sum().item()
        even += (best - paid.mean(dim=1)).sum().item()
        made += len(x)
    return made / cpu, made / wall, missed / even


def world(decisions: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Contexts (B, P), what arms pay on average (B, ARMS) and noise (B,), batch after batch."""
    generator = torch.Generator().manual_seed(seed + 1_000_000)
    theta = torch.randn(FEATURES, ARMS, generator=generator)
    theta = theta / theta.norm(dim=0)
    for first in range(0, decisions, BATCH):
        users = min(BATCH, decisions - first)
        x = torch.randn(users, FEATURES, generator=generator)
        x = x / x.norm(dim=1, keepdim=True)
        paid = (0.5 + 1.5 * x @ theta).clamp(0.0, 1.0)  # (B, ARMS)
        yield x, paid, NOISE * torch.randn(users, generator=generator)
