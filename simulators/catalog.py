"""From a log before a cut to the `Catalog`: most bought products, texts, prices, vectors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from encoders.items import ItemEncoder, item_sources
from encoders.text import TextEncoder
from simulators.base import Catalog
from sources.cache import cached
from sources.logs import Logs

FORMAT = 1  # of a saved catalogue; raised when its content or meaning changes


def days(moment: pd.Timestamp) -> float:
    """Days since 1970-01-01."""
    return moment.timestamp() / 86_400


def catalog_from_logs(
    logs: Logs,
    *,
    size: int = 2000,
    cut: float = 0.9,
    dim: int = 64,
    model: str = "all-minilm-l6-v2",
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Catalog:
    """Describe the `size` products with most purchase lines before `cut` (share of the time span).

    Chosen, counted and encoded from events before the cut only. Made once per log and options.
    """
    check_catalog({"size": size, "cut": cut, "dim": dim})
    as_of = logs.cut(cut)
    past = logs.before(as_of)
    key = f"catalog {FORMAT} {past.fingerprint()} {size} {as_of} {dim} {model} {seed}"

    def make() -> Catalog:
        ids = past.top_items(size, seed)
        if len(ids) < 2:
            raise ValueError(
                f"{logs.name}: {len(ids)} products were bought before the cut at {as_of}, a "
                "catalogue needs 2: choose a later cut or a longer log"
            )
        texts = past.item_text().loc[ids].tolist()
        encoder = TextEncoder(model, device=device, progress=progress)
        sources = item_sources(past, ids, as_of, encoder.encode(texts))
        vectors = ItemEncoder.fit(sources, dim=dim, seed=seed).vectors(sources)
        return described(past, ids, texts, vectors, as_of)

    return cached(key, make, save_catalog, load_catalog, what="the catalogue")


def check_catalog(settings: Mapping[str, Any]) -> None:
    """Refuse what no catalogue can be; each message begins with the name of its setting."""
    for name in ("size", "dim"):
        if name in settings and settings[name] < 2:
            raise ValueError(f"{name} must be at least 2, got {settings[name]}")
    if "cut" in settings and not 0.0 < settings["cut"] < 1.0:
        raise ValueError(
            f"cut must be a share of the time span inside (0, 1), got {settings['cut']}: .9 keeps "
            "the last tenth to judge with"
        )


def described(
    past: Logs, ids: np.ndarray, texts: list[str], vectors: torch.Tensor, as_of: pd.Timestamp
) -> Catalog:
    """Put category, price and popularity of `ids` beside their texts and vectors."""
    items = past.items.set_index("item").loc[ids]
    events = past.events[past.events["behaviour"].isin(past.purchases)]
    row = pd.Index(ids).get_indexer(events["item"])  # (n,)
    visits = _visits(events)
    bought = pd.DataFrame({"row": row, "visit": visits})[row >= 0].drop_duplicates()
    count = np.bincount(bought["row"], minlength=len(ids))
    price = np.full(len(ids), np.nan)
    if "price" in events:
        median = events["price"].groupby(row).median()
        median = median[median.index >= 0]
        price[median.index] = median
    names, category = [""], np.zeros(len(ids), np.int64)
    if finest := finest_categories(past, ids):
        category, known = pd.factorize(items[finest[-1]].astype(object).fillna(""), sort=True)
        names = [str(name) for name in known]
    return Catalog(
        ids=ids,
        texts=texts,
        vectors=vectors,
        category=torch.from_numpy(category.astype(np.int64)),
        price=torch.from_numpy(price).float(),
        popularity=torch.from_numpy(count / max(1, len(np.unique(visits)))).float(),
        as_of=days(as_of),
        category_names=names,
    )


def _visits(events: pd.DataFrame) -> np.ndarray:
    """A number per visit of a user, (n,): the basket, or the day where baskets are not logged."""
    visit = events["basket"] if "basket" in events else events["time"].dt.floor("D")
    return pd.factorize(pd.MultiIndex.from_arrays([events["user"], visit]))[0]


def finest_categories(logs: Logs, ids: np.ndarray, count: int = 2) -> list[str]:
    """Up to `count` declared category columns that group items finest: finest first."""
    items = logs.items.set_index("item").loc[ids]
    levels = {c: items[c].nunique() for c in logs.roles.item_category}
    useful = [c for c, n in levels.items() if 2 <= n <= len(ids) / 2]
    return sorted(useful, key=lambda c: -levels[c])[:count]


def save_catalog(catalog: Catalog, path: Path) -> None:
    """Write a catalogue as one file of tensors and plain values."""
    state = vars(catalog) | {"ids": catalog.ids.tolist(), "ids_type": str(catalog.ids.dtype)}
    torch.save(state, path)


def load_catalog(path: Path) -> Catalog:
    """Read what `save_catalog` wrote."""
    state = torch.load(path, weights_only=True)
    kind = state.pop("ids_type")
    return Catalog(**state | {"ids": np.array(state["ids"], dtype=kind)})
