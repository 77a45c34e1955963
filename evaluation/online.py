"""Judge policies by playing: fixed sessions, replayed trips, intervals over both clusters."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.base import Agent, Decision, Mask
from encoders.state import EMPTY, Observation
from evaluation.decisions import DecisionWriter

Choice = Callable[[Tensor, Observation, Mask], Decision]  # rows (R,) of the env, what they see
Watch = Callable[[Tensor, Observation, Any], None]  # rows (R,), what they saw, info of all M rows
CHUNK = 512  # trips replayed at once


@dataclass(frozen=True)
class Sessions:
    """M sessions that were played, each once."""

    reward: Tensor  # (M,) float64: sum over the session
    length: Tensor  # (M,) int64 steps
    shown: Tensor  # (N,) int64: how often each item was shown

    @property
    def coverage(self) -> float:
        """Share of the catalogue that was shown at all."""
        return (self.shown > 0).double().mean().item()


def play(
    env: Any,
    agent: Agent,
    users: Tensor,
    episodes: Tensor,
    *,
    explore: bool = False,
    log: DecisionWriter | None = None,
    watch: Watch | None = None,
) -> Sessions:
    """Let an agent serve each (user, episode), (M,) each, exactly once; `watch` sees each step."""

    def choose(rows: Tensor, obs: Observation, mask: Mask) -> Decision:
        return agent.act(obs, mask, explore=explore)

    return sessions(env, choose, users, episodes, log=log, watch=watch)


def sessions(
    env: Any,
    choose: Choice,
    users: Tensor,
    episodes: Tensor,
    *,
    log: DecisionWriter | None = None,
    watch: Watch | None = None,
) -> Sessions:
    """Play M sessions on an env of M rows; a row whose session is over is asked no more.

    A list that is played to its end favours nobody: the first M sessions to finish would be the
    short ones.
    """
    m, n, k = len(users), catalog_size(env), env.slate_size
    if env.num_envs != m or len(episodes) != m:
        raise ValueError(
            f"{m} users need an env of num_envs={m} and as many episodes, "
            f"got num_envs={env.num_envs} and {len(episodes)} episodes"
        )
    obs, info = env.reset(options={"user": users, "episode": episodes})
    device = obs.past.device
    reward = torch.zeros(m, dtype=torch.float64, device=device)
    length = torch.zeros(m, dtype=torch.int64, device=device)
    shown = torch.zeros(n + 1, dtype=torch.int64, device=device)  # the last place for empty slots
    rows = torch.arange(m, device=device)  # (R,) still playing
    while len(rows):
        seen, time = obs[rows], env.time[rows]
        mask = None if info["mask"] is None else info["mask"][rows]
        decision = choose(rows, seen, mask)
        slate = torch.full((m, k), EMPTY, device=device).index_copy(
            0, rows, decision.slate
        )  # (M, K)
        obs, gained, terminated, truncated, info = env.step(slate)
        if log is not None:
            assert mask is not None
            step = one_step(env, rows, decision, terminated, truncated, info)
            log.write(**step, obs=seen, excluded=mask, time=time)
        if watch is not None:
            watch(rows, seen, info)
        reward[rows] += gained[rows].double()
        length[rows] += 1
        there = info["slate"][rows].flatten()  # (R * K,)
        shown += torch.bincount(torch.where(there == EMPTY, n, there), minlength=n + 1)
        rows = rows[~(terminated | truncated)[rows]]
    return Sessions(reward, length, shown[:n])


def catalog_size(env: Any) -> int:
    """N, as the env's action space says it."""
    space = env.single_action_space
    return int(space.nvec[0]) if hasattr(space, "nvec") else int(space.n)


def one_step(
    env: Any, rows: Tensor, decision: Decision, terminated: Tensor, truncated: Tensor, info: Any
) -> dict[str, Any]:
    """What the decision log keeps of one step of R rows, apart from what was seen and when."""
    return {
        "decision": decision,
        "user": info["user"][rows],
        "episode": info["episode"][rows],
        "step": info["step"][rows],
        "slot_reward": info["slot_reward"][rows],
        "chosen": {name: x[rows] for name, x in info["response"].chosen.items()},
        "terminated": terminated[rows],
        "truncated": truncated[rows],
    }


