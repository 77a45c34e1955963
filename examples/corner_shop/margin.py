"""What the corner shop earns: two rewards of its own, one by a flat share, one by product."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from simulators.base import Response, SimSpec
from simulators.fitted import FittedSimulator

SHARE = 0.38  # of the price that is left, over all products
HANDLING = 0.30  # cost of taking one product from the shelf
PRODUCTS = Path(__file__).resolve().with_name("products.csv")


def flat(response: Response) -> Tensor:
    """What is left of what was bought, were the share the same for all products."""
    bought = response.chosen["buy"].float()  # (B, K)
    return SHARE * response.value - HANDLING * bought


def fit(spec: SimSpec, **settings: Any) -> FittedSimulator:
    """Users of `FittedSimulator.fit`, the value of whose purchases is the product's margin.

    For reward=revenue: a reward sees what was bought and for how much, not which product it was.
    """
    users = FittedSimulator.fit(spec, **settings)
    margin = pd.read_csv(PRODUCTS, dtype={"product": "str"}).set_index("product")["margin"]
    known = margin.reindex(users.catalog.ids)  # (N,) in the catalogue's order
    if known.isna().any():
        missing = list(known.index[known.isna()])
        raise ValueError(
            f"{PRODUCTS.name} must have a margin for every product, none for {missing}"
        )
    users.price = torch.tensor(known.to_numpy(), dtype=torch.float32, device=users.price.device)
    return users
