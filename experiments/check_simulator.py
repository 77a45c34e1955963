"""Say how like a held-out log the simulated users are: a line a check, PASS or FAIL.

python experiments/check_simulator.py env=ecommerce
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("check_simulator", __doc__, sys.argv[1:])  # before torch: at once

import json
from dataclasses import asdict
from itertools import combinations
from typing import Any

import hydra
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from agents.base import AgentSpec
from agents.interactions import Interactions
from agents.linear import EASE
from encoders.items import interactions
from evaluation.online import play
from experiments.from_logs import (
    SPLIT,
    coverage_line,
    events_before,
    first_trips,
    held_out_trips,
    remember_gate,
    summary,
    with_levels,
)
from experiments.gate_page import write_page
from experiments.policies import (
    SESSIONS_SEED,
    agent_config,
    agent_spec,
    make_env,
    named_agent,
    opening,
    session_list,
)
from experiments.prepare import JUDGES, Worlds
from experiments.run_folder import plain, writable_home, write_text
from simulators.base import Catalog, SimSpec, UserSimulator
from simulators.fidelity import HeldOut, hits, priced
from simulators.fit import moment
from simulators.fitted import FittedSimulator
from simulators.gate import (
    THRESHOLDS,
    Check,
    above,
    at_least,
    calibration_checks,
    lines,
    walk_checks,
    walked,
)
from simulators.organic import fit_alone
from simulators.realism import Distance
from simulators.trips import trips_from_logs
from sources.logs import Logs

DEVICE = "cpu"  # a few minutes there; the same bits everywhere
RIVALS = {  # of the ranking: what is scored, and against what
    "hit10_new_over_ease": ("new", "EASE"),
    "hit10_new_over_item_knn": ("new", "item-kNN"),
    "hit10_new_over_popularity": ("new", "popularity"),
    "hit10_over_own_counts": ("repeats", "own counts"),
    "hit10_over_decayed_counts": ("repeats", "decayed own counts"),
}


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="check_simulator")
def main(cfg: DictConfig) -> None:
    """Fit on half of the households before the cut; judge on the others after it."""
    with cli.plain_errors():
        limits = thresholds(cfg)
        torch.set_num_threads(cfg.threads)
        if cfg.env.get("data") is None:
            raise ValueError(
                f"env={cfg.env_name} has no log, so there is nothing to hold its users against: "
                "the gate is for users fitted to a log"
            )
        logs: Logs = with_levels(instantiate(cfg.env.data))
        print("\n".join([summary(logs), *(f"  {note}" for note in logs.notes)]), flush=True)
        catalog: Catalog = instantiate(cfg.env.catalog, logs, device=DEVICE, progress=cfg.progress)
        print(coverage_line(logs, catalog), flush=True)
        ours, others = logs.split_users(0.5, SPLIT)
        simulator = instantiate(
            cfg.env.simulator, SimSpec(ours, catalog, DEVICE, cfg.seed), _convert_="all"
        )
        if not isinstance(simulator, FittedSimulator):
            raise ValueError(
                f"the gate checks users of simulators.fitted, env={cfg.env_name} has "
                f"{type(simulator).__name__}: simulators.testing.check_simulator checks any"
            )
        checks, more = gate(cfg, simulator, logs, (ours, others), catalog, limits)
        print("\n".join(["", *lines(checks)]))
        remember_gate(simulator.fit_key, checks)
        folder = (
            Path(cfg.out_dir) if cfg.out_dir else writable_home() / "runs" / cfg.env_name / "gate"
        )
        print(f"page: {write_page(folder, cfg.env_name, checks, more)}")
        if cfg.out:
            said = [json.dumps(plain(asdict(check)), allow_nan=False) for check in checks]
            write_text(Path(cfg.out), "\n".join(said) + "\n")


def thresholds(cfg: DictConfig) -> dict[str, float]:
    """What each check must keep: the usual numbers, and those typed."""
    typed = dict(cfg.thresholds)
    for name, value in typed.items():
        if name not in THRESHOLDS:
            raise ValueError(
                f"thresholds.{name}: there is no such check{cli.advise(name, [*THRESHOLDS])}; "
                f"there are: {', '.join(THRESHOLDS)}"
            )
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ValueError(f"thresholds.{name} must be a number or null, got {value!r}")
    if not isinstance(cfg.eval_users, int) or cfg.eval_users < 2:
        raise ValueError(f"eval_users must be a whole number of at least 2, got {cfg.eval_users!r}")
    for name in cfg.policies:
        agent_config(name)  # a wrong name is refused before the work
    return {**THRESHOLDS, **typed}


def gate(
    cfg: DictConfig, simulator: FittedSimulator, logs: Logs, halves: tuple[Logs, Logs],
    catalog: Catalog, limits: dict[str, float],
) -> tuple[list[Check], dict[str, Any]]:  # fmt: skip
    """All checks, and what the page draws beside."""
    ours, others = halves
    asked = {name: np.nan if value is None else value for name, value in limits.items()}
    with tqdm(total=4, desc="gate", unit="part", disable=not cfg.progress) as bar:
        trips = held_out_trips(others, catalog)
        if not len(trips) or not len(trips.bought):
            raise ValueError(
                f"{logs.name}: no household to judge with bought of the catalogue after the cut at "
                f"{moment(catalog.as_of):%Y-%m-%d}: choose an earlier cut (env.catalog.cut)"
            )
        held = priced(simulator.preference, trips)
        checks, calibrated = calibration_checks(held, simulator.preference.log_rate, asked)
        bar.update()
        checks += ranking_checks(held, ours, catalog, asked, cfg, simulator.preference.log_rate)
        bar.update()
        window = cfg.env.simulator.get("window", 150.0)
        alone = fit_alone(simulator.preference, ours, catalog, window=window, seed=cfg.seed)
        found = walked(alone, others, catalog, seed=cfg.seed)
        walks, looks = walk_checks(found, catalog, asked, seed=cfg.seed)
        checks += walks
        bar.update()
        if cfg.policies:
            checks.append(agreement(cfg, logs, (ours, others), catalog, asked))
        bar.update()
    kept = [check for check in checks if limits[check.check] is not None]
    return kept, {"calibration": calibrated, "looks": looks, "walked": found}


def ranking_checks(
    held: HeldOut, ours: Logs, catalog: Catalog, limits: dict[str, float], cfg: DictConfig,
    log_rate: torch.Tensor,
) -> list[Check]:  # fmt: skip
    """Hit@10 at each household's first trip, for all it buys after the cut, over rivals.

    Rivals know what the simulator knows: the other half of the households before the cut, and what
    the household itself had bought.
    """
    before = ours.before(moment(catalog.as_of))
    counts, _ = interactions(before, catalog.ids)
    ease = EASE(Interactions.of(counts), lam=cfg.ease_lam, seed=cfg.seed)
    first = np.unique(held.trips.user, return_index=True)[1]
    obs = opening(held.trips[first].users(), 1, 1)
    found = hits(
        held.theta, held.bought, held.trips, counts, log_rate, cfg.seed, {"EASE": ease.scores(obs)}
    )
    checks = []
    for name, (mode, rival) in RIVALS.items():
        model, other = found[mode]["model"], found[mode][rival]  # (h,) each
        gain = model - other
        mean, error = float(gain.mean()), 1.96 * float(gain.std()) / max(len(gain), 1) ** 0.5
        said = (
            f"Hit@10, {'items new to the household' if mode == 'new' else 'all items'}: "
            f"{float(model.mean()):.3f}, {rival} {float(other.mean()):.3f}, {len(gain)} households"
        )
        checks.append(above(name, Distance(mean, mean - error, mean + error), limits, said))
    return checks


def agreement(
    cfg: DictConfig, logs: Logs, halves: tuple[Logs, Logs], catalog: Catalog,
    limits: dict[str, float],
) -> Check:  # fmt: skip
    """Whether users fitted to one half order policies as those fitted to the other do.

    Of the pairs of policies whose difference is clear in one (its interval is off zero), the share
    that has the same sign in the other; both halves are asked.
    """
    ours, others = halves
    judges = trips_from_logs(others, catalog.ids, since=catalog.as_of)
    users = judges[first_trips(judges)].users()
    specs = [
        SimSpec(ours, catalog, DEVICE, cfg.seed, users),
        SimSpec(others, catalog, DEVICE, JUDGES, users),
    ]
    simulators = [instantiate(cfg.env.simulator, spec, _convert_="all") for spec in specs]
    events = events_before(cfg, logs, catalog)
    worlds = Worlds(simulators[0], simulators, events, None, {}, notes=[])
    spec = agent_spec(cfg, worlds, DEVICE)
    rewards = [played(cfg, sim, spec, list(cfg.policies)) for sim in simulators]
    clear = same = 0
    for here, there in (rewards, rewards[::-1]):
        for one, other in combinations(cfg.policies, 2):
            gain = here[one] - here[other]  # (M,)
            if abs(gain.mean()) > 1.96 * gain.std() / len(gain) ** 0.5:
                clear += 1
                same += bool(np.sign(gain.mean()) == np.sign((there[one] - there[other]).mean()))
    said = f"of {clear} clear pairs of {len(cfg.policies)} policies in users of disjoint households"
    share = same / clear if clear else float("nan")
    return at_least("ranking_agreement", wilson(share, clear), limits, f"same order: {same} {said}")


def played(
    cfg: DictConfig, simulator: UserSimulator, spec: AgentSpec, policies: list[str]
) -> dict[str, np.ndarray]:
    """Reward (M,) of every session by policy, the same sessions for all."""
    users, episodes = session_list(len(simulator.users), cfg.eval_users, DEVICE)
    found = {}
    for name in policies:
        env = make_env(cfg, simulator, num_envs=len(users), seed=SESSIONS_SEED)
        found[name] = play(env, named_agent(name, spec), users, episodes).reward.cpu().numpy()
    return found


def wilson(share: float, n: int) -> Distance:
    """A share of n with its 95 % interval (Wilson, 1927)."""
    if not n:
        return Distance(share, float("nan"), float("nan"))
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return Distance(share, middle - half, middle + half)


if __name__ == "__main__":
    main()
