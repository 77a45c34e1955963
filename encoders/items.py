"""Items to vectors: text, categories, numbers and behaviour, fused; what is missing is explicit."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, normalize

from encoders.text import centre
from sources.logs import Logs

MIN_BUYERS = 5  # fewer say little about who buys an item
RARE = 5  # a category with fewer items is pooled to "other"
COLD = 0.5  # share of a batch fitted as if nobody had bought it yet: what new items look like
BATCH = 512  # items whose mutual similarities make one step of fitting
OWN = ("text", "numbers", "behaviour")  # names of sources that no column may take


@dataclass(frozen=True)
class Source:
    """One thing known of N items, and of which of them it is known."""

    kind: Literal["vector", "category"]
    values: Tensor  # (N, d) float32 or (N,) int64; any value where absent
    present: Tensor  # (N,) bool
    cardinality: int = 0  # of a category


def interactions(logs: Logs, ids: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
    """Count purchases: CSR (users, N) float32 and the ids (users,) of those with at least one.

    A log that names no purchases counts all its events.
    """
    events = logs.events
    if logs.purchases:
        events = events[events["behaviour"].isin(logs.purchases)]
    column = _positions(ids, events["item"])  # (n,)
    inside = column >= 0
    row, users = pd.factorize(events["user"][inside], sort=True)
    one = np.ones(inside.sum(), dtype=np.float32)
    shape = (len(users), len(ids))
    counts = csr_matrix((one, (row, column[inside])), shape=shape)  # sums what occurs twice
    return counts, np.asarray(users)


def _positions(ids: np.ndarray, items: pd.Series) -> np.ndarray:
    """Outside item ids (n,) to their rows (n,) in the catalogue, -1 where not in it."""
    index = pd.Index(ids)
    if not index.is_unique:
        twice = index[index.duplicated()]
        raise ValueError(f"ids must be distinct, got {len(twice)} twice, the first {twice[0]!r}")
    return index.get_indexer(items)


def item_sources(
    logs: Logs,
    ids: np.ndarray,
    as_of: pd.Timestamp,
    text: tuple[Tensor, Tensor] | None,
    *,
    periods: int = 4,
    behaviour_dim: int = 64,
) -> dict[str, Source]:
    """Describe N items by name of source, from the items table and events before `as_of` only."""
    ids = np.asarray(ids)
    past = logs.before(as_of)
    if not len(past):
        raise ValueError(f"there are no events before as_of={as_of}: choose a later cut")
    known = logs.items.set_index("item")
    unknown = ids[~pd.Index(ids).isin(known.index)]
    if len(unknown):
        raise ValueError(
            f"ids must be in the items table, got {unknown[:3].tolist()} which are not"
        )
    columns = logs.roles.item_category + logs.roles.item_number
    if clash := set(columns) & set(OWN):
        raise ValueError(
            f"item columns {sorted(clash)} are named like sources of ours: rename them"
        )
    items = known.loc[ids]
    sources: dict[str, Source] = {}
    if text is not None:
        vectors, present = text
        if len(vectors) != len(ids):
            raise ValueError(f"text must have a row for each of {len(ids)} ids, got {len(vectors)}")
        _check_source("text", Source("vector", vectors, present))
        sources["text"] = Source("vector", centre(vectors, present), present)
    for name in logs.roles.item_category:
        sources[name] = _category(items[name])
    for name in logs.roles.item_number:
        sources[name] = _numbers(items[[name]].to_numpy(dtype=np.float64))
    sources["numbers"] = _numbers(_statistics(past, ids, as_of, periods))
    sources["behaviour"] = _behaviour(interactions(past, ids)[0], behaviour_dim)
    return sources


def _category(column: pd.Series) -> Source:
    """Code a column by its sorted values (N,); the rare share the last code."""
    value = column.astype(object).where(column.notna(), "").astype(str).str.strip()
    count = value[value != ""].value_counts()
    kept = sorted(count.index[count >= RARE])
    code = pd.Index(kept).get_indexer(value)  # (N,), -1 where rare or missing
    code = torch.from_numpy(np.where(code < 0, len(kept), code).astype(np.int64))
    present = torch.tensor((value != "").to_numpy())  # a copy: pandas' own is read-only
    return Source("category", code, present, len(kept) + 1)


def _numbers(table: np.ndarray) -> Source:
    """Standardise (N, d) by its complete rows; a row with a NaN is absent."""
    present = np.isfinite(table).all(axis=1)  # (N,)
    values = np.zeros_like(table)
    if present.any():
        whole = table[present]
        spread = whole.std(axis=0)
        values[present] = (whole - whole.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    return Source("vector", torch.from_numpy(values).float(), torch.from_numpy(present))


def _statistics(past: Logs, ids: np.ndarray, as_of: pd.Timestamp, periods: int) -> np.ndarray:
    """Log median unit price, discount share (where logged) and log popularity by period, (N, d)."""
    if periods < 1:
        raise ValueError(f"periods must be at least 1, got {periods}")
    events = past.events
    row = _positions(ids, events["item"])  # (n,)
    events, row = events[row >= 0], row[row >= 0]
    columns = []
    for name, statistic in (("price", "median"), ("discount", "mean")):
        if name in events:
            by_item = events[name].groupby(row).agg(statistic).reindex(range(len(ids)))
            number = by_item.to_numpy(dtype=np.float64)  # (N,), NaN where never logged
            columns.append(np.log(number) if name == "price" else number)
    start = past.events["time"].min()
    share = ((events["time"] - start) / (as_of - start)).to_numpy(
        dtype=np.float64
    )  # (n,) in [0, 1)
    period = np.minimum((share * periods).astype(np.int64), periods - 1)
    count = np.bincount(row * periods + period, minlength=len(ids) * periods)
    return np.column_stack([*columns, np.log1p(count.reshape(len(ids), periods))])


def _behaviour(counts: csr_matrix, dim: int) -> Source:
    """Who buys an item: its centred unit direction (N, dim) in an SVD of households x items."""
    buyers = np.bincount(counts.indices, minlength=counts.shape[1])  # (N,) distinct households
    present = torch.from_numpy(buyers >= MIN_BUYERS)
    weight = counts.astype(np.float64).log1p()
    length = np.sqrt(weight.multiply(weight).sum(axis=1)).A1  # (users,), none is 0
    weight = csr_matrix(weight.multiply(1.0 / length[:, None]))
    directions, strength = _truncated_svd(weight, dim)
    vectors = normalize(torch.from_numpy(directions * strength).float(), dim=1)
    return Source("vector", centre(vectors, present), present)


def _truncated_svd(matrix: Any, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right singular vectors (N, k) and values (k,), randomised (Halko et al., 2011)."""
    k = min(dim, *matrix.shape)
    width = min(k + 10, *matrix.shape)  # a few more than asked: sharper at the edge
    start = np.random.default_rng(seed).standard_normal((matrix.shape[1], width))
    basis = np.linalg.qr(matrix @ start)[0]  # (users, width)
    for _ in range(4):  # power iterations; each one re-orthogonalised
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    _, values, right = np.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    return right[:k].T, values[:k]


