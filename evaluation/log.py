"""The rows a policy logged, from arrays or from files that are never loaded whole."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import log_checks as checks
from evaluation.batch import EMPTY, ArrayRows, Batch, Rows, cut
from evaluation.log_files import ROWS, FileRows, Piece
from evaluation.terms import Groups

Array = np.ndarray
ROW = ("action", "reward", "propensity", "marginal", "joint", "context")
PLACE = ("slot", "decision", "episode", "step", "cluster", "logger")
FIELDS = (*ROW, *PLACE)
UNITS = {"episode": "episode", "slate": "decision"}  # what is kept whole, and by which ids
NEEDS = {"step": "episode", "joint": "decision"}
POOLINGS = ("balanced", "naive")


class DecisionLog:
    """What a policy showed, with which probability, and what came of it; in batches, lazily."""

    def __init__(
        self,
        rows: Rows,
        *,
        support: Any = None,
        num_actions: int | None = None,
        reward_range: tuple[float, float] | None = None,
        pooling: str = "balanced",
        adaptive: bool = False,
        estimated: bool = False,
        meta: Mapping[str, Any] | None = None,
        beside: Piece | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self._rows, self._support, self._pooling = rows, support, pooling
        self._beside, self._extra = beside or {}, tuple(extra)  # beside: columns by row of the log
        self._order = getattr(rows, "order", None)
        self._fields = {*rows.names, *self._beside} - {*self._extra}
        listed = None if not isinstance(support, np.ndarray) else items_of(support)
        self._given_actions = listed if num_actions is None else num_actions
        self._given_range, self._checked = reward_range, False
        self._found: dict[str, Any] = {}  # what complete passes saw
        self.num_rows = rows.num_rows
        self.adaptive, self.estimated, self.meta = adaptive, estimated, dict(meta or {})
        self.unit = next((u for u, c in UNITS.items() if c in self._fields), "row")
        self._check_fields()

    @classmethod
    def from_arrays(
        cls,
        *,
        action: Any,
        reward: Any,
        propensity: Any = None,
        context: Any = None,
        slot: Any = None,
        decision: Any = None,
        episode: Any = None,
        step: Any = None,
        cluster: Any = None,
        support: Any = None,
        marginal: Any = None,
        joint: Any = None,
        logger: Any = None,
        num_actions: int | None = None,
        reward_range: tuple[float, float] | None = None,
        columns: Mapping[str, Any] | None = None,
        pooling: str = "balanced",
        adaptive: bool = False,
        estimated: bool = False,
    ) -> "DecisionLog":
        """One entry per row and field, in any order; all of it is checked now.

        `propensity` is (n,), None where unknown, or (n, J) of J loggers with `logger` (n,); the
        pooled propensity is their mean by share (Agarwal et al., 2017) or the row's own (naive).
        """
        given = {
            "action": action, "reward": reward, "propensity": propensity, "marginal": marginal,
            "joint": joint, "context": context, "slot": slot, "decision": decision,
            "episode": episode, "step": step, "cluster": cluster, "logger": logger,
        }  # fmt: skip
        extra = {name: checks.as_array(x) for name, x in (columns or {}).items()}
        clash = sorted({*extra} & {*FIELDS})
        if clash:
            raise ValueError(f"columns hold what is no field, got {clash[0]!r}: rename it")
        given = {name: checks.as_array(x) for name, x in given.items() if x is not None}
        n = checks.check_shapes({**given, **extra}, free=("propensity", "context", *extra))
        arrays = {name: checks.typed(name, x, checks.named) for name, x in given.items()}
        log = cls(
            ArrayRows({**arrays, **extra}, order_of(arrays)), support=known_support(support, n),
            num_actions=num_actions, reward_range=reward_range, pooling=pooling,
            adaptive=adaptive, estimated=estimated, extra=tuple(extra),
        )  # fmt: skip
        log._pass((*FIELDS, "support"))
        log._checked = True
        return log

    @classmethod
    def from_frame(
        cls, frame: Any, columns: Mapping[str, str | Sequence[str]], **given: Any
    ) -> "DecisionLog":
        """`columns` says which of a frame's (pandas, Polars, Arrow) is which of our fields."""
        arrays = {
            name: frame[theirs]
            if isinstance(theirs, str)
            else np.column_stack([np.asarray(frame[each]) for each in theirs])
            for name, theirs in columns.items()
        }
        return cls.from_arrays(**{"propensity": None, **arrays, **given})

    @classmethod
    def scan(
        cls,
        where: str | Path | Sequence[str | Path],
        *,
        columns: Mapping[str, str | Sequence[str]],
        extra: Sequence[str] = (),
        support: Any = None,
        num_actions: int | None = None,
        reward_range: tuple[float, float] | None = None,
        pooling: str = "balanced",
        adaptive: bool | None = None,
        estimated: bool = False,
    ) -> "DecisionLog":
        """Parquet or CSV files (a path, folder, glob or list); rows are checked when read.

        `columns`: our field to the file's column (for context to one of lists, or to several).
        `extra`: columns for targets that name one. Slates and episodes stand row by row, in order.
        An id that comes back batches later with a full slate of its own passes for another one.
        """
        unknown = sorted({*columns} - {*FIELDS}) + sorted({*extra} & {*FIELDS})
        if unknown:
            raise ValueError(
                f"columns name our fields ({', '.join(FIELDS)}) and extra all others, got "
                f"{unknown[0]!r}"
            )
        if not {"action", "reward"} <= {*columns}:
            raise ValueError(f"columns must name action and reward, got {', '.join(columns)}")
        files = FileRows(where, columns, extra)
        meta = files.meta()
        return cls(
            files, support=known_support(support, files.num_rows), num_actions=num_actions,
            reward_range=reward_range, pooling=pooling, estimated=estimated, meta=meta, extra=extra,
            adaptive=bool(meta.get("adaptive", False) if adaptive is None else adaptive),
        )  # fmt: skip

    def with_propensity(self, propensity: Any, *, estimated: bool = True) -> "DecisionLog":
        """The same rows with these propensities (n,)."""
        p = checks.typed("propensity", propensity, checks.named)
        if p.shape != (self.num_rows,):
            raise ValueError(f"propensity must be ({self.num_rows},), one a row, got {p.shape}")
        log = DecisionLog(
            self._rows, support=self._support, num_actions=self._given_actions,
            reward_range=self._given_range, adaptive=self.adaptive, estimated=estimated,
            meta=self.meta, beside={**self._beside, "propensity": p}, extra=self._extra,
        )  # fmt: skip
        log._found = dict(self._found)
        log._pass(("propensity",))
        log._checked = self._checked
        return log

    def has(self, name: str) -> bool:
        """Whether batches can carry this field, support, or extra column."""
        if name == "support":
            return self._support is not None
        return name in self._fields or name in self._extra

    @property
    def num_actions(self) -> int:
        """Given, or known from the support, or one more than the largest action."""
        if self._given_actions is not None:
            return self._given_actions
        return int(self._seen("num_actions", "action"))

    @property
    def reward_range(self) -> tuple[float, float]:
        """Given, or observed."""
        if self._given_range is not None:
            return self._given_range
        low, high = self._seen("reward_range", "reward")
        return low, high

    @property
    def horizon(self) -> int:
        """Rows or steps of the longest episode or slate; 1 without either."""
        return 1 if self.unit == "row" else int(self._seen("horizon", UNITS[self.unit]))

    def batches(self, rows: int = ROWS, columns: Sequence[str] | None = None) -> Iterator[Batch]:
        """At most about `rows` at a time, as often as asked; only `columns` are read, or all."""
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        names = self._wanted(columns)
        key = None if self.unit == "row" else UNITS[self.unit]
        seen: dict[str, Any] = {}
        start = 0
        for piece in cut(self._rows.pieces(names), key, rows):
            n = len(next(iter(piece.values())))
            at = slice(start, start + n)
            numbers = np.arange(start, start + n) if self._order is None else self._order[at]
            batch = self._batch(piece, numbers, columns)
            if not self._checked:
                self._check(batch, seen)
            yield batch
            start += n
        self._found.update(seen)

    def _seen(self, what: str, column: str) -> Any:
        if what not in self._found:
            self._pass((column,))
        return self._found[what]

    def _pass(self, columns: Sequence[str]) -> None:
        """Read these columns once, for what checking them tells."""
        for _ in self.batches(columns=[name for name in columns if self.has(name)]):
            pass

    def _wanted(self, columns: Sequence[str] | None) -> list[str]:
        """Columns to read for those asked for: with them what groups rows and empties slots."""
        asked = {*self._fields, *self._extra} if columns is None else {*columns} - {"support"}
        unknown = sorted(name for name in asked - {*FIELDS} if not self.has(name))
        if unknown:
            has = ", ".join([*sorted(self._fields), *self._extra])
            raise ValueError(f"the log has no column {unknown[0]!r}, it has: {has}")
        if columns is not None and "support" in columns:
            asked |= {
                "context",
                *getattr(self._support, "needs", ()),
            }  # what a policy is asked with
        asked &= {*self._fields, *self._extra}
        if self.unit != "row":
            asked |= {"decision", "slot", "episode", "step"} & self._fields
        if asked & {"propensity", "marginal"} or asked <= {*self._beside}:
            asked.add("action")
        if "propensity" in asked - {*self._beside} and "logger" in self._fields:
            asked.add("logger")
        return [name for name in self._rows.names if name in asked - {*self._beside}]

    def _batch(self, piece: Piece, rows: Array, columns: Sequence[str] | None) -> Batch:
        """Types, pooled propensities, certain empty slots and the places that the log left out."""
        beside = [n for n in self._beside if columns is None or n in columns]
        raw = {**piece, **{name: self._beside[name][rows] for name in beside}}
        where = self._where(rows)
        have = {n: checks.typed(n, x, where) for n, x in raw.items() if n not in self._extra}
        if have.get("propensity", rows).ndim == 2:
            have["propensity"] = self._pool(have["propensity"], have.get("logger"), where)
        if self._slots() and "action" in have:
            empty = have["action"] == EMPTY  # (n,)
            for name in {"propensity", "marginal"} & {*have} if empty.any() else ():
                have[name] = np.where(empty, 1.0, have[name])  # nothing else could stand there
        for ids, order in (("decision", "slot"), ("episode", "step")):
            if ids in have and order not in have:
                have[order] = checks.place_of(checks.starts_of(have[ids]), len(rows))
        fields: dict[str, Any] = {**dict.fromkeys(ROW[:3]), **have}
        fields |= self._support_of(rows, columns)
        extra = {name: piece[name] for name in self._extra if name in piece}
        return Batch(rows=rows, columns=extra, **fields)

    def _support_of(self, rows: Array, columns: Sequence[str] | None) -> dict[str, Any]:
        if self._support is None or not (columns is None or "support" in columns):
            return {}
        if not isinstance(self._support, np.ndarray):
            return {"logging_policy": self._support}
        at = slice(rows[0], rows[-1] + 1) if self._order is None else rows
        some = self._support[at]
        return {"support" if some.dtype == bool else "listed": some}

    def _check(self, batch: Batch, seen: dict[str, Any]) -> None:
        """Refuse what cannot be, and note what was seen."""
        where = self._where(batch.rows)
        if batch.action is not None:
            top = checks.check_action(batch.action, self._given_actions, self._slots(), where)
            seen["num_actions"] = max(seen.get("num_actions", 0), top + 1)
        if batch.reward is not None:
            low, high = checks.check_reward(batch.reward, self._given_range, where)
            so_far = seen.get("reward_range", (low, high))
            seen["reward_range"] = (min(low, so_far[0]), max(high, so_far[1]))
        for name in ("propensity", "marginal", "joint"):
            p = getattr(batch, name)
            if p is not None:
                checks.check_probability(name, p, where)
        if batch.context is not None:
            checks.check_context(batch.context, where)
        if batch.action is not None:
            checks.check_support(batch, where)
        if self.unit != "row":
            longest = checks.check_groups(batch, not self.estimated, where)
            seen["horizon"] = max(seen.get("horizon", 1), longest)

    def _where(self, rows: Array) -> checks.Where:
        return lambda row: self._rows.where(int(rows[row]))

    def _slots(self) -> bool:
        return bool(self._fields & {"slot", "decision"})

    def _pool(self, each: Array, logger: Array | None, where: checks.Where) -> Array:
        """Propensities (n, J) of J loggers to those of the log as a whole, (n,)."""
        if logger is None or self.unit != "row":
            raise ValueError(
                "propensity (n, J) is of J loggers: give `logger` (n,), which of them showed the "
                "row, and neither decision nor episode; or give propensity (n,)"
            )
        checks.check_logger(logger, each.shape[1], where)
        own = each[np.arange(len(each)), logger]  # (n,)
        checks.check_probability("propensity", own, where)  # those of the others may be 0
        if self._pooling == "naive":
            return own
        if "shares" not in self._found:
            counts = np.zeros(each.shape[1])
            for piece in self._rows.pieces(["logger"]):
                counts += np.bincount(
                    checks.whole("logger", piece["logger"], where), minlength=len(counts)
                )[: len(counts)]
            self._found["shares"] = counts / counts.sum()
        return each @ self._found["shares"]

    def _check_fields(self) -> None:
        """Refuse an empty log, fields that need another, and unknown pooling."""
        if not self.num_rows:
            raise ValueError("the log is empty: expected at least one row")
        if self._pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self._pooling!r}")
        for name, needs in NEEDS.items():
            if name in self._fields and needs not in self._fields:
                raise ValueError(f"{name} needs {needs}: give {needs} as well, or leave {name} out")
        if {"decision", "episode"} <= self._fields and "step" not in self._fields:
            raise ValueError("episodes of slates need step: say which step each decision is")


