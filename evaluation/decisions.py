"""The decision log: what a policy saw and showed, with which propensity, and what came of it.

Parquet, one row per shown item. What the policy saw stands on slot 0 only, in lists without
padding.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from agents.base import Decision
from encoders.state import EMPTY, Observation

COLUMNS: dict[str, pa.DataType] = {
    "decision": pa.int64(),
    "slot": pa.int8(),
    "item": pa.int32(),
    "propensity": pa.float32(),  # given the items above it
    "marginal": pa.float32(),  # of the item at that slot; null where unknown
    "reward": pa.float32(),  # of the slot; the slots of a step sum to its reward
    "user": pa.int64(),  # row of the simulator's user table
    "episode": pa.int64(),
    "step": pa.int32(),
    "time": pa.timestamp("ms"),
    "terminated": pa.bool_(),
    "truncated": pa.bool_(),
    "policy_version": pa.int64(),
}
SEEN: dict[str, pa.DataType] = {
    "past": pa.int32(),
    "past_count": pa.float32(),
    "past_age": pa.float32(),
    "history": pa.int32(),
    "feedback": pa.float32(),  # behaviours of the first item, then of the second, ...
    "context": pa.float32(),
    "profile": pa.float32(),
    "excluded": pa.int32(),
}
META = ("catalog", "policy", "env", "adaptive")  # what every log says of itself
KEY = b"recplay"  # under which the parquet schema carries the metadata
DAY = 86_400_000  # milliseconds


def schema(behaviours: Sequence[str]) -> pa.Schema:
    """The columns of a log."""
    fields = [pa.field(name, kind) for name, kind in COLUMNS.items()]
    fields += [pa.field(name, pa.bool_()) for name in behaviours]
    fields += [pa.field(name, pa.list_(kind)) for name, kind in SEEN.items()]
    return pa.schema(fields)


def ragged(values: Tensor, keep: Tensor, first: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """Lists of `values` (B, M) where `keep` (B, M), on the rows `first` (R,) marks, else null."""
    lengths = np.zeros(len(first) + 1, dtype=np.int64)  # (R + 1,)
    lengths[1:][first] = keep.sum(dim=1).numpy()
    offsets = pa.array(lengths.cumsum().astype(np.int32))
    flat = pa.array(values[keep].numpy()).cast(kind)
    return pa.ListArray.from_arrays(offsets, flat, mask=pa.array(~first))


class DecisionWriter:
    """Writes steps to numbered parts; each appears whole or not at all, so any prefix is a log."""

    def __init__(
        self,
        folder: str | Path,
        *,
        behaviours: Sequence[str],
        meta: dict[str, Any],
        flush_rows: int = 50_000,
        resume: tuple[int, int] | None = None,
    ) -> None:
        """`resume` (parts, decisions) goes on behind so many parts; later ones are taken away."""
        missing = [key for key in META if key not in meta]
        if missing:
            raise ValueError(f"meta must say {', '.join(META)}, missing: {', '.join(missing)}")
        clash = sorted(set(behaviours) & ({*COLUMNS} | {*SEEN}))
        if clash:
            raise ValueError(f"behaviour {clash[0]!r} is a column of every log: rename it")
        self.folder = Path(folder)
        first, decided = resume or (0, 0)
        if resume is not None:
            for part in parts(self.folder)[first:]:
                part.unlink()
            if len(parts(self.folder)) < first:
                raise ValueError(
                    f"{self.folder} has {len(parts(self.folder))} parts, the run to go on with had "
                    f"written {first}: some were deleted, start the run anew"
                )
        elif parts(self.folder):
            raise ValueError(f"{self.folder} already holds a decision log: choose another folder")
        self.behaviours = tuple(behaviours)
        self.meta = {**meta, "behaviours": list(behaviours)}
        self.schema = schema(self.behaviours)
        self.flush_rows = flush_rows
        self.batches: list[pa.RecordBatch] = []
        self.rows, self.decisions, self.part = 0, decided, first

    def write(
        self,
        *,
        user: Tensor,
        episode: Tensor,
        step: Tensor,
        time: Tensor,
        decision: Decision,
        slot_reward: Tensor,
        chosen: dict[str, Tensor],
        terminated: Tensor,
        truncated: Tensor,
        obs: Observation,
        excluded: Tensor,
        policy_version: int = 0,
    ) -> None:
        """Add one step of B users with slates of K; `excluded` (B, M) items were forbidden."""
        possible(decision)
        obs, excluded, slate = obs.to("cpu"), excluded.cpu(), decision.slate.cpu()  # (B, K)
        b, k = slate.shape
        shown = slate != EMPTY  # (B, K)
        shown[:, 0] = True  # slot 0 carries what the policy saw, even when it shows nothing
        keep = shown.flatten().numpy()  # (B * K,) of them R rows: decisions in order, slots within
        slot = np.tile(np.arange(k), b)[keep]  # (R,)

        def each(x: Tensor) -> np.ndarray:  # one value a decision (B,) or a slot (B, K) to (R,)
            x = x.cpu() if x.ndim == 2 else x.cpu()[:, None].expand(b, k)
            return x.reshape(-1).numpy()[keep]

        propensity = each(torch.where(decision.slate == EMPTY, 1.0, decision.propensity))  # (R,)
        columns: dict[str, Any] = {
            "decision": each(self.decisions + torch.arange(b)),
            "slot": slot,
            "item": each(slate),
            "propensity": propensity,
            "marginal": pa.array(propensity, mask=slot > 0),  # at slot 0 the two are one
            "reward": each(slot_reward),
            "user": each(user),
            "episode": each(episode),
            "step": each(step),
            "time": each((time.double() * DAY).round().long()),
            "terminated": each(terminated),
            "truncated": each(truncated),
            "policy_version": np.full(len(slot), policy_version),
        }
        columns |= {name: each(chosen[name]) for name in self.behaviours}
        columns |= seen(obs, excluded, slot == 0)
        self.meta["sizes"] = sizes(obs, excluded)
        arrays = [pa.array(columns[f.name]).cast(f.type) for f in self.schema]
        self.batches.append(pa.record_batch(arrays, schema=self.schema))
        self.rows += len(slot)
        self.decisions += b
        if self.rows >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one part: first under another name, then renamed."""
        if not self.batches:
            return
        table = pa.Table.from_batches(self.batches)
        # steps of one episode side by side: what they saw is nearly the same and packs well
        table = table.sort_by([(c, "ascending") for c in ("user", "episode", "decision", "slot")])
        table = table.replace_schema_metadata({KEY: json.dumps(self.meta)})
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"part-{self.part:05d}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial, compression="zstd")
        os.replace(partial, path)
        self.batches, self.rows, self.part = [], 0, self.part + 1

    def close(self) -> None:
        """Write the rest."""
        self.flush()


