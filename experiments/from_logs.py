"""From a log to users: one simulator to train on, others of other households to judge with."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from agents.interactions import Interactions
from encoders.items import interactions
from encoders.text import TextEncoder
from envs.excluded import Excluded, refuse_unknown
from envs.rewards import Margin, Reward, Weighted, revenue, units
from experiments.early import rules_of, under
from experiments.prepare import JUDGES, ReplayTrips, Worlds, plug_in_note
from experiments.run_folder import stage, write_text
from simulators.base import Catalog, SimSpec, UserSimulator, UserTable
from simulators.exposed import ExposureSimulator, visitors
from simulators.fidelity import fidelity, lines
from simulators.fit import moment
from simulators.fitted import FittedSimulator
from simulators.gate import Check
from simulators.settings import Assumptions
from simulators.trips import Trips, trips_from_logs
from sources.cache import cache_folder, cached
from sources.logs import Logs

SPLIT = (
    0  # seed of who is trained on and who judges: the same in every run, so that fits are reused
)
REPLAYED = 2000  # held-out trips that policies are replayed on
FITS_AT_ONCE = 2
CHECKED = 30_000  # held-out trips at most that the figures are made from
LEARNT = 150_000  # visits in the window at most that a fit is made from


def from_logs(cfg: DictConfig, device: str) -> Worlds:
    """Read, encode, fit: half of the households train the agent, the other half judge it."""
    seconds: dict[str, float] = {}
    torch.set_num_threads(1)  # fits run side by side, each on one thread: the same bits everywhere
    with stage("read", seconds):
        print(f"read the log of env={cfg.env_name}", flush=True)
        logs = with_levels(instantiate(cfg.env.data))
        print("\n".join([summary(logs), *(f"  {note}" for note in logs.notes)]), flush=True)
    reward = refuse_unrewarded(cfg, logs)
    with stage("encode", seconds):
        catalog: Catalog = instantiate(cfg.env.catalog, logs, device=device, progress=cfg.progress)
        print(coverage_line(logs, catalog), flush=True)
    if isinstance(reward, Margin):
        with under("env.session."):
            reward.of(catalog)  # an item without a margin is known by now
    if not describes_users(cfg):
        refuse_strangers(logs, catalog)
    rules = rules_of(cfg)
    refuse_unknown(rules, logs.users["user"], logs.items["item"], catalog.category_names)
    with stage("fit", seconds):
        ours, others = logs.split_users(0.5, SPLIT)
        whole = logs
        if not describes_users(cfg):
            since = catalog.as_of - cfg.env.simulator.get("window", 150.0)
            ours, others, whole = (households_to_fit(x, since) for x in (ours, others, logs))
        judges = trips_from_logs(others, catalog.ids, since=catalog.as_of)
        first = judges[first_trips(judges)]
        if len(first) < 2 and not describes_users(cfg):
            raise ValueError(
                f"{logs.name}: {len(first)} of the {len(others.users)} households to judge with "
                f"come after the cut at {moment(catalog.as_of):%Y-%m-%d}, having come before, and "
                "intervals need 2: choose an earlier cut (env.catalog.cut) or a longer log"
            )
        print(f"fit users: {len(ours.users)} households to train on, {len(others.users)} to judge "
              f"with, {len(first)} of them come after the cut", flush=True)  # fmt: skip
        users = None if describes_users(cfg) else first.users()
        specs = {"train": SimSpec(ours, catalog, device, cfg.seed)} | {
            f"judge {i}": SimSpec(others, catalog, device, JUDGES + i, users, True)
            for i in range(cfg.evaluators)
        }
        made, checked = fit_all(cfg, specs, lambda: check(cfg, logs, whole, catalog))
        made = {name: after_the_cut(name, sim, others) for name, sim in made.items()}
        if checked:  # a simulator of another kind has no such figures
            print("\n".join(lines(checked)), flush=True)
        second = second_opinion(cfg, others, catalog, device, first.users())
    replay = None if describes_users(cfg) else replay_trips(judges).to(device)
    train, *test = made.values()
    notes = plug_in_note(cfg, train)
    if rules:
        notes.append(Excluded.of(rules, catalog, train.users).words(catalog))
    return Worlds(train, test, events_before(cfg, logs, catalog), replay, checked, notes=notes,
                  seconds=seconds, specs=tuple(specs.values())[1:],
                  gate=gate_line(cfg.env_name, train), second=second)  # fmt: skip


def refuse_strangers(logs: Logs, catalog: Catalog) -> None:
    """Refuse a log in which nobody who comes after the cut had come before it."""
    events = logs.events[logs.events["behaviour"].isin(logs.purchases)]
    early = (events["time"] < moment(catalog.as_of)).to_numpy()
    if events["user"][~early].isin(events["user"][early].unique()).any():
        return
    day = events["time"].dt.floor("D").groupby(events["user"])
    if (day.min() == day.max()).all():
        raise ValueError(
            f"{logs.name}: each of {len(day)} users comes on one day only. What users want is "
            "learnt from what they came for before: give who they are as `user` (it may be the id "
            "of a session), or a longer log"
        )
    raise ValueError(
        f"{logs.name}: nobody who comes after the cut at {moment(catalog.as_of):%Y-%m-%d} had come "
        "before: choose an earlier cut (env.catalog.cut, cut) or a longer log"
    )


def refuse_unrewarded(cfg: DictConfig, logs: Logs) -> Reward | Margin:
    """The reward; one of what the log does not have is refused: all would be worth nothing."""
    reward: Reward | Margin = instantiate(cfg.env.session.get("reward"), _convert_="all") or units
    if describes_users(cfg):
        if isinstance(reward, Weighted):
            said = {str(b) for b in logs.events["behaviour"].unique()}
            with under("env.session."):
                reward.check(said - {cfg.env.simulator.impression})
        return reward
    priced = "price" in logs.events and bool(logs.events["price"].notna().any())
    if reward is revenue and not priced:
        raise ValueError(
            "env.session.reward is revenue, and no item of this log has a price: give the events a "
            "price, or another reward (envs.rewards.units; envs.rewards.Margin reads a table)"
        )
    return reward


def second_opinion(
    cfg: DictConfig, others: Logs, catalog: Catalog, device: str, users: UserTable
) -> UserSimulator | None:
    """Users whose wishes are boosted trees, with the assumptions of the others; None if not asked.

    Whoever wins only on users of the kind it was trained on has learnt their faults.
    """
    if not cfg.get("second_opinion"):
        return None
    from simulators.boosted import BoostedSimulator

    given: Any = OmegaConf.to_container(cfg.env.simulator, resolve=True)
    kept = ("window", *Assumptions.__dataclass_fields__)
    settings = {name: given[name] for name in kept if name in given}
    return BoostedSimulator.fit(SimSpec(others, catalog, device, JUDGES, users, True), **settings)


def replay_trips(judges: Trips) -> ReplayTrips:
    """Some trips after the cut that bought of the catalogue."""
    rows = np.random.default_rng(SPLIT).permutation(len(judges))
    rows = rows[np.diff(judges.pointer)[rows] > 0][:REPLAYED]
    replayed = judges[np.sort(rows)]
    return ReplayTrips(replayed.users(), torch.from_numpy(replayed.padded()))


def describes_users(cfg: DictConfig) -> bool:
    """Whether the simulator reads users off impressions itself, not off trips."""
    return "impression" in cfg.env.simulator


def after_the_cut(name: str, simulator: UserSimulator, others: Logs) -> UserSimulator:
    """Judges who read users off impressions serve those who come after the cut."""
    if name == "train" or not isinstance(simulator, ExposureSimulator):
        return simulator
    later = visitors(simulator, others, since=simulator.catalog.as_of)
    simulator.users = later.to(simulator.catalog.vectors.device)
    return simulator


def events_before(cfg: DictConfig, logs: Logs, catalog: Catalog) -> Interactions:
    """Purchases of the catalogue before the cut, in time order, with the vectors of its texts.

    Where no item has a text, the catalogue's own vectors stand in.
    """
    past = logs.before(moment(catalog.as_of))
    users = interactions(past, catalog.ids)[1]  # those with a purchase
    vectors = catalog.vectors.cpu()
    if any(text.strip() for text in catalog.texts):
        model = cfg.env.catalog.get("model", "all-minilm-l6-v2")
        vectors = TextEncoder(model, progress=bool(cfg.progress)).encode(catalog.texts)[0]
    return Interactions.of(past, items=catalog.ids, users=users, vectors=vectors, seed=SPLIT)


def fit_all(
    cfg: DictConfig, specs: dict[str, SimSpec], check_all: Callable[[], dict[str, Any]]
) -> tuple[dict[str, UserSimulator], dict[str, Any]]:
    """Fit every simulator and make the held-out figures, some at once; simulators as in `specs`."""
    with (
        ThreadPoolExecutor(FITS_AT_ONCE) as pool,
        tqdm(total=len(specs) + 1, desc="fit users", unit="fit", disable=not cfg.progress) as bar,
    ):
        checked = pool.submit(check_all)  # the dearest starts first
        jobs = {
            name: pool.submit(instantiate, cfg.env.simulator, spec, _convert_="all")
            for name, spec in specs.items()
        }
        for job in as_completed([checked, *jobs.values()]):
            job.result()  # an error of any fit is raised as soon as it is there
            bar.update()
    return {name: job.result() for name, job in jobs.items()}, checked.result()


def check(cfg: DictConfig, logs: Logs, fitted: Logs, catalog: Catalog) -> dict[str, Any]:
    """Held-out figures of the same model fitted to all households, on their trips after the cut."""
    if describes_users(cfg):
        return {}
    whole = instantiate(cfg.env.simulator, SimSpec(fitted, catalog, "cpu", 0), _convert_="all")
    if not isinstance(whole, FittedSimulator):
        return {}

    return held_out_figures(whole, logs, catalog)


def held_out_figures(users: FittedSimulator, logs: Logs, catalog: Catalog) -> dict[str, Any]:
    """How the preferences of fitted users foretell the trips after the cut; made once."""

    def make() -> dict[str, Any]:
        counts = interactions(logs.before(moment(catalog.as_of)), catalog.ids)[0]
        trips = held_out_trips(logs, catalog)
        return fidelity(users.preference, trips, counts, users.preference.log_rate)

    key = f"fidelity 3 {logs.fingerprint()} {users.fit_key}"
    return cached(key, make, write_figures, read_figures, what="the held-out figures")


def held_out_trips(logs: Logs, catalog: Catalog) -> Trips:
    """Trips after the cut of households that had come before; of too many, some households'."""
    known = logs.before(moment(catalog.as_of)).events["user"].unique()
    visits = visits_since(logs, catalog.as_of)
    logs = drawn(logs, visits[visits.index.isin(known)], CHECKED)
    trips = trips_from_logs(logs, catalog.ids, since=catalog.as_of)
    return trips[np.isin(trips.user, known)]


