"""Real and simulated visits side by side: features, distances between distributions, and a judge.

The judge is a classifier two-sample test (Lopez-Paz and Oquab, 2017): gradient boosting learns to
tell simulated visits from real ones, on other users than it is asked about. An AUC of .5 says that
it cannot. Intervals are bootstraps over users, who are the independent units.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from encoders.state import EMPTY
from simulators.base import Catalog, UserTable
from simulators.rhythm import Memory, hour_of, weekday_of
from simulators.visits import Lines

TOP = 100  # items that count as popular
FEATURES = (
    "size", "spend", "categories", "repeats", "repeat_age", "top_items", "hour", "weekday", "gap",
    "discount", "price", "entropy", "within", "to_history", "new_category",
)  # fmt: skip
FOLDS = 5
DRAWS = 200  # bootstrap samples of users


def visit_features(
    lines: Lines, catalog: Catalog, users: UserTable, memory: Memory
) -> pd.DataFrame:
    """One row a visit: FEATURES and `user`. `users` and `memory` are as they were before the first.

    size: distinct items; spend: log of its money; repeats: share of items the user had bought
    before; repeat_age: mean log days since; top_items: share among the TOP items of the catalogue;
    gap: log days since the last visit; discount: share of lines with one; price: mean log price;
    entropy: of its categories; within: mean cosine between its items; to_history: cosine of its
    mean with that of the past; new_category: share of items of categories never bought before.
    What is not defined (no past, a single item, no prices in the log) is nan.
    """
    n = int(lines.visit.max(initial=-1)) + 1
    first = np.searchsorted(lines.visit, np.arange(n))
    user, time = lines.user[first], lines.time[first]
    category = catalog.category.cpu().numpy()
    vectors = catalog.vectors.cpu().numpy().astype(np.float64)
    popular = np.zeros(len(catalog), bool)
    popular[np.argsort(-catalog.popularity.cpu().numpy(), kind="stable")[:TOP]] = True
    start = users.start.cpu().numpy()
    age = _days_since(lines, lines.item, users.past.cpu().numpy(), start, users)
    kinds = np.where(users.past.cpu().numpy() == EMPTY, EMPTY, category[users.past.cpu().numpy()])
    kind_age = _days_since(lines, category[lines.item], kinds, start, users)

    def mean(x: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        keep = np.isfinite(x) if where is None else where & np.isfinite(x)
        total = np.bincount(lines.visit[keep], x[keep], minlength=n)
        count = np.bincount(lines.visit[keep], minlength=n)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(total / count)

    size = np.bincount(lines.visit, minlength=n)
    summed = np.zeros((n, vectors.shape[1]))
    np.add.at(summed, lines.visit, vectors[lines.item])
    pairs = np.where(size > 1, size * (size - 1.0), np.nan)
    within = ((summed**2).sum(axis=1) - size) / pairs
    share = pd.DataFrame({"visit": lines.visit, "category": category[lines.item]})
    share = share.value_counts().rename("count").reset_index()
    p = share["count"].to_numpy() / size[share["visit"].to_numpy()]
    history = _history(users, vectors)[user]
    length = np.linalg.norm(summed, axis=1) * np.linalg.norm(history, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        to_history = np.where(length > 0, (summed * history).sum(axis=1) / length, np.nan)
    before = np.concatenate([[np.nan], time[:-1]])
    opening = np.concatenate([[True], user[1:] != user[:-1]])
    before = np.where(opening, memory.last[user], before)
    values = {
        "size": size, "spend": np.log1p(np.bincount(lines.visit, lines.value, minlength=n)),
        "categories": np.bincount(share["visit"], minlength=n), "repeats": mean(1.0 * (age >= 0)),
        "repeat_age": mean(np.log1p(np.maximum(age, 0.0)), age >= 0),
        "top_items": mean(1.0 * popular[lines.item]), "hour": hour_of(time),
        "weekday": weekday_of(time), "gap": np.log1p(np.maximum(time - before, 0.0)),
        "discount": mean(np.where(np.isfinite(lines.discount), 1.0 * (lines.discount > 0.01),
                                  np.nan)),
        "price": mean(np.log(np.maximum(lines.price, 0.01))),
        "entropy": np.bincount(share["visit"], -p * np.log(p), minlength=n), "within": within,
        "to_history": to_history, "new_category": mean(1.0 * ~(kind_age >= 0)),
    }  # fmt: skip
    return pd.DataFrame({name: values[name] for name in FEATURES} | {"user": user, "time": time})


def _days_since(
    lines: Lines, what: np.ndarray, past: np.ndarray, start: np.ndarray, users: UserTable
) -> np.ndarray:
    """Days (m,) since the user's last visit with the same `what`; nan for the first time."""
    row, place = np.nonzero(past != EMPTY)
    then = start[row] - users.past_age.cpu().numpy()[row, place]
    table = pd.DataFrame({
        "user": np.concatenate([row, lines.user]),
        "what": np.concatenate([past[row, place], what]),
        "time": np.concatenate([then, lines.time]),
        "line": np.concatenate([np.full(len(row), -1), np.arange(len(lines))]),
    }).sort_values(["user", "what", "time"], kind="stable")  # fmt: skip
    # several lines of one visit share its time: what was there before it is what counts
    at = table.groupby(["user", "what"], sort=False)["time"]
    earlier = at.shift().where(at.shift() < table["time"])
    earlier = earlier.groupby([table["user"], table["what"], table["time"]]).transform("min")
    table = table.assign(days=table["time"] - earlier)
    table = table[table["line"] >= 0].sort_values("line")
    return np.asarray(table["days"].to_numpy(np.float64))


