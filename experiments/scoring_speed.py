"""How fast whole catalogues are scored and the best items taken, beside the bare product and topk.

4096 users, 100,000 items, slates of 10, on one thread, by a learner with a dot head and by factors
of a static policy as they serve, and by lists as `evaluation.ranking` makes them. The limit is the
same product in blocks into memory that is there, then `topk`. At a million items an index finds
candidates, whose share of the truly best is measured.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn.functional import normalize

from agents.base import AgentSpec
from agents.dqn import DQN
from agents.explore import row_blocks
from agents.factors import ALS
from agents.retrieval import Index
from agents.static import Static
from encoders.state import EMPTY, Observation
from evaluation.ranking import rank
from experiments.bench_rows import (
    Row,
    Work,
    fixed,
    forget_peak,
    in_turn,
    installed,
    peak_mib,
    row,
)

USERS, ITEMS, K, DIM = 4096, 100_000, 10, 64
QUICK = (64, 2000)  # users, items
MANY, QUICK_MANY, CANDIDATES = (1024, 1_000_000), (64, 5000), 200
PROBES = (32, 128, 512)  # lists of the index that are looked at
PAST, TOPICS, SPREAD = 16, 2000, 0.6  # items of a past; of the items, and how far they scatter
GOAL = 0.77  # at most 1.3 times the time of the bare kernel
UNIT = "users per CPU-second"


def rows(
    repeats: int = 3, seconds: float = 2.0, seed: int = 0, quick: bool = False, device: str = "cpu"
) -> list[Row]:
    """The learner, the static policy and the lists; a curve over items."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        users, items = QUICK if quick else (USERS, ITEMS)
        found = [
            scored(name, users, items, repeats, seconds, seed, device, goal=GOAL)
            for name in WAYS
            if name != "lists" or device == "cpu"  # lists are made where files are read
        ]
        for n in (500, 1000) if quick else (1000, 10_000, 100_000):
            found.append(
                scored("learner", users, n, 1, seconds, seed, device, curve="items", at=float(n))
            )
        return found + found_by_index(repeats, seconds, seed, quick, device)
    finally:
        torch.set_num_threads(before)


def scored(
    name: str, users: int, items: int, repeats: int, seconds: float, seed: int, device: str,
    *, goal: float | None = None, curve: str | None = None, at: float | None = None,
) -> Row:  # fmt: skip
    """One way to the best items beside its limit, with the memory that it needs at most."""
    said, make = WAYS[name]
    spec, obs = shop(users, items, seed, device)
    forget_peak()
    held = peak_mib()
    work, width = make(spec, obs, seed)
    work()
    most = peak_mib() - held
    limit = bare(users, items, width, seed, device)
    speed = in_turn({"ours": work, "bare": limit}, repeats, seconds, device)
    case = f"{said}, {users} users x {items:,} items, the best {K}"
    return row(
        "scoring", f"{case}, of a curve" if curve else case, UNIT, speed["ours"],
        limit=speed["bare"], limit_name=f"bare product of {width} numbers and topk",
        limit_goal=goal, memory_mib=most, curve=curve, at=at,
    )  # fmt: skip


def found_by_index(repeats: int, seconds: float, seed: int, quick: bool, device: str) -> list[Row]:
    """Candidates of an index beside all of very many items, and their share of the truly best."""
    users, items = QUICK_MANY if quick else MANY
    said = f"DQN.act, greedy, {users} users x {items:,} items, {CANDIDATES} candidates"
    exact_name, all_found = "all items looked at", "the best of all items"
    if not installed("faiss"):
        print("no rows of candidates: pip install 'recplay[retrieval]'")
        return []
    spec, obs = shop(users, items, seed, device)
    exact = DQN(spec)
    stirred(exact, seed)
    wanted = exact.act(obs, None, explore=False).slate  # (B, K)
    quick_one = DQN(spec, candidates=CANDIDATES)
    stirred(quick_one, seed)
    found = []
    for probes in PROBES[:2] if quick else PROBES:
        forget_peak()
        held = peak_mib()
        quick_one.index = Index(quick_one.target.read.described(), probes=probes, seed=seed)
        most = peak_mib() - held
        works: dict[str, Work] = {
            name: served(agent, obs) for name, agent in (("index", quick_one), ("exact", exact))
        }
        speed = in_turn(works, repeats, seconds, device)
        got = quick_one.act(obs, None, explore=False).slate
        recall = (got[:, :, None] == wanted[:, None, :]).any(dim=1).float().mean().item()
        lists = f"{quick_one.index.probes} of {quick_one.index.lists} lists"
        found.append(
            row("scoring", f"{said} from {lists}", UNIT,
                speed["index"], limit=speed["exact"], limit_name=exact_name, memory_mib=most)
        )  # fmt: skip
        found.append(
            row("scoring", f"{said} from {lists}: recall at {K}", f"of {all_found}",
                fixed(recall), limit=1.0, limit_name=all_found, absolute=True)
        )  # fmt: skip
    return found


