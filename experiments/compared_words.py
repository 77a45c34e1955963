"""Sessions in words: who came, what was shown, what happened, and why the policy showed it."""

from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import normalize

from agents.base import Agent, allowed_items
from agents.explore import standardised
from encoders.state import EMPTY, Observation
from evaluation.online import play
from experiments.policies import SESSIONS_SEED, make_env, session_list
from simulators.base import Catalog, UserSimulator

LATEST = 3  # purchases of the past that introduce a user
SLOTS = 3  # of a slate that are told
BLOCKS = {  # what a policy sees, and what it is like not to see it
    "the past": ("past", "past_count", "past_age"),
    "this session": ("history", "feedback"),
    "the profile": ("profile",),
    "weekday, hour and season": ("context",),
}


def told_sessions(
    cfg: DictConfig,
    simulator: UserSimulator,
    agents: dict[str, Agent],
    vectors: Tensor,
) -> list[dict[str, Any]]:
    """`cfg.examples` sessions of each policy, the same users for all, as the report prints them."""
    size = cfg.examples
    if not size:
        return []
    device = str(simulator.users.past.device)
    users, episodes = session_list(len(simulator.users), size, device)
    unit = normalize(vectors.to(device), dim=1)  # (N, D)
    told = []
    for name, agent in agents.items():
        env = make_env(cfg, simulator, num_envs=size, seed=SESSIONS_SEED)
        steps: list[list[dict[str, Any]]] = [[] for _ in range(size)]
        first: list[str] = [""] * size
        gone: list[str] = ["" for _ in range(size)]

        def see(
            rows: Tensor, obs: Observation, info: Any, agent: Agent = agent,
            steps: list[list[dict[str, Any]]] = steps, first: list[str] = first,
        ) -> None:  # fmt: skip
            for i, row in enumerate(rows.tolist()):  # a few sessions, for people to read
                seen = obs[i : i + 1]
                first[row] = first[row] or introduced(simulator, int(users[row]), seen)
                steps[row].append(told_step(agent, simulator.catalog, unit, seen, info, row))

        played = play(env, agent, users, episodes, watch=see)
        for row in range(size):
            n, earned = int(played.length[row]), float(played.reward[row])
            over = n >= cfg.env.session.max_steps
            gone[row] = f"{'still there' if over else 'left'} after {n} slates, reward {earned:g}"
            told.append({"policy": name, "user": first[row], "steps": steps[row],
                         "end": gone[row]})  # fmt: skip
    return told


def introduced(simulator: UserSimulator, row: int, obs: Observation) -> str:
    """Who the user is, as the shop knows it."""
    past, count, age = known(obs)
    if not len(past):
        return f"user {simulator.users.ids[row]}, of whom nothing was bought before"
    latest = [
        f"{name(simulator.catalog, int(past[i]))} ({ago(float(age[i]))}, {times(float(count[i]))})"
        for i in age.argsort(stable=True)[:LATEST].tolist()
    ]
    return (
        f"user {simulator.users.ids[row]}, who bought {len(past)} different items before; the "
        f"latest: {'; '.join(latest)}"
    )


def known(obs: Observation) -> tuple[Tensor, Tensor, Tensor]:
    """Items, counts and ages of the one user's past, (H',) each; EMPTY may stand anywhere."""
    real = obs.past[0] != EMPTY
    return obs.past[0][real], obs.past_count[0][real], obs.past_age[0][real]


def told_step(
    agent: Any, catalog: Catalog, unit: Tensor, obs: Observation, info: Any, row: int
) -> dict[str, Any]:
    """One slate: what was shown, what was done with it, why the policy thought of it."""
    slate = info["slate"][row]  # (K,)
    bought = next(iter(info["response"].chosen.values()))[row] & (slate != EMPTY)
    behaviour = next(iter(info["response"].chosen))
    shown = [int(i) for i in slate.tolist() if i != EMPTY]
    chosen = [int(i) for i in slate[bought].tolist()]
    words = ", ".join(name(catalog, i) for i in chosen)
    why = [reason(agent, catalog, unit, obs, i) for i in (chosen or shown)[:1]]
    more = [f"and {len(shown) - SLOTS} more"] if len(shown) > SLOTS else []
    return {
        "shown": [name(catalog, i) for i in shown[:SLOTS]] + more,
        "happened": f"{behaviour}: {words}" if chosen else "passed",
        "why": [w for w in why if w],
    }


def reason(agent: Any, catalog: Catalog, unit: Tensor, obs: Observation, item: int) -> str:
    """What of the user's past is nearest to an item, and what the score owes to each source.

    The share of a source is how many standard deviations of the user's scores the item falls when
    the policy is not shown that source.
    """
    parts = [nearest(catalog, unit, obs, item)]
    if hasattr(agent, "scores"):
        score = level(agent, obs, item)
        falls = {
            block: score - level(agent, without(obs, fields), item)
            for block, fields in BLOCKS.items()
        }
        felt = {block: fall for block, fall in falls.items() if abs(fall) > 0.05}
        said = ", ".join(f"{block} {fall:+.1f}" for block, fall in felt.items())
        place = f"scored {score:+.1f} standard deviations from the user's mean item"
        parts.append(f"{place}, of which {said}" if said else f"{place}, whoever the user is")
    return "; ".join(part for part in parts if part)


def nearest(catalog: Catalog, unit: Tensor, obs: Observation, item: int) -> str:
    """The item of the past that is most like this one."""
    past, often, days = known(obs)
    if not len(past):
        return ""
    place = (past == item).nonzero().squeeze(1)
    if len(place):
        at = int(place[0])
        count, age = float(often[at]), float(days[at])
        return f"bought before: {times(count)}, the last time {ago(age)}"
    like = unit[past] @ unit[item]  # (H,)
    at = int(like.argmax())
    return (
        f"new to the user, most like {name(catalog, int(past[at]))}, bought "
        f"{times(float(often[at]))} (cosine {float(like[at]):.2f})"
    )


def level(agent: Any, obs: Observation, item: int) -> float:
    """The item's score in standard deviations of all the user's scores."""
    with torch.no_grad():
        scores = agent.scores(obs)  # (1, N)
    every = allowed_items(None, 1, scores.shape[1], scores.device)
    return float(standardised(scores, every)[0, item])


def without(obs: Observation, fields: tuple[str, ...]) -> Observation:
    """The observation with some fields as of somebody unknown."""
    blank = {
        f: torch.full_like(getattr(obs, f), EMPTY if f in ("past", "history") else 0)
        for f in fields
    }
    return replace(obs, **blank)


def name(catalog: Catalog, item: int) -> str:
    """An item as a person would call it."""
    return catalog.texts[item].strip() or f"item {catalog.ids[item]}"


def ago(days: float) -> str:
    return "today" if days < 1 else f"{days:.0f} day{'s' * (days >= 1.5)} ago"


def times(count: float) -> str:
    return "once" if count < 1.5 else f"{count:.0f} times"
