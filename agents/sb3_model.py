"""Models of Stable-Baselines3 for our agent: built, run, carried over, read from files of SB3."""

import contextlib
import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from sb3_contrib import QRDQN, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.save_util import load_from_zip_file
from torch import Tensor

from agents.base import AgentSpec
from agents.nets import Reader
from agents.saving import load_net
from agents.sb3_env import SessionsVecEnv, Stopped, Watch, Watcher, spaces_of
from agents.sb3_policies import (
    DotActorCriticPolicy,
    DotDQNPolicy,
    DotMaskableActorCriticPolicy,
    DotQRDQNPolicy,
)

CLASSES: dict[str, tuple[Any, Any]] = {
    "dqn": (DQN, DotDQNPolicy),
    "qrdqn": (QRDQN, DotQRDQNPolicy),
    "ppo": (PPO, DotActorCriticPolicy),
    "a2c": (A2C, DotActorCriticPolicy),
    "maskable_ppo": (MaskablePPO, DotMaskableActorCriticPolicy),
}
COUNTERS = ("num_timesteps", "_n_updates", "_n_calls", "_episode_num", "exploration_rate")
PART = {"dqn": "q_net", "qrdqn": "quantile_net"}  # of the policy; else mlp_extractor
USUAL = {"dqn": "ReLU", "qrdqn": "ReLU"}  # SB3's activations; else Tanh


def build(
    spec: AgentSpec, settings: dict[str, Any], read: Reader, num_envs: int, capacity: int
) -> Any:
    """The SB3 model for this many users, as its constructor makes it; seeds global generators."""
    algo = settings["algo"]
    kind, policy = CLASSES[algo]
    net: dict[str, Any] = {"net_arch": [settings["width"]] * 2}
    if algo == "qrdqn":
        net["n_quantiles"] = settings["quantiles"]
    if settings["head"] == "dense":
        policy = "MlpPolicy"
    else:
        net["item_features"] = read.items[:-1].cpu()  # (N, R + 1)
    given = {"learning_rate": settings["lr"], "gamma": settings["gamma"], "policy_kwargs": net,
             "seed": spec.seed, "device": spec.device}  # fmt: skip
    given |= on_replay(settings, num_envs, capacity) if algo in PART else on_rollouts(settings)
    # without an environment, as SB3 itself loads a model: spaces and users follow from the spec
    model = kind(policy, None, **given, _init_setup_model=False)
    model.observation_space, model.action_space = spaces_of(
        read.size, spec.num_items, spec.slate_size
    )
    model.n_envs = num_envs
    model._setup_model()
    if algo in PART:
        model.exploration_rate = model.exploration_initial_eps  # SB3 says 0 until its first step
    return model


def on_replay(settings: dict[str, Any], num_envs: int, capacity: int) -> dict[str, Any]:
    """SB3's arguments for many users at once: its own defaults count steps of the whole batch."""
    size = settings["batch_size"]
    earned = num_envs * settings["replay_ratio"] / size  # updates per step of all users
    return {
        "batch_size": size,
        "buffer_size": capacity,
        "train_freq": max(1, round(1.0 / earned)),
        "gradient_steps": max(1, round(earned)),
        "learning_starts": max(settings["learning_starts"], num_envs),
        "target_update_interval": max(settings["target_every"], num_envs),
        "exploration_fraction": settings["exploration_fraction"],
        "exploration_final_eps": settings["epsilon_end"],
    }


def on_rollouts(settings: dict[str, Any]) -> dict[str, Any]:
    """SB3's arguments of algorithms that learn from what they have just played."""
    given = {
        "n_steps": settings["n_steps"],
        "gae_lambda": settings["gae_lambda"],
        "ent_coef": settings["entropy"],
    }
    if settings["algo"] != "a2c":
        given |= {"batch_size": settings["batch_size"], "n_epochs": settings["epochs"]}
    return given


def adopt(model: Any, other: Any) -> None:
    """Carry over what was learnt and counted to a model for another number of users."""
    model.policy.load_state_dict(other.policy.state_dict())
    model.policy.optimizer.load_state_dict(other.policy.optimizer.state_dict())
    model.action_space.np_random.bit_generator.state = (
        other.action_space.np_random.bit_generator.state
    )
    set_counters(model, counters(other))


def serving_copy(model: Any) -> Any:
    """A model that acts and counts by itself; it has no buffers, so that nothing is shared."""
    other, policy = copy.copy(model), model.policy
    # what the last step's distribution was made of cannot be copied, and is made anew when asked
    memo = {id(x): copy.copy(x) for x in [getattr(policy, "action_dist", None)] if x is not None}
    other.policy = copy.deepcopy(policy, memo)
    other.action_space = copy.deepcopy(model.action_space)
    other.env = other._last_obs = other.replay_buffer = other.rollout_buffer = None
    if hasattr(other, "_create_aliases"):
        other._create_aliases()
    return other


def counters(model: Any) -> dict[str, Any]:
    """How far the model has come."""
    return {name: getattr(model, name) for name in COUNTERS if hasattr(model, name)}


