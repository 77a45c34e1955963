"""Your own CSV or Parquet tables as `Logs`, described by one yaml.

name: corner shop
events:
  file: sales.csv                # relative to the yaml; a list of files is read as one
  separator: ";"                 # also decimal and encoding, for CSV
  columns: {user: customer_id, item: sku, time: ts, basket: receipt, quantity: qty, price: paid}
  time_format: "%d.%m.%Y %H:%M"  # or time_unit: s; neither means ISO dates
  behaviour: buy                 # where no column says it; behaviours: {sale: buy} renames
  value: 1.0                     # where no column says it; without it price x quantity
  keep: {qty: {min: 1}, customer_id: {present: true}}  # by the file's own names
items: {file: products.csv, columns: {item: sku}}
roles: {item_text: [title], item_category: [shelf]}
purchases: [buy]

A column that already has our name, or that a role names, needs no mapping; all others are left out.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from sources.cache import cached
from sources.checks import (
    NUMBERS,
    OPTIONAL_IDS,
    REQUIRED,
    Unit,
    closest,
    comma_hint,
    numbers,
    parse_times,
    require_columns,
)
from sources.headers import check_headers
from sources.logs import Logs, Roles

PREPARED = 1  # raised when the preparation below changes, so that no old cache is read
READING = ("file", "separator", "decimal", "encoding", "columns", "keep")
KEYS = {
    "": ("name", "events", "items", "users", "relations", "roles", "purchases"),
    "events": (*READING, "time_format", "time_unit", "behaviour", "behaviours", "value"),
    "items": (*READING, "first_of_each"),
    "users": (*READING, "first_of_each"),
    "relations": (*READING, "time_format", "time_unit", "kind"),
    "roles": tuple(Roles.__dataclass_fields__),
}
RULES = ("min", "max", "present", "values")
IDS = ("user", "item", "source", "target", *OPTIONAL_IDS)


def load(config: str | Path | None, *, cache_dir: str | Path | None = None) -> Logs:
    """Read the tables that the yaml `config` describes; prepared anew only when they change."""
    if config is None:
        raise ValueError(
            "config is null: give the yaml that describes your tables (config=my.yaml)"
        )
    path = Path(config)
    about = _read_config(path)
    stamp = [PREPARED, about]
    for table in ("events", "items", "users", "relations"):
        for file in _files(about.get(table, {}), path):
            if not file.is_file():
                raise ValueError(
                    f"{path}: {table}.file is {file}, which does not exist: a path in the yaml is "
                    "relative to the yaml's own folder"
                )
            stat = file.stat()
            stamp.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    key = hashlib.sha256(json.dumps(stamp, default=str).encode()).hexdigest()
    return cached(
        f"tables-{path.stem}-{key}",
        lambda: _prepare(about, path),
        Logs.save,
        Logs.load,
        folder=cache_dir,
        what=f"the log of {path}",
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The yaml as a dict whose every key is known."""
    import yaml

    if not path.is_file():
        raise ValueError(f"{path} does not exist: expected a yaml that describes your tables")
    try:
        about = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not yaml: {str(error)[:300]}; expected is a file like that of "
            "docs/your_own_logs.md"
        ) from None
    if not isinstance(about, dict):
        raise ValueError(
            f"{path} must be a mapping that describes your tables (docs/your_own_logs.md), it "
            f"begins with {path.read_text()[:60]!r}: is it one of the tables?"
        )
    _check_keys(about, KEYS[""], str(path))
    for part in ("events", "items", "users", "relations", "roles"):
        if part in about:
            _check_keys(about[part], KEYS[part], f"{path}: {part}")
        if part in about and part != "roles":
            _check_table(about[part], f"{path}: {part}")
    if "events" not in about:
        raise ValueError(f"{path} must have a part 'events', it has {list(about)}")
    for role, columns in about.get("roles", {}).items():
        _check_names(columns, f"{path}: roles.{role}")
    _check_names(about.get("purchases", []), f"{path}: purchases")
    return about


def _check_table(table: dict[str, Any], where: str) -> None:
    """Refuse a table's description without a file or with a rule that does not exist."""
    if "file" not in table:
        raise ValueError(f"{where} must name its file, it has {list(table)}")
    for mapping in ("columns", "keep", "behaviours"):
        if not isinstance(table.get(mapping, {}), dict):
            raise ValueError(
                f"{where}.{mapping} must map names to names or rules, got {table[mapping]!r}"
            )
    for column, rule in table.get("keep", {}).items():
        _check_keys(rule, RULES, f"{where}.keep.{column}")
        if "values" in rule and not isinstance(rule["values"], list):
            raise ValueError(f"{where}.keep.{column}.values must be a list, got {rule['values']!r}")
    if "time_format" in table and "time_unit" in table:
        raise ValueError(f"{where} has both time_format and time_unit: a time is text or a number")
    if table.get("time_unit", "s") not in get_args(Unit):
        raise ValueError(
            f"{where}.time_unit must be one of {get_args(Unit)}, got {table['time_unit']!r}"
        )


