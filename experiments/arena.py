"""Where an agent is trained and judged: users fitted to a log, or any Gymnasium environment."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from agents.base import Agent, AgentSpec, Mask
from evaluation.decisions import DecisionWriter
from evaluation.online import play
from experiments.oracle import regret
from experiments.policies import SESSIONS_SEED, agent_spec, judge, make_env, session_list
from experiments.prepare import Worlds, prepare
from simulators.base import UserSimulator

REGRET_USERS = 64  # of a point of rollout/regret_mean: pricing the whole catalogue is dear
CURVE_SESSIONS = 200  # of a point of eval/mean_reward
BASELINES = ("random", "popularity", "buy_again")  # of a shop, where baselines is null

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Arena:
    """What training and judging need of the world, whatever world it is."""

    spec: AgentSpec
    catalog: str  # a fingerprint of what can be shown: checkpoints of another do not fit
    env: Callable[[], Any]  # sessions to train on
    evaluate: Callable[[Agent], dict[str, float]]  # a short fixed list of others: the eval/ curves
    judge: Callable[[dict[str, Agent]], Rows]  # the table, with an oracle where there is one
    baselines: tuple[str, ...]  # agents of conf/agent that the table compares with
    baseline: str  # of them the one that differences are to
    notes: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    regret: Callable[[dict[str, Tensor], Mask, Tensor], Tensor] | None = None
    log: Callable[..., DecisionWriter] | None = None  # folder, policy, adaptive=, resume=
    worlds: Worlds | None = None  # of a shop
    gate: str = ""  # what check_simulator.py said of its users
    second: Callable[[dict[str, Agent]], Rows] | None = None  # the table on users of another kind


def arena(cfg: DictConfig, device: str, steps: int) -> Arena:
    """The world of `cfg.env`, ready for `steps` env steps of training."""
    if "id" in cfg.env:
        from experiments.gym_arena import gym_arena

        return gym_arena(cfg, device, steps)
    return shop(cfg, prepare(cfg, device), device, steps)


def shop(cfg: DictConfig, worlds: Worlds, device: str, steps: int) -> Arena:
    """Users fitted to a log, or synthetic ones: some to train on, others to judge."""
    simulator = worlds.train
    judges = worlds
    if cfg.early_stopping:
        judges = replace(worlds, test=worlds.test[1:], specs=worlds.specs[1:])

    def allowed_regret(state: dict[str, Tensor], mask: Mask, slate: Tensor) -> Tensor:
        few = {name: x[:REGRET_USERS] for name, x in state.items()}
        assert mask is not None
        return regret(simulator.relevance(few), mask[:REGRET_USERS], slate[:REGRET_USERS])

    def asked_again(agents: dict[str, Agent]) -> Rows:
        assert worlds.second is not None
        other = replace(worlds, test=[worlds.second], specs=(), replay=None)
        return judge(cfg, other, agents, device)

    return Arena(
        spec=replace(agent_spec(cfg, worlds, device), total_steps=steps),
        catalog=simulator.catalog.fingerprint(),
        env=lambda: make_env(cfg, simulator, num_envs=min(cfg.num_envs, steps), seed=cfg.seed),
        evaluate=curve_sessions(cfg, worlds.test[0], device),
        judge=lambda agents: judge(cfg, judges, agents, device),
        baselines=tuple(dict.fromkeys([*(cfg.baselines or BASELINES), "popularity"])),
        baseline="popularity",
        notes=worlds.notes,
        seconds=worlds.seconds,
        fidelity=worlds.fidelity,
        regret=allowed_regret,
        log=lambda *args, **settings: decision_log(cfg, simulator, *args, **settings),
        worlds=worlds,
        gate=worlds.gate,
        second=asked_again if worlds.second is not None else None,
    )


def curve_sessions(
    cfg: DictConfig, simulator: UserSimulator, device: str
) -> Callable[[Agent], dict[str, float]]:
    """A function that plays a short fixed list of held-out sessions: the eval/ curves."""
    users, episodes = session_list(len(simulator.users), CURVE_SESSIONS, device)
    env = make_env(cfg, simulator, num_envs=CURVE_SESSIONS, seed=SESSIONS_SEED)

    def evaluate(agent: Agent) -> dict[str, float]:
        played = play(env, agent, users, episodes)
        length = played.length.double().mean().item()
        return {"eval/mean_reward": played.reward.mean().item(), "eval/mean_ep_length": length}

    return evaluate


def decision_log(
    cfg: DictConfig,
    simulator: UserSimulator,
    folder: Path,
    policy: str,
    *,
    adaptive: bool,
    resume: tuple[int, int] | None = None,
) -> DecisionWriter:
    """A decision log that says of itself whose decisions, of which catalogue and of which users."""
    meta = {
        "catalog": simulator.catalog.fingerprint(),
        "policy": policy,
        "env": OmegaConf.to_container(cfg.env, resolve=True),
        "adaptive": adaptive,
        "households": simulator.users.ids.astype(str).tolist(),  # of the rows that `user` numbers
        "seed": cfg.seed,
    }
    return DecisionWriter(folder, behaviours=simulator.behaviours, meta=meta, resume=resume)


def chosen_device(cfg: DictConfig) -> str:
    """Where tensors live."""
    if cfg.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {cfg.device!r}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device=cuda, but torch sees no CUDA device: use device=cpu or device=auto"
        )
    return "cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
