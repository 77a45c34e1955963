"""Offers: what items cost today where that is not what they usually do, from a table."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from simulators.base import Catalog
from simulators.prices import CHEAPEST, Elasticity
from simulators.settings import check_offers


def read_offers(path: str | Path, catalog: Catalog) -> tuple[Tensor, Tensor]:
    """Today's shelf price over the usual one, and the share of it left to pay; (N,) each.

    The file has rows of `item`, and `price` (money, before the discount), `discount` (a share of
    it), or both. Items that it does not name cost what they usually do.
    """
    file = Path(path)
    check_offers(file)
    try:
        table = pd.read_csv(file, dtype="str")
    except (ValueError, OSError) as error:  # of encodings and empty files too
        raise ValueError(
            f"offers ({file}) cannot be read: {error}: give a CSV in UTF-8 with a line of names"
        ) from None
    names = [str(name) for name in table]
    if "item" not in names or not {"price", "discount"} & set(names):
        hint = ": its separator must be a comma" if ";" in "".join(names) else ""
        raise ValueError(
            f"offers ({file}): expected the columns item, and price (money) or discount (a share) "
            f"or both, got {', '.join(names)}{hint}"
        )
    if not len(table):
        raise ValueError(f"offers ({file}) has no lines: leave offers out, or null")
    ids = pd.Index(catalog.ids).astype(str)
    row = ids.get_indexer(table["item"].astype(str))
    if (row < 0).any():
        raise ValueError(
            f"offers ({file}): {int((row < 0).sum())} of {len(row)} items are not in the catalogue "
            f"of {len(catalog)}, such as {table['item'][row < 0].iloc[0]!r}: leave them out or "
            "enlarge the catalogue (env.catalog.size)"
        )
    if table["item"].duplicated().any():
        twice = table["item"][table["item"].duplicated()].iloc[0]
        raise ValueError(f"offers ({file}): item {twice!r} stands there twice: give it one row")
    shelf, left = torch.ones(len(catalog)), torch.ones(len(catalog))
    usual = catalog.price.cpu().numpy()[row]
    if "price" in table:
        price = pd.to_numeric(table["price"], errors="coerce").to_numpy(np.float64)
        gone = table["price"].isna().to_numpy()  # not given: as usual
        wrong = ~gone & ~((price > 0) & np.isfinite(price) & np.isfinite(usual) & (usual > 0))
        refuse(
            table,
            wrong,
            file,
            "price",
            "a number above 0 (3.50), of an item that has a price in the log",
        )
        shelf[row] = torch.from_numpy(np.where(gone, 1.0, price / usual)).float()
    if "discount" in table:
        off = pd.to_numeric(table["discount"], errors="coerce").to_numpy(np.float64)
        gone = table["discount"].isna().to_numpy()
        wrong = ~gone & ~((off >= 0) & (off <= 1 - CHEAPEST))  # the fit knows no larger ones
        refuse(table, wrong, file, "discount", f"a share from 0 to {1 - CHEAPEST:g}")
        left[row] = torch.from_numpy(np.where(gone, 1.0, 1.0 - off)).float()
    return shelf, left


def refuse(table: pd.DataFrame, wrong: np.ndarray, file: Path, column: str, wanted: str) -> None:
    """Say which value of a column cannot be used."""
    if wrong.any():
        first = int(wrong.nonzero()[0][0])
        raise ValueError(
            f"offers ({file}), line {first + 2}: {column} must be {wanted}, got "
            f"{table[column].iloc[first]!r} for item {table['item'].iloc[first]!r}"
        )


def with_offers(
    catalog: Catalog, path: str | Path, elasticity: Elasticity | None
) -> tuple[Catalog, Tensor]:
    """The catalogue at the prices of today, and what they add to theta, (N,)."""
    if elasticity is None:
        raise ValueError(
            f"offers ({path}): the log does not tell how purchases answer to prices: it has none, "
            "or they hardly change; leave offers out"
        )
    shelf, left = read_offers(path, catalog)
    price = catalog.price * (shelf * left).to(catalog.price.device)
    return replace(catalog, price=price), elasticity.shift(shelf, left)
