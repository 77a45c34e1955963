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
from dataclasses import asdict, dataclass
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
from experiments.early import refuse_early
from experiments.from_logs import (
    SPLIT,
    after_the_cut,
    coverage_line,
    describes_users,
    events_before,
    first_trips,
    held_out_trips,
    remember_gate,
    summary,
    with_levels,
)
from experiments.gate_baskets import basket_checks, with_rivals
from experiments.gate_order import (
    played,
    same_order,
    sensitivity,
    sensitivity_lines,
)
from experiments.gate_page import write_page
from experiments.kinds import named
from experiments.policies import (
    agent_config,
    agent_spec,
    opening,
)
from experiments.prepare import JUDGES, Worlds
from experiments.run_folder import plain, refuse_unwritable, writable_home, write_text
from simulators.base import Catalog, SimSpec, UserSimulator
from simulators.exposed import ExposureSimulator
from simulators.fidelity import HeldOut, hits, priced
from simulators.fit import moment
from simulators.fitted import FittedSimulator
from simulators.gate import (
    THRESHOLDS,
    Check,
    above,
    at_least,
    calibration_checks,
    left_out,
    lines,
    price_checks,
    walk_checks,
    walked,
)
from simulators.gate_exposed import EXPOSED, exposed_checks, kind_of
from simulators.organic import fit_alone
from simulators.realism import Distance
from simulators.segments import segment_checks
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


@dataclass(frozen=True)
class Verdict:
    """All lines of the gate, what the page draws beside, and why lines are missing."""

    checks: list[Check]
    more: dict[str, Any]
    notes: list[str]


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="check_simulator")
def main(cfg: DictConfig) -> None:
    """Fit on half of the households before the cut; judge on the others after it."""
    with cli.plain_errors():
        limits = thresholds(cfg)
        torch.set_num_threads(cfg.threads)
        checked(cfg)
        logs: Logs = with_levels(instantiate(cfg.env.data))
        print("\n".join([summary(logs), *(f"  {note}" for note in logs.notes)]), flush=True)
        catalog: Catalog = instantiate(cfg.env.catalog, logs, device=DEVICE, progress=cfg.progress)
        print(coverage_line(logs, catalog), flush=True)
        ours, others = logs.split_users(0.5, SPLIT)
        simulator = instantiate(
            cfg.env.simulator, SimSpec(ours, catalog, DEVICE, cfg.seed), _convert_="all"
        )
        if isinstance(simulator, FittedSimulator):
            found = gate(cfg, simulator, logs, (ours, others), catalog, limits)
        elif isinstance(simulator, ExposureSimulator):
            found = gate_of_impressions(cfg, simulator, logs, (ours, others), catalog, limits)
        else:
            raise ValueError(not_for(cfg, type(simulator)))
        tell(cfg, simulator.fit_key, found)


def tell(cfg: DictConfig, fit_key: str, found: Verdict) -> None:
    """Print the lines, remember what failed, write page and file."""
    checks, more = found.checks, found.more
    print("\n".join(["", *lines(checks)]))
    for note in found.notes:
        print(f"  left out: {note}")
    if "sensitivity" in more:
        said = sensitivity_lines(more["sensitivity"])
        print("\n".join(["order of the policies if an assumption is wrong:", *said]))
    remember_gate(fit_key, checks)
    folder = Path(cfg.out_dir) if cfg.out_dir else writable_home() / "runs" / cfg.env_name / "gate"
    print(f"page: {write_page(folder, cfg.env_name, checks, more | {'notes': found.notes})}")
    if cfg.out:
        rows = [json.dumps(plain(asdict(check)), allow_nan=False) for check in checks]
        write_text(Path(cfg.out), "\n".join(rows) + "\n")


def checked(cfg: DictConfig) -> None:
    """Refuse users without a log, what no environment can be, and places to write that are none."""
    if cfg.env.get("data") is None:
        raise ValueError(
            f"env={cfg.env_name} has no log, so there is nothing to hold its users against: "
            "the gate is for users fitted to a log"
        )
    target = (cfg.env.get("simulator") or {}).get("_target_")
    made = named(str(target), "env.simulator._target_")
    if isinstance(made, type) and not issubclass(made, FittedSimulator | ExposureSimulator):
        raise ValueError(not_for(cfg, made))
    refuse_early(cfg)
    refuse_unwritable(cfg.out_dir, "out_dir")
    refuse_unwritable(cfg.out, "out", file=True)


def not_for(cfg: DictConfig, kind: type) -> str:
    """Why users of another kind are not for the gate."""
    return (
        "the gate checks users of simulators.fitted and simulators.exposed, "
        f"env={cfg.env_name} has {kind.__name__}: simulators.testing.check_simulator checks any"
    )


def thresholds(cfg: DictConfig) -> dict[str, float]:
    """What each check must keep: the usual numbers, and those typed."""
    typed = dict(cfg.thresholds)
    if not isinstance(cfg.sensitivity, bool):
        raise ValueError(f"sensitivity must be true or false, got {cfg.sensitivity!r}")
    if cfg.sensitivity and len(cfg.policies) < 2:
        raise ValueError("sensitivity asks for the order of policies: name two or more in policies")
    exposed = "impression" in cfg.env.get("simulator", {})
    usual = EXPOSED if exposed else THRESHOLDS
    for name, value in typed.items():
        if name not in usual and not (exposed and kind_of(name)):
            raise ValueError(
                f"thresholds.{name}: there is no such check{cli.advise(name, [*usual])}; "
                f"there are: {', '.join(usual)}"
            )
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ValueError(f"thresholds.{name} must be a number or null, got {value!r}")
    if not isinstance(cfg.eval_users, int) or cfg.eval_users < 2:
        raise ValueError(f"eval_users must be a whole number of at least 2, got {cfg.eval_users!r}")
    for name in cfg.policies:
        agent_config(name)  # a wrong name is refused before the work
    return {**usual, **typed}


