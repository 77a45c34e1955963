"""Training runs of a comparison: several agents and seeds, side by side in processes, kept."""

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from agents.base import Agent, AgentSpec
from experiments.arena import arena
from experiments.checkpoints import folders, load_checkpoint, of_run
from experiments.cli import CONF, keys
from experiments.policies import agent_config
from experiments.run_folder import open_folder, stage, write_json
from experiments.train_agent import checked, log_frozen, train
from simulators.base import Catalog

SHARED = ("steps", "device", "threads", "num_envs", "log_every", "eval_every", "frozen_users",
          "frozen_temperature")  # fmt: skip
CURVE = "eval/mean_reward"  # of the same held-out sessions at every point


@dataclass(frozen=True)
class Run:
    """A training run that is over, in its folder."""

    policy: str
    seed: int
    folder: Path
    config: DictConfig

    def agent(self, spec: AgentSpec, catalog: Catalog) -> Agent:
        """The agent that the run judged."""
        agent: Agent = instantiate(self.config.agent, spec)
        load_checkpoint(
            of_run(self.folder), agent, catalog.fingerprint(), str(catalog.vectors.device)
        )
        return agent

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Env steps (T,) and the held-out reward of a session at each (T,)."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "tensorboard"), {"scalars": 0})
        events.Reload()
        if CURVE not in events.Tags()["scalars"]:
            return np.zeros(0, np.int64), np.zeros(0)
        points = {point.step: point.value for point in events.Scalars(CURVE)}
        return np.array(sorted(points)), np.array([points[step] for step in sorted(points)])


def runs_in(place: Path, env: DictConfig) -> list[Run]:
    """All finished runs in a folder and below; runs of another environment are refused.

    Runs of one agent with other settings are policies of their own, named after what differs.
    """
    if not place.is_dir():
        raise ValueError(f"runs={place} is no folder: give one that holds run folders")
    found = []
    for path in sorted(place.rglob("config.yaml")):
        folder = path.parent
        if not whole(folder):
            print(f"{folder} is left out: it holds no finished run", flush=True)
            continue
        config = OmegaConf.load(path)
        assert isinstance(config, DictConfig)
        if config.env != env:
            raise ValueError(
                f"{folder} was trained in another environment than the one asked for: "
                f"{difference(config.env, env)}. Give the same env=... and env.* keys as it had"
            )
        found.append(Run(config.agent_name, config.seed, folder, config))
    if not found:
        raise ValueError(
            f"runs={place} holds no finished run: expected folders with checkpoint/ and "
            "result.json, as experiments/train_agent.py leaves them"
        )
    return told_apart(found)


def whole(folder: Path) -> bool:
    """Whether a run was trained to its end."""
    return bool(folders(folder / "checkpoint")) and (folder / "result.json").is_file()


def told_apart(runs: list[Run]) -> list[Run]:
    """The runs with names that tell settings apart; the same run twice is refused."""
    settings = [flat(run.config) for run in runs]
    named = []
    for run, mine in zip(runs, settings, strict=True):
        same = [x for r, x in zip(runs, settings, strict=True) if r.policy == run.policy]
        differs = [k for k in mine if any(x.get(k) != mine[k] for x in same)]
        said = ", ".join(f"{k.removeprefix('agent.')}={mine[k]}" for k in differs)
        named.append(replace(run, policy=f"{run.policy} {said}".strip()))
    seen: dict[tuple[str, int], Path] = {}
    for run in named:
        other = seen.setdefault((run.policy, run.seed), run.folder)
        if other != run.folder:
            raise ValueError(
                f"{other} and {run.folder} are the same run, {run.policy} with seed {run.seed}: "
                "one training is not two, move one of them elsewhere"
            )
    return named


def flat(config: DictConfig) -> dict[str, Any]:
    """The settings that make a policy what it is, apart from its seed."""
    agent: Any = OmegaConf.to_container(config.agent, resolve=True)
    steps = config.steps if config.steps is not None else config.env.get("train_steps")
    return {**{f"agent.{k}": v for k, v in keys(agent).items()}, "steps": steps,
            "num_envs": config.num_envs}  # fmt: skip


def running(owner: str) -> bool:
    """Whether the process of this number is there; one that was killed left its lock behind."""
    if os.name != "posix" or not owner.isdigit():
        return os.name != "posix"
    try:
        os.kill(int(owner), 0)  # asks only
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of somebody else
        return True
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder: two comparisons in one would take each other's runs away."""
    lock = folder / "in-use"
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        owner = lock.read_text().strip()
        if running(owner):
            raise ValueError(
                f"{folder} is in use by another comparison (process {owner}): wait for it, "
                f"choose another out_dir, or delete {lock} if it is over"
            ) from None
    lock.write_text(str(os.getpid()))
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def difference(one: DictConfig, other: DictConfig) -> str:
    """The first key in which two configurations differ."""
    whole: list[Any] = [OmegaConf.to_container(x, resolve=True) for x in (one, other)]
    a, b = (keys(x) for x in whole)
    key = next(k for k in [*a, *b] if not isinstance(a.get(k), dict) and a.get(k) != b.get(k))
    return f"env.{key} was {a.get(key)}, is {b.get(key)}"


