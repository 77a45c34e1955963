"""What happened: `Logs`, validated on entry, split in time without leaks."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from sources.checks import (
    clean_events,
    clean_ids,
    describe_cleaning,
    one_row_per_id,
    require_columns,
)

FORMAT = 1  # of a saved log; raised when the files or their meaning change
TABLES = ("events", "items", "users", "relations")


@dataclass(frozen=True)
class Roles:
    """What each column of items and users means: declared, never guessed."""

    item_text: tuple[str, ...] = ()
    item_category: tuple[str, ...] = ()
    item_number: tuple[str, ...] = ()
    user_category: tuple[str, ...] = ()
    user_number: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Logs:
    """Events of users with items, sorted by time; build one with `Logs.create`.

    events: user, item, time (datetime64[ns], UTC), behaviour (category), value (money of the
    line, rating, minutes) and, where logged, quantity, price (paid per unit), discount (share of
    the shelf price), basket, place, position, propensity, shown; others stay as they are. Events of
    one moment keep the order they came in; who needs an order among them draws it with a seed.
    """

    events: pd.DataFrame  # (n, columns)
    items: pd.DataFrame  # one row per item
    users: pd.DataFrame  # one row per user
    relations: pd.DataFrame | None = None  # source, target, kind, and time where known
    roles: Roles = field(default_factory=Roles)
    notes: tuple[str, ...] = ()  # what was cleaned, and how much
    name: str = "events"
    purchases: tuple[str, ...] = ("buy",)  # the behaviours that are purchases

    @staticmethod
    def create(
        events: pd.DataFrame,
        items: pd.DataFrame | None = None,
        users: pd.DataFrame | None = None,
        relations: pd.DataFrame | None = None,
        roles: Roles | None = None,
        *,
        name: str = "events",
        now: pd.Timestamp | str | None = None,
        purchases: Iterable[str] = ("buy",),
    ) -> "Logs":
        """Check and clean tables into a log; what was cleaned is in its `notes`."""
        roles = roles or Roles()
        events, notes = clean_events(events, name, now)
        purchases = tuple(purchases)
        unknown = [p for p in purchases if p not in events["behaviour"].cat.categories]
        if unknown:
            raise ValueError(
                f"{name}: purchases {unknown} never occur, behaviours are "
                f"{list(events['behaviour'].cat.categories)}: name those meant, "
                "purchases=(...), or purchases: [...] in a yaml"
            )
        items = one_row_per_id(items, events, "item", roles.item_category, roles.item_number)
        users = one_row_per_id(users, events, "user", roles.user_category, roles.user_number)
        require_columns(items, roles.item_text, "items", "the roles declare it as text")
        if relations is not None:
            require_columns(relations, ("source", "target", "kind"), "relations", "")
            relations = relations.reset_index(drop=True)
            for end in ("source", "target"):
                relations[end] = clean_ids(relations[end], f"relations.{end}")
        logs = Logs(events, items, users, relations, roles, (), name, purchases)
        notes += describe_cleaning(events, items, users, logs.item_text())
        return replace(logs, notes=tuple(notes))

    def __len__(self) -> int:
        return len(self.events)

    def cut(self, share: float, by: Literal["span", "events"] = "span") -> pd.Timestamp:
        """The moment with `share` of the time span, or of the events, before it."""
        if not 0.0 < share < 1.0:
            raise ValueError(
                f"share must be inside (0, 1), got {share}: .9 keeps 10 % after the cut"
            )
        if not len(self):
            raise ValueError(f"{self.name}: there are no events to cut")
        time = self.events["time"]
        if time.iloc[0] == time.iloc[-1]:
            raise ValueError(
                f"{self.name}: all {len(self)} events carry the time {time.iloc[0]}, which leaves "
                "no earlier and later to cut: give the moment of each event"
            )
        if by == "events":
            return time.iloc[int(share * len(time))]
        if by != "span":
            raise ValueError(f"by must be 'span', 'events', 'user' or 'draw', got {by!r}")
        return time.iloc[0] + share * (time.iloc[-1] - time.iloc[0])

    def before(self, moment: pd.Timestamp | str) -> "Logs":
        """Keep what happened strictly before `moment`; relations without a time stay."""
        return self._where_time(pd.Timestamp(moment), before=True)

    def since(self, moment: pd.Timestamp | str) -> "Logs":
        """Keep what happened at `moment` or later; relations without a time stay."""
        return self._where_time(pd.Timestamp(moment), before=False)

    def only_users(self, ids: Iterable[Any]) -> "Logs":
        """Keep these users and their events; relations stay whole, as they name no kind of end."""
        wanted = self._known("user", self.users, ids)
        users = self.users[self.users["user"].isin(wanted)].reset_index(drop=True)
        return replace(self._rows(self.events["user"].isin(wanted).to_numpy()), users=users)

    def only_items(self, ids: Iterable[Any]) -> "Logs":
        """Keep these items and their events; relations stay whole, as they name no kind of end."""
        wanted = self._known("item", self.items, ids)
        items = self.items[self.items["item"].isin(wanted)].reset_index(drop=True)
        return replace(self._rows(self.events["item"].isin(wanted).to_numpy()), items=items)

    def split_users(self, share: float, seed: int = 0) -> tuple["Logs", "Logs"]:
        """Two logs of different users, `share` of them in the first, drawn with `seed`."""
        ids = self.users["user"].to_numpy()
        count = round(share * len(ids))
        if not 0 < count < len(ids):
            raise ValueError(
                f"{self.name}: share {share} of {len(ids)} users leaves one side without users: "
                "choose a share nearer to .5 or a log with more users"
            )
        drawn = np.random.default_rng(seed).permutation(ids)
        return self.only_users(drawn[:count]), self.only_users(drawn[count:])

    def temporal_split(
        self, share: float, *, by: Literal["span", "events", "user", "draw"] = "span", seed: int = 0
    ) -> tuple["Logs", "Logs"]:
        """(train, test): earlier and later events, at one moment or per user (`by="user"`).

        Per user, the first `share` (at least one event) is train; ties are broken by seeded draws.
        `by="draw"` draws the `share` of each user whatever their time: train then knows the future
        of test, which is of use only to compare with figures published for such a split.
        """
        if by != "user" and by != "draw":
            moment = self.cut(share, by)
            return self._both_sides(self.before(moment), self.since(moment), f"split at {moment}")
        if not 0.0 < share < 1.0:
            raise ValueError(f"share must be inside (0, 1), got {share}")
        rank, count = self._rank_in_user(seed, timed=by == "user")
        first = np.maximum(np.floor(share * count + 1e-9), 1)  # (n,); 1e-9: .29 * 100 is 28.99...
        return self._split_rows(rank < first, f"split at {share} of each user's events")

    def leave_last_out(self, seed: int = 0) -> tuple["Logs", "Logs"]:
        """(train, test): the last event of each user who has two or more is test."""
        rank, count = self._rank_in_user(seed)
        return self._split_rows(
            (rank < count - 1) | (count == 1), "leaving out each user's last event"
        )

    def top_items(self, size: int, seed: int = 0) -> np.ndarray:
        """The up to `size` item ids with most purchase lines, (N,), most first; ties are drawn.

        A log without purchases counts all its lines. Items without a line are never among them.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        bought = self.events["behaviour"].isin(self.purchases).to_numpy()
        lines = self.events["item"][bought] if self.purchases else self.events["item"]
        ids = self.items["item"]
        count = ids.map(lines.value_counts()).fillna(0).to_numpy()  # (items,)
        draw = np.random.default_rng(seed).random(len(ids))  # (items,)
        order = np.lexsort((draw, -count))
        return ids.to_numpy()[order[: min(size, int((count > 0).sum()))]]

    def item_text(self) -> pd.Series:
        """Text per item, indexed by item id: the declared text columns joined, "" where none."""
        text = pd.Series("", index=self.items["item"].to_numpy(), dtype=object)
        for column in self.roles.item_text:
            part = self.items[column].astype(object)
            words = part.where(part.notna(), "").astype(str).str.strip().to_numpy(dtype=object)
            gap = np.where((text.to_numpy() != "") & (words != ""), ". ", "").astype(object)
            text = text + gap + words
        return text

    def fingerprint(self) -> str:
        """A hex digest of all content: equal logs, equal digest, in every process."""
        digest = hashlib.sha256(json.dumps([asdict(self.roles), self.purchases]).encode())
        for table in TABLES:
            frame = getattr(self, table)
            if frame is not None:
                digest.update(json.dumps([table, *map(str, frame.columns)]).encode())
                digest.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write one Parquet file per table and logs.json into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for table in TABLES:
            frame = getattr(self, table)
            if frame is not None:
                frame.to_parquet(folder / f"{table}.parquet", index=False)
            else:
                (folder / f"{table}.parquet").unlink(missing_ok=True)  # of a log saved here before
        about = {
            "format": FORMAT,
            "name": self.name,
            "purchases": self.purchases,
            "roles": asdict(self.roles),
            "notes": self.notes,
        }
        (folder / "logs.json").write_text(json.dumps(about, indent=1))

    @staticmethod
    def load(folder: Path | str) -> "Logs":
        """Read what `save` wrote."""
        folder = Path(folder)
        if not (folder / "logs.json").is_file():
            raise ValueError(f"{folder} holds no saved log (logs.json is missing): see Logs.save")
        about = json.loads((folder / "logs.json").read_text())
        if about["format"] != FORMAT:
            raise ValueError(
                f"{folder}: saved log has format {about['format']}, this version reads {FORMAT}: "
                "prepare it again"
            )
        files = {table: folder / f"{table}.parquet" for table in TABLES}
        frames = {table: pd.read_parquet(f) for table, f in files.items() if f.is_file()}
        roles = Roles(**{role: tuple(columns) for role, columns in about["roles"].items()})
        notes, purchases = tuple(about["notes"]), tuple(about["purchases"])
        return Logs(**frames, roles=roles, notes=notes, name=about["name"], purchases=purchases)

    def _rows(self, keep: np.ndarray) -> "Logs":
        """Keep the events where `keep` (n,) is true."""
        return replace(self, events=self.events[keep].reset_index(drop=True))

    def _where_time(self, moment: pd.Timestamp, *, before: bool) -> "Logs":
        def kept(time: pd.Series) -> np.ndarray:
            return (time < moment if before else time >= moment).to_numpy()

        relations = self.relations
        if relations is not None and "time" in relations:
            keep = kept(relations["time"]) | relations["time"].isna().to_numpy()
            relations = relations[keep].reset_index(drop=True)
        return replace(self._rows(kept(self.events["time"])), relations=relations)

    def _known(self, kind: str, table: pd.DataFrame, ids: Iterable[Any]) -> np.ndarray:
        """`ids` as an array, each of which `table` must know."""
        wanted = np.asarray(list(ids))
        unknown = wanted[~pd.Series(wanted).isin(table[kind]).to_numpy()]
        if len(unknown):
            raise ValueError(
                f"{self.name}: {len(unknown)} of {len(wanted)} {kind} ids are not in {kind}s, "
                f"the first {list(unknown[:3])}: {kind}s knows {table[kind].dtype} ids such as "
                f"{table[kind].head(3).tolist()}"
            )
        return wanted

    def _rank_in_user(self, seed: int, timed: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Rank (n,) of each event in its user's by time then seeded draw, and their number (n,)."""
        n = len(self)
        user = self.events["user"].factorize()[0]  # (n,)
        draw = np.random.default_rng(seed).random(
            n
        )  # (n,) by row: a new name of an item changes none
        time = self.events["time"].to_numpy() if timed else np.zeros(n)
        order = np.lexsort((draw, time, user))
        count = np.bincount(user)
        start = count.cumsum() - count
        rank = np.empty(n, dtype=np.int64)
        rank[order] = np.arange(n) - start[user[order]]
        return rank, count[user]

    def _split_rows(self, train: np.ndarray, how: str) -> tuple["Logs", "Logs"]:
        return self._both_sides(self._rows(train), self._rows(~train), how)

    def _both_sides(self, train: "Logs", test: "Logs", how: str) -> tuple["Logs", "Logs"]:
        for side, logs in (("train", train), ("test", test)):
            if not len(logs):
                raise ValueError(
                    f"{self.name}: {how} leaves no events in {side}, {len(self)} in the other: "
                    "choose another share or way to split, or give a longer log"
                )
        return train, test
