"""Impressions of short videos with seven kinds of answer: KuaiRand-Pure (Gao et al., 2022).

An impression is an event "shown"; each answer to it is an event of its own with the same user,
item and time, so that whatever counts clicks counts them here as in any log. All events of an
impression carry its minutes watched as value: sum them over one behaviour, never over several.
The log of random exposure and the statistics of videos, taken over all days, are not read.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from sources.cache import cached
from sources.checks import numbers, parse_times, require_columns, sample
from sources.logs import Logs, Roles

PREPARED = 1  # raised when the preparation below changes, so that no old cache is read
ANSWERS = {
    "is_click": "click", "long_view": "long_view", "is_like": "like", "is_follow": "follow",
    "is_comment": "comment", "is_forward": "forward", "is_hate": "hate",
}  # fmt: skip
LOG = ("user_id", "video_id", "time_ms", *ANSWERS, "play_time_ms", "tab")
USERS, VIDEOS = "user_features_pure", "video_features_basic_pure"
GET = (
    "get KuaiRand-Pure from kuairand.com and give the folder with log_standard_*.csv, "
    f"{USERS}.csv and {VIDEOS}.csv (data.path=FOLDER)"
)
CHINA = pd.Timedelta(hours=8)  # all users live by one clock, which the log's own hours follow
FLAGS = ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author")
ROLES = Roles(
    item_category=("tag", "first_tag", "video_type", "upload_type", "music_type"),
    item_number=("minutes", "server_width", "server_height"),
    user_category=(*FLAGS, *(f"onehot_feat{i}" for i in range(18))),
    user_number=("follow_user_num", "fans_user_num", "friend_user_num", "register_days"),
)


def load(path: Path | str | None = None, *, cache_dir: Path | str | None = None) -> Logs:
    """The standard log in a folder of CSV or Parquet files, as released or part of it."""
    if path is None:
        raise ValueError(f"KuaiRand has no path: {GET}")
    files = find(Path(path))
    digest = hashlib.sha256()
    for name, file in files:
        digest.update(f"{name}{file.suffix}".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    key = f"kuairand-{PREPARED}-{digest.hexdigest()}"
    what = "the prepared log of KuaiRand"
    return cached(key, lambda: _prepare(files), Logs.save, Logs.load, folder=cache_dir, what=what)


def find(folder: Path) -> list[tuple[str, Path]]:
    """The files of the set by what they are, in the folder or its data/."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: {GET}")
    inside = folder / "data" if (folder / "data").is_dir() else folder
    there = sorted(f for f in inside.iterdir() if f.suffix.lower() in (".csv", ".parquet"))
    found = [("log", f) for f in there if f.name.startswith("log_standard")]
    tables = [(name, f) for name in (USERS, VIDEOS) for f in there if f.stem == name]
    for what, kind in (("log_standard_*", "log"), (USERS, USERS), (VIDEOS, VIDEOS)):
        count = sum(name == kind for name, _ in (*found, *tables))
        if not count or (count > 1 and kind != "log"):
            raise ValueError(
                f"{inside} must hold {what} as .csv or .parquet once, found {count} among "
                f"{[f.name for f in there]}: {GET}"
            )
    stems = [f.stem for _, f in found]
    if len(set(stems)) < len(stems):
        raise ValueError(f"{inside} holds a log both as .csv and as .parquet ({stems}): keep one")
    return [*found, *tables]


def _read(file: Path) -> pd.DataFrame:
    reader: Callable[[Path], pd.DataFrame]
    reader = pd.read_csv if file.suffix.lower() == ".csv" else pd.read_parquet
    try:
        return reader(file)
    except (ValueError, OSError) as error:  # what the readers of both formats raise
        raise ValueError(f"{file} cannot be read ({error}): fetch it again") from None


