"""All policies of a comparison on the same held-out sessions, and on those of other assumptions."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from agents.base import Agent, Decision, Mask, Transition
from encoders.state import EMPTY, Observation
from evaluation.online import Sessions, play
from experiments.oracle import play_oracle
from experiments.policies import (
    PLAYED_AT_ONCE,
    SESSIONS_SEED,
    household_names,
    make_env,
    session_list,
)
from experiments.prepare import Worlds
from simulators.base import UserSimulator

ORACLE = "oracle"
CHANCES = ("patience",)  # assumptions that are probabilities
FROM_LOG = "from the log"  # said of what was fitted and has not one size


@dataclass(frozen=True)
class Played:
    """What a policy, trained with R seeds, did in M sessions on each of S simulators."""

    reward: np.ndarray  # (R, S, M)
    length: np.ndarray  # (R, S, M) steps
    revenue: np.ndarray  # (R, S, M) money paid for what was shown
    diversity: float  # 1 - cosine of two items shown in one session, a mean over sessions
    shown: np.ndarray  # (R, N) how often each item was shown
    chosen: np.ndarray  # (N,) how often it was bought


class Tally:
    """Sums over the steps of M sessions beyond those of `Sessions`."""

    def __init__(self, m: int, vectors: Tensor) -> None:
        self.unit = normalize(vectors, dim=1)  # (N, D)
        self.revenue = vectors.new_zeros(m, dtype=torch.float64)
        self.total = vectors.new_zeros(m, vectors.shape[1])  # (M, D) of the vectors shown
        self.count = vectors.new_zeros(m)  # (M,) items with a vector shown
        self.chosen = vectors.new_zeros(len(vectors), dtype=torch.int64)  # (N,)

    def see(self, rows: Tensor, obs: Observation, info: Any) -> None:
        """Add one step of R rows."""
        slate, response = info["slate"][rows], info["response"]  # (R, K)
        bought = next(iter(response.chosen.values()))[rows] & (slate != EMPTY)
        self.revenue[rows] += response.value[rows].sum(dim=1).double()
        shown = self.unit[slate.clamp(min=0)] * (slate != EMPTY)[:, :, None]  # (R, K, D)
        self.total[rows] += shown.sum(dim=1)
        self.count[rows] += shown.square().sum(dim=(1, 2))  # each has length 1, or none
        self.chosen += torch.bincount(slate[bought], minlength=len(self.chosen))

    def diversity(self) -> Tensor:
        """(M,) 1 - mean cosine of all pairs shown in a session; NaN with fewer than two."""
        pairs = self.count * (self.count - 1)
        same = (self.total.square().sum(dim=1) - self.count) / pairs
        return torch.where(self.count > 1.5, 1.0 - same, torch.nan)


class Stranger:
    """A policy that is told nothing of the user: no past, and the profile of the median one."""

    def __init__(self, agent: Agent, profile: Tensor) -> None:
        self.agent, self.profile = agent, profile.median(dim=0).values  # (P,)

    def hidden(self, obs: Observation) -> Observation:
        """The observation as if this were the user's first visit."""
        return replace(
            obs,
            profile=self.profile.expand(len(obs), -1),
            past=torch.full_like(obs.past, EMPTY),
            past_count=torch.zeros_like(obs.past_count),
            past_age=torch.zeros_like(obs.past_age),
        )

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        return self.agent.act(self.hidden(obs), mask, explore=explore)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        return self.agent.slate_probs(self.hidden(obs), mask, slate, explore=explore)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        return self.agent.action_probs(self.hidden(obs), mask, explore=explore)

    def update(self, transition: Transition) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return self.agent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state)


def play_all(
    cfg: DictConfig,
    simulators: list[UserSimulator],
    agents: dict[str, list[Agent]],
    vectors: Tensor,
    size: int,
    what: str,
    *,
    oracle: bool = True,
) -> dict[str, Played]:
    """Every policy, each of its seeds, in the same `size` sessions of each simulator.

    `vectors` (N, D) say how alike items are. All meet the same users with the same draws.
    """
    todo = [(name, r) for name, seeds in agents.items() for r in range(len(seeds))]
    todo += [(ORACLE, 0)] * oracle
    with (
        tqdm(total=len(todo) * len(simulators), desc=what, unit="play",
             disable=not cfg.progress) as bar,
        ThreadPoolExecutor(PLAYED_AT_ONCE) as pool,
    ):  # fmt: skip

        def on(simulator: UserSimulator) -> list[tuple[Sessions, Tally]]:
            torch.set_num_threads(1)
            device = simulator.users.past.device
            users, episodes = session_list(len(simulator.users), size, str(device))
            env = make_env(cfg, simulator, num_envs=size, seed=SESSIONS_SEED)
            found = []
            for name, r in todo:
                tally = Tally(size, vectors.to(device))
                if name == ORACLE:
                    done = play_oracle(env, users, episodes, watch=tally.see)
                else:  # each simulator meets the same agent, with the same generator
                    agent = copy.deepcopy(agents[name][r])
                    done = play(env, agent, users, episodes, watch=tally.see)
                found.append((done, tally))
                bar.update()
            return found

        by_simulator = list(pool.map(on, simulators))  # S lists as long as `todo`
    played = {}
    for name in dict.fromkeys(n for n, _ in todo):
        places = [i for i, (n, _) in enumerate(todo) if n == name]
        cells = [[by_simulator[s][i] for s in range(len(simulators))] for i in places]  # (R, S)
        played[name] = together(cells)
    return played


