"""What a comparison refuses before any work, and where it goes."""

import os
import time
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from experiments.cli import advise
from experiments.compared_parts import MEANING
from experiments.compared_play import simulators_with, variants
from experiments.compared_runs import optioned
from experiments.kinds import refuse_targets, refuse_words
from experiments.policies import agent_config
from experiments.prepare import Worlds
from experiments.run_folder import ROOT, refuse_unwritable
from experiments.train_agent import chosen_device

LEAST = {"seeds": 1, "seed": 0, "evaluators": 1, "eval_users": 2, "replay_items": 1,
         "sensitivity_simulators": 1, "sensitivity_users": 2, "examples": 0, "eval_every": 1,
         "frozen_users": 0, "num_envs": 1, "threads": 1, "log_every": 1, "workers": 1,
         "steps": 1}  # fmt: skip
MAY_BE_NULL = ("workers", "steps")


def checked(cfg: DictConfig) -> str:
    """The device; settings that make no sense are refused."""
    for key in ("agents", "assumptions"):
        if not isinstance(cfg[key], ListConfig) or (key == "agents" and not cfg[key]):
            raise ValueError(
                f"{key} must be a list{' of at least one' * (key == 'agents')}, got {cfg[key]!r}: "
                f"{key}=[...]"
            )
    for key, bound in LEAST.items():
        value = cfg[key]
        if value is None and key in MAY_BE_NULL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{key} must be a whole number of at least {bound}, got {value!r}")
    for key in ("sensitivity", "off_policy", "progress"):
        if not isinstance(cfg[key], bool):
            raise ValueError(f"{key} must be true or false, got {cfg[key]!r}")
    if not isinstance(cfg.frozen_temperature, int | float) or not cfg.frozen_temperature > 0:
        raise ValueError(f"frozen_temperature must be above 0, got {cfg.frozen_temperature!r}")
    assumptions = [*MEANING, *cfg.env.get("simulator", {})]
    for name in [*cfg.assumptions, *cfg.alternatives]:
        if name not in assumptions:
            raise ValueError(
                f"assumptions: env={cfg.env_name} makes none called {name!r}"
                f"{advise(name, assumptions)}; known are {', '.join(MEANING)}"
            )
    cfg.sensitivity_simulators = min(cfg.sensitivity_simulators, cfg.evaluators)
    cfg.sensitivity_users = min(cfg.sensitivity_users, cfg.eval_users)
    return chosen_device(cfg)


def options_known(cfg: DictConfig, names: list[str]) -> None:
    """Refuse options of agents that are not compared; an agent's other spellings are its name."""
    for name in [*cfg.options]:
        found = agent_config(name)[0]
        if found not in names:
            raise ValueError(f"options.{name}: {found} is not among agents=[{', '.join(names)}]")
        whole = optioned(cfg, name)
        refuse_targets(whole, f"options.{name}")
        refuse_words(whole, f"options.{name}")
        if found != name:
            OmegaConf.set_struct(cfg.options, False)
            cfg.options[found] = cfg.options.pop(name)


def plausible(cfg: DictConfig, worlds: Worlds) -> None:
    """Make each simulator that will be tried once, so that an impossible one is known by now."""
    for variant in variants(cfg, worlds.test[0]) if cfg.sensitivity else []:
        simulators_with(cfg, worlds, variant, only=1)


def comparison_folder(cfg: DictConfig) -> Path:
    """Where runs and report go; it is made when the training begins."""
    home = ROOT if os.access(ROOT, os.W_OK) else Path.cwd()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(cfg.out_dir) if cfg.out_dir else home / "runs" / cfg.env_name / f"compare-{stamp}"
    refuse_unwritable(folder, "out_dir")
    return folder
