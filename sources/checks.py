"""What a table must be to become part of `Logs`; every refusal says what, where and what to do."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd

Unit = Literal["D", "s", "ms", "us", "ns"]
REQUIRED = ("user", "item", "time", "behaviour", "value")
OPTIONAL_IDS = ("basket", "place")
# column: (above, below, may it be empty?, what is expected and what to do)
NUMBERS = {
    "value": (
        -np.inf,
        np.inf,
        False,
        "a finite number: fill in what the line was worth, or drop it",
    ),
    "quantity": (-np.inf, np.inf, False, "a finite number: drop lines without a quantity"),
    "price": (
        0.0,
        np.inf,
        True,
        "a price paid per unit above 0: drop gifts and returns, or leave it empty",
    ),
    "discount": (-1e-9, 1.0 + 1e-9, True, "a share of the shelf price from 0 to 1, or empty"),
    "position": (-1.0, np.inf, True, "the place in the list from 0 on, or empty"),
    "propensity": (
        0.0,
        1.0 + 1e-9,
        False,
        "in (0, 1]: a logged action cannot have been impossible",
    ),
}


DECIMAL_COMMA = r"\s*[-+]?[0-9. ]*,[0-9]+\s*"
COMMA = (
    ': a comma stands before the decimals, so say decimal: "," beside the file in the yaml '
    "(pd.read_csv(..., decimal=',') in Python)"
)


def closest(word: str, words: Iterable[str]) -> str:
    """Suggest the nearest of `words`, or nothing."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def require_columns(frame: pd.DataFrame, columns: Sequence[str], table: str, why: str) -> None:
    """Refuse a table that lacks one of `columns`."""
    for column in columns:
        if column not in frame.columns:
            have = [str(c) for c in frame.columns]
            raise ValueError(
                f"{table} lacks the column '{column}'{f' ({why})' if why else ''}, it has {have}: "
                f"rename the column that means it (in a yaml: {table}.columns: "
                f"{{{column}: ITS NAME IN THE FILE}}).{closest(column, have)}"
            )


def sample(bad: np.ndarray, values: pd.Series) -> str:
    """How many rows are `bad` (n,), and the first three with their values."""
    rows = np.flatnonzero(bad)[:3]
    plain = values.iloc[rows].tolist()  # Python's own types: they print as people write them
    first = ", ".join(f"row {r}: {v!r}" for r, v in zip(rows, plain, strict=True))
    return f"{int(bad.sum())} of {len(bad)} rows ({first})"


def clean_ids(ids: pd.Series, where: str) -> pd.Series:
    """Ids (n,) as int64 or str, the same for numbers that a missing value had turned to floats."""
    missing = ids.isna().to_numpy()
    if missing.any():
        raise ValueError(f"{where} is missing in {sample(missing, ids)}: drop these rows first")
    if isinstance(ids.dtype, pd.CategoricalDtype):
        ids = ids.astype(ids.cat.categories.dtype)
    if pd.api.types.is_float_dtype(ids):
        broken = (ids % 1 != 0).to_numpy()
        if broken.any():
            raise ValueError(f"{where} must be whole numbers or strings, got {sample(broken, ids)}")
        return ids.astype("int64")
    if pd.api.types.is_integer_dtype(ids):
        return ids.astype("int64")
    kinds = set(ids.map(type))
    if kinds <= {int, np.int64}:
        return ids.astype("int64")
    if not kinds <= {str}:
        names = sorted(k.__name__ for k in kinds)
        raise ValueError(
            f"{where} must be whole numbers or strings, got {names}: make them one type"
        )
    return ids.astype("str")


def parse_times(
    times: pd.Series, where: str, *, pattern: str | None = None, unit: Unit | None = None
) -> pd.Series:
    """Times (n,) as datetime64[ns] without zone (UTC where a zone is given)."""
    if pd.api.types.is_numeric_dtype(times) and unit is None:
        raise ValueError(
            f"{where} must be dates, got numbers ({times.dtype}): say what they count "
            "(time_unit: s in a yaml, pd.to_datetime(..., unit='s') in Python)"
        )
    if unit is not None:
        parsed = pd.to_datetime(pd.to_numeric(times, errors="coerce"), unit=unit, errors="coerce")
    elif pd.api.types.is_datetime64_any_dtype(times):
        parsed = times
    else:
        parsed = pd.to_datetime(times, format=pattern or "ISO8601", errors="coerce", utc=True)
    if getattr(parsed.dt, "tz", None) is not None:
        parsed = parsed.dt.tz_convert("UTC").dt.tz_localize(None)
    bad = parsed.isna().to_numpy()
    if bad.any():
        expected = f"like {pattern}" if pattern else f"numbers of {unit}" if unit else "ISO dates"
        raise ValueError(
            f"{where} must be {expected}, cannot read {sample(bad, times)}: "
            "give the right time_format or drop these rows"
        )
    return parsed.astype("datetime64[ns]")


def comma_hint(column: pd.Series) -> str:
    """What to do if text that should be numbers is numbers with a decimal comma, else nothing."""
    known = column.dropna().astype("str")
    text = known[pd.to_numeric(known, errors="coerce").isna()]
    return COMMA if len(text) and text.str.fullmatch(DECIMAL_COMMA).all() else ""


