"""Do fitted users order policies as the truth does? Logs of known worlds, fitted blind.

python experiments/policy_truth.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("policy_truth", __doc__, sys.argv[1:])  # before torch: at once

import json
from dataclasses import asdict, replace

import hydra
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from agents.interactions import Interactions
from encoders.items import interactions
from experiments.early import refuse_early
from experiments.from_logs import SPLIT, first_trips
from experiments.gate_order import Agreed, Rewards, played, same_order
from experiments.policies import agent_config, agent_spec
from experiments.prepare import Worlds
from experiments.run_folder import plain, refuse_unwritable, write_text
from simulators.base import Catalog, SimSpec
from simulators.catalog import check_catalog
from simulators.fit import moment
from simulators.fitted import FittedSimulator
from simulators.gate import Check, at_least, lines
from simulators.lived import as_logged, shopping_log
from simulators.settings import check_settings as check_fit
from simulators.trips import trips_from_logs
from simulators.worlds import TinyWorld
from sources.logs import Logs


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="policy_truth")
def main(cfg: DictConfig) -> None:
    """Rank the policies in each world and in the users fitted to its log; count the pairs."""
    with cli.plain_errors():
        check_settings(cfg)
        torch.set_num_threads(cfg.threads)
        total = Agreed(0, 0)
        for seed in tqdm(range(cfg.seed, cfg.seed + cfg.worlds), desc="worlds", unit="world",
                         disable=not cfg.progress):  # fmt: skip
            fitted, truth = one_world(cfg, seed)
            found = same_order(truth, fitted)
            total = total + found
            print("\n".join([f"world {seed}: {found.same} of {found.clear} clear pairs in the true "
                             "order", *table(truth, fitted)]), flush=True)  # fmt: skip
        check = verdict(cfg, total)
        print("\n".join(["", *lines([check])]))
        if cfg.out:
            write_text(Path(cfg.out), json.dumps(plain(asdict(check)), allow_nan=False) + "\n")


def check_settings(cfg: DictConfig) -> None:
    """Refuse what cannot be played before the work."""
    if cfg.env.get("data") is not None:
        raise ValueError(
            f"env={cfg.env_name} has a log, so its truth is not known: policy_truth.py makes logs "
            "of synthetic worlds (env=tiny); check_simulator.py holds users against a real one"
        )
    for name, least in (("worlds", 1), ("eval_users", 2), ("households", 50)):
        if not isinstance(cfg[name], int) or cfg[name] < least:
            raise ValueError(
                f"{name} must be a whole number of at least {least}, got {cfg[name]!r}"
            )
    if len(cfg.policies) < 2:
        raise ValueError(f"policies must name two or more to be ordered, got {list(cfg.policies)}")
    for name in cfg.policies:
        agent_config(name)
    check_catalog({"cut": cfg.cut})
    refuse_early(cfg)
    try:
        check_fit(cfg.fit)
    except ValueError as error:
        raise ValueError(f"fit.{error}") from None
    refuse_unwritable(cfg.out, "out", file=True)


def verdict(cfg: DictConfig, found: Agreed) -> Check:
    """The share of pairs that are clear in truth and in the right order in the fitted users."""
    said = (
        f"in the true order: {found.same} of {found.clear} pairs of {len(cfg.policies)} policies "
        f"that truth tells apart, {cfg.worlds} worlds"
    )
    nobody, limits = not found.clear, {"policy_truth": cfg.threshold}
    return at_least("policy_truth", found.share(), limits, said, nobody=nobody)


def one_world(cfg: DictConfig, seed: int) -> tuple[Rewards, Rewards]:
    """Rewards of each policy in users fitted to the log of a world, and in the world itself.

    Half of the households are fitted to, before the cut; the others are served, from their first
    visit after it, the same sessions with the same draws in both.
    """
    households = cfg.households
    world = instantiate(
        cfg.env.simulator, SimSpec(None, None, seed=seed), households=households, world_seed=seed
    )
    if not isinstance(world, TinyWorld):
        raise ValueError(
            f"policy_truth.py needs a world whose truth is known, env={cfg.env_name} has "
            f"{type(world).__name__}: use env=tiny"
        )
    logs = shopping_log(world, days=cfg.days, seed=seed)
    catalog = blind_catalog(world, logs, cfg.cut)
    ours, others = logs.split_users(0.5, SPLIT)
    judges = trips_from_logs(others, catalog.ids, since=catalog.as_of)
    users = judges[first_trips(judges)].users()
    spec = SimSpec(ours, catalog, "cpu", seed, users)
    fitted = FittedSimulator.fit(spec, **cfg.fit)
    before = logs.before(moment(catalog.as_of))
    known = interactions(before, catalog.ids)[1]
    events = Interactions.of(
        before, items=catalog.ids, users=known, vectors=catalog.vectors, seed=SPLIT
    )
    agents = agent_spec(cfg, Worlds(fitted, [], events, None, {}, notes=[]), "cpu")
    names = list(cfg.policies)
    truth = as_logged(world, users)
    truth.catalog = replace(truth.catalog, popularity=catalog.popularity)
    return played(cfg, fitted, agents, names), played(cfg, truth, agents, names)


def blind_catalog(world: TinyWorld, logs: Logs, cut: float) -> Catalog:
    """The world's items with what the log says of them before the cut.

    Vectors stay: they are the texts of this shop, which anyone can read.
    """
    as_of = logs.cut(cut).timestamp() / 86_400
    before = logs.before(moment(as_of)).events
    trips = max(before["basket"].nunique(), 1)
    lines_of = np.bincount(before["item"].astype(int), minlength=len(world.catalog))
    popularity = torch.from_numpy(lines_of / trips).float()
    texts = [""] * len(world.catalog)
    return replace(world.catalog, texts=texts, popularity=popularity, as_of=as_of)


def table(truth: Rewards, fitted: Rewards) -> list[str]:
    """Mean rewards in truth and in fitted users, the best in truth first."""
    mean = {name: (float(truth[name].mean()), float(fitted[name].mean())) for name in truth}
    width = max(map(len, mean))
    return [
        f"  {name:<{width}}  {real:.3f} in truth, {said:.3f} in the fitted users"
        for name, (real, said) in sorted(mean.items(), key=lambda pair: -pair[1][0])
    ]


if __name__ == "__main__":
    main()