def train_all(cfg: DictConfig, learners: list[str], folder: Path) -> list[Run]:
    """Train each learner with each seed in processes of their own; what is there is not redone."""
    todo, done, every = [], [], []
    for config in training_configs(cfg, learners, folder):
        every.append(config)  # in this order, whatever was done before
        if finished(config):
            done.append(config)
        else:
            todo.append(config)
    if done:
        print(f"{len(done)} of {len(done) + len(todo)} runs are in {folder} already", flush=True)
    workers = max(1, min(cfg.workers or cores(), len(todo)))
    context = get_context("spawn")  # a forked torch may hang; each worker imports it once
    plain: list[Any] = [OmegaConf.to_container(config, resolve=True) for config in todo]
    with (
        tqdm(total=len(todo), desc="train", unit="run", disable=not cfg.progress) as bar,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        jobs: dict[Future[None], Any] = {pool.submit(train_one, p): p for p in plain}
        try:
            for job in as_completed(jobs):
                job.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            print(f"runs that are over stay in {folder}: the same command goes on", file=sys.stderr)
            raise
    return [Run(c.agent_name, c.seed, Path(c.run_dir), c) for c in every]


def cores() -> int:
    """Processes that train at once where nothing is typed."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def training_configs(cfg: DictConfig, learners: list[str], folder: Path) -> list[DictConfig]:
    """Those of each learner with each seed."""
    return [
        training_config(cfg, name, seed, folder / name / f"seed{seed}")
        for name in learners
        for seed in range(cfg.seed, cfg.seed + cfg.seeds)
    ]


def training_config(cfg: DictConfig, name: str, seed: int, folder: Path) -> DictConfig:
    """What experiments/train_agent.py would be told for this run."""
    root: Any = OmegaConf.to_container(OmegaConf.load(CONF / "train_agent.yaml"), resolve=False)
    typed = {k: v for k, v in root.items() if k not in ("defaults", "hydra")}
    whole = typed | {k: cfg[k] for k in SHARED}
    whole |= {
        "env": cfg.env, "agent": optioned(cfg, name), "env_name": cfg.env_name, "agent_name": name,
        "seed": seed, "run_dir": str(folder), "progress": False, "evaluators": 1, "out": None,
        "log_training": False,
    }  # fmt: skip
    return OmegaConf.create(whole)


def optioned(cfg: DictConfig, name: str) -> DictConfig:
    """The agent's configuration with the options typed for it."""
    merged = OmegaConf.merge(agent_config(name)[1], cfg.options.get(name) or {})
    assert isinstance(merged, DictConfig)
    return merged


def finished(config: DictConfig) -> bool:
    """Whether this run is over; one that is half done is taken away, another one is refused."""
    folder = Path(config.run_dir)
    if over(config):
        return True
    if folder.exists():
        print(f"{folder} holds a run that was cut off: it starts anew", flush=True)
        shutil.rmtree(folder)
    return False


def over(config: DictConfig) -> bool:
    """Whether this run is over; a folder that holds another run, or none, is refused."""
    folder = Path(config.run_dir)
    if not folder.exists():
        return False
    before = OmegaConf.load(folder / "config.yaml") if (folder / "config.yaml").exists() else None
    if before is not None and whole(folder):
        a, b = (OmegaConf.to_container(x, resolve=True) for x in (before, config))
        if a != b:
            assert isinstance(a, dict)
            assert isinstance(b, dict)
            key = next(k for k in [*a, *b] if a.get(k) != b.get(k))
            raise ValueError(
                f"{folder} holds a run with another {key}: choose another folder with out_dir=..., "
                "or give the keys it was made with"
            )
        return True
    if before is None:
        raise ValueError(f"{folder} is there and holds no run: choose another folder with out_dir")
    return False


def train_one(plain: dict[str, Any]) -> None:
    """Train one agent with one seed, in a process of its own; its words go to run.log."""
    cfg = OmegaConf.create(plain)
    seconds: dict[str, float] = {}
    log = Path(cfg.run_dir).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as words, redirect_stdout(words):
        device, steps = checked(cfg)
        with stage("prepare", seconds):
            world = arena(cfg, device, steps)
        torch.set_num_threads(cfg.threads)
        agent = instantiate(cfg.agent, world.spec)
        folder = open_folder(cfg)
        with stage("train", seconds):
            train(cfg, world, agent, folder, steps)
        with stage("log", seconds):
            log_frozen(cfg, world, agent, folder, device)
        about = {"env": cfg.env_name, "agent": cfg.agent_name, "seed": cfg.seed, "steps": steps}
        write_json(folder / "result.json", {**about, "table": [], "seconds": seconds})
