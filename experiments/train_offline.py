"""Train an agent on the decisions that a run logged, and compare it with the policy that made them.

python experiments/train_offline.py run=RUN_DIR agent=cql
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    if any(word.startswith("log=") for word in sys.argv):  # of evaluate_policies.py, a group there
        cli.fail("log=...: here the key is logs=training, decisions, both or the folder of a log")
    sys.argv[1:] = cli.check("train_offline", __doc__, sys.argv[1:])  # before torch: at once

import shlex
from dataclasses import asdict, replace
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from agents.base import Agent
from agents.checks import NonFiniteLossError
from agents.replay import Replay
from evaluation import decisions
from evaluation.online import Sessions, play, table
from experiments.arena import Arena, arena, chosen_device
from experiments.checkpoints import load_checkpoint, of_run, save_checkpoint
from experiments.kinds import refuse_targets, refuse_words
from experiments.logged_runs import configuration, spec_of
from experiments.logged_transitions import Logged, replay_of
from experiments.oracle import play_oracle
from experiments.policies import (
    SESSIONS_SEED,
    agent_config,
    household_names,
    joint_coverage,
    lines,
    make_env,
    mean_length,
    named_agent,
    replay_value,
    session_list,
)
from experiments.prepare import Worlds
from experiments.run_folder import (
    open_folder,
    refuse_taken,
    refuse_unwritable,
    stage,
    write_json,
)
from experiments.train_agent import log_frozen

LOGS = {"training": ("training",), "decisions": ("decisions",), "both": ("training", "decisions")}
BASELINES = ("random", "popularity")
HARDLY = 0.02  # explored less than that, a log shows of each user little but what one policy liked
OPTIONAL = ("evaluators", "eval_users", "frozen_users")  # what the run had where nothing is typed


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="train_offline")
def main(cfg: DictConfig) -> None:
    """Read a run's log, learn from it, judge on held-out users, and say where everything is."""
    with cli.plain_errors():
        checked(cfg)
        run, logs = sources(cfg)
        merged = settings(cfg, run)
        device = chosen_device(merged)
        seconds: dict[str, float] = {}
        with stage("prepare", seconds):
            world = arena(of_the_run(merged, run), device, cfg.updates)
        print("\n".join(world.notes), flush=True)
        torch.set_num_threads(cfg.threads)
        agent: Any = hydra.utils.instantiate(cfg.agent, replace(world.spec, seed=cfg.seed))
        with stage("read", seconds):
            replay, logged = replay_of(logs, world.spec, catalog=world.catalog)
        print("\n".join(told(logged)), flush=True)
        rivals, logger = others(cfg, run, world)
        folder = open_folder(merged)  # not before all that was typed fits
        print(f"learn {merged.agent_name} by {cfg.updates} updates, curves in "
              f"{folder / 'tensorboard'}", flush=True)  # fmt: skip
        with stage("train", seconds):
            learn(cfg, agent, replay, world, folder)
        about = {"catalog": world.catalog, "agent_kind": type(agent).__name__}
        parts = {"agent": agent.state_dict()}
        save_checkpoint(folder / "checkpoint", parts, merged, step=cfg.updates, about=about)
        with stage("evaluate", seconds):
            worlds = unseen(world, logs)
            rows = judged(merged, worlds, {**rivals, merged.agent_name: agent}, device, logger)
        with stage("log", seconds):
            log_frozen(merged, world, agent, folder, device)
        result = {
            "env": merged.env_name, "agent": merged.agent_name, "seed": cfg.seed,
            "steps": cfg.updates, "updates": cfg.updates, "logged": asdict(logged), "table": rows,
            "seconds": {**world.seconds, **seconds}, "fidelity": world.fidelity,
        }  # fmt: skip
        write_json(folder / "result.json", result)
        print("\n".join(["", *lines(rows, logger), "", *next_steps(run, folder, merged, logs)]))
        if cfg.out:
            write_json(Path(cfg.out), result)