class ItemEncoder(nn.Module):
    """Fuse sources to item vectors (N, D): one token per source, gated sum, linear.

    A missing source is a learned token of its own, never zero: zero is what an average item has.
    """

    def __init__(self, sources: dict[str, Source], *, dim: int, generator: torch.Generator) -> None:
        super().__init__()

        def draw(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * scale)

        self.names = tuple(sources)
        self.widths = {n: _width(s) for n, s in sources.items()}
        self.project = nn.ParameterList(  # (d, D) each
            [
                draw(w, dim, scale=1.0 if sources[n].kind == "category" else w**-0.5)
                for n, w in self.widths.items()
            ]
        )
        count = len(sources)  # S
        self.missing = draw(count, dim, scale=0.1)
        self.source_type = draw(count, dim, scale=0.1)
        self.gate = draw(count, dim, scale=0.1 / math.sqrt(dim))
        self.gate_bias = nn.Parameter(torch.zeros(count))
        self.out = draw(dim, dim, scale=dim**-0.5)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(dim))

    @classmethod
    def fit(
        cls,
        sources: dict[str, Source],
        *,
        dim: int = 64,
        dropout: float = 0.2,
        steps: int = 300,
        seed: int = 0,
    ) -> "ItemEncoder":
        """Learn to reproduce who-buys-what similarity although sources are dropped at random.

        Dropping behaviour too, and more often, places an item that nobody bought yet by its text.
        Without behaviour there is nothing to learn from: the fusion stays a random projection.
        """
        if not sources or dim < 1 or not 0.0 <= dropout < 1.0:
            raise ValueError(
                "fit needs at least one source, dim of at least 1 and dropout in [0, 1), "
                f"got {len(sources)} sources, dim={dim}, dropout={dropout}"
            )
        generator = torch.Generator().manual_seed(seed)
        encoder = cls(sources, dim=dim, generator=generator)
        encoder._check(sources)
        behaviour = sources.get("behaviour")
        taught = behaviour.present.nonzero().squeeze(1) if behaviour else torch.zeros(0).long()
        if behaviour and len(taught) >= 2:
            optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
            dropped = torch.tensor([COLD if n == "behaviour" else dropout for n in sources])  # (S,)
            for _ in range(steps):
                pick = torch.randperm(len(taught), generator=generator)[:BATCH]
                rows = taught[pick]  # (M,)
                batch = {n: _rows(s, rows) for n, s in sources.items()}
                kept = torch.rand(len(rows), len(batch), generator=generator) >= dropped  # (M, S)
                loss = similarity_loss(encoder(batch, kept), batch["behaviour"].values)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            encoder.mean = normalize(encoder(sources), dim=1).mean(dim=0)
        return encoder.eval()

    def forward(self, sources: dict[str, Source], kept: Tensor | None = None) -> Tensor:
        """Sources of N items, those not `kept` (N, S) taken as missing, to fused rows (N, D)."""
        tokens, gates = self._tokens(sources, kept)
        return linear((gates[:, :, None] * tokens).sum(dim=1), self.out)

    @torch.no_grad()
    def vectors(self, sources: dict[str, Source]) -> Tensor:
        """Item vectors (N, D): centred by the mean of the catalogue fitted on, unit length."""
        self._check(sources)
        fused = normalize(self(sources), dim=1)
        centred = fused - self.mean
        # Where all items are alike the mean is the item: it keeps its direction instead of none.
        alone = centred.norm(dim=1, keepdim=True) < 1e-5  # (N, 1)
        return normalize(torch.where(alone, fused, centred), dim=1)

    @torch.no_grad()
    def gates(self, sources: dict[str, Source]) -> dict[str, float]:
        """Mean share of each source in the fused vectors, for a log."""
        self._check(sources)
        share = self._tokens(sources, None)[1].mean(dim=0)  # (S,)
        return dict(zip(self.names, share.tolist(), strict=True))

    def _tokens(self, sources: dict[str, Source], kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """One token per source (N, S, D) and its gate (N, S); the gates of an item sum to 1."""
        tokens = []
        for s, name in enumerate(self.names):
            source = sources[name]
            present = source.present if kept is None else source.present & kept[:, s]  # (N,)
            seen = layer_norm(self._project(s, source), self.source_type.shape[1:])  # (N, D)
            token = torch.where(present[:, None], seen, self.missing[s])
            tokens.append(token + self.source_type[s])
        stacked = torch.stack(tokens, dim=1)  # (N, S, D)
        score = (stacked * self.gate).sum(dim=2) + self.gate_bias  # (N, S)
        return stacked, score.softmax(dim=1)

    def _project(self, s: int, source: Source) -> Tensor:
        weight = self.project[s]  # (d, D)
        if source.kind == "category":
            return weight[source.values * source.present]  # absent ones may hold any code
        return torch.where(source.present[:, None], source.values, 0.0) @ weight

    def _check(self, sources: dict[str, Source]) -> None:
        """Refuse sources that are not those of this encoder, or that hold no numbers."""
        if tuple(sources) != self.names:
            raise ValueError(f"sources must be {self.names} in this order, got {tuple(sources)}")
        for name, source in sources.items():
            if _width(source) != self.widths[name]:
                raise ValueError(
                    f"source {name!r} must have width {self.widths[name]}, got {_width(source)}"
                )
            _check_source(name, source)


def similarity_loss(fused: Tensor, behaviour: Tensor) -> Tensor:
    """Mean squared error of the cosines between M items: of (M, D) to those of (M, d)."""
    unit, target = normalize(fused, dim=1), normalize(behaviour, dim=1)
    error = (unit @ unit.T - target @ target.T).square()  # (M, M), zero on the diagonal
    return error.sum() / (len(fused) * (len(fused) - 1))


def _width(source: Source) -> int:
    return source.cardinality if source.kind == "category" else source.values.shape[1]


def _rows(source: Source, rows: Tensor) -> Source:
    return Source(source.kind, source.values[rows], source.present[rows], source.cardinality)


def _check_source(name: str, source: Source) -> None:
    """Refuse values that cannot be encoded, unless their row is absent."""
    if source.kind == "vector":
        bad, what = ~source.values.isfinite().all(dim=1), "NaN or infinite"  # (N,)
    else:
        bad = (source.values < 0) | (source.values >= source.cardinality)  # (N,)
        what = f"outside [0, {source.cardinality})"
    rows = (bad & source.present).nonzero().squeeze(1).tolist()
    if rows:
        raise ValueError(
            f"source {name!r} is {what} in {len(rows)} rows, the first {rows[:5]}: "
            "mark what is missing in `present`"
        )
