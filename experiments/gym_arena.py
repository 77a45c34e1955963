"""Any registered Gymnasium environment as a place to train and judge agents."""

import hashlib
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from agents.base import Agent, AgentSpec
from envs.gym_vector import GymVectorEnv
from evaluation.online import Sessions, play, table
from experiments.arena import Arena, Rows
from experiments.policies import SESSIONS_SEED

CURVE_EPISODES = 64  # of a point of eval/mean_reward
OPTIONS = ("module", "item_features", "kwargs", "history", "past", "slate", "shown", "feedback",
           "oracle", "max_actions", "max_steps")  # fmt: skip


def gym_arena(cfg: DictConfig, device: str, steps: int) -> Arena:
    """The environment of `cfg.env.id`: other seeds are other episodes."""
    if not cfg.env.id:
        raise ValueError(
            "env=gym needs the id of a registered environment: env.id=CartPole-v1, or of a "
            "package's own: env.id=sardine/SlateTopK-Bored-v0 env.module=sardine"
        )

    def make(num_envs: int, seed: int) -> GymVectorEnv:
        settings: Any = OmegaConf.to_container(cfg.env, resolve=True)
        options = {name: settings[name] for name in OPTIONS if name in settings}
        return GymVectorEnv(cfg.env.id, num_envs=num_envs, seed=seed, device=device, **options)

    one = make(1, cfg.seed)
    few = listed(CURVE_EPISODES, device)
    many = make(CURVE_EPISODES, SESSIONS_SEED)

    def evaluate(agent: Agent) -> dict[str, float]:
        played = play(many, agent, *few)
        length = played.length.double().mean().item()
        return {"eval/mean_reward": played.reward.mean().item(), "eval/mean_ep_length": length}

    def judge(agents: dict[str, Agent]) -> Rows:
        users, episodes = listed(cfg.eval_users, device)
        played = {
            name: play(make(len(users), SESSIONS_SEED + 1), agent, users, episodes)
            for name, agent in agents.items()
        }
        if cfg.env.get("oracle") is not None:
            env = make(len(users), SESSIONS_SEED + 1)
            played["oracle"] = play_asked(env, users, episodes)
        return rows_of(played)

    return Arena(
        spec=spec_of(one, cfg, device, steps),
        catalog=fingerprint(cfg.env.id, one.item_vectors),
        env=lambda: make(min(cfg.num_envs, steps), cfg.seed),
        evaluate=evaluate,
        judge=judge,
        baselines=tuple(dict.fromkeys([*(cfg.baselines or ()), "random"])),
        baseline="random",
        notes=one.notes(),
    )


def spec_of(env: GymVectorEnv, cfg: DictConfig, device: str, steps: int) -> AgentSpec:
    """What an agent may know of it: nobody has a past, nothing is popular yet."""
    n = env.num_items
    return AgentSpec(
        num_items=n,
        slate_size=env.slate_size,
        item_vectors=env.item_vectors,
        category=torch.zeros(n, dtype=torch.int64, device=device),
        popularity=torch.full((n,), 1.0 / n, device=device),
        interactions=None,
        profile_size=env.profile_size,
        past_size=env.past_size,
        history_size=env.history_size,
        feedback_size=env.feedback_size,
        context_size=env.context_size,
        device=device,
        seed=cfg.seed,
        total_steps=steps,
    )


def listed(size: int, device: str) -> tuple[Tensor, Tensor]:
    """Episodes by number, as users who come once each: (M,) both."""
    return torch.arange(size, device=device), torch.zeros(size, dtype=torch.int64, device=device)


def play_asked(env: GymVectorEnv, users: Tensor, episodes: Tensor) -> Sessions:
    """Let the environment itself choose, where it has an action that asks it to."""
    env.reset(options={"user": users, "episode": episodes})
    m = len(users)
    reward = torch.zeros(m, dtype=torch.float64, device=env.device)
    length = torch.zeros(m, dtype=torch.int64, device=env.device)
    shown = torch.zeros(env.num_items, dtype=torch.int64, device=env.device)
    there = torch.ones(m, dtype=torch.bool, device=env.device)
    while there.any():
        _, gained, terminated, truncated, info = env.step_oracle(there)
        items = info["slate"][there].flatten()  # (R * K,)
        shown += torch.bincount(items.clamp(min=0), minlength=env.num_items)
        reward += gained * there
        length += there
        there = there & ~(terminated | truncated)
    return Sessions(reward, length, shown)


def rows_of(played: dict[str, Sessions]) -> Rows:
    """The table: the same episodes for every policy, each a cluster of its own."""
    rewards = {name: s.reward.cpu().numpy()[None] for name, s in played.items()}  # (1, M)
    household = torch.arange(len(next(iter(played.values())).reward)).numpy()
    return table(
        rewards, household,
        length={name: s.length.double().mean().item() for name, s in played.items()},
        coverage={name: s.coverage for name, s in played.items()},
        replay_value=dict.fromkeys(played),
        baseline="random",
    )  # fmt: skip


def fingerprint(name: str, vectors: Tensor) -> str:
    """Of what can be chosen: a checkpoint of another environment does not fit."""
    digest = hashlib.sha256(name.encode())
    digest.update(vectors.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