def checked(cfg: DictConfig) -> None:
    """Refuse agents that do not learn from logs, and numbers that make no sense."""
    refuse_targets(cfg.agent, "agent")
    refuse_words(cfg.agent, "agent")
    for name in cfg.baselines if OmegaConf.is_list(cfg.baselines) else ():
        agent_config(name)
    if not getattr(hydra.utils.get_class(cfg.agent._target_), "offline", False):
        raise ValueError(
            f"agent={cfg.agent_name} does not learn from a log: choose behaviour_cloning, bcq, cql "
            f"or iql, or let it serve users with experiments/train_agent.py agent={cfg.agent_name}"
        )
    least = {"updates": 1, "batch_size": 1, "log_every": 1, "threads": 1, "seed": 0,
             "eval_every": 0, "evaluators": 1, "eval_users": 2, "frozen_users": 0}  # fmt: skip
    for key, bound in least.items():
        value = cfg[key]
        if value is None and key in OPTIONAL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{key} must be a whole number of at least {bound}, got {value!r}")
    if cfg.seed >= 2**31:
        raise ValueError(f"seed must be below 2**31, got {cfg.seed}")
    if isinstance(cfg.baselines, str):
        raise ValueError(f"baselines must be a list, got {cfg.baselines!r}: baselines=[...]")
    refuse_unwritable(cfg.out, "out", file=True)
    refuse_taken(cfg.run_dir)


def sources(cfg: DictConfig) -> tuple[Path, list[Path]]:
    """The run folder and the folders of the logs in it to learn from."""
    if cfg.run is None:
        raise ValueError(
            "run=RUN_DIR is needed: the folder of a run of experiments/train_agent.py, whose "
            "decisions to learn from"
        )
    run = Path(cfg.run)
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"run={run} is no run folder: expected config.yaml in it, and training/ or decisions/, "
            "as experiments/train_agent.py leaves them"
        )
    logs = [run / name for name in LOGS[cfg.logs]] if cfg.logs in LOGS else [Path(str(cfg.logs))]
    for folder in logs:
        if not decisions.parts(folder):
            hint = {"training": "train with log_training=true, or take logs=decisions",
                    "decisions": "train with frozen_users=1000, or take logs=training"}  # fmt: skip
            said = hint.get(folder.name, f"logs is {', '.join(LOGS)} or the folder of a log")
            raise ValueError(f"no decision log in {folder}: {said}")
    return run, logs


def settings(cfg: DictConfig, run: Path) -> DictConfig:
    """The run's configuration with what was typed: what this run's folder will say of itself."""
    whole: Any = OmegaConf.to_container(configuration(run), resolve=True)
    typed: Any = OmegaConf.to_container(cfg, resolve=True)
    own = ("agent", "seed", "device", "threads", "log_every", "eval_every", "progress", "run_dir")
    whole |= {name: typed[name] for name in own}
    whole |= {name: typed[name] for name in OPTIONAL if typed[name] is not None}
    whole |= {
        "agent_name": f"{cfg.agent_name}-offline", "steps": cfg.updates, "early_stopping": 0,
        "checkpoint": None, "resume": None, "out": None, "baselines": typed["baselines"],
        "offline": {
            "run": str(run.absolute()), "logs": cfg.logs, "batch_size": cfg.batch_size,
        },
    }  # fmt: skip
    return OmegaConf.create(whole)


def of_the_run(merged: DictConfig, run: Path) -> DictConfig:
    """The same for the world: its users are those of the run, whatever the seed of this one."""
    world = OmegaConf.merge(merged, {"seed": configuration(run).seed})
    assert isinstance(world, DictConfig)
    return world


def told(logged: Logged) -> list[str]:
    """How much of a log there was, and what to beware of."""
    said = [
        f"log of {', '.join(logged.policies)}: {logged.steps:,} steps in {logged.episodes:,} "
        f"sessions of {logged.users:,} users, {logged.session_reward:.4f} reward a session",
        f"its policy, asked again, would have shown another item {logged.explored:.1%} of the "
        f"time; it showed {logged.coverage:.1%} of the catalogue",
        f"{logged.used:,} steps to learn from; {logged.cut:,} dropped where the log breaks off, "
        f"{logged.left_over:,} to make equal chunks",
    ]  # fmt: skip
    if logged.explored < HARDLY:
        said.append(
            f"WARNING: the log's policy hardly explored ({logged.explored:.2%}): what other items "
            "would have earned is a guess. A log of more exploration teaches more: "
            "agent.epsilon_end or frozen_temperature of the run"
        )
    return said


def others(cfg: DictConfig, run: Path, world: Arena) -> tuple[dict[str, Agent], str]:
    """Baselines and the run's agent, and the latter's name in the table."""
    config = configuration(run)
    agent: Agent = hydra.utils.instantiate(config.agent, world.spec)
    load_checkpoint(of_run(run), agent, world.catalog, world.spec.device)
    names = dict.fromkeys(cfg.baselines if cfg.baselines is not None else BASELINES)
    logger = f"logging {config.agent_name}"
    return {**{name: named_agent(name, world.spec) for name in names}, logger: agent}, logger


