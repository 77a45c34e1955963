"""Fit models of a configuration on one part of a log and rank the other: rows of a table."""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from agents.interactions import Interactions
from encoders.text import TextEncoder
from evaluation.ranking import Ranking, evaluate, paired
from experiments.held_out import Parts

VALIDATION = 0.9  # share of each user's fitted events that settings are fitted on when tuned
BASELINE = "ease"  # what differences are to, where it is fitted; else the first model
KNOWN = ("_target_", "_partial_", "grid")


def rank_models(
    cfg: DictConfig, parts: Parts, models: dict[str, DictConfig], seed: int
) -> list[dict[str, Any]]:
    """One row for each model, k and way of repeats."""
    parts = with_vectors(cfg, parts)
    ways = list(cfg.data.repeats) if cfg.repeats is None else [bool(cfg.repeats)]
    found: dict[tuple[str, bool], tuple[Ranking, float]] = {}
    bar = tqdm(models.items(), desc="fit", unit="model", disable=not cfg.progress, leave=False)
    for name, config in bar:
        bar.set_postfix_str(name)
        began = time.process_time()
        model = instantiate({k: v for k, v in config.items() if k != "grid"})(parts.past, seed=seed)
        fitted = time.process_time() - began
        for repeats in ways:
            found[name, repeats] = ranking(cfg, parts, model, repeats, seed), fitted
    baseline = BASELINE if BASELINE in models else next(iter(models))
    rows = []
    for (name, repeats), (result, fitted) in found.items():
        for k in cfg.k:
            base = found[baseline, repeats][0].values[k]["ndcg"]
            gap, low, high = paired(result.values[k]["ndcg"], base, seed=seed)[:3]
            rows.append({
                "model": name, "split": parts.split, "repeats": repeats, "k": k,
                "fit_seconds": fitted, "baseline": baseline, "ndcg_difference": gap,
                "difference_low": low, "difference_high": high, **result.row(k),
            })  # fmt: skip
    return rows


def ranking(cfg: DictConfig, parts: Parts, model: Any, repeats: bool, seed: int) -> Ranking:
    """Every user with something to find, all items ranked."""
    known = None if repeats else parts.past.counts()
    return evaluate(
        scorer(parts.past, parts.now, model), parts.relevant(repeats=repeats), known,
        k=tuple(cfg.k), popularity=parts.past.popularity(), vectors=parts.past.vectors, seed=seed,
        cold=cfg.cold,
    )  # fmt: skip


def scorer(past: Interactions, now: np.ndarray, model: Any) -> Callable[[Tensor], Tensor]:
    """Scores (b, N) of users by row, as they were when their later part began."""

    def scores(rows: Tensor) -> Tensor:
        users = rows.numpy()
        with torch.no_grad():
            found: Tensor = model.scores(past.histories(users, now[users]))
        return found

    return scores


def with_vectors(cfg: DictConfig, parts: Parts) -> Parts:
    """The parts with vectors of the items' texts, cached by text; none where no item has one."""
    if not any(text.strip() for text in parts.texts) or parts.past.vectors is not None:
        return parts
    vectors = TextEncoder(cfg.text, progress=bool(cfg.progress)).encode(parts.texts)[0]
    return replace(parts, past=replace(parts.past, vectors=vectors))


def tuned(cfg: DictConfig, parts: Parts, name: str, config: DictConfig, seed: int) -> DictConfig:
    """The settings of a model's grid with the best NDCG on the last events of the fitted part."""
    if "grid" not in config:
        return config
    inner = validation(with_vectors(cfg, parts))
    repeats = False if cfg.repeats is None else bool(cfg.repeats)
    best, chosen = -1.0, config
    grid = OmegaConf.to_container(config.grid, resolve=True)
    assert isinstance(grid, dict)
    for values in itertools.product(*grid.values()):
        setting = dict(zip(grid, values, strict=True))
        tried = OmegaConf.create({**config, **setting})  # a grid may name what the yaml leaves out
        model = instantiate({k: v for k, v in tried.items() if k != "grid"})(inner.past, seed=seed)
        value = float(ranking(cfg, inner, model, repeats, seed).values[cfg.k[0]]["ndcg"].mean())
        if value > best:
            best, chosen = value, tried
    said = ", ".join(f"{key}={chosen[key]}" for key in map(str, grid))
    print(f"{name}: {said} (ndcg@{cfg.k[0]} {best:.4f} on validation)", flush=True)
    return chosen


def validation(parts: Parts) -> Parts:
    """The fitted part cut once more: the last events of each user are to be found."""
    past = parts.past
    count = np.bincount(past.user, minlength=past.num_users)  # (U,)
    start = count.cumsum() - count
    place = np.arange(len(past.user)) - start[past.user]  # (n,) in the user's order
    first = place < np.maximum(np.floor(VALIDATION * count + 1e-9), 1)[past.user]

    def some(keep: np.ndarray) -> Interactions:
        columns = {k: getattr(past, k)[keep] for k in ("user", "item", "time", "value")}
        return replace(past, **columns)

    inner, later = some(first), some(~first)
    now = np.full(past.num_users, np.inf)
    np.minimum.at(now, later.user, later.time)
    now = np.where(np.isfinite(now), now, past.time.max(initial=0.0))
    return replace(parts, past=inner, later=later, now=now)


def mean_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of several seeds to their means."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["repeats"], row["k"]), []).append(row)
    return [{key: mean([row[key] for row in group]) for key in group[0]}
            for group in groups.values()]  # fmt: skip


def mean(values: list[Any]) -> Any:
    """The mean of numbers; of words the first."""
    if isinstance(values[0], str | bool):
        return values[0]
    numbers = [float(v) for v in values if v is not None]
    whole = all(isinstance(v, int) for v in values)
    middle = float(np.mean(numbers)) if numbers else None
    return round(middle) if whole and middle is not None else middle