def numbers(column: pd.Series, where: str) -> pd.Series:
    """A column (n,) as float64; text is refused, never turned into missing values."""
    if not pd.api.types.is_numeric_dtype(column):
        text = pd.to_numeric(column, errors="coerce").isna().to_numpy() & column.notna().to_numpy()
        if text.any():
            hint = comma_hint(column[text])
            raise ValueError(f"{where} must be numbers, got {sample(text, column)}{hint}")
        column = pd.to_numeric(column)
    return pd.Series(column.to_numpy(dtype="float64", na_value=np.nan), index=column.index)


def clean_numbers(events: pd.DataFrame, name: str) -> None:
    """Check the known numeric columns of events in place."""
    for column, (low, high, may_be_empty, expected) in NUMBERS.items():
        if column not in events:
            continue
        values = numbers(events[column], f"{name}.{column}")
        x = values.to_numpy()
        bad = ~((x > low) & (x < high)) & ~(np.isnan(x) & may_be_empty)
        if column == "position":
            bad |= np.isfinite(x) & (x % 1 != 0)
        if bad.any():
            raise ValueError(f"{name}.{column} must be {expected}; got {sample(bad, values)}")
        events[column] = values


def clean_events(
    events: pd.DataFrame, name: str, now: pd.Timestamp | str | None
) -> tuple[pd.DataFrame, list[str]]:
    """Check events, drop exact duplicates, sort by time; returns them and notes."""
    require_columns(events, REQUIRED, name, "")
    if events.empty:
        raise ValueError(f"{name}: there are no events, expected at least one row")
    events = events.reset_index(drop=True)  # a new frame: the caller's stays as it was
    for column in ("user", "item", *(c for c in OPTIONAL_IDS if c in events)):
        events[column] = clean_ids(events[column], f"{name}.{column}")
    events["time"] = parse_times(events["time"], f"{name}.time")
    # a day of grace: local times of the far east are up to 14 hours ahead of UTC
    limit = pd.Timestamp.now("UTC").tz_localize(None) + pd.Timedelta(days=1) if now is None else now
    future = (events["time"] > pd.Timestamp(limit)).to_numpy()
    if future.any():
        raise ValueError(
            f"{name}.time lies after now ({pd.Timestamp(limit)}) in "
            f"{sample(future, events['time'])}: check the time format and unit, or drop these rows"
        )
    missing = events["behaviour"].isna().to_numpy()
    if missing.any():
        raise ValueError(f"{name}.behaviour is missing in {sample(missing, events['item'])}")
    events["behaviour"] = events["behaviour"].astype("str").astype("category")
    clean_numbers(events, name)
    if "shown" in events:
        odd = ~events["shown"].isin([0, 1]).to_numpy()
        if odd.any():
            raise ValueError(
                f"{name}.shown must be true or false, got {sample(odd, events['shown'])}"
            )
        events["shown"] = events["shown"].astype(bool)
    again = events.duplicated().to_numpy()  # another basket or quantity makes another row
    notes = [f"{int(again.sum())} exact duplicate event rows dropped"] if again.any() else []
    events = events[~again].sort_values("time", kind="stable").reset_index(drop=True)
    return events, notes


def one_row_per_id(
    table: pd.DataFrame | None,
    events: pd.DataFrame,
    kind: str,
    categories: Sequence[str],
    measures: Sequence[str],
) -> pd.DataFrame:
    """Check items or users: ids unique, every event's id known, declared columns there and sound.

    Without a table it comes from events; users it lacks are added, items it lacks are an error.
    """
    if table is None:
        table = events[[kind]].drop_duplicates()  # in order of time, not of id
    require_columns(table, (kind,), f"{kind}s", "")
    require_columns(table, (*categories, *measures), f"{kind}s", "the roles declare it")
    table = table.reset_index(drop=True)
    table[kind] = clean_ids(table[kind], f"{kind}s.{kind}")
    again = table[kind].duplicated().to_numpy()
    if again.any():
        raise ValueError(
            f"{kind}s must have one row per {kind}, ids repeat in {sample(again, table[kind])}"
        )
    absent = ~events[kind].isin(table[kind]).to_numpy()
    if absent.any() and (kind == "item" or table[kind].dtype != events[kind].dtype):
        raise ValueError(
            f"events name {kind}s ({events[kind].dtype}) that {kind}s ({table[kind].dtype}) lacks: "
            f"{sample(absent, events[kind])}: add them to {kind}s, drop these events, "
            "or make the ids one type"
        )
    if absent.any():
        table = pd.concat([table, events.loc[absent, [kind]].drop_duplicates()], ignore_index=True)
    for column in categories:
        if table[column].dtype == object:
            table[column] = table[column].astype(str).where(table[column].notna())
    for column in (*measures, *(["price"] if kind == "item" and "price" in table else [])):
        values = numbers(table[column], f"{kind}s.{column}")
        bad = np.isinf(values.to_numpy()) | (values.to_numpy() <= 0 if column == "price" else False)
        if bad.any():
            expected = "above 0" if column == "price" else "finite"
            raise ValueError(
                f"{kind}s.{column} must be {expected} or empty, got {sample(bad, values)}"
            )
        table[column] = values
    return table


def describe_cleaning(
    events: pd.DataFrame, items: pd.DataFrame, users: pd.DataFrame, text: pd.Series
) -> list[str]:
    """Lines that say what is thin: no text, one event, no event."""
    per_user = events["user"].value_counts()
    lines = {
        "items without text": int((text == "").sum()),
        "items without events": int((~items["item"].isin(events["item"])).sum()),
        "users without events": int((~users["user"].isin(events["user"])).sum()),
        "users with one event": int((per_user == 1).sum()),
    }
    return [f"{count} {what}" for what, count in lines.items() if count]
