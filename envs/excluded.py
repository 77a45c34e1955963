"""Business rules: items that some users, or all, must not be shown. Kept sparse, never (U, N)."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from encoders.state import EMPTY
from simulators.base import Catalog, UserSimulator, UserTable

TABLES = (".csv", ".parquet", ".pq")
NO_RULE = "leave it out where there is no rule (excluded=null)"
WHAT = ("item", "category")  # a rule's column: one of them


@dataclass(frozen=True, eq=False)
class Rule:
    """n lines: who must not be shown what, by outside names as text."""

    where: str  # the file, for errors
    user: np.ndarray | None  # (n,) ids; None: everybody
    what: str  # "item" or "category"
    name: np.ndarray  # (n,) ids of items, or names of categories


def read_rules(source: str | Path | Sequence[str | Path]) -> list[Rule]:
    """Rules of `source`: a table with columns user and item (or category), a category, or several.

    A table (.csv, .parquet) without a column user is a rule for everybody, as a category is.
    """
    if not isinstance(source, str | Path | list | tuple):
        raise ValueError(
            f"excluded must be a table ({', '.join(TABLES)}), a category or a list of these, "
            f"got {source!r}"
        )
    parts = [source] if isinstance(source, str | Path) else source
    rules, words = [], []
    for part in map(str, parts):
        if part.lower().endswith(TABLES):
            rules.append(_read_table(Path(part)))
        elif Path(part).suffix and Path(part).is_file():
            raise ValueError(
                f"excluded: {part} is a file and its name does not end in {' or '.join(TABLES)}: "
                "only such a file is read as a table, other words are categories"
            )
        else:
            words.append(part)
    if words:
        rules.append(Rule("excluded", None, "category", np.array(words, dtype=object)))
    if not rules:
        raise ValueError("excluded must name a table or a category, got none: null means no rule")
    return rules


def _read_table(path: Path) -> Rule:
    """One file; everything is text, so that leading zeros survive."""
    if not path.is_file():
        raise ValueError(f"excluded: {path} does not exist: give the path from where you are")
    try:
        if path.suffix.lower() == ".csv":
            table = pd.read_csv(path, dtype="str")
        else:
            table = pd.read_parquet(path)
    except pd.errors.EmptyDataError:
        raise ValueError(
            f"excluded: {path} is empty, expected a first line that names its columns (item or "
            f"category, and user where the rule is not for everybody): {NO_RULE}"
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(
            f"excluded: {path} cannot be read ({str(error).strip()}): give a .csv with "
            "commas or a .parquet"
        ) from None
    columns = [c for c in WHAT if c in table]
    if len(columns) != 1:
        raise ValueError(
            f"excluded: {path} must have a column item or a column category, and user where the "
            f"rule is not for everybody, got {[str(c) for c in table]}: rename the columns, and "
            "separate them by commas"
        )
    others = [str(c) for c in table if c not in columns]
    if "user" not in table and others:  # a user by another name would be a rule for everybody
        raise ValueError(
            f"excluded: {path} has the column {columns[0]} and {others}, none of them user: call "
            "the column of users user, or leave the others out if the rule is for everybody"
        )
    if not len(table):
        raise ValueError(
            f"excluded: {path} has no lines, expected one for each thing excluded: {NO_RULE}"
        )
    named = [*columns, *(["user"] if "user" in table else [])]
    for column in named:
        empty = np.flatnonzero(table[column].isna().to_numpy())
        if len(empty):
            raise ValueError(
                f"excluded: {path} has no {column} in {len(empty)} of {len(table)} lines (first in "
                f"line {empty[0]}): fill it in; rules for everybody stand in a table without user"
            )
    user = as_text(table["user"]) if "user" in table else None
    return Rule(str(path), user, columns[0], as_text(table[columns[0]]))


def as_text(ids: Any) -> np.ndarray:
    """Ids of any type as text, (n,): the same for 7, "7" and 7.0."""
    values = pd.Series(ids)
    if pd.api.types.is_float_dtype(values) and (values % 1 == 0).all():
        values = values.astype("int64")
    return values.astype("str").to_numpy(dtype=object)


def refuse_unknown(
    rules: Iterable[Rule], users: Any, items: Any, categories: Sequence[str]
) -> None:
    """Refuse rules that name users, items or categories nobody knows: how many, the first few."""
    known = {"user": users, "item": items, "category": [c for c in categories if c]}
    for rule in rules:
        for kind, names in (("user", rule.user), (rule.what, rule.name)):
            if names is None:
                continue
            there = as_text(known[kind])
            distinct = pd.unique(names)
            strange = distinct[~pd.Series(distinct).isin(there).to_numpy()]
            if len(strange):
                near = difflib.get_close_matches(str(strange[0]), list(there[:10_000]), n=1)
                plural = "categories" if kind == "category" else f"{kind}s"
                raise ValueError(
                    f"{rule.where}: {len(strange)} of {len(distinct)} {plural} are not known, the "
                    f"first {list(map(str, strange[:3]))}"
                    f"{f', did you mean {near[0]!r}?' if near else ''}; known are {len(there)} "
                    f"{plural} such as {list(map(str, there[:3]))}"
                    + (", and a table's name ends in .csv or .parquet" * (rule.user is None))
                )


@dataclass(frozen=True, eq=False)
class Excluded:
    """What users must not be shown: rows of a user table share sets, sets are lists of items."""

    belongs: Tensor  # (U,) int64: the set of each row of the user table
    pointer: Tensor  # (S + 1,) int64 into `items`; set 0 is empty
    items: Tensor  # (m,) int64 catalogue rows
    everybody: Tensor  # (E,) int64: in no set

    @staticmethod
    def of(rules: Iterable[Rule], catalog: Catalog, users: UserTable) -> "Excluded":
        """The rules as rows of catalogue and user table; what these do not hold is left out."""
        household, ids = pd.factorize(as_text(users.ids))  # (U,), (H,)
        whom, token = _tokens(rules, catalog, ids)  # (n,) each; -1: everybody
        member, start = _members(catalog)
        everybody = _distinct(_expanded(token[whom < 0], len(catalog), member, start)[1])
        words = len(catalog) + len(catalog.category_names)
        cells = _distinct((whom * words + token)[whom >= 0])  # by household, then token
        owner, token = cells // words, cells % words  # (n,) each
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        sets: dict[bytes, int] = {b"": 0}  # households of one rule share its list
        mine = np.zeros(len(ids), np.int64)
        kept: list[np.ndarray] = [token[:0]]
        for tokens, who in zip(np.split(token, first[1:]), owner[first], strict=False):
            key = tokens.tobytes()
            if key not in sets:
                sets[key] = len(kept)
                kept.append(tokens)
            mine[who] = sets[key]
        place = np.repeat(np.arange(len(kept)), [len(k) for k in kept])
        which, item = _expanded(np.concatenate(kept), len(catalog), member, start)
        which = place[which]
        cells = _distinct(which * len(catalog) + item)
        cells = cells[~np.isin(cells % len(catalog), everybody)]
        pointer = np.searchsorted(cells // len(catalog), np.arange(len(kept) + 1))
        return Excluded(
            *(
                torch.from_numpy(x).to(catalog.vectors.device)
                for x in (mine[household], pointer, cells % len(catalog), everybody)
            )
        )

    @staticmethod
    def read(source: str | Path | Sequence[str | Path], simulator: UserSimulator) -> "Excluded":
        """The rules of `source` (`read_rules`) for these users, all of whom must be known."""
        rules, catalog = read_rules(source), simulator.catalog
        refuse_unknown(rules, simulator.users.ids, catalog.ids, catalog.category_names)
        return Excluded.of(rules, catalog, simulator.users)

    @property
    def width(self) -> int:
        """W: items of the longest list, those for everybody included."""
        return int(self.pointer.diff().max()) + len(self.everybody)

    def rows(self, user: Tensor) -> Tensor:
        """What rows (B,) of the user table must not be shown, (B, W) ascending, EMPTY first."""
        which = self.belongs[user]  # (B,)
        start, size = self.pointer[which], self.pointer.diff()[which]  # (B,) each
        own = torch.arange(self.width - len(self.everybody), device=user.device)  # (W',)
        place = (start[:, None] + own).clamp(max=max(0, len(self.items) - 1))  # (B, W')
        if len(self.items):
            mine = torch.where(own < size[:, None], self.items[place], EMPTY)  # (B, W')
        else:
            mine = place
        return torch.cat([mine, self.everybody.expand(len(user), -1)], dim=1).sort(dim=1).values

    def words(self, catalog: Catalog) -> str:
        """One line on how much is excluded."""
        ruled = int((self.belongs > 0).sum())
        return (
            f"excluded: {len(self.everybody)} of {len(catalog)} items for everybody, up to "
            f"{self.width - len(self.everybody)} more for {ruled} of {len(self.belongs)} users"
        )


def among(slate: Tensor, excluded: Tensor) -> Tensor:
    """Which slots (B, K) hold one of the row's `excluded` (B, W), ascending."""
    if not excluded.shape[1]:  # none of these users has a rule
        return torch.zeros_like(slate, dtype=torch.bool)
    place = torch.searchsorted(excluded, slate).clamp(max=excluded.shape[1] - 1)  # (B, K)
    return (excluded.gather(1, place) == slate) & (slate != EMPTY)


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Ascending, each once; NumPy's own takes ten times as long for ten million."""
    ordered = np.sort(numbers)
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return np.asarray(ordered[new])