def set_counters(model: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(model, name, value)


def run(model: Any, sessions: SessionsVecEnv, steps: int, watch: Watch) -> None:
    """SB3's own learn, with nothing on the screen or on disk."""
    replays = hasattr(model, "train_freq")
    length = model.train_freq.frequency if replays else model.n_steps
    if not replays and length * sessions.num_envs < 2:
        raise ValueError("a rollout needs two steps to compare: n_steps=2 or more users at once")
    model.set_env(sessions)
    model.set_logger(Logger(None, []))
    with contextlib.suppress(Stopped):
        model.learn(
            steps, callback=Watcher(sessions, watch, length), log_interval=None,
            reset_num_timesteps=False,
        )  # fmt: skip
    model.env = None  # whoever made the environment keeps it


def logits(algo: str, policy: Any, state: Tensor) -> Tensor:
    """States (B, U) to values (B, N) or to logits of all slots (B, K * N)."""
    if algo == "dqn":
        out: Tensor = policy.q_net(state)
    elif algo == "qrdqn":
        out = policy.quantile_net(state).mean(dim=1)
    else:
        features = policy.extract_features(state)
        out = policy.action_net(policy.mlp_extractor.forward_actor(features))
    return out


def load_zip(
    path: Path, model: Any, spec: AgentSpec, settings: dict[str, Any], read: Reader
) -> None:
    """Put weights and counters of SB3's file into a model that fits; refuse any other."""
    if not path.exists() and path.with_name(path.name + ".zip").exists():
        path = path.with_name(path.name + ".zip")  # SB3's save adds it
    if not path.exists():
        raise ValueError(f"there is no file {path}: give the path that model.save() was given")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no zip file of SB3: give what model.save() wrote")
    with zipfile.ZipFile(path) as archive:
        if not {"data", "policy.pth", "policy.optimizer.pth"} <= set(archive.namelist()):
            raise ValueError(f"{path} holds no SB3 model: give what model.save() wrote")
        said = json.loads(archive.read("data"))
    weights: dict[str, Any] = load_from_zip_file(path, load_data=False, device=spec.device)[1]
    check_zip(path, said, weights["policy"], spec, settings, read)
    load_net(model.policy, weights["policy"])
    model.policy.optimizer.load_state_dict(weights["policy.optimizer"])
    set_counters(model, {name: said[name] for name in COUNTERS if hasattr(model, name)})
    table = table_of(weights["policy"])
    if table is not None:
        read.items[:-1] = table  # its axes may differ in sign from those found here


def check_zip(
    path: Path, said: dict[str, Any], weights: dict[str, Tensor], spec: AgentSpec,
    settings: dict[str, Any], read: Reader,
) -> None:  # fmt: skip
    """Refuse a file of another algorithm, head, size or catalogue, saying which."""
    algo, theirs = settings["algo"], algorithm_of(said, weights)
    if theirs.removeprefix("maskable_") != algo.removeprefix("maskable_"):  # masks are no weights
        raise ValueError(f"{path} is of {theirs}, this agent of {algo}: SB3(algo={theirs!r})")
    table = table_of(weights)
    head = "dense" if table is None else "dot"
    if head != settings["head"]:
        raise ValueError(
            f"{path} has a {head} head, this agent a {settings['head']} one: SB3(head={head!r})"
        )
    shape = [spec.num_items] if spec.slate_size == 1 else [spec.slate_size, spec.num_items]
    for name, mine, got in (
        ("states", [read.size], said["observation_space"].get("_shape")),
        ("actions", shape, actions_of(said["action_space"])),
    ):
        if mine != got:
            raise ValueError(
                f"{path} is for {name} {got}, this agent for {mine}: it must have been trained "
                "through agents.sb3_env.SessionsVecEnv with the same spec"
            )
    usual = USUAL.get(algo, "Tanh")
    used = (said["policy_kwargs"] or {}).get("activation_fn", f"<class '{usual}'>")
    if str(used).strip("'<>").rpartition(".")[2].rpartition(" '")[2] != usual:
        raise ValueError(f"{path} has activation {used}, this agent {usual}: train it with that")
    if table is not None:
        ours, other = read.items[:-1][:256], table[:256]  # (M, R + 1); products see no signs
        if ours.shape != other.shape or not torch.allclose(
            ours @ ours.T, other @ other.T, atol=1e-2
        ):
            raise ValueError(
                f"{path} is of another catalogue (its item vectors differ): load it with the "
                "catalogue and the text encoder it was trained on"
            )


def algorithm_of(said: dict[str, Any], weights: dict[str, Tensor]) -> str:
    """SB3's file does not name its algorithm, but only one has such parts and settings."""
    for algo, part in PART.items():
        if any(name.startswith(f"{part}.") for name in weights):
            return algo
    if not any(name.startswith("action_net.") for name in weights):
        return "another algorithm"
    if "n_epochs" not in said:
        return "a2c"
    masked = "askable" in str(said["policy_class"].get("__module__"))
    return "maskable_ppo" if masked or "Maskable" in str(said["policy_class"]) else "ppo"


def actions_of(space: dict[str, Any]) -> list[int]:
    """[N] of a Discrete space, [K, N] of a MultiDiscrete one, as SB3 describes it in words."""
    if "n" in space:
        return [int(space["n"])]
    sizes = [int(word) for word in str(space.get("nvec", "")).strip("[]").split()]
    return [len(sizes), max(sizes)] if sizes else []


def table_of(weights: dict[str, Tensor]) -> Tensor | None:
    """Item features (N, R + 1) of a dot head."""
    return next((x for name, x in weights.items() if name.endswith(".table")), None)