def _check_keys(part: Any, known: Iterable[str], where: str) -> None:
    """Refuse anything but a mapping with known keys."""
    known = list(known)
    if not isinstance(part, dict):
        raise ValueError(f"{where} must be a mapping with keys of {known}, got {part!r}")
    for key in part:
        if key not in known:
            raise ValueError(
                f"{where} has the unknown key '{key}', known are {known}.{closest(str(key), known)}"
            )


def _check_names(names: Any, where: str) -> None:
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{where} must be a list of names, got {names!r}")


def _files(table: dict[str, Any], config: Path) -> list[Path]:
    """The files of one table, relative to the yaml."""
    files = table.get("file", [])
    return [config.parent / str(f) for f in (files if isinstance(files, list) else [files])]


def _prepare(about: dict[str, Any], path: Path) -> Logs:
    """Read, filter, rename, then let `Logs.create` judge."""
    check_headers(about, path)
    roles = Roles(**{role: tuple(columns) for role, columns in about.get("roles", {}).items()})
    notes: list[str] = []
    frames: dict[str, pd.DataFrame] = {}
    wanted = {
        "events": [*REQUIRED, *OPTIONAL_IDS, *NUMBERS, "shown"],
        "items": ["item", *roles.item_text, *roles.item_category, *roles.item_number, "price"],
        "users": ["user", *roles.user_category, *roles.user_number],
        "relations": ["source", "target", "kind", "time"],
    }
    for table, columns in wanted.items():
        if table in about:
            frames[table] = _read(about[table], path, table, columns, notes)
    if "behaviour" not in frames["events"] or "value" not in frames["events"]:
        frames["events"] = _complete_events(frames["events"], about["events"], f"{path}: events")
    if "behaviours" in about["events"]:
        frames["events"] = _rename_behaviours(frames["events"], about["events"], f"{path}: events")
    for column in IDS:
        _one_type(frames, column)
    logs = Logs.create(
        frames["events"],
        frames.get("items"),
        frames.get("users"),
        frames.get("relations"),
        roles,
        name=str(about.get("name", path.stem)),
        purchases=about.get("purchases", ["buy"]),
    )
    return replace(logs, notes=(*notes, *logs.notes))


def _read(
    about: dict[str, Any], path: Path, table: str, wanted: list[str], notes: list[str]
) -> pd.DataFrame:
    """One table with our names: the rows that `keep` leaves, the columns mapped or `wanted`."""
    where = f"{path}: {table}"
    mapping = {str(ours): str(theirs) for ours, theirs in about.get("columns", {}).items()}
    texts = [theirs for ours, theirs in mapping.items() if ours in IDS]
    texts += [column for column in IDS if column not in mapping]
    frame = pd.concat([_read_file(f, about, texts) for f in _files(about, path)], ignore_index=True)
    for ours, theirs in mapping.items():
        require_columns(frame, (theirs,), f"{where} ({about['file']})", f"mapped to {ours}")
    for column, rule in about.get("keep", {}).items():
        require_columns(frame, (column,), f"{where} ({about['file']})", "a rule of keep")
        keep = _kept(frame[column], rule, f"{where}.keep.{column}")
        if not keep.all():
            notes.append(f"{int((~keep).sum())} rows of {table} dropped: keep {column} {rule}")
            frame = frame[keep]
    named = [
        *mapping,
        *(c for c in dict.fromkeys(wanted) if c not in mapping and c in frame.columns),
    ]
    frame = pd.DataFrame({c: frame[mapping.get(c, c)] for c in named}).reset_index(drop=True)
    if table == "relations" and "kind" in about and "kind" not in frame:
        frame["kind"] = about["kind"]
    if about.get("first_of_each"):
        require_columns(frame, (wanted[0],), where, "first_of_each needs it")
        again = (frame[wanted[0]].duplicated() | frame[wanted[0]].isna()).to_numpy()
        notes.append(
            f"{int((~again).sum())} of {len(frame)} rows of {table} kept: first of each {wanted[0]}"
        )
        frame = frame[~again].reset_index(drop=True)
    if (
        "time" in frame
        and table in ("events", "relations")
        and {"time_format", "time_unit"} & set(about)
    ):
        pattern, unit = about.get("time_format"), about.get("time_unit")
        frame["time"] = parse_times(frame["time"], f"{where}.time", pattern=pattern, unit=unit)
    return frame


