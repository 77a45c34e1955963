"""Make agents and environments from a configuration; judge all policies on the same sessions."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from agents.base import Agent, AgentSpec, Decision
from encoders.state import CONTEXT, EMPTY, Observation, calendar
from envs.excluded import Excluded
from envs.recommend import RecommendVectorEnv
from evaluation.online import CHUNK, Sessions, play, replay, table
from experiments.cli import advise
from experiments.early import rules_of
from experiments.oracle import play_oracle
from experiments.prepare import Worlds
from simulators.base import Catalog, UserSimulator, UserTable

DEFAULT_STEPS = 100_000  # env steps of training where nothing else is said
PLAYED_AT_ONCE = 2  # simulators, each on one thread: the same bits however many
SESSIONS_SEED = 20_240_607  # of the sessions that judge: the same ones in every run


def agent_spec(cfg: DictConfig, worlds: Worlds, device: str) -> AgentSpec:
    """What an agent may know before it starts."""
    catalog, users = worlds.train.catalog, worlds.train.users
    return AgentSpec(
        num_items=len(catalog),
        slate_size=cfg.env.session.slate_size,
        item_vectors=catalog.vectors,
        category=catalog.category,
        popularity=catalog.popularity,
        interactions=worlds.events.counts(),
        profile_size=users.profile.shape[1],
        past_size=users.past.shape[1],
        history_size=cfg.env.session.slate_size * cfg.env.session.max_steps,
        feedback_size=len(worlds.train.behaviours),
        context_size=CONTEXT,
        device=device,
        seed=cfg.seed,
        events=worlds.events,
        total_steps=cfg.get("steps") or cfg.env.get("train_steps") or DEFAULT_STEPS,
    )


def agent_config(name: str) -> tuple[str, DictConfig]:
    """Name and content of conf/agent/NAME.yaml, here or in a folder given by --config-dir.

    `itemknn` finds item_knn: underscores do not tell agents apart.
    """
    sources = HydraConfig.get().runtime.config_sources
    folders = [Path(s.path) / "agent" for s in sources if s.schema == "file"]
    files = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.yaml")}
    plain = {stem.replace("_", ""): stem for stem in files}
    found = name if name in files else plain.get(name.replace("_", ""), "")
    if not found:
        raise ValueError(
            f"there is no agent {name!r}{advise(name, [*files])}; there are: "
            f"{', '.join(sorted(files))}"
        )
    config = OmegaConf.load(files[found])
    assert isinstance(config, DictConfig)
    return found, config


def named_agent(name: str, spec: AgentSpec) -> Agent:
    """The agent of conf/agent/NAME.yaml."""
    return instantiate(agent_config(name)[1], spec)


def make_env(
    cfg: DictConfig, simulator: UserSimulator, *, num_envs: int, seed: int
) -> RecommendVectorEnv:
    """Sessions of `cfg.env.session` with these users."""
    session = instantiate(cfg.env.session, _convert_="all")
    session["excluded"] = excluded(cfg, simulator.catalog, simulator.users)
    return RecommendVectorEnv(
        simulator, num_envs=num_envs, observation="ids", output="torch", seed=seed, **session
    )


def excluded(cfg: DictConfig, catalog: Catalog, users: UserTable) -> Excluded | None:
    """What `env.session.excluded` forbids these users; None where nothing is."""
    rules = rules_of(cfg)
    return Excluded.of(rules, catalog, users) if rules else None


def session_list(users: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """A fixed list of (user, episode), (M,) each: all users in random order, then all again."""
    generator = torch.Generator().manual_seed(SESSIONS_SEED)
    rounds = [torch.randperm(users, generator=generator) for _ in range(-(-size // users))]
    episode = torch.arange(size) // users  # (M,)
    return torch.cat(rounds)[:size].to(device), episode.to(device)


def judge(
    cfg: DictConfig, worlds: Worlds, agents: dict[str, Agent], device: str
) -> list[dict[str, Any]]:
    """The table: every policy and the oracle on the same sessions of every judging simulator."""
    names = [*agents, "oracle"]
    todo = len(worlds.test) * len(names)
    with (
        tqdm(total=todo, desc="evaluate", unit="play", disable=not cfg.progress) as bar,
        ThreadPoolExecutor(PLAYED_AT_ONCE) as pool,
    ):

        def play_all(simulator: UserSimulator) -> list[Sessions]:
            torch.set_num_threads(1)
            users, episodes = session_list(len(simulator.users), cfg.eval_users, device)
            env = make_env(cfg, simulator, num_envs=len(users), seed=SESSIONS_SEED)
            done = []
            for name in names:
                if name == "oracle":
                    done.append(play_oracle(env, users, episodes))
                else:  # each simulator meets the same agent, with the same generator
                    done.append(play(env, copy.deepcopy(agents[name]), users, episodes))
                bar.update()
            return done

        by_simulator = list(pool.map(play_all, worlds.test))
    played = {name: [row[i] for row in by_simulator] for i, name in enumerate(names)}
    households = []
    for i, simulator in enumerate(worlds.test):
        users, _ = session_list(len(simulator.users), cfg.eval_users, device)
        households.append(household_names(simulator.users, users, worlds.test[0].users, i))
    return table(
        {name: np.stack([s.reward.cpu().numpy() for s in all_]) for name, all_ in played.items()},
        np.stack(households),
        length={name: mean_length(all_) for name, all_ in played.items()},
        coverage={name: joint_coverage(all_) for name, all_ in played.items()},
        replay_value={
            name: replay_value(cfg, copy.deepcopy(agents[name]), worlds) if name in agents else None
            for name in played
        },
        baseline="popularity",
    )


def household_names(users: UserTable, rows: Tensor, first: UserTable, simulator: int) -> np.ndarray:
    """(M,) clusters: shared with the first simulator where the users are the same, else own."""
    names = users.ids[rows.cpu().numpy()].astype(str)
    same = len(users) == len(first) and torch.equal(users.profile, first.profile)
    return names if same else np.char.add(f"{simulator}/", names)


def mean_length(played: list[Sessions]) -> float:
    """Steps a session."""
    return torch.cat([s.length for s in played]).double().mean().item()


def joint_coverage(played: list[Sessions]) -> float:
    """Share of the catalogue that was shown to anybody."""
    return (torch.stack([s.shown for s in played]).sum(dim=0) > 0).double().mean().item()


def replay_value(cfg: DictConfig, agent: Agent, worlds: Worlds) -> float | None:
    """Items really bought on a held-out trip among `cfg.replay_items` shown, a mean over trips."""
    if worlds.replay is None:
        return None
    session = cfg.env.session
    steps = min(-(-cfg.replay_items // session.slate_size), session.max_steps)
    obs = opening(
        worlds.replay.users, session.slate_size * session.max_steps, len(worlds.train.behaviours)
    )
    rule = excluded(cfg, worlds.train.catalog, worlds.replay.users)
    sizes = {"steps": steps, "slate_size": session.slate_size}
    if rule is None:
        found = replay(agent, obs, worlds.replay.bought, **sizes)
    else:
        parts = torch.arange(len(obs), device=obs.past.device).split(CHUNK)
        found = torch.cat([
            replay(
                cast(Agent, Ruled(agent, rule.rows(rows))),  # replay only lets it act
                obs[rows], worlds.replay.bought[rows], **sizes,
            )
            for rows in parts
        ])  # fmt: skip
    return found.double().mean().item()


@dataclass(frozen=True)
class Ruled:
    """An agent that serves B users, each of whom must not be shown some items."""

    agent: Agent
    never: Tensor  # (B, W) excluded ids

    def act(self, obs: Observation, mask: Tensor, *, explore: bool = True) -> Decision:
        return self.agent.act(obs, torch.cat([mask, self.never], dim=1), explore=explore)


def opening(users: UserTable, places: int, behaviours: int) -> Observation:
    """What is seen as trips of M users begin: L `places` of empty history."""
    m = len(users)
    device = users.past.device
    return Observation(
        profile=users.profile,
        past=users.past,
        past_count=users.past_count,
        past_age=users.past_age,
        history=torch.full((m, places), EMPTY, device=device),
        feedback=torch.zeros(m, places, behaviours, device=device),
        context=calendar(users.start),
    )


def lines(rows: list[dict[str, Any]], baseline: str = "popularity") -> list[str]:
    """The table as aligned text."""
    head = ["policy", "mean reward", "95 % interval", f"to {baseline}", "95 % interval", "length",
            "coverage", "replay"]  # fmt: skip
    replay = any(r["replay_value"] is not None for r in rows)  # else a column of dashes
    cells = [head]
    for r in rows:
        replayed = "-" if r["replay_value"] is None else f"{r['replay_value']:.3f}"
        cells.append([
            r["policy"], f"{r['mean_reward']:.4f}", f"{r['ci_low']:.4f} to {r['ci_high']:.4f}",
            f"{r[f'diff_to_{baseline}']:+.4f}",
            f"{r['diff_ci_low']:+.4f} to {r['diff_ci_high']:+.4f}",
            f"{r['session_length']:.2f}", f"{r['coverage']:.3f}", replayed,
        ])  # fmt: skip
    cells = [row if replay else row[:-1] for row in cells]
    head = cells[0]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    padded = [[c.rjust(w) for c, w in zip(row, widths, strict=True)] for row in cells]
    return ["  ".join([row[0].strip().ljust(widths[0]), *row[1:]]) for row in padded]
