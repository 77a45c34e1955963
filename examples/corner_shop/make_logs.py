"""Write the files of a made-up corner shop beside this script: orders, products, a rule.

python examples/corner_shop/make_logs.py
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

FIRST_DAY = pd.Timestamp("2024-01-01")
DAYS = 280
CUSTOMERS, JUNIORS = 400, 60  # juniors have a card that begins with j
EVERY = 8.0  # days between two visits of a customer, on average
FAVOURITES, AGAIN, CURIOUS = 5, 0.35, 1.2  # chance of each favourite, other products expected
RETURNED = 0.04  # share of lines that come back
SLOW = 3.0  # days from an order to its payment, on average
SIZES = {"small": 1.0, "large": 1.8}  # times price and margin
SHELVES = {  # product: price, and what of it is left after the purchase
    "bread": {"rye loaf": (3.2, 1.3), "white rolls": (1.8, 0.9), "seed bread": (4.1, 1.9),
              "butter croissant": (1.6, 0.8), "oat biscuits": (2.4, 1.1), "flat bread": (2.2, 0.8)},
    "dairy": {"whole milk": (1.3, 0.2), "goat cheese": (5.2, 1.6), "plain yogurt": (1.1, 0.3),
              "salted butter": (2.9, 0.4), "oat drink": (1.9, 0.5), "soft cheese": (3.4, 1.0)},
    "fruit": {"red apples": (2.8, 1.2), "bananas": (1.9, 0.6), "lemons": (1.5, 0.7),
              "blue grapes": (3.6, 1.3), "pears": (2.9, 1.1), "dried figs": (4.4, 2.0)},
    "pantry": {"black tea": (3.9, 2.1), "ground coffee": (6.5, 1.4), "spaghetti": (1.4, 0.5),
               "olive oil": (8.9, 2.2), "tomato sauce": (2.1, 0.9), "wild honey": (5.8, 2.6)},
    "sweets": {"milk chocolate": (1.7, 0.8), "fruit gums": (1.5, 0.8), "salted nuts": (2.6, 1.2),
               "vanilla ice": (4.5, 1.7), "mint drops": (1.2, 0.7), "almond cake": (5.5, 2.4)},
    "wine": {"dry white wine": (7.5, 2.8), "red table wine": (6.9, 2.5), "light beer": (1.6, 0.4),
             "apple cider": (2.7, 0.9), "sparkling wine": (9.9, 3.9), "dark beer": (1.9, 0.5)},
}  # fmt: skip


def products() -> pd.DataFrame:
    """One row per product."""
    rows = [
        (f"{title}, {size}", shelf, round(times * price, 2), round(times * margin, 2))
        for shelf, titles in SHELVES.items()
        for title, (price, margin) in titles.items()
        for size, times in SIZES.items()
    ]
    table = pd.DataFrame(rows, columns=["title", "shelf", "shelf_price", "margin"])
    table.insert(0, "product", [f"P{100 + i}" for i in range(len(table))])
    return table


def orders(stock: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """One row per line of an order, with the moment of the order and the day of its payment."""
    price = stock["shelf_price"].to_numpy()
    alcohol = (stock["shelf"] == "wine").to_numpy()
    fame = rng.permutation(1.0 / np.arange(2.0, len(stock) + 2))  # (N,)
    rows = []
    for customer in range(CUSTOMERS):
        junior = customer < JUNIORS
        allowed = ~alcohol if junior else np.ones(len(stock), dtype=bool)
        chance = CURIOUS * fame / fame.sum()  # (N,)
        favourites = rng.choice(np.nonzero(allowed)[0], FAVOURITES, replace=False)
        chance[favourites] = AGAIN
        day = rng.exponential(EVERY)
        while day < DAYS:
            at = FIRST_DAY + pd.Timedelta(days=int(day), minutes=int(rng.normal(15, 3) % 24 * 60))
            cheaper = np.where(rng.random(len(stock)) < 0.1, 0.8, 1.0)  # this day's offers
            taken = np.nonzero((rng.random(len(stock)) < chance / cheaper) & allowed)[0]
            payment = at.normalize() + pd.Timedelta(days=int(rng.exponential(SLOW)))
            for item in taken:
                rows.append((
                    f"{'j' if junior else 'c'}{customer:03d}", f"{customer}-{int(day)}",
                    at.strftime("%Y-%m-%d %H:%M"), payment.strftime("%Y-%m-%d"),
                    stock["product"][item], 1 + int(rng.random() < 0.15),
                    round(float(price[item] * cheaper[item]), 2),
                    "returned" if rng.random() < RETURNED else "paid",
                ))  # fmt: skip
            day += 1.0 + rng.exponential(EVERY - 1.0)
    names = ["card", "order", "ordered", "paid_on", "product", "pieces", "price_each", "status"]
    return pd.DataFrame(rows, columns=names).sort_values("ordered", kind="stable")


def main(folder: Path, seed: int = 0) -> None:
    """Write orders.csv, products.csv and juniors.csv, who are not shown wine, into `folder`."""
    stock = products()
    stock.to_csv(folder / "products.csv", index=False)
    sold = orders(stock, np.random.default_rng(seed))
    sold.to_csv(folder / "orders.csv", index=False)
    juniors = [f"j{customer:03d}" for customer in range(JUNIORS)]
    rule = pd.DataFrame({"user": juniors, "category": "wine"})
    rule.to_csv(folder / "juniors.csv", index=False)
    print(f"{len(sold)} lines of orders, {len(stock)} products")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