def together(cells: list[list[tuple[Sessions, Tally]]]) -> Played:
    """Sessions of R seeds on S simulators as one."""

    def table(of: Callable[[Sessions, Tally], Tensor]) -> np.ndarray:
        return np.stack([np.stack([of(*c).cpu().numpy() for c in row]) for row in cells])

    diversity = table(lambda _, t: t.diversity())
    there = diversity[np.isfinite(diversity)]
    return Played(
        reward=table(lambda s, _: s.reward),
        length=table(lambda s, _: s.length.double()),
        revenue=table(lambda _, t: t.revenue),
        diversity=float(there.mean()) if len(there) else float("nan"),
        shown=table(lambda s, _: s.shown).sum(axis=1),
        chosen=table(lambda _, t: t.chosen).sum(axis=(0, 1)),
    )


def households(cfg: DictConfig, simulators: list[UserSimulator], size: int) -> np.ndarray:
    """Who came in each session, (S, M): the clusters of every interval."""
    rows = []
    for i, simulator in enumerate(simulators):
        users, _ = session_list(len(simulator.users), size, str(simulator.users.past.device))
        rows.append(household_names(simulator.users, users, simulators[0].users, i))
    return np.stack(rows)


@dataclass(frozen=True)
class Variant:
    """A named assumption at another value."""

    assumption: str
    label: str
    value: Any


def variants(cfg: DictConfig, simulator: UserSimulator) -> list[Variant]:
    """Half and double of each assumption that the simulator names, and other ways to choose.

    One that is off is tried at a size from the configuration, and at half of it. A word, as
    exposure=display, is what the simulator measured for it; what is not one number, as what baskets
    of the log say of satiation, is tried off, a word at that size too.
    """
    found = []
    for name in cfg.assumptions:
        if name not in cfg.env.simulator:
            continue
        given = cfg.env.simulator[name]
        typed = isinstance(given, int | float)
        now = given if typed else getattr(simulator, name, None)  # fitted to the log, or measured
        if name == "position" and cfg.env.session.slate_size == 1:
            continue  # there is no slot further down
        said = FROM_LOG if given is None else given
        size = cfg.when_off.get(name)
        if not isinstance(now, int | float):  # of fitted parts there is no half
            sizes = {f"off (is {said})": 0.0}
            if given is not None and size is not None:
                sizes[f"on, {size:.3g} (is {said})"] = size
        elif now:
            twice = min(now * 2, 1.0) if name in CHANCES else now * 2
            sizes = {f"half ({now / 2:.3g})": now / 2, f"double ({twice:.3g})": twice}
            if isinstance(given, str):
                sizes = {f"off (is {said}, {now:.3g})": 0.0} | sizes
        else:
            size = cfg.when_off[name]
            sizes = {f"on, {size / 2:.3g} (is off)": size / 2, f"on, {size:.3g} (is off)": size}
        found += [Variant(name, label, float(value)) for label, value in sizes.items()]
    for name, others in cfg.alternatives.items():
        if name in cfg.env.simulator:
            now = cfg.env.simulator[name]
            same = ("cascade", "independent") if cfg.env.session.slate_size == 1 else ()
            others = [x for x in others if x not in same[:1]]  # of one item both are the same
            found += [Variant(name, str(other), other) for other in others if other != now]
    return found


def simulators_with(
    cfg: DictConfig, worlds: Worlds, variant: Variant, only: int | None = None
) -> list[UserSimulator]:
    """The judging simulators, the same fits, with one assumption changed; all or `only` some."""
    specs = worlds.specs[: only or cfg.sensitivity_simulators]
    changed = {variant.assumption: variant.value}
    return [instantiate(cfg.env.simulator, spec, **changed, _convert_="all") for spec in specs]