def learn(cfg: DictConfig, agent: Agent, replay: Replay, world: Arena, folder: Path) -> None:
    """Gradient steps on random minibatches of the log; curves over updates."""
    generator = torch.Generator(world.spec.device).manual_seed(cfg.seed)
    with (
        SummaryWriter(str(folder / "tensorboard")) as writer,
        tqdm(total=cfg.updates, desc="learn", unit="update", disable=not cfg.progress) as bar,
    ):
        for update in range(1, cfg.updates + 1):
            batch = replay.sample(cfg.batch_size, generator).transition
            try:
                logs = agent.update(batch)
            except NonFiniteLossError as error:
                bad = folder / "bad_batch.pt"
                torch.save(error.batch, bad)
                raise ValueError(f"{error}; what it learnt from is in {bad}") from error
            points: dict[str, float] = {}
            if update % cfg.log_every == 0 or update == cfg.updates:
                points = {name: value.item() for name, value in logs.items()}
            if cfg.eval_every and update % cfg.eval_every == 0:
                points |= world.evaluate(agent)
                bar.set_postfix(reward=points["eval/mean_reward"])
            for name, value in points.items():
                writer.add_scalar(name, value, update)
            bar.update()


def unseen(world: Arena, logs: list[Path]) -> Worlds:
    """The simulators that judge; the one whose users wrote a frozen log does not."""
    assert world.worlds is not None  # a run without logs was refused
    frozen = any(not decisions.meta(folder)["adaptive"] for folder in logs)
    test = world.worlds.test
    return replace(world.worlds, test=test[1:]) if frozen and len(test) > 1 else world.worlds


def judged(
    cfg: DictConfig, worlds: Worlds, agents: dict[str, Agent], device: str, baseline: str
) -> list[dict[str, Any]]:
    """The table: every policy and the oracle on the same sessions, differences to `baseline`."""
    played: dict[str, list[Sessions]] = {name: [] for name in (*agents, "oracle")}
    households = []
    bar = tqdm(total=len(worlds.test) * len(played), desc="evaluate", unit="play",
               disable=not cfg.progress)  # fmt: skip
    with bar:
        for i, simulator in enumerate(worlds.test):
            users, episodes = session_list(len(simulator.users), cfg.eval_users, device)
            env = make_env(cfg, simulator, num_envs=len(users), seed=SESSIONS_SEED)
            for name, agent in agents.items():
                played[name].append(play(env, agent, users, episodes))
                bar.update()
            played["oracle"].append(play_oracle(env, users, episodes))
            bar.update()
            households.append(household_names(simulator.users, users, worlds.test[0].users, i))
    replayed = {name: replay_value(cfg, agent, worlds) for name, agent in agents.items()}
    rewards = {
        name: np.stack([s.reward.cpu().numpy() for s in all_]) for name, all_ in played.items()
    }
    return table(
        rewards, np.stack(households), baseline=baseline,
        length={name: mean_length(all_) for name, all_ in played.items()},
        coverage={name: joint_coverage(all_) for name, all_ in played.items()},
        replay_value={**replayed, "oracle": None},
    )  # fmt: skip


def next_steps(run: Path, folder: Path, merged: DictConfig, logs: list[Path]) -> list[str]:
    """What to look at next: curves, and the off-policy estimate on the run's frozen log."""
    said = [f"tensorboard --logdir {folder / 'tensorboard'}"]
    if not decisions.parts(run / "decisions"):
        return said
    name = merged.agent_name.replace("-", "_")
    learnt = f'+log.others.{name}={{_target_:experiments.train_offline.learnt,path:"{folder}"}}'
    words = ["python", "experiments/evaluate_policies.py", "log=run", f"log.path={run}", learnt]
    said.append(f"what the frozen log of {run} says of it: {shlex.join(words)}")
    if run / "decisions" in logs:
        said.append("it learned from that very log: the estimate will flatter it")
    return said


def learnt(path: str) -> Agent:
    """The agent of a run of this command, on what its environment's agents know of the shop."""
    folder = Path(path)
    cfg = configuration(folder)
    logs = [Path(cfg.offline.run) / name for name in LOGS["both"]]
    about = decisions.meta(next((log for log in logs if decisions.parts(log)), logs[-1]))
    spec, catalog = spec_of(cfg, about)
    agent: Agent = hydra.utils.instantiate(cfg.agent, replace(spec, total_steps=cfg.steps))
    load_checkpoint(folder / "checkpoint", agent, catalog.fingerprint())
    return agent


if __name__ == "__main__":
    main()