def drawn(logs: Logs, visits: pd.Series, most: int) -> Logs:
    """All of the log, or the events of some households that made at most so many visits."""
    if visits.sum() <= most:
        return logs
    order = np.random.default_rng(SPLIT).permutation(len(visits))
    some = visits.iloc[order]
    kept = some.index[some.cumsum() <= most]
    events = logs.events[logs.events["user"].isin(kept)].reset_index(drop=True)
    return replace(logs, events=events)  # users stay: attributes are measured against all of them


def households_to_fit(logs: Logs, since: float) -> Logs:
    """The log, or of one with too many visits from day `since` on that of some households.

    Memory and time of a fit go with its visits, and so are bounded.
    """
    some = drawn(logs, visits_since(logs, since), LEARNT)
    if some is not logs:
        print(
            f"  fit to {some.events['user'].nunique():,} of {logs.events['user'].nunique():,} "
            f"users, drawn at random, who make {LEARNT:,} visits from the window on",
            flush=True,
        )
    return some


def visits_since(logs: Logs, day: float) -> pd.Series:
    """How often each user came from `day` on, by user; those who did not come are left out."""
    events = logs.since(moment(day)).events
    events = events[events["behaviour"].isin(logs.purchases)]
    visit = events["basket"] if "basket" in events else events["time"].dt.floor("D")
    visits = pd.DataFrame({"user": events["user"], "visit": visit}).drop_duplicates()
    return visits["user"].value_counts().sort_index()


