"""The tables of a comparison, each from what was played: plain numbers for the report."""

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from scipy.sparse import csr_matrix
from torch import Tensor

from agents.base import Agent
from encoders.state import EMPTY
from evaluation.compared import POWER, claim, over_seeds, per_arm
from evaluation.ranking import Ranking, evaluate
from experiments.compared_play import (
    FROM_LOG,
    ORACLE,
    Played,
    Stranger,
    households,
    play_all,
    simulators_with,
    variants,
)
from experiments.policies import opening, replay_value
from experiments.prepare import Worlds

Rows = list[dict[str, Any]]
NEW = 0.1  # of the catalogue, those first sold last, are what we call new items
RANKED = ("recall", "ndcg", "hit")
CATEGORIES = 8  # that exposure is told of; the others together
THIRDS = ("head: a third of sales", "middle: a third of sales", "tail: a third of sales")
MEANING = {
    "patience": "probability to leave after a slate with nothing bought",
    "satiation": "how a purchase changes the wish for others; a number: lowers it for its category",
    "drift": "how much a purchase moves the user's taste",
    "exposure": "what being shown adds to the logit of buying",
    "position": "what each slot further down takes from the logit",
    "choice": "how one item is chosen of a slate",
    "trips": "visits that make one episode",
}


def best_static(played: dict[str, Played], statics: list[str]) -> str:
    """The static policy with most reward: what the others have to beat."""
    return max(statics, key=lambda name: played[name].reward.mean())