def _prepare(files: list[tuple[str, Path]]) -> Logs:
    """The tables of the set to a log."""
    parts = [(f, _read(f)) for name, f in files if name == "log"]
    for file, part in parts:
        require_columns(part, LOG, file.name, "the set has it")
    lines = pd.concat([part[list(LOG)] for _, part in parts], ignore_index=True)
    tables = {name: _read(f) for name, f in files if name != "log"}
    impressions, notes = _impressions(lines)
    logs = Logs.create(
        _events(impressions), _items(tables[VIDEOS]), _users(tables[USERS]), roles=ROLES,
        name="kuairand", purchases=("click",),
    )  # fmt: skip
    rates = ", ".join(f"{b} {impressions[b].mean():.2%}" for b in ANSWERS.values())
    first = f"{len(impressions)} impressions of the standard policy: {rates}"
    return replace(logs, notes=(first, *notes, *logs.notes))


def _impressions(lines: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """One row per impression: lines of one user, video and moment are logged twice."""
    if lines.empty:
        raise ValueError(f"kuairand: the log has no lines, expected at least one: {GET}")
    for column in LOG[2:]:
        lines[column] = numbers(lines[column], f"kuairand.{column}")
        flag = column in ANSWERS
        value = lines[column].to_numpy()
        bad = ~np.isin(value, (0.0, 1.0)) if flag else ~(np.isfinite(value) & (value >= 0))
        if bad.any():
            expected = "0 or 1" if flag else "0 or more"
            raise ValueError(
                f"kuairand.{column} must be {expected}, got {sample(bad, lines[column])}: the file "
                "is cut off or garbled, fetch it again"
            )
    keys = ["user_id", "video_id", "time_ms"]
    how = dict.fromkeys(ANSWERS, "max") | {"play_time_ms": "max", "tab": "first"}
    merged = lines.groupby(keys, sort=False, as_index=False).agg(how).rename(columns=ANSWERS)
    for name in ANSWERS.values():
        merged[name] = merged[name].astype(bool)
    merged["minutes"] = merged["play_time_ms"] / 60_000
    notes = ["times are those of China (UTC+8)"]
    if again := len(lines) - len(merged):
        notes.append(f"{again} lines merged with another of the same user, video and moment")
    return merged, notes


def _events(impressions: pd.DataFrame) -> pd.DataFrame:
    """One event per impression and one per answer to it."""
    time = parse_times(impressions["time_ms"].astype("int64"), "kuairand.time_ms", unit="ms")
    shown = pd.DataFrame(
        {
            "user": impressions["user_id"],
            "item": impressions["video_id"],
            "time": time + CHINA,
            "behaviour": "shown",
            "value": impressions["minutes"],
            "place": impressions["tab"],
        }
    )
    answers = [shown[impressions[b]].assign(behaviour=b) for b in ANSWERS.values()]
    return pd.concat([shown, *answers], ignore_index=True)


def _items(videos: pd.DataFrame) -> pd.DataFrame:
    """Videos; a tag is a list of ids, of which the first is a group of its own."""
    ours = ("minutes", "first_tag")
    columns = [c for c in (*ROLES.item_category, *ROLES.item_number) if c not in ours]
    require_columns(videos, ("video_id", "video_duration", *columns), VIDEOS, "the set has it")
    length = numbers(videos["video_duration"], f"{VIDEOS}.video_duration") / 60_000
    items = videos[["video_id", *columns]].rename(columns={"video_id": "item"})
    items["tag"] = _codes(videos["tag"])
    items["music_type"] = _codes(videos["music_type"])
    items["first_tag"] = (
        items["tag"].astype("str").str.split(",").str[0].where(items["tag"].notna())
    )
    return items.assign(minutes=length)


def _users(users: pd.DataFrame) -> pd.DataFrame:
    """Users with what is known of them; ranges, which repeat the numbers, are left out."""
    columns = (*ROLES.user_category, *ROLES.user_number)
    require_columns(users, ("user_id", *columns), USERS, "the set has it")
    table = users[["user_id", *columns]].rename(columns={"user_id": "user"})
    for column in ROLES.user_category:
        table[column] = _codes(table[column])
    return table


def _codes(column: pd.Series) -> pd.Series:
    """Codes (n,) as text, the same whether a missing value had turned them to floats or not."""
    whole = column.astype("Int64") if pd.api.types.is_float_dtype(column) else column
    return whole.astype(object).map(str, na_action="ignore")