def write_figures(figures: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(figures))


def read_figures(path: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def gate_entry(fit_key: str) -> Path:
    """Where the verdict on users of this fit is kept."""
    digest = hashlib.sha256(fit_key.encode()).hexdigest()[:16]
    return cache_folder() / f"gate-{digest}.json"


def remember_gate(fit_key: str, checks: Sequence[Check]) -> None:
    """Keep which checks users of this fit failed, for those who train on them."""
    verdict = {
        "checks": len(checks),
        "failed": [check.check for check in checks if check.passed is False],
        "unsure": [check.check for check in checks if check.passed is None],
    }
    write_text(gate_entry(fit_key), json.dumps(verdict))


def gate_line(env_name: str, simulator: UserSimulator) -> str:
    """What the gate said of the users that were trained on; "" for users of another kind."""
    if not isinstance(simulator, FittedSimulator | ExposureSimulator):
        return ""
    command = f"python experiments/check_simulator.py env={env_name} (with the same env.* keys)"
    try:
        verdict = json.loads(gate_entry(simulator.fit_key).read_text())
    except (OSError, ValueError):
        return f"these users have not been held against their log yet: {command}"
    failed, unsure, total = verdict["failed"], verdict.get("unsure", []), verdict["checks"]
    few = f"; too few users to tell in {len(unsure)} more ({', '.join(unsure)})" if unsure else ""
    if failed:
        what = f"FAILED {len(failed)} of {total} checks ({', '.join(failed)}){few}"
        return f"warning: these users {what}: {command}"
    passed = f"{total - len(unsure)} of {total}" if unsure else f"all {total}"
    return f"these users passed {passed} checks{few} of {command}"


def with_levels(logs: Logs) -> Logs:
    """The same log, whose parts know all levels of users' categories: their profiles match."""
    kinds = {column: "category" for column in logs.roles.user_category}
    return replace(logs, users=logs.users.astype(kinds))


def first_trips(trips: Trips) -> np.ndarray:
    """Rows of each household's first trip, of those who bought anything before."""
    known = ~np.isnan(trips.gap)
    _, first = np.unique(trips.user[known], return_index=True)
    return np.nonzero(known)[0][first]


def summary(logs: Logs) -> str:
    """One line on the size and span of a log."""
    time = logs.events["time"]
    return (
        f"{logs.name}: {len(logs):,} events of {len(logs.users):,} users with {len(logs.items):,} "
        f"items, {time.min():%Y-%m-%d} to {time.max():%Y-%m-%d}"
    )


def coverage_line(logs: Logs, catalog: Catalog) -> str:
    """How much of what is bought after the cut the catalogue leaves out."""
    after = logs.since(moment(catalog.as_of)).events
    inside = after["item"].isin(catalog.ids).mean()
    return (
        f"catalogue: {len(catalog):,} products chosen before {moment(catalog.as_of):%Y-%m-%d}, "
        f"vectors of {catalog.vectors.shape[1]} numbers; {1 - inside:.0%} of the lines after it "
        "are of other products"
    )