def served(agent: DQN | Static, obs: Observation) -> Work:
    """All users once, greedily."""

    def work() -> int:
        agent.act(obs, None, explore=False)
        return len(obs)

    return work


def shop(users: int, items: int, seed: int, device: str) -> tuple[AgentSpec, Observation]:
    """Items around topics, and users who bought some of them."""
    vectors = around_topics(items, seed).to(device)
    rng = np.random.default_rng(seed)
    past = torch.from_numpy(rng.integers(0, items, (users, PAST)))
    past = torch.where(
        past.sort(dim=1).values.diff(dim=1, prepend=past[:, :1] - 1) == 0, EMPTY, past
    )
    count = csr_matrix(
        (np.ones(users * PAST, np.float32), (np.arange(users).repeat(PAST), past.ravel() % items)),
        shape=(users, items),
    )
    one = torch.ones(items, device=device)
    spec = AgentSpec(
        items, K, vectors, one.long(), one / items, count, 4, PAST, K, 1, 0, device, seed
    )
    number = torch.ones(users, PAST)
    none = torch.full((users, K), EMPTY)
    obs = Observation(
        torch.randn(users, 4, generator=torch.Generator().manual_seed(seed)), past, number,
        30.0 * number, none, torch.zeros(users, K, 1), torch.zeros(users, 0),
    )  # fmt: skip
    return spec, obs.to(device)


def around_topics(items: int, seed: int, scatter: float = SPREAD) -> Tensor:
    """Unit vectors (N, D) that lie around topics, as those of texts do."""
    generator = torch.Generator().manual_seed(seed)
    topics = normalize(torch.randn(TOPICS, DIM, generator=generator), dim=1)
    own = torch.randint(TOPICS, (items,), generator=generator)
    noise = torch.randn(items, DIM, generator=generator) / DIM**0.5
    return normalize(topics[own] + scatter * noise, dim=1)


def learner(spec: AgentSpec, obs: Observation, seed: int) -> tuple[Work, int]:
    """A DQN with a dot head who serves greedily: reading what it sees is included."""
    agent = DQN(spec, epsilon_start=0.0, epsilon_end=0.0)
    stirred(agent, seed)
    width = agent.net.items.shape[1] + 1  # a product of what describes items
    return served(agent, obs), width


def stirred(agent: DQN, seed: int) -> None:
    """Give users opinions, as training does: a new net has none of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in agent.target.personal():
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.add_(0.1 * noise)


def factors(spec: AgentSpec, obs: Observation, seed: int) -> tuple[Work, int]:
    """A static policy of least-squares factors: folding users in is included."""
    agent = Static(spec, model=lambda past, **given: ALS(past, iterations=1, factors=DIM, **given))
    return served(agent, obs), DIM


def lists(spec: AgentSpec, obs: Observation, seed: int) -> tuple[Work, int]:
    """Lists of `evaluation.ranking` from users and items of 64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    users = torch.randn(len(obs), DIM, generator=generator)
    items = spec.item_vectors
    relevant = csr_matrix(
        (np.ones(len(obs)), (np.arange(len(obs)), np.arange(len(obs)) % len(items))),
        shape=(len(obs), len(items)),
    )

    def work() -> int:
        rank(lambda rows: users[rows] @ items.T, relevant, None, k=K)
        return len(obs)

    return work, DIM


Way = Callable[[AgentSpec, Observation, int], tuple[Work, int]]
WAYS: dict[str, tuple[str, Way]] = {
    "learner": ("DQN.act, greedy", learner),
    "factors": ("Static(ALS).act", factors),
    "lists": ("evaluation.ranking.rank of a product", lists),
}


def bare(users: int, items: int, width: int, seed: int, device: str) -> Work:
    """The product in blocks of rows into memory that is there, and topk."""
    generator = torch.Generator(device).manual_seed(seed)
    left = torch.randn(users, width, generator=generator, device=device)
    right = torch.randn(items, width, generator=generator, device=device)
    blocks = list(row_blocks(users, items))
    out = torch.empty(blocks[0].stop, items, device=device)

    def work() -> int:
        for rows in blocks:
            some = left[rows]
            torch.mm(some, right.T, out=out[: len(some)]).topk(K, dim=1)
        return users

    return work