def order_of(arrays: Piece) -> Array | None:
    """Rows such that slates and episodes are whole and in order; None if they are."""
    ids = arrays.get("episode", arrays.get("decision"))
    if ids is None:
        return None
    slot, step = arrays.get("slot"), arrays.get("step")
    if "episode" not in arrays:
        step = slot
    elif "decision" in arrays and slot is not None and step is not None:
        step = step * (int(slot.max()) + 1) + slot  # slots of a step side by side
    order = Groups(ids, step).order
    return None if isinstance(order, slice) else order


def known_support(support: Any, n: int) -> Any:
    """(n, A) bool or (n, m) int64 arrays; a logging policy stays what it is."""
    if support is None or callable(support) or hasattr(support, "distribution"):
        return support
    x = checks.as_array(support)
    if x.ndim != 2 or len(x) != n or x.dtype.kind not in "biu":
        raise ValueError(
            f"support must be ({n}, A) bool, ({n}, m) item ids with -1 behind the last, or the "
            f"logging policy, got {x.dtype} of shape {x.shape}: of probabilities give `pi > 0`"
        )
    return x if x.dtype == bool else x.astype(np.int64, copy=False)


def items_of(support: Array) -> int:
    """Number of items that a support knows."""
    return support.shape[1] if support.dtype == bool else int(support.max(initial=-1)) + 1
