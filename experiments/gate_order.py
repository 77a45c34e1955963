"""Whether one order of policies is another: pairs whose difference is clear, and their signs."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from agents.base import AgentSpec
from evaluation.online import play
from experiments.policies import SESSIONS_SEED, make_env, named_agent, session_list
from simulators.base import SimSpec, UserSimulator
from simulators.realism import Distance

Rewards = dict[str, np.ndarray]  # policy to the reward (M,) of each session, the same for all
WHEN_OFF = {"patience": 0.1, "satiation": 0.5, "drift": 0.2, "exposure": 0.5, "position": 0.1}
CHOICES = ("logit", "independent", "cascade")


@dataclass(frozen=True)
class Agreed:
    """Of `clear` pairs of policies, `same` have the same sign elsewhere."""

    clear: int
    same: int

    def __add__(self, other: "Agreed") -> "Agreed":
        return Agreed(self.clear + other.clear, self.same + other.same)

    def share(self) -> Distance:
        """With its 95 % interval."""
        return wilson(self.same / self.clear if self.clear else float("nan"), self.clear)


def same_order(here: Rewards, there: Rewards) -> Agreed:
    """Pairs whose difference `here` exceeds its 95 % interval, and how many keep their sign."""
    clear = same = 0
    for one, other in combinations(here, 2):
        gain = here[one] - here[other]  # (M,)
        if abs(gain.mean()) > 1.96 * gain.std() / len(gain) ** 0.5:
            clear += 1
            same += bool(np.sign(gain.mean()) == np.sign((there[one] - there[other]).mean()))
    return Agreed(clear, same)


def wilson(share: float, n: int) -> Distance:
    """A share of n with its 95 % interval (Wilson, 1927)."""
    if not n:
        return Distance(share, float("nan"), float("nan"))
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Distance(share, middle - half, middle + half)


def played(
    cfg: DictConfig, simulator: UserSimulator, spec: AgentSpec, policies: list[str]
) -> Rewards:
    """Reward (M,) of every session by policy, the same sessions for all."""
    device = str(simulator.users.past.device)
    users, episodes = session_list(len(simulator.users), cfg.eval_users, device)
    found = {}
    for name in policies:
        env = make_env(cfg, simulator, num_envs=len(users), seed=SESSIONS_SEED)
        found[name] = play(env, named_agent(name, spec), users, episodes).reward.cpu().numpy()
    return found


def otherwise(cfg: DictConfig, simulator: UserSimulator) -> list[tuple[str, str, Any]]:
    """Every named assumption at half, at double and off: its name, what it is called, its value.

    One that is off already is tried on, at a usual size and at half of it. A word, as
    exposure=display, is what the simulator measured for it, and where that is not one number, off
    and a usual size.
    """
    given = cfg.env.simulator
    found: list[tuple[str, str, Any]] = []
    for name, size in WHEN_OFF.items():
        if name not in given or (name == "position" and cfg.env.session.slate_size == 1):
            continue  # a slate of one has no lower slot
        typed = isinstance(given[name], int | float)
        now = given[name] if typed else getattr(simulator, name, None)
        if not isinstance(now, int | float):  # fitted parts, or a word, without one size
            sizes = {"off": 0.0} | ({"on": size} if given[name] is not None else {})
        elif now:
            twice = min(2 * now, 1.0) if name == "patience" else 2 * now
            sizes = {"off": 0.0, "half": now / 2, "double": twice}
        else:
            sizes = {"on, half": size / 2, "on": size}
        found += [(name, f"{said} ({value:.3g})", float(value)) for said, value in sizes.items()]
    if "choice" in given:
        # of one item, independent and cascade are the same
        others = CHOICES if cfg.env.session.slate_size > 1 else CHOICES[:2]
        found += [("choice", x, x) for x in others if x != given.choice]
    return found


def sensitivity(
    cfg: DictConfig, simulator: UserSimulator, made_from: SimSpec, spec: AgentSpec
) -> list[dict[str, Any]]:
    """The order of the gate's policies under other assumptions: a row each, the default first."""
    policies = list(cfg.policies)
    usual = played(cfg, simulator, spec, policies)
    rows = [row_of("as configured", "", usual, usual)]
    changes = otherwise(cfg, simulator)
    for name, said, value in tqdm(changes, desc="sensitivity", disable=not cfg.progress):
        changed = instantiate(cfg.env.simulator, made_from, **{name: value}, _convert_="all")
        rows.append(row_of(name, said, usual, played(cfg, changed, spec, policies)))
    return rows


def row_of(assumption: str, said: str, usual: Rewards, there: Rewards) -> dict[str, Any]:
    """How far the order under an assumption is the usual one."""
    found = same_order(usual, there)
    mean = {name: float(reward.mean()) for name, reward in there.items()}
    first, second = sorted(mean, key=lambda name: -mean[name])[:2]
    gain = there[first] - there[second]
    clear = bool(gain.mean() > 1.96 * gain.std() / len(gain) ** 0.5)
    return {
        "assumption": assumption, "value": said, "same": found.same, "clear": found.clear,
        "best": first, "best_is_clear": clear, "mean": mean,
    }  # fmt: skip


def sensitivity_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as aligned text."""
    said = [f"{r['assumption']} {r['value']}".strip() for r in rows]
    width = max(map(len, said))
    return [
        f"  {words:<{width}}  {r['same']} of {r['clear']} clear pairs as configured, best "
        f"{r['best']} ({r['mean'][r['best']]:.3f}){'' if r['best_is_clear'] else ', not clearly'}"
        for words, r in zip(said, rows, strict=True)
    ]
