"""From a configuration to users: those an agent trains on, and the others that judge it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from agents.interactions import Interactions
from encoders.state import EMPTY
from envs.excluded import Excluded, as_text, refuse_unknown
from experiments.early import refuse_early, rules_of
from simulators.base import Catalog, SimSpec, UserSimulator, UserTable
from simulators.testing import check_simulator

JUDGES = 1_000_000  # seeds of the simulators that judge: the same ones for every training seed


@dataclass(frozen=True)
class ReplayTrips:
    """M real trips after the cut: who came, knowing what, and what was really bought."""

    users: UserTable  # (M,) rows
    bought: Tensor  # (M, T) int64, EMPTY-padded

    def to(self, device: str) -> "ReplayTrips":
        return ReplayTrips(self.users.to(device), self.bought.to(device))


@dataclass(frozen=True)
class Worlds:
    """All that training and evaluation need of the world."""

    train: UserSimulator
    test: list[UserSimulator]  # fitted to other households
    events: Interactions  # purchases before the cut, with vectors of what items are
    replay: ReplayTrips | None
    fidelity: dict[str, Any]  # how like the held-out log the simulated users are
    notes: list[str]  # lines worth printing
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, where it has several
    specs: tuple[SimSpec, ...] = ()  # of `test`: what they were made from, to make others like them
    gate: str = ""  # what check_simulator.py said of the users
    second: UserSimulator | None = None  # users of another kind, of the households that judge


def prepare(cfg: DictConfig, device: str) -> Worlds:
    """Make the users of `cfg.env`."""
    if "id" in cfg.env:
        raise ValueError(
            "env=gym is an environment without a log or a simulator: train_agent.py trains and "
            "judges there, and python experiments/gym_results.py RUNS_FOLDER compares its runs"
        )
    if "simulator" not in cfg.env:
        raise ValueError(
            f"env={cfg.env_name} names no simulator: its yaml needs simulator: {{_target_: ...}}, "
            "as experiments/conf/env/tiny.yaml has it"
        )
    refuse_early(cfg)
    if cfg.env.get("data") is None:
        worlds = synthetic(cfg, device)
    else:
        from experiments.from_logs import from_logs

        worlds = from_logs(cfg, device)
    few = min(len(simulator.users) for simulator in worlds.test)
    if few < 2:
        raise ValueError(
            f"env.simulator is {cfg.env.simulator.get('_target_')}, which has {few} user to judge "
            "with; intervals are over users and need 2 or more: give it more users"
        )
    return worlds


def plug_in_note(cfg: DictConfig, simulator: UserSimulator) -> list[str]:
    """Look at users whose code is not of this repository, before anything is built on them."""
    target = str(cfg.env.simulator.get("_target_"))
    if target.startswith("simulators."):
        return []
    problems = check_simulator(simulator, quick=True)
    if problems:
        raise ValueError(
            f"env.simulator is {target}, whose users cannot be trained on:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\nsimulators.testing.check_simulator looks closer (docs/custom_simulator.md)"
        )
    return [f"{target}: a quick check found nothing wrong with these users"]


def synthetic(cfg: DictConfig, device: str) -> Worlds:
    """A world without logs: other seeds are other households of the same shop."""
    seeds = [cfg.seed, *(JUDGES + i for i in range(cfg.evaluators))]
    specs = [SimSpec(None, None, device=device, seed=seed) for seed in seeds]
    train, *test = [instantiate(cfg.env.simulator, spec) for spec in specs]
    notes = plug_in_note(cfg, train)
    notes.append(f"{len(train.users)} synthetic users, {len(train.catalog)} items, no log")
    if rules := rules_of(cfg):
        everybody = np.concatenate([as_text(s.users.ids) for s in (train, *test)])
        refuse_unknown(rules, everybody, train.catalog.ids, train.catalog.category_names)
        notes.append(Excluded.of(rules, train.catalog, train.users).words(train.catalog))
    events = events_of(train.users, train.catalog)
    return Worlds(train, test, events, replay=None, fidelity={}, notes=notes,
                  specs=tuple(specs[1:]))  # fmt: skip


def events_of(users: UserTable, catalog: Catalog) -> Interactions:
    """Past purchases one by one; of an item bought several times only the last time is known."""
    past, count = users.past.cpu().numpy(), users.past_count.cpu().numpy()  # (U, H) each
    row, place = np.nonzero(past != EMPTY)
    often = count[row, place].astype(np.int64)  # (pairs,)
    row, place = np.repeat(row, often), np.repeat(place, often)  # (n,)
    time = users.start.cpu().numpy()[row] - users.past_age.cpu().numpy()[row, place]
    order = np.lexsort((time, row))
    return Interactions(
        row[order], past[row, place][order].astype(np.int64), time[order], np.ones(len(row)),
        len(users), len(catalog), catalog.vectors.cpu(),
    )  # fmt: skip
