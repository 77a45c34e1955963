"""Train an agent against users fitted to a log, and compare it with what it has to beat.

python experiments/train_agent.py env=ecommerce agent=dqn
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    cli.check("train_agent", __doc__, sys.argv[1:])  # before torch: help and typos answer at once

from collections.abc import Callable
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from agents.base import Agent, AgentSpec, Transition
from evaluation.decisions import DecisionWriter
from evaluation.online import one_step, play
from experiments.curves import Curves
from experiments.oracle import regret
from experiments.policies import (
    SESSIONS_SEED,
    agent_spec,
    judge,
    lines,
    make_env,
    named_agent,
    session_list,
)
from experiments.prepare import Worlds, prepare
from experiments.run_folder import (
    load_checkpoint,
    open_folder,
    save_checkpoint,
    stage,
    write_json,
)
from experiments.sweep import sweep_folder
from simulators.base import UserSimulator

DEFAULT_STEPS = 100_000
REGRET_USERS = 64  # of a point of rollout/regret_mean: pricing the whole catalogue is dear
CURVE_SESSIONS = 200  # of a point of eval/mean_reward


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="train_agent")
def main(cfg: DictConfig) -> None:
    """Prepare users, train an agent on some, judge it on others, and say where everything is."""
    with cli.plain_errors():
        device, steps = checked(cfg)
        seconds: dict[str, float] = {}
        with stage("prepare", seconds):
            worlds = prepare(cfg, device)
        print("\n".join(worlds.notes), flush=True)
        torch.set_num_threads(cfg.threads)
        spec = agent_spec(cfg, worlds, device)
        agent = hydra.utils.instantiate(cfg.agent, spec)
        names = dict.fromkeys([*cfg.baselines, "popularity"])  # the last: what differences are to
        agents = {name: named_agent(name, spec) for name in names}
        if cfg.checkpoint:
            load_checkpoint(Path(cfg.checkpoint), agent, worlds.train.catalog)

        make_env(cfg, worlds.train, num_envs=1, seed=cfg.seed)  # refuses what no session can be
        cfg.run_dir = cfg.run_dir or sweep_folder(cfg)
        folder = open_folder(cfg)  # not before all that was typed made sense
        print(
            f"train {cfg.agent_name} for {steps} steps, curves in {folder / 'tensorboard'}",
            flush=True,
        )
        with stage("train", seconds):
            train(cfg, worlds, agent, folder, steps, device)
        with stage("evaluate", seconds):
            rows = judge(cfg, worlds, {**agents, cfg.agent_name: agent}, device)
        with stage("log", seconds):
            log_frozen(cfg, worlds, agent, spec, folder, device)

        result = {
            "env": cfg.env_name, "agent": cfg.agent_name, "seed": cfg.seed, "steps": steps,
            "table": rows, "seconds": {**worlds.seconds, **seconds}, "fidelity": worlds.fidelity,
        }  # fmt: skip
        write_json(folder / "result.json", result)
        print("\n".join(["", *lines(rows), "", f"tensorboard --logdir {folder / 'tensorboard'}"]))
        if cfg.out:
            write_json(Path(cfg.out), result)


def train(
    cfg: DictConfig, worlds: Worlds, agent: Agent, folder: Path, steps: int, device: str
) -> None:
    """Let the agent serve users and learn from them; an interrupt keeps all that was written."""
    simulator, buy = worlds.train, worlds.train.behaviours[0]
    env = make_env(cfg, simulator, num_envs=min(cfg.num_envs, steps), seed=cfg.seed)
    curves = Curves(
        folder / "tensorboard", num_envs=env.num_envs, num_items=env.num_items,
        every=cfg.log_every, device=device,
    )  # fmt: skip
    log = decision_log(cfg, simulator, folder / "training", cfg.agent_name, adaptive=True)
    rows = torch.arange(env.num_envs, device=device)  # (B,)
    evaluate = curve_sessions(cfg, worlds.test[0], device)
    bar = tqdm(total=steps, desc="train", unit="step", disable=not cfg.progress)
    try:
        obs, info = env.reset()
        while curves.step < steps:
            mask, time, truth = info["mask"], env.time.clone(), env.state
            decision = agent.act(obs, mask)
            next_obs, reward, terminated, truncated, info = env.step(decision.slate)
            transition = Transition(
                obs, mask, decision, reward, info["response"].chosen[buy], info["slot_reward"],
                info.get("final_obs", next_obs), info.get("final_mask", info["mask"]),
                terminated, truncated,
            )  # fmt: skip
            learnt = agent.update(transition)

            if cfg.log_training:
                step = one_step(env, rows, decision, terminated, truncated, info)
                log.write(**step, obs=obs, excluded=mask, time=time, policy_version=curves.step)
            curves.add(transition, learnt)
            bar.update(min(env.num_envs, steps - bar.n))
            if curves.due or curves.step >= steps:
                few = {name: x[:REGRET_USERS] for name, x in truth.items()}
                shown = decision.slate[:REGRET_USERS]
                recent = curves.write(regret(simulator.relevance(few), mask[:REGRET_USERS], shown))
                bar.set_postfix(reward=recent)
            if crossed(curves.step, env.num_envs, cfg.eval_every):
                curves.points(evaluate(agent))
            if crossed(curves.step, env.num_envs, cfg.checkpoint_every):
                save_checkpoint(folder / "checkpoint", agent, simulator.catalog, cfg, curves.step)
            obs = next_obs
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"checkpoint, curves and decisions so far: {folder}") from None
    finally:
        bar.close()
        save_checkpoint(folder / "checkpoint", agent, simulator.catalog, cfg, curves.step)
        log.close()
        curves.close()


def crossed(step: int, batch: int, every: int) -> bool:
    """Whether the last `batch` env steps passed a multiple of `every`; never where it is 0."""
    return every > 0 and step // every > (step - batch) // every


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
    cfg: DictConfig, simulator: UserSimulator, folder: Path, policy: str, *, adaptive: bool
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
    return DecisionWriter(folder, behaviours=simulator.behaviours, meta=meta)


def log_frozen(
    cfg: DictConfig, worlds: Worlds, agent: Any, spec: AgentSpec, folder: Path, device: str
) -> None:
    """Write the decisions of the agent frozen and made stochastic, for off-policy evaluation."""
    if not cfg.frozen_users:
        return
    if not hasattr(agent, "scores"):
        print(f"no frozen log: {cfg.agent_name} has no scores(obs) to make a softmax of")
        return
    from agents.frozen import Frozen

    frozen = Frozen(agent, spec, temperature=cfg.frozen_temperature)
    simulator = worlds.test[0]
    users, episodes = session_list(len(simulator.users), cfg.frozen_users, device)
    env = make_env(cfg, simulator, num_envs=len(users), seed=SESSIONS_SEED)
    policy = f"frozen {cfg.agent_name}"
    log = decision_log(cfg, simulator, folder / "decisions", policy, adaptive=False)
    play(env, frozen, users, episodes, explore=True, log=log)
    log.close()


def checked(cfg: DictConfig) -> tuple[str, int]:
    """The device and the training steps; numbers that make no sense are refused before any work."""
    steps = cfg.steps if cfg.steps is not None else cfg.env.get("train_steps", DEFAULT_STEPS)
    least = {"steps": 1, "num_envs": 1, "log_every": 1, "threads": 1, "evaluators": 1,
             "replay_items": 1, "eval_users": 2, "frozen_users": 0, "seed": 0, "eval_every": 0,
             "checkpoint_every": 0}  # fmt: skip
    for key, bound in least.items():
        value = steps if key == "steps" else cfg[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{key} must be a whole number of at least {bound}, got {value!r}")
    if not isinstance(cfg.frozen_temperature, int | float) or not cfg.frozen_temperature > 0:
        raise ValueError(f"frozen_temperature must be above 0, got {cfg.frozen_temperature!r}")
    if cfg.seed >= 2**31:
        raise ValueError(f"seed must be below 2**31, got {cfg.seed}")
    if isinstance(cfg.baselines, str):
        raise ValueError(f"baselines must be a list, got {cfg.baselines!r}: baselines=[...]")
    if cfg.out:
        try:
            Path(cfg.out).absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out={cfg.out} cannot be written: {error.strerror}") from error
    return chosen_device(cfg), steps


def chosen_device(cfg: DictConfig) -> str:
    """Where tensors live."""
    if cfg.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {cfg.device!r}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device=cuda, but torch sees no CUDA device: use device=cpu or device=auto"
        )
    return "cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