def _history(users: UserTable, vectors: np.ndarray) -> np.ndarray:
    """Mean vector (U, D) of what was bought before."""
    past = users.past.cpu().numpy()
    known = past != EMPTY
    out = np.zeros((len(past), vectors.shape[1]))
    for row in range(len(past)):  # (H, D) at a time: (U, H, D) would be large
        if known[row].any():
            out[row] = vectors[past[row][known[row]]].mean(axis=0)
    return out


@dataclass(frozen=True)
class Distance:
    """A figure with a 95 % interval over users."""

    value: float
    low: float
    high: float


def ks(real: np.ndarray, simulated: np.ndarray) -> float:
    """Largest distance of two distribution functions (Kolmogorov and Smirnov)."""
    from scipy.stats import ks_2samp

    real, simulated = real[np.isfinite(real)], simulated[np.isfinite(simulated)]
    if not len(real) or not len(simulated):
        return float("nan")
    return float(ks_2samp(real, simulated).statistic)


def jensen_shannon(real: np.ndarray, simulated: np.ndarray) -> float:
    """Divergence of two lists of counts, in bits: 0 the same, 1 nothing in common (Lin, 1991)."""
    p, q = real / max(real.sum(), 1e-12), simulated / max(simulated.sum(), 1e-12)
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(x > 0, x * np.log2(x / m), 0.0).sum() for x in (p, q)]
    return float(sum(parts) / 2)


def over_users(
    figures: Mapping[str, tuple[str, Callable[[np.ndarray, np.ndarray], float]]],
    real: pd.DataFrame, simulated: pd.DataFrame, rng: np.random.Generator,
) -> dict[str, Distance]:  # fmt: skip
    """Figures (a column, and what to make of it), with intervals over users drawn anew."""
    users = np.union1d(real["user"], simulated["user"])
    rows_of = [_places(table) for table in (real, simulated)]
    nothing = np.zeros(0, np.int64)
    drawn: dict[str, list[float]] = {name: [] for name in figures}
    tables = [
        {c: t[c].to_numpy(np.float64) for c, _ in figures.values()} for t in (real, simulated)
    ]
    for _ in range(DRAWS):
        some = rng.choice(users, len(users))
        one, other = (np.concatenate([g.get(u, nothing) for u in some]) for g in rows_of)
        for name, (column, figure) in figures.items():
            drawn[name].append(figure(tables[0][column][one], tables[1][column][other]))
    return {
        name: spread(figure(*(t[column] for t in tables)), drawn[name])
        for name, (column, figure) in figures.items()
    }


def spread(value: float, drawn: list[float]) -> Distance:
    """A figure with the spread of its bootstrap samples about it.

    About it, not about their mean: samples of users differ by being samples, so that distances of
    theirs are too large on average.
    """
    low, high = value + np.nanpercentile(drawn, [2.5, 97.5]) - np.nanmean(drawn)
    return Distance(value, float(low), float(high))


def difference(real: np.ndarray, simulated: np.ndarray) -> float:
    """Of the means, simulated - real."""
    return float(np.nanmean(simulated) - np.nanmean(real))


def _places(table: pd.DataFrame) -> dict[int, np.ndarray]:
    """Rows of each user."""
    user = table["user"].to_numpy()
    order = np.argsort(user, kind="stable")
    starts = np.searchsorted(user[order], np.unique(user))
    return dict(zip(np.unique(user).tolist(), np.split(order, starts[1:]), strict=True))


def told_apart(
    real: pd.DataFrame, simulated: pd.DataFrame, rng: np.random.Generator
) -> tuple[Distance, dict[str, float]]:
    """AUC of the judge over users it did not learn from, and what it looks at most.

    What is named beside a feature is how much AUC is lost when that feature is shuffled.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    table = pd.concat([real, simulated], ignore_index=True)
    x, user = table[list(FEATURES)].to_numpy(np.float64), table["user"].to_numpy()
    label = np.repeat([0, 1], [len(real), len(simulated)])
    fold = rng.permutation(int(user.max()) + 1)[user] % FOLDS  # a user is in one fold
    score = np.zeros(len(x))
    shuffled = np.zeros((len(FEATURES), len(x)))
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        # what never varies, or is never logged, tells nothing (and cannot be binned)
        use = [f for f in range(len(FEATURES)) if varies(x[train, f])]
        model = HistGradientBoostingClassifier(
            max_iter=100, learning_rate=0.1, max_leaf_nodes=15, min_samples_leaf=50,
            l2_regularization=1.0, random_state=0, early_stopping=False,
        ).fit(x[train][:, use], label[train])  # fmt: skip
        score[test] = model.decision_function(x[test][:, use])
        shuffled[:, test] = score[test]
        for f in use:
            other = x[test].copy()
            other[:, f] = rng.permutation(other[:, f])
            shuffled[f, test] = model.decision_function(other[:, use])
    value = auc(score, label)
    loss = {name: value - auc(shuffled[f], label) for f, name in enumerate(FEATURES)}
    groups = [np.nonzero(user == u)[0] for u in np.unique(user)]
    drawn = []
    for _ in range(DRAWS):
        rows = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        drawn.append(auc(score[rows], label[rows]))
    return spread(value, drawn), dict(sorted(loss.items(), key=lambda pair: -pair[1]))


def varies(x: np.ndarray) -> bool:
    """Whether there are two different numbers."""
    known = x[np.isfinite(x)]
    return bool(len(known) and known.min() < known.max())


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """Chance that a simulated visit scores above a real one, ties half (Mann and Whitney, 1947)."""
    from scipy.stats import rankdata

    ones = int(label.sum())
    if not 0 < ones < len(label):
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[label == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(label) - ones)))