def possible(decision: Decision) -> None:
    """Refuse a propensity that no logged action can have had."""
    bad = ~((decision.propensity > 0) & (decision.propensity <= 1)) & (decision.slate != EMPTY)
    if bad.any():
        row, slot = bad.nonzero()[0].tolist()
        raise ValueError(
            f"propensity must be in (0, 1], got {decision.propensity[row, slot].item()} in row "
            f"{row}, slot {slot}: a logged action cannot have been impossible"
        )


def sizes(obs: Observation, excluded: Tensor) -> dict[str, int]:
    """How wide each list was before its padding went."""
    wide = {name: getattr(obs, name).flatten(1).shape[1] for name in SEEN if name != "excluded"}
    return {**wide, "excluded": excluded.shape[1]}


def seen(obs: Observation, excluded: Tensor, first: np.ndarray) -> dict[str, pa.ListArray]:
    """What B policies saw, as list columns of R rows."""
    bought, shown = obs.past != EMPTY, obs.history != EMPTY  # (B, H), (B, L)
    feedback = obs.feedback.flatten(1)  # (B, L * F)
    answered = shown[:, :, None].expand(obs.feedback.shape).flatten(1)  # (B, L * F)
    lists = {
        "past": (obs.past, bought),
        "past_count": (obs.past_count, bought),
        "past_age": (obs.past_age, bought),
        "history": (obs.history, shown),
        "feedback": (feedback, answered),
        "context": (obs.context, torch.ones_like(obs.context, dtype=torch.bool)),
        "profile": (obs.profile, torch.ones_like(obs.profile, dtype=torch.bool)),
        "excluded": (excluded, excluded != EMPTY),
    }
    return {name: ragged(x, keep, first, SEEN[name]) for name, (x, keep) in lists.items()}