def gate(
    cfg: DictConfig, simulator: FittedSimulator, logs: Logs, halves: tuple[Logs, Logs],
    catalog: Catalog, limits: dict[str, float],
) -> Verdict:  # fmt: skip
    """All checks of users fitted to purchases."""
    ours, others = halves
    asked = {name: np.nan if value is None else value for name, value in limits.items()}
    with tqdm(total=4, desc="gate", unit="part", disable=not cfg.progress) as bar:
        trips = held_out_trips(others, catalog)
        if not len(trips) or not len(trips.bought):
            raise ValueError(
                f"{logs.name}: no household to judge with bought of the catalogue after the cut at "
                f"{moment(catalog.as_of):%Y-%m-%d}: choose an earlier cut (env.catalog.cut)"
            )
        log_rate = simulator.preference.log_rate
        held = priced(simulator.preference, trips)
        checks, calibrated = calibration_checks(held, log_rate, asked)
        kinds, calibrated["segments"], notes = segment_checks(held, others, asked)
        checks += kinds
        bar.update()
        checks += ranking_checks(held, ours, catalog, asked, cfg, log_rate)
        counts, _ = interactions(ours.before(moment(catalog.as_of)), catalog.ids)
        checks += basket_checks(held, counts, log_rate, asked, cfg.seed)
        checks, why = with_rivals(checks, held)
        notes += why
        bar.update()
        window = cfg.env.simulator.get("window", 150.0)
        alone = fit_alone(
            simulator.preference, ours, catalog, window=window, seed=cfg.seed,
            company=simulator.habits.company,
        )  # fmt: skip
        found = walked(alone, others, catalog, seed=cfg.seed)
        walks, looks = walk_checks(found, catalog, asked, seed=cfg.seed)
        checks += walks
        checks += price_checks(simulator.habits.elasticity, others, catalog, asked)
        notes += left_out(found, catalog).values()
        bar.update()
        if cfg.policies:
            checks.append(agreement(cfg, logs, halves, catalog, asked))
        bar.update()
    more: dict[str, Any] = {"calibration": calibrated, "looks": looks, "walked": found}
    if cfg.sensitivity:
        specs = judged_by(cfg, halves, catalog)
        spec = policy_spec(cfg, logs, catalog, simulator)
        served = instantiate(cfg.env.simulator, specs[0], _convert_="all")
        more["sensitivity"] = sensitivity(cfg, served, specs[0], spec)
    kept = [check for check in checks if limits[check.check] is not None]
    return Verdict(kept, more, notes)


def gate_of_impressions(
    cfg: DictConfig, simulator: ExposureSimulator, logs: Logs, halves: tuple[Logs, Logs],
    catalog: Catalog, limits: dict[str, float],
) -> Verdict:  # fmt: skip
    """All checks of users fitted to what they were shown."""
    checks, more, notes = exposed_checks(simulator, halves, limits, seed=cfg.seed)
    if cfg.policies and limits["ranking_agreement"] is not None:
        checks.append(agreement(cfg, logs, halves, catalog, limits))
    if cfg.sensitivity:
        notes.append("sensitivity: users fitted to impressions have none of these assumptions")
    return Verdict(checks, more, notes)


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
        found_gain = Distance(mean, mean - error, mean + error)
        checks.append(above(name, found_gain, limits, said, users=len(gain)))
    return checks


def agreement(
    cfg: DictConfig, logs: Logs, halves: tuple[Logs, Logs], catalog: Catalog,
    limits: dict[str, float],
) -> Check:  # fmt: skip
    """Whether users fitted to one half order policies as those fitted to the other do.

    Of the pairs of policies whose difference is clear in one (its interval is off zero), the share
    that has the same sign in the other; both halves are asked.
    """
    simulators = [
        # users of impressions are read by the fit; the same sessions of the same users for both
        after_the_cut("judge", instantiate(cfg.env.simulator, spec, _convert_="all"), halves[1])
        for spec in judged_by(cfg, halves, catalog)
    ]
    spec = policy_spec(cfg, logs, catalog, simulators[0])
    here, there = (played(cfg, sim, spec, list(cfg.policies)) for sim in simulators)
    found = same_order(here, there) + same_order(there, here)
    said = (
        f"same order: {found.same} of {found.clear} clear pairs of {len(cfg.policies)} policies in "
        "users of disjoint households"
    )
    nobody = not found.clear
    return at_least("ranking_agreement", found.share(), limits, said, nobody=nobody)


def judged_by(cfg: DictConfig, halves: tuple[Logs, Logs], catalog: Catalog) -> list[SimSpec]:
    """Fits to either half of the households, both serving the second as it comes after the cut."""
    ours, others = halves
    users = None
    if not describes_users(cfg):
        judges = trips_from_logs(others, catalog.ids, since=catalog.as_of)
        users = judges[first_trips(judges)].users()
    return [
        SimSpec(ours, catalog, DEVICE, cfg.seed, users),
        SimSpec(others, catalog, DEVICE, JUDGES, users),
    ]


def policy_spec(
    cfg: DictConfig, logs: Logs, catalog: Catalog, simulator: UserSimulator
) -> AgentSpec:
    """What the policies know: all purchases before the cut."""
    events = events_before(cfg, logs, catalog)
    return agent_spec(cfg, Worlds(simulator, [], events, None, {}, notes=[]), DEVICE)


if __name__ == "__main__":
    main()
