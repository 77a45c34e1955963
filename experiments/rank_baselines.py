"""Fit static recommenders to a log and rank what was held out of it, all items, in one table.

python experiments/rank_baselines.py data=movielens
python experiments/rank_baselines.py data=online_retail data.path=FILE
python experiments/rank_baselines.py data=complete_journey
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("rank_baselines", __doc__, sys.argv[1:])  # before torch: at once

from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from experiments.from_logs import summary
from experiments.held_out import SPLITS, split_of
from experiments.kinds import named
from experiments.ranked import mean_rows, rank_models, tuned
from experiments.run_folder import write_json
from sources.logs import Logs

SHOWN = ("recall", "ndcg", "precision", "map", "mrr", "hit", "coverage", "gini", "novelty",
         "diversity", "popularity_bias", "cold_recall", "fit_seconds",
         "predict_ms_per_user")  # fmt: skip


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="rank_baselines")
def main(cfg: DictConfig) -> None:
    """Read, split, fit, rank, print."""
    with cli.plain_errors():
        cfg.split = cfg.split or cfg.data.get("split", "user_time")
        checked(cfg)
        torch.set_num_threads(cfg.threads)
        source = {k: v for k, v in cfg.data.items() if k not in ("models", "repeats", "split")}
        logs: Logs = hydra.utils.instantiate(source)
        print("\n".join([summary(logs), *(f"  {note}" for note in logs.notes)]), flush=True)
        rows = cold(cfg, logs) if cfg.split == "cold" else warm(cfg, logs)
        if cfg.out:
            write_json(Path(cfg.out), rows)


def warm(cfg: DictConfig, logs: Logs) -> list[dict[str, Any]]:
    """Rank for users by what they had before; print a table for each k and way of repeats."""
    models = chosen_models(cfg)
    found: list[dict[str, Any]] = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        parts = split_of(cfg, logs, seed)
        print(parts.words(), flush=True)
        if cfg.tune:
            models = {name: tuned(cfg, parts, name, model, seed) for name, model in models.items()}
        found += rank_models(cfg, parts, models, seed)
    rows = mean_rows(found)
    for repeats in dict.fromkeys(row["repeats"] for row in rows):
        for k in cfg.k:
            print("\n".join(["", *lines(rows, repeats, k)]), flush=True)
    return rows


def cold(cfg: DictConfig, logs: Logs) -> list[dict[str, Any]]:
    """Rank items that nobody was fitted on by their texts."""
    from encoders.text import TextEncoder
    from experiments.cold_items import cold_table

    def encode(texts: list[str]) -> torch.Tensor:
        return TextEncoder(cfg.text, progress=bool(cfg.progress)).encode(texts)[0]

    rows = cold_table(logs, encode, seeds=cfg.seeds, seed=cfg.seed)
    print("\n".join(aligned([[*rows[0]], *([cell(x) for x in row.values()] for row in rows)])))
    return rows


def chosen_models(cfg: DictConfig) -> dict[str, DictConfig]:
    """Models of the data's yaml by name."""
    every = cfg.data.models
    names = [*every] if cfg.models is None else list(cfg.models)
    for name in names:
        if name not in every:
            raise ValueError(
                f"models: data={cfg.data_name} has no {name!r}{cli.advise(name, [*every])}; it "
                f"has: {', '.join(every)}"
            )
    return {name: every[name] for name in names}


def lines(rows: list[dict[str, Any]], repeats: bool, k: int) -> list[str]:
    """The table of one k, with intervals and paired differences of NDCG."""
    picked = [r for r in rows if r["k"] == k and r["repeats"] == repeats]
    how = "any item" if repeats else "items new to the user"
    head = f"{how}, k={k}, {picked[0]['users']:.0f} users, {picked[0]['split']}"
    names = ["model", f"ndcg@{k}", "95 % interval", "to " + str(picked[0]["baseline"]),
             "95 % interval", *(n for n in SHOWN if n != "ndcg")]  # fmt: skip
    cells = [names]
    for row in sorted(picked, key=lambda r: -r["ndcg"]):
        gap = "" if row["model"] == row["baseline"] else f"{row['ndcg_difference']:+.4f}"
        around = f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f}" if gap else ""
        cells.append([
            row["model"], cell(row["ndcg"]), f"{row['ndcg_low']:.4f} to {row['ndcg_high']:.4f}",
            gap, around, *(cell(row[n]) for n in names[5:]),
        ])  # fmt: skip
    return [head, *aligned(cells)]


def aligned(cells: list[list[str]]) -> list[str]:
    """Columns of text, the first to the left."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(c.rjust(w) if i else c.ljust(w)
                      for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells]  # fmt: skip


def cell(x: Any) -> str:
    """A number with as many digits as mean something."""
    if x is None or (isinstance(x, float) and not np.isfinite(x)):
        return "-"
    if not isinstance(x, float):
        return str(x)
    return f"{x:.4f}" if abs(x) < 1 else f"{x:.2f}"


def checked(cfg: DictConfig) -> None:
    """Refuse what makes no sense before any work."""
    if cfg.split not in (*SPLITS, "cold"):
        raise ValueError(f"split must be one of {', '.join([*SPLITS, 'cold'])}, got {cfg.split!r}")
    if isinstance(cfg.models, str) or (cfg.models is not None and not cfg.models):
        raise ValueError(
            f"models must be a list of at least one, got {cfg.models!r}: models=[ease]"
        )
    ks = [] if isinstance(cfg.k, int | str) else list(cfg.k)
    if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
        raise ValueError(f"k must be a list of whole numbers of at least 1, got {cfg.k!r}: k=[10]")
    cfg.k = sorted(set(ks))
    for key, least in {"seeds": 1, "threads": 1, "seed": 0, "cold": 0, "size": 2}.items():
        value = cfg[key]
        if value is None and key == "size":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}")
    if not isinstance(cfg.share, float) or not 0.0 < cfg.share < 1.0:
        raise ValueError(f"share must be inside (0, 1), got {cfg.share!r}: .8 holds out a fifth")
    ways = cfg.data.get("repeats")
    flags = {"tune": cfg.tune, "progress": cfg.progress, "repeats": cfg.repeats}
    listed = [*ways] if OmegaConf.is_list(ways) else [ways]
    for key, value in [*flags.items(), *(("data.repeats", x) for x in listed)]:
        if not isinstance(value, bool) and not (value is None and key == "repeats"):
            raise ValueError(f"{key} must be true or false, got {value!r}")
    if "_target_" not in cfg.data or not OmegaConf.is_dict(cfg.data.get("models")):
        raise ValueError(
            f"data={cfg.data_name} needs a _target_ that gives Logs, and models: with a _target_ "
            "each, as experiments/conf/data/movielens.yaml has them"
        )
    named(str(cfg.data._target_), "data._target_")
    for name, model in chosen_models(cfg).items():
        named(str(model.get("_target_")), f"data.models.{name}._target_")
    if cfg.split == "cold" and (cfg.models is not None or cfg.repeats is not None or cfg.tune):
        raise ValueError("split=cold ranks new items by text: it takes seeds, seed and text only")
    if cfg.out and (Path(cfg.out).is_dir() or not Path(cfg.out).absolute().parent.is_dir()):
        raise ValueError(f"out={cfg.out} must be a file in a folder that is there")


if __name__ == "__main__":
    main()
