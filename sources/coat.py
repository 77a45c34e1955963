"""Coat Shopping (Schnabel et al., 2016): ratings of coats that users chose, and of random ones.

Read as a log for the question what the mean rating would be if nobody chose: a row is a rating,
`propensity` the chance that this user rated this coat, and `uniform` the same for a shop that asks
as many questions but prefers no pair. Their ratio is the weight of inverse propensity scoring.
"""

from pathlib import Path

import numpy as np

from sources.bandits import BanditLog

FILES = ("train.ascii", "test.ascii", "propensities.ascii.gz", "user_features.ascii",
         "user_features_map.txt", "item_features.ascii", "item_features_map.txt")  # fmt: skip


def coat(path: Path | str, test: bool = False) -> BanditLog:
    """The self-selected ratings of the folder `path`, or with `test` those of random coats."""
    folder = Path(path)
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise ValueError(f"no {', '.join(missing)} in {folder}: give the folder of the Coat files")
    kind = "test" if test else "train"
    ratings = _matrix(folder / f"{kind}.ascii")  # (U, A), 0 where unrated
    users, items = ratings.shape
    bad = ~np.isin(ratings, range(6))
    if bad.any() or not ratings.any():
        where = np.argwhere(bad)[0].tolist() if bad.any() else []
        raise ValueError(
            f"{kind}.ascii must hold ratings 1..5, and 0 where there is none, got "
            f"{ratings[tuple(where)] if where else 'only 0'}{f' at {where}' if where else ''}"
        )
    profile, profile_names = _features(folder, "user", users)  # (U, d)
    coats, coat_names = _features(folder, "item", items)  # (A, f)
    user, item = np.nonzero(ratings)  # (n,) each
    share = len(user) / ratings.size  # of pairs rated: what it is for each, if none is preferred
    propensity = np.full(len(user), share)  # (n,) the random test asked for each pair alike
    notes = [f"{users} users, {items} coats, {len(user)} ratings, self-selected: {not test}"]
    if not test:
        rated = _matrix(folder / "propensities.ascii.gz")  # (U, A)
        if rated.shape != ratings.shape:
            raise ValueError(
                f"propensities.ascii.gz is {rated.shape}, train.ascii {ratings.shape}: "
                "give files of one copy of the data"
            )
        propensity = rated[user, item]
        odd = ~((propensity > 0) & (propensity <= 1))
        if odd.any():
            row = int(odd.argmax())
            raise ValueError(
                f"propensities must be in (0, 1], got {propensity[row]} for user {user[row]}, item "
                f"{item[row]}, which is rated: a logged rating cannot have been impossible"
            )
        notes += [
            "propensities are the data set's own model of who rates what, not known by design"
        ]
    return BanditLog(
        name=f"coat/{kind}",
        action=item.astype(np.int64),
        reward=ratings[user, item],
        propensity=propensity,
        uniform=np.full(len(user), share),
        context=profile[user],
        context_names=profile_names,
        num_actions=items,
        item_features=coats,
        item_feature_names=coat_names,
        cluster=user.astype(np.int64),
        notes=notes,
    )


def _matrix(path: Path) -> np.ndarray:
    """Numbers by row; a file cut off in a line is an error that names it."""
    try:
        return np.loadtxt(path, ndmin=2)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a table of numbers ({error}): fetch it again") from error


def _features(folder: Path, kind: str, rows: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """One-hot features (rows, f) of users or items, and their names."""
    features = _matrix(folder / f"{kind}_features.ascii")
    names = tuple((folder / f"{kind}_features_map.txt").read_text().split("\n"))
    names = tuple(name.strip() for name in names if name.strip())
    if features.shape != (rows, len(names)):
        raise ValueError(
            f"{kind}_features.ascii must be ({rows}, {len(names)}), one row per {kind} and one "
            f"column per line of {kind}_features_map.txt, got {features.shape}"
        )
    return features, names
