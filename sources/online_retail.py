"""A year of a British shop of gifts (Chen, 2015): UCI "Online Retail", many customers wholesalers.

Times are the shop's local ones, taken as they are. Goods that were later returned stay bought.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from sources.cache import cached
from sources.checks import clean_ids, numbers, parse_times, require_columns, sample
from sources.logs import Logs, Roles

PREPARED = 1  # raised when the preparation below changes, so that no old cache is read
COLUMNS = (
    "InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID",
    "Country",
)  # fmt: skip
LINES = 541_909  # of the whole set
GET = (
    'get "Online Retail" from the UCI Machine Learning Repository (doi 10.24432/C5BW33), save it '
    "as .csv or .parquet"
)
# stock codes that are no goods; PADS, as odd a code, are pads for cushions
SERVICES = {
    "POST": "postage", "DOT": "postage of the web shop", "C2": "carriage", "M": "manual entry",
    "D": "discount", "S": "samples", "B": "bad debt", "BANK CHARGES": "bank charges",
    "AMAZONFEE": "marketplace fee", "CRUK": "commission of a charity",
}  # fmt: skip
ROLES = Roles(item_text=("text",), user_category=("country",))


def load(path: Path | str | None = None, *, cache_dir: Path | str | None = None) -> Logs:
    """The purchases in a Parquet or CSV file; once it read the whole set, `load()` finds it."""
    whole, what = f"online-retail-{PREPARED}", "the prepared log of Online Retail"
    if path is None:
        return cached(whole, _missing, Logs.save, Logs.load, folder=cache_dir, what=what)
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}: {GET} and give that file (data.path=FILE)")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    key = f"{whole}-{path.suffix.lower()}-{digest}"
    logs = cached(
        key, lambda: _prepare(_read(path)), Logs.save, Logs.load, folder=cache_dir, what=what
    )
    if logs.notes[0] == _extent(LINES):
        cached(whole, lambda: logs, Logs.save, Logs.load, folder=cache_dir, what=what)
    return logs


def _missing() -> Logs:
    raise ValueError(f"Online Retail is not in the cache: {GET}, and give it once (data.path=FILE)")


def _extent(lines: int) -> str:
    """How much of the set was read."""
    return f"{lines} lines read" + ("" if lines == LINES else f", the whole set has {LINES}")


def _read(path: Path) -> pd.DataFrame:
    """One file; codes come as text, since some are numbers and some are not."""
    kind = path.suffix.lower()
    if kind not in (".parquet", ".pq", ".csv"):
        raise ValueError(f"{path} must be .csv or .parquet, got {kind or 'no ending'}: {GET}")
    texts = dict.fromkeys(
        ("InvoiceNo", "StockCode", "Description", "InvoiceDate", "Country"), "str"
    )
    try:
        if kind != ".csv":
            return pd.read_parquet(path)
        try:
            return pd.read_csv(path, dtype=texts)
        except UnicodeDecodeError:  # the copies saved by a spreadsheet
            return pd.read_csv(path, dtype=texts, encoding="latin-1")
    except (ValueError, OSError) as error:  # what the readers of both formats raise
        raise ValueError(
            f"{path} cannot be read ({error}): it is cut off or no {kind} file, fetch it again"
        ) from None


def _prepare(lines: pd.DataFrame) -> Logs:
    """Lines of invoices to a log."""
    extent = _extent(len(lines))
    bought, left_out = clean(lines)
    goods, services = without_services(bought)
    events, merged = _events(goods)
    first = goods.groupby(["CustomerID", "Country"], sort=False).size().rename("lines")
    most = first.reset_index().sort_values("lines", ascending=False, kind="stable")
    users = most.drop_duplicates("CustomerID").sort_values("CustomerID")
    users = users.rename(columns={"CustomerID": "user", "Country": "country"})
    logs = Logs.create(
        events, _items(goods), users[["user", "country"]], roles=ROLES, name="online_retail"
    )
    return replace(logs, notes=(extent, *left_out, *services, *merged, *logs.notes))


def clean(lines: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The lines that are a known customer's purchases, and notes of those that are not."""
    require_columns(lines, COLUMNS, "online_retail", "the set has these eight")
    lines = lines[list(COLUMNS)].reset_index(drop=True)
    if lines.empty:
        raise ValueError("online_retail: there are no lines, expected at least one: fetch it again")
    for column in ("InvoiceNo", "StockCode"):
        lines[column] = clean_ids(lines[column], f"online_retail.{column}").astype("str")
    for column in ("Quantity", "UnitPrice", "CustomerID"):
        lines[column] = numbers(lines[column], f"online_retail.{column}")
        bad = ~np.isfinite(lines[column].to_numpy())
        if column != "CustomerID" and bad.any():
            raise ValueError(
                f"online_retail.{column} must be a number on every line, got "
                f"{sample(bad, lines[column])}: the file is cut off or garbled, fetch it again"
            )
    reasons = {
        "lines without a customer": lines["CustomerID"].isna(),
        "returns (invoices C...)": lines["InvoiceNo"].str.startswith("C"),
        "lines without units (corrections of stock)": lines["Quantity"] <= 0,
        "lines without a price (gifts)": lines["UnitPrice"] <= 0,
    }
    keep, notes = np.ones(len(lines), dtype=bool), []
    for what, reason in reasons.items():  # a line counts for the first that applies
        bad = keep & reason.to_numpy(dtype=bool)
        keep &= ~bad
        notes += [f"{int(bad.sum())} {what} dropped"] if bad.any() else []
    if not keep.any():
        raise ValueError(f"online_retail: no line is a purchase: {', '.join(notes)}")
    return lines[keep].reset_index(drop=True), notes