def _tokens(
    rules: Iterable[Rule], catalog: Catalog, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whom, a row of ids (H,) or -1 for all, and what: an item's row, or N + a category's: (n,)."""
    rows = {
        "item": pd.Index(as_text(catalog.ids)),
        "category": pd.Index([str(name) for name in catalog.category_names]),
    }
    whom, token = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for rule in rules:
        row = rows[rule.what].get_indexer(rule.name)  # (n,)
        user = np.full(len(row), -1) if rule.user is None else pd.Index(ids).get_indexer(rule.user)
        here = (row >= 0) & ((user >= 0) | (rule.user is None))
        whom.append(user[here].astype(np.int64))
        token.append(row[here] + (len(catalog) if rule.what == "category" else 0))
    return np.concatenate(whom), np.concatenate(token).astype(np.int64)


def _members(catalog: Catalog) -> tuple[np.ndarray, np.ndarray]:
    """Items by category, (N,), and where each category's begin, (C + 1,)."""
    category = catalog.category.cpu().numpy()
    order = np.argsort(category, kind="stable")
    return order, np.searchsorted(category[order], np.arange(len(catalog.category_names) + 1))


def _expanded(
    token: np.ndarray, num_items: int, member: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n,) as items: the place of the token and the item, (m,) each."""
    category = np.maximum(token - num_items, 0)
    single = token < num_items  # (n,)
    size = np.where(single, 1, start[category + 1] - start[category])  # (n,)
    place = np.repeat(np.arange(len(token)), size)  # (m,)
    inside = np.arange(len(place)) - np.repeat(size.cumsum() - size, size)  # (m,)
    within = np.minimum(start[category][place] + inside, len(member) - 1)
    return place, np.where(single[place], token[place], member[within])