def replay(
    agent: Agent, obs: Observation, bought: Tensor, *, steps: int, slate_size: int
) -> Tensor:
    """Count what was really bought, (M, T) EMPTY-padded, among `steps` slates of each trip: (M,).

    No simulator: the agent is told of a hit as of a purchase, and the trip goes on.
    """
    places = obs.history.shape[1]
    if steps * slate_size > places:
        raise ValueError(
            f"{steps} slates of {slate_size} need {steps * slate_size} places of history, "
            f"the observation has {places}: ask for fewer steps"
        )
    chunks = [slice(i, i + CHUNK) for i in range(0, len(obs), CHUNK)]
    found = [
        replay_chunk(agent, obs[rows], bought[rows], steps=steps, slate_size=slate_size)
        for rows in chunks
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def replay_chunk(
    agent: Agent, obs: Observation, bought: Tensor, *, steps: int, slate_size: int
) -> Tensor:
    """`replay` of at most CHUNK trips."""
    found = torch.zeros(len(obs), dtype=torch.int64, device=bought.device)  # (M,)
    for step in range(steps):
        slate = agent.act(obs, obs.history, explore=False).slate  # (M, K)
        again = (slate[:, :, None] == obs.history[:, None, :]).any(dim=2) | (
            slate == EMPTY
        )  # (M, K)
        hit = (slate[:, :, None] == bought[:, None, :]).any(dim=2) & ~again  # (M, K)
        found += hit.sum(dim=1)
        places = slice(step * slate_size, (step + 1) * slate_size)
        history, feedback = obs.history.clone(), obs.feedback.clone()
        history[:, places] = slate
        feedback[:, places, 0] = hit.float()
        obs = replace(obs, history=history, feedback=feedback)
    return found


def interval(
    matrix: np.ndarray, *, alpha: float = 0.05, replicates: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of (S, H), simulators by households (nan where none), with a 1 - alpha interval.

    Pigeonhole bootstrap (Owen, 2007): rows and columns are redrawn independently, one fewer than
    there are, which keeps the variance unbiased (Rao and Wu, 1988). Few simulators make percentile
    limits too narrow, so the limits are Student's with the degrees of freedom of the two sources.
    """
    from scipy.stats import t

    mean, error, free = standard_error(matrix, replicates=replicates, seed=seed)
    reach = t.ppf(1 - alpha / 2, free) * error
    return mean, float(mean - reach), float(mean + reach)


def standard_error(
    matrix: np.ndarray, *, replicates: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of (S, H), its pigeonhole-bootstrap standard error, and the error's freedom."""
    s, h = matrix.shape
    there = ~np.isnan(matrix)  # (S, H)
    if h < 2 or there.sum() < 2:
        raise ValueError(f"an interval needs at least 2 households, got a matrix of {matrix.shape}")
    x = np.where(there, matrix, 0.0)  # (S, H)
    mean = x.sum() / there.sum()
    rng = np.random.default_rng(seed)
    rows = (
        rng.multinomial(s - 1, np.full(s, 1 / s), replicates) if s > 1 else np.ones((replicates, 1))
    )
    columns = rng.multinomial(h - 1, np.full(h, 1 / h), replicates)  # (R, H)
    weight = (rows @ there * columns).sum(axis=1)  # (R,)
    total = (rows @ x * columns).sum(axis=1)  # (R,)
    means = total[weight > 0] / weight[weight > 0]
    return float(mean), float(means.std(ddof=1)), degrees_of_freedom(x, there)


def degrees_of_freedom(x: np.ndarray, there: np.ndarray) -> float:
    """Of a variance with two parts, simulators and households (Satterthwaite, 1946)."""
    parts, free = [], []
    for axis in (1, 0):
        count = there.sum(axis=axis)
        means = x.sum(axis=axis)[count > 0] / count[count > 0]
        if len(means) > 1:
            parts.append(means.var(ddof=1) / len(means))
            free.append(len(means) - 1)
    total = sum(parts)
    if total == 0:
        return float(max(free))
    return float(total**2 / sum(p**2 / f for p, f in zip(parts, free, strict=True)))


def by_household(reward: np.ndarray, household: np.ndarray) -> np.ndarray:
    """Session rewards (S, M) of households (M,) or (S, M) to means (S, H), nan where none."""
    s = reward.shape[0]
    names, column = np.unique(np.broadcast_to(household, reward.shape), return_inverse=True)
    cell = np.arange(s)[:, None] * len(names) + column.reshape(reward.shape)  # (S, M)
    total = np.bincount(cell.ravel(), reward.ravel(), minlength=s * len(names))
    count = np.bincount(cell.ravel(), minlength=s * len(names))
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean.reshape(s, len(names))


def table(
    rewards: dict[str, np.ndarray],
    household: np.ndarray,
    *,
    length: dict[str, float],
    coverage: dict[str, float],
    replay_value: dict[str, float | None],
    baseline: str = "popularity",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row a policy: rewards (S, M) of the same sessions, on common random numbers.

    Households (M,) are the same in all simulators, or (S, M) where each has its own. Differences
    are taken session by session before anything is averaged.
    """
    if baseline not in rewards:
        raise ValueError(f"baseline {baseline!r} was not played: there are {', '.join(rewards)}")
    rows = []
    for policy, reward in rewards.items():
        mean, low, high = interval(by_household(reward, household), seed=seed)
        gap = by_household(reward - rewards[baseline], household)
        diff, diff_low, diff_high = interval(gap, seed=seed)
        rows.append(
            {
                "policy": policy,
                "mean_reward": mean,
                "ci_low": low,
                "ci_high": high,
                f"diff_to_{baseline}": diff,
                "diff_ci_low": diff_low,
                "diff_ci_high": diff_high,
                "session_length": length[policy],
                "coverage": coverage[policy],
                "replay_value": replay_value[policy],
            }
        )
    return rows