def without_services(lines: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Drop lines of postage, fees and the like, and say of which codes."""
    code = lines["StockCode"].str.upper().str.strip()
    count = code[code.isin(set(SERVICES))].value_counts()
    if count.empty:
        return lines, []
    kept = lines[~code.isin(set(SERVICES))].reset_index(drop=True)
    if kept.empty:
        raise ValueError(f"online_retail: all lines are services ({', '.join(count.index)})")
    parts = ", ".join(f"{n} {c} ({SERVICES[str(c)]})" for c, n in count.items())
    return kept, [f"{int(count.sum())} lines of services dropped: {parts}"]


def _events(lines: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Purchases, one per invoice and item, at one time per invoice."""
    dates = lines["InvoiceDate"]
    text = not pd.api.types.is_datetime64_any_dtype(dates)
    american = text and bool(dates.astype("str").str.contains("/").any())
    pattern = "%m/%d/%Y %H:%M" if american else None
    time = parse_times(dates, "online_retail.InvoiceDate", pattern=pattern)
    lines = lines.assign(time=time, value=lines["Quantity"] * lines["UnitPrice"])
    lines["time"] = lines.groupby("InvoiceNo")["time"].transform("min")
    keys = ["InvoiceNo", "StockCode"]
    how = {"CustomerID": "first", "time": "first", "Quantity": "sum", "value": "sum"}
    merged = lines.groupby(keys, sort=False, as_index=False).agg(how)
    events = pd.DataFrame(
        {
            "user": merged["CustomerID"],
            "item": merged["StockCode"],
            "time": merged["time"],
            "behaviour": "buy",
            "value": merged["value"],
            "quantity": merged["Quantity"],
            "price": merged["value"] / merged["Quantity"],
            "basket": merged["InvoiceNo"],
        }
    )
    gone = len(lines) - len(merged)
    note = f"{gone} lines merged with another of the same product and invoice"
    return events, [note] if gone else []


def _items(lines: pd.DataFrame) -> pd.DataFrame:
    """Goods with the text most of their lines carry; of two as frequent the earlier."""
    texts = lines["Description"].fillna("").astype("str")
    said = texts.map({text: readable(text) for text in texts.unique()})
    named = pd.DataFrame({"item": lines["StockCode"], "text": said})
    count = named.groupby(["item", "text"], sort=False).size().rename("lines").reset_index()
    count["lines"] *= count["text"] != ""  # an empty one only where there is no other
    count = count.sort_values("lines", ascending=False, kind="stable")
    return count.drop_duplicates("item").sort_values("item")[["item", "text"]]


def readable(label: str) -> str:
    """A label in words: "SET/20 RED  NAPKINS ," is "set of 20 red napkins"."""
    text = re.sub(r"\bs(?:et)?/(\d+)", r"set of \1", label.lower())
    text = text.replace('"', "").replace("&", " and ").replace("+", " and ")
    text = re.sub(r"\bw(?:/|\b)", "with ", text)
    text = re.sub(r"\s*,[\s,]*", ", ", text)
    return re.sub(r"\s+", " ", text).strip(" ,./-")