def policy_rows(
    worlds: Worlds,
    learners: list[str],
    played: dict[str, Played],
    who: np.ndarray,
    ranked: dict[str, Ranking],
    replayed: dict[str, float],
) -> Rows:
    """One row a policy, the most rewarded first."""
    counts = worlds.events.popularity()
    rows = []
    for name, did in played.items():
        reward, revenue = over_seeds(did.reward, who), over_seeds(did.revenue, who)
        place = ranked[name].row(ranked[name].k[0]) if name in ranked else {}
        rows.append({
            "policy": name, "learns": name in learners, "seeds": len(did.reward),
            "reward": reward.mean, "reward_low": reward.low, "reward_high": reward.high,
            "revenue": revenue.mean, "revenue_low": revenue.low, "revenue_high": revenue.high,
            "length": did.length.mean(), "diversity": did.diversity,
            "replay": replayed.get(name),
            **exposed_by_seed(did.shown, counts),
            **{key: place.get(key) for key in RANKED},
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["reward"])


def exposed_by_seed(shown: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The same of (R, N), a mean over seeds: together several show more than any of them."""
    each = [exposed(x, counts) for x in shown]
    return {key: float(np.mean([figures[key] for figures in each])) for key in each[0]}


def exposed(shown: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Coverage, Gini and novelty of what was shown, (N,) times, given sales (N,)."""
    total = max(1, shown.sum())
    know = (counts + 1.0) / (counts.sum() + len(counts))  # add-one: never sold is no infinite bit
    ordered = np.sort(shown)
    n = len(shown)
    rank = np.arange(1, n + 1)
    gini = float(((2 * rank - n - 1) * ordered).sum() / (n * total))
    return {
        "coverage": float((shown > 0).mean()),
        "gini": gini,
        "novelty": float(-(shown * np.log2(know)).sum() / total),
    }


def differences(played: dict[str, Played], who: np.ndarray, baseline: str) -> Rows:
    """Session by session to the baseline, on common random numbers."""
    base = played[baseline].reward
    rows = []
    for name, did in played.items():
        if name == baseline:
            continue
        gap = over_seeds(did.reward, who, other=base)
        said = claim(gap, float(base.mean()), baseline)
        rows.append({
            "policy": name, "difference": gap.mean, "low": gap.low, "high": gap.high,
            "relative": gap.mean / base.mean() if base.mean() else None, "claim": said,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["difference"])


def ranking_of(
    cfg: DictConfig, worlds: Worlds, agents: dict[str, list[Agent]]
) -> dict[str, Ranking]:
    """How policies rank what held-out trips bought; the first seed of those that learn."""
    if worlds.replay is None:
        return {}
    trips = worlds.replay
    session, n = cfg.env.session, worlds.events.num_items
    obs = opening(trips.users, session.slate_size * session.max_steps, len(worlds.train.behaviours))
    relevant = listed(trips.bought, n)
    found = {}
    for name, seeds in agents.items():
        agent: Any = seeds[0]
        if not hasattr(agent, "scores"):
            continue

        def scores(rows: Tensor, agent: Any = agent) -> Tensor:
            with torch.no_grad():
                return agent.scores(obs[rows])  # (b, N)

        found[name] = evaluate(
            scores, relevant, None, k=(cfg.replay_items,), popularity=worlds.events.popularity(),
            vectors=worlds.events.vectors, seed=cfg.seed,
        )  # fmt: skip
    return found


def listed(items: Tensor, n: int) -> csr_matrix:
    """Items (M, T), EMPTY-padded, as CSR (M, N) of ones."""
    row, place = (items != EMPTY).cpu().nonzero(as_tuple=True)
    column = items.cpu()[row, place].numpy()
    one = np.ones(len(row), dtype=np.float32)
    cells = csr_matrix((one, (row.numpy(), column)), shape=(len(items), n))
    cells.data[:] = 1.0
    return cells


def replays(cfg: DictConfig, worlds: Worlds, agents: dict[str, list[Agent]]) -> dict[str, float]:
    """Items really bought among those shown on replayed trips, a mean over seeds."""
    found = {}
    for name, seeds in agents.items():
        values = [replay_value(cfg, agent, worlds) for agent in seeds]
        if values[0] is not None:
            found[name] = float(np.mean([v for v in values if v is not None]))
    return found


def newcomers(
    cfg: DictConfig,
    worlds: Worlds,
    agents: dict[str, list[Agent]],
    played: dict[str, Played],
    baseline: str,
) -> Rows:
    """The same sessions with the past hidden from the policies: what a new user is served."""
    tests = worlds.test[: cfg.sensitivity_simulators]
    profile = tests[0].users.profile
    blind: dict[str, list[Agent]] = {
        name: [Stranger(agent, profile) for agent in seeds] for name, seeds in agents.items()
    }
    vectors = worlds.events.vectors
    assert vectors is not None
    size = cfg.sensitivity_users
    new = play_all(cfg, tests, blind, vectors, size, "new users", oracle=False)
    who = households(cfg, tests, size)
    gaps = {row["policy"]: row for row in differences(new, who, baseline)}
    rows = []
    for name, did in new.items():
        reward, gap = over_seeds(did.reward, who), gaps.get(name, {})
        rows.append({
            "policy": name, "reward": reward.mean, "low": reward.low, "high": reward.high,
            "difference": gap.get("difference"), "diff_low": gap.get("low"),
            "diff_high": gap.get("high"),
            "all_reward": played[name].reward[:, : len(tests), :size].mean(),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["reward"])


def sensitivity(
    cfg: DictConfig, worlds: Worlds, agents: dict[str, list[Agent]], baseline: str
) -> dict[str, Any]:
    """Differences to the baseline when a named assumption is another than was trained with."""
    vectors = worlds.events.vectors
    assert vectors is not None
    size, rows = cfg.sensitivity_users, []
    tests = worlds.test[: cfg.sensitivity_simulators]
    who = households(cfg, tests, size)

    def row(label: str, assumption: str, value: Any, simulators: list[Any]) -> dict[str, Any]:
        did = play_all(cfg, simulators, agents, vectors, size, f"{assumption} {label}".strip(),
                       oracle=False)  # fmt: skip
        gaps = differences(did, who, baseline)
        return {
            "assumption": assumption, "label": label, "value": value,
            "differences": {g["policy"]: {k: g[k] for k in ("difference", "low", "high")}
                            for g in gaps},
        }  # fmt: skip

    rows.append(row("", "as it is", None, tests))
    for variant in variants(cfg, worlds.test[0]):
        changed = simulators_with(cfg, worlds, variant)
        rows.append(row(variant.label, variant.assumption, variant.value, changed))
    return {"baseline": baseline, "policies": [n for n in agents if n != baseline], "rows": rows}


def new_items(
    worlds: Worlds, played: dict[str, Played], ranked: dict[str, Ranking]
) -> dict[str, Any] | None:
    """What policies make of the items that were first sold last."""
    events = worlds.events
    n, count = events.num_items, round(NEW * events.num_items)
    if worlds.replay is None or not events.timed or not count:
        return None  # without a log it is not known when an item was first sold
    first = np.full(n, np.inf)
    np.minimum.at(first, events.item, events.time)
    draw = np.random.default_rng(0).random(n)
    fresh = np.zeros(n, dtype=bool)
    fresh[np.lexsort((draw, -first))[:count]] = True  # never sold is the newest of all
    sales = events.popularity()
    seen = first[fresh & np.isfinite(first)]
    since = (events.time.max() - seen.min()) if len(seen) else 0.0
    rows = []
    for name, did in played.items():
        place = ranked[name].recall_of(torch.from_numpy(fresh)) if name in ranked else None
        rows.append({
            "policy": name,
            "shown_share": did.shown[:, fresh].sum() / max(1, did.shown.sum()),
            "chosen_share": did.chosen[fresh].sum() / max(1, did.chosen.sum()),
            "recall": place,
        })  # fmt: skip
    return {
        "what": f"the tenth of the catalogue first sold last, within {since:.0f} days of the cut",
        "items": count, "catalogue_share": count / n,
        "sales_share": sales[fresh].sum() / max(1, sales.sum()), "rows": rows,
    }  # fmt: skip


def exposure(worlds: Worlds, played: dict[str, Played]) -> list[dict[str, Any]]:
    """Who is shown: items by popularity and by category, beside their share of sales."""
    sales = worlds.events.popularity().astype(np.float64)
    order = np.lexsort((np.random.default_rng(0).random(len(sales)), -sales))
    third = np.empty(len(sales), dtype=np.int64)
    before = np.concatenate([[0.0], np.cumsum(sales[order])[:-1]]) / max(1.0, sales.sum())
    third[order] = np.minimum((before * 3).astype(np.int64), 2)
    found = [grouped("popularity", third, list(THIRDS), sales, played)] if sales.sum() else []
    catalog = worlds.train.catalog
    category = catalog.category.cpu().numpy()
    names = catalog.category_names
    if len(names) > 1:
        size = np.bincount(category, sales, minlength=len(names))
        kept = np.argsort(-size, kind="stable")[:CATEGORIES]
        group = np.full(len(names), len(kept))
        group[kept] = np.arange(len(kept))
        labels = [str(names[i]) or "no category" for i in kept] + ["all others"]
        found.append(grouped("category", group[category], labels, sales, played))
    return found


def grouped(
    kind: str, group: np.ndarray, labels: list[str], sales: np.ndarray, played: dict[str, Played]
) -> dict[str, Any]:
    """Shares of groups (N,) in the catalogue, in sales and in what each policy shows."""

    def share(x: np.ndarray) -> np.ndarray:
        return np.bincount(group, x, minlength=len(labels)) / max(1e-12, float(x.sum()))

    catalogued, sold = share(np.ones(len(group))), share(sales)
    shown = {name: share(did.shown.sum(axis=0) * 1.0) for name, did in played.items()}
    groups = [
        {"group": label, "catalogue_share": catalogued[i], "sales_share": sold[i],
         "shown": {name: x[i] for name, x in shown.items()}}
        for i, label in enumerate(labels)
    ]  # fmt: skip
    return {"kind": kind, "groups": groups}


def ab_test(played: dict[str, Played], baseline: str) -> dict[str, Any]:
    """Users an A/B test would need to find the measured differences, and a lift of 1 %."""
    base = played[baseline].reward
    variance, mean = float(base.var(axis=(1, 2)).mean()), float(base.mean())
    rows = []
    for name, did in played.items():
        if name in (baseline, ORACLE):
            continue
        other, gap = float(did.reward.var(axis=(1, 2)).mean()), float(did.reward.mean()) - mean
        rows.append({
            "policy": name, "difference": gap, "sd": other**0.5,
            "per_arm": per_arm(variance, other, gap),
            "per_arm_one_percent": per_arm(variance, other, 0.01 * mean),
        })  # fmt: skip
    return {"alpha": 0.05, "power": POWER, "rows": rows}


def assumed(cfg: DictConfig, worlds: Worlds) -> Rows:
    """What the simulator takes for granted, with its values."""
    config = OmegaConf.to_container(cfg.env.simulator, resolve=True)
    assert isinstance(config, dict)
    rows = []
    for name, meaning in MEANING.items():
        if name not in config:
            continue
        value = config[name]
        fitted = value is None
        found = getattr(worlds.test[0], name, None)
        value = found if fitted else value
        said = f"{value:.3g}" if isinstance(value, float) else str(value)
        if value is None:
            said = FROM_LOG
        elif isinstance(value, str) and isinstance(found, float):  # a word for what was measured
            said = f"{value} ({found:.3g})"
        off = "" if fitted or value else ", off"
        rows.append({"name": name, "value": f"{said}{off}", "what": meaning,
                     "kind": "fitted" if fitted else "assumed"})  # fmt: skip
    return rows