def _read_file(file: Path, about: dict[str, Any], texts: list[str]) -> pd.DataFrame:
    """One file; columns of ids come as text from a CSV, so that leading zeros survive."""
    if file.suffix.lower() in (".parquet", ".pq"):
        return pd.read_parquet(file)
    try:
        frame = pd.read_csv(
            file,
            sep=about.get("separator", ","),
            decimal=about.get("decimal", "."),
            encoding=about.get("encoding", "utf-8"),
            dtype=dict.fromkeys(texts, "str"),
        )
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        UnicodeDecodeError,
        LookupError,
    ) as error:
        raise ValueError(f"{file} cannot be read ({error}): check separator and encoding") from None
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes what is too much for labels
        raise ValueError(
            f"{file}: its lines have more fields than its first line names columns: a number such "
            "as 3,50 must stand in quotes or between other separators, and no line may end in one"
        )
    return frame


def _kept(column: pd.Series, rule: dict[str, Any], where: str) -> np.ndarray:
    """Which rows (n,) satisfy one rule of `keep`; a missing value has no size and is no value."""
    keep = np.ones(len(column), dtype=bool)
    if "present" in rule:
        keep &= column.notna().to_numpy() == bool(rule["present"])
    if "values" in rule:
        keep &= column.astype("str").isin([str(v) for v in rule["values"]]).to_numpy()
    try:
        if "min" in rule:
            keep &= (column >= rule["min"]).fillna(False).to_numpy(dtype=bool)
        if "max" in rule:
            keep &= (column <= rule["max"]).fillna(False).to_numpy(dtype=bool)
    except TypeError:
        raise ValueError(
            f"{where}: {rule} cannot be compared with {column.dtype} values{comma_hint(column)}"
        ) from None
    return keep


def _complete_events(events: pd.DataFrame, about: dict[str, Any], where: str) -> pd.DataFrame:
    """Give events the behaviour and value that no column says."""
    events = events.copy()
    if "behaviour" not in events:
        if "behaviour" not in about:
            raise ValueError(
                f"{where} says no behaviour: map a column (columns: {{behaviour: ...}}) or name "
                "the one that all rows are (behaviour: buy)"
            )
        events["behaviour"] = about["behaviour"]
    if "value" not in events:
        if "value" in about:
            events["value"] = about["value"]
        elif {"price", "quantity"} <= set(events.columns):
            price, quantity = (numbers(events[c], f"{where}.{c}") for c in ("price", "quantity"))
            events["value"] = price * quantity
        else:
            raise ValueError(
                f"{where} says no value: map a column (columns: {{value: ...}}), or price and "
                "quantity, or name the one that all rows have (value: 1.0)"
            )
    return events


def _rename_behaviours(events: pd.DataFrame, about: dict[str, Any], where: str) -> pd.DataFrame:
    """The file's words for behaviours to ours; a word without a translation is refused."""
    words = {str(k): str(v) for k, v in about["behaviours"].items()}
    said = events["behaviour"].astype("str")
    unknown = sorted(set(said.dropna()) - set(words))
    if unknown:
        raise ValueError(
            f"{where}.behaviours does not translate {unknown[:5]}: it knows {list(words)}"
        )
    return events.assign(behaviour=said.map(words))


def _one_type(frames: dict[str, pd.DataFrame], column: str) -> None:
    """Make an id the same type in all tables: whole numbers if all are, else text. In place."""
    ids = {table: frame[column] for table, frame in frames.items() if column in frame}
    whole = {table: _whole(values) for table, values in ids.items()}
    for table, values in ids.items():
        numbers = whole[table]
        if all(w is not None for w in whole.values()):
            frames[table][column] = numbers
        else:
            text = values if numbers is None or values.dtype == "str" else numbers
            frames[table][column] = text.astype("str").where(values.notna())


def _whole(ids: pd.Series) -> pd.Series | None:
    """Ids (n,) as Int64 if each is a whole number written the plain way, else None."""
    if pd.api.types.is_numeric_dtype(ids):
        known = ids.dropna()
        return ids.astype("Int64") if (known % 1 == 0).all() else None
    text = ids.dropna().astype("str")
    if not text.str.fullmatch(r"0|-?[1-9][0-9]{0,17}").all():
        return None
    whole = pd.Series(pd.NA, index=ids.index, dtype="Int64")
    whole[text.index] = text.astype("int64").astype(
        "Int64"
    )  # by way of floats long ids would lose digits
    return whole