def parts(folder: str | Path) -> list[Path]:
    """The finished parts of a log, in order."""
    return sorted(Path(folder).glob("part-*.parquet"))


def first_part(folder: str | Path) -> Path:
    """The first part; a folder without one is an error."""
    found = parts(folder)
    if not found:
        raise ValueError(f"no decision log in {folder}: expected part-00000.parquet, found none")
    return found[0]


def meta(folder: str | Path) -> dict[str, Any]:
    """What the log says of itself: catalogue hash, policy, env, adaptive, behaviours."""
    path = first_part(folder)
    kept = pq.read_schema(path).metadata or {}
    if KEY not in kept:
        raise ValueError(
            f"{path} is not a decision log: its schema has no '{KEY.decode()}' metadata"
        )
    return json.loads(kept[KEY])


def table(folder: str | Path) -> pa.Table:
    """All finished parts, checked, rows in the order decided."""
    about = meta(folder)
    wanted = schema(about["behaviours"])
    found = []
    for path in parts(folder):
        part = pq.read_table(path)
        missing = [name for name in wanted.names if name not in part.column_names]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}: it has {', '.join(part.column_names)}"
            )
        found.append(part.select(wanted.names).cast(wanted))
    whole = pa.concat_tables(found).sort_by([("decision", "ascending"), ("slot", "ascending")])
    propensity = whole["propensity"].to_numpy()
    bad = ~((propensity > 0) & (propensity <= 1))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"propensity must be in (0, 1], got {propensity[row]} in row {row} of {folder}: "
            "a logged action cannot have been impossible"
        )
    return whole


def read(folder: str | Path) -> pd.DataFrame:
    """The log as a table, one row per shown item, in the order decided."""
    return table(folder).to_pandas()


def padded(lists: pa.ChunkedArray, width: int, empty: float) -> Tensor:
    """Lists of n rows to (n, width), padded on the right."""
    rows = lists.combine_chunks()
    lengths = rows.value_lengths().to_numpy()  # (n,)
    if (lengths > width).any():
        raise ValueError(f"lists of up to {lengths.max()} do not fit into {width} places")
    flat = rows.flatten().to_numpy(zero_copy_only=False)
    out = np.full((len(lengths), width), empty, dtype=flat.dtype)  # (n, width)
    out[np.arange(width) < lengths[:, None]] = flat
    return torch.from_numpy(out)


def seen_by(folder: str | Path) -> tuple[Observation, Tensor]:
    """What the policy saw at each of n decisions, in order, and the excluded ids (n, M).

    With it any agent's probabilities on the logged contexts can be recomputed.
    """
    whole, about = table(folder), meta(folder)
    log = whole.filter(pc.equal(whole["slot"], 0))
    width, f = about["sizes"], len(about["behaviours"])
    empty = {"past": EMPTY, "history": EMPTY, "excluded": EMPTY}
    wide = {name: padded(log[name], width[name], empty.get(name, 0)) for name in SEEN}
    wide["feedback"] = wide["feedback"].reshape(len(log), -1, f)  # (n, L, F)
    wide |= {name: wide[name].long() for name in empty}
    excluded = wide.pop("excluded")  # (n, M)
    return Observation(**wide), excluded
