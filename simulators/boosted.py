"""A second opinion on what is bought: boosted trees in the place of the net of preference.py.

Policies learn by playing against the net; what they learn of its own mistakes pays nothing here.
Same log, same trips, same features and same item-to-item weights, another class of functions:
gradient boosted trees (Friedman, 2001) on histograms, of scikit-learn. What a simulated user does
with a slate beside that (habits, choice, assumptions) is `FittedSimulator`'s.

Trees are kept as tensors, so that a fit is stored without code and runs on any device. Trees jump:
so features are taken in float64 and rounded, and sums of leaves are exact, and a household's logits
are the same bit by bit in any batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, softplus

from encoders.state import EMPTY
from simulators.base import Catalog, SimSpec
from simulators.fit import fit_once, load_state, user_table
from simulators.fitted import FittedSimulator, with_display
from simulators.habits import Habits
from simulators.preference import RECENT, ItemFacts, Preference
from simulators.preference_fit import sample_pairs
from simulators.settings import Assumptions, check_display, check_settings
from simulators.trips import Trips

FORMAT = 5  # of a saved fit; raised when its content or meaning changes
DEPTH, LEAVES, RATE = 6, 31, 0.1  # of a tree, and the share of each tree that is added
LEAST, RIDGE = 200, 10.0  # rows of a leaf, and what draws it to 0: pairs never bought say little
MOST = 20_000  # trips that trees are grown on: about 1.5 million pairs
HELD = 0.15  # share of households that trees are not grown on: they say how many are enough
EXACT = 2.0**32  # leaf values are multiples of 1 / EXACT: float64 adds them without rounding
BINS, BINNED = 255, 200_000  # bins of a feature, and rows that they are found on
ROWS = 512  # pairs sent through all trees at once: what is held stays in the processor's cache


@dataclass(frozen=True)
class Trees:
    """T trees of one depth D as heaps: the children of node i are 2 i + 1 and 2 i + 2."""

    feature: Tensor  # (T, 2^D - 1) int32: column looked at
    threshold: Tensor  # (T, 2^D - 1) float32: above it to the second child
    value: Tensor  # (T, 2^D) float64 of the leaves, left to right


NO_TREES = Trees(
    torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1), torch.zeros(1, 2).double()
)


def grow(x: Tensor, label: Tensor, weight: Tensor, trees: int, seed: int) -> Trees:
    """Boost log-odds of `label` (m,) given rows x (m, F), each standing for `weight` (m,) rows."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    edges = bin_edges(x, np.random.default_rng(seed))
    columns = [np.searchsorted(edge, x[:, f].numpy()) for f, edge in enumerate(edges)]
    model = HistGradientBoostingClassifier(
        learning_rate=RATE,
        max_iter=trees,
        max_leaf_nodes=LEAVES,
        max_depth=DEPTH,
        min_samples_leaf=LEAST,
        l2_regularization=RIDGE,
        early_stopping=False,
        random_state=seed,
    )
    codes = np.stack(columns, axis=1).astype(np.float32)  # (m, F) numbers of bins
    model.fit(codes, label.numpy(), sample_weight=weight.numpy())
    return trees_of(model, edges)


def bin_edges(x: Tensor, rng: np.random.Generator) -> list[np.ndarray]:
    """Where trees may cut each column of x (m, F): between quantiles, all rows counting once.

    Left to scikit-learn, rows would count by their weight: nearly all bins would lie among pairs of
    which nothing is known, and what a household buys again and again would share the few left.
    """
    some = x[np.sort(rng.permutation(len(x))[:BINNED])].numpy()
    edges = []
    for column in some.T:
        values, rows = np.unique(column, return_counts=True)
        if len(values) > BINS:
            share = np.linspace(0, rows.sum(), BINS + 1)[1:-1]
            last = np.unique(np.searchsorted(rows.cumsum(), share))
            last = last[last < len(values) - 1]
        else:
            last = np.arange(len(values) - 1)
        edges.append((values[last] + values[last + 1]) / 2)  # float32, as features are
    return edges


def trees_of(model: Any, edges: list[np.ndarray]) -> Trees:
    """The trees of a fitted HistGradientBoostingClassifier of two classes, on numbers of bins."""
    count = len(model._predictors)
    feature = np.zeros((count, 2**DEPTH - 1), np.int32)
    threshold = np.full(feature.shape, np.inf, np.float32)
    value = np.zeros((count, 2**DEPTH))
    for tree, (predictor,) in enumerate(model._predictors):
        nodes, todo = predictor.nodes, [(0, 0)]
        while todo:
            number, place = todo.pop()
            node = nodes[number]
            if not node["is_leaf"]:
                column, code = int(node["feature_idx"]), int(node["num_threshold"])
                feature[tree, place], threshold[tree, place] = column, edges[column][code]
                todo += [(node["left"], 2 * place + 1), (node["right"], 2 * place + 2)]
                continue
            while place < feature.shape[1]:  # a leaf higher up: always left from here
                place = 2 * place + 1
            value[tree, place - feature.shape[1]] = node["value"]
    value[0] += model._baseline_prediction.item()
    value = np.round(value * EXACT) / EXACT
    return Trees(*(torch.from_numpy(part) for part in (feature, threshold, value)))


def leaves(x: Tensor, trees: Trees) -> Iterator[Tensor]:
    """The value that each tree gives to each row of x (m, F) float32, (T, P) for ROWS at a time."""
    count, inner = trees.feature.shape
    feature, threshold = trees.feature.flatten(), trees.threshold.flatten()
    tree = torch.arange(count, dtype=torch.int32, device=x.device)[:, None]  # (T, 1)
    root = tree * inner  # of all trees' nodes, one after another
    for some in x.contiguous().split(ROWS):
        row = torch.arange(len(some), dtype=torch.int32, device=x.device) * x.shape[1]  # (P,)
        cells = some.flatten()
        node = root.expand(count, len(some))  # (T, P)
        for _ in range(inner.bit_length()):
            at = node.flatten()
            cell = feature.index_select(0, at).view_as(node) + row  # (T, P)
            above = cells.index_select(0, cell.flatten()) > threshold.index_select(0, at)
            node = 2 * node + (1 - root) + above.view_as(node)
        leaf = (node + (tree - inner)).flatten()  # a tree has one leaf more than inner nodes
        yield trees.value.flatten().index_select(0, leaf).view_as(node)


def walk(x: Tensor, trees: Trees) -> Tensor:
    """Log-odds (m,) float64 of rows x (m, F)."""
    return torch.cat([part.sum(dim=0) for part in leaves(x, trees)])


def enough(trees: Trees, x: Tensor, label: Tensor, weight: Tensor) -> Trees:
    """The first trees, as many as predict these rows best, which none has seen."""
    loss = torch.zeros(len(trees.feature), dtype=torch.float64)
    rows = zip(leaves(x, trees), label.split(ROWS), weight.split(ROWS), strict=True)
    for part, bought, stands in rows:
        theta = part.cumsum(dim=0)  # (T, P) after each tree
        loss += ((softplus(theta) - theta * bought) * stands).sum(dim=1)
    return Trees(*(part[: int(loss.argmin()) + 1] for part in vars(trees).values()))


class BoostedPreference(nn.Module):
    """What `FittedSimulator` asks of a `Preference`, answered by trees on the same features.

    Of the `Preference` within only the features are used; its layers stay blank.
    """

    extra = Preference.extra
    feature: Tensor
    threshold: Tensor
    value: Tensor

    def __init__(self, seen: Preference, trees: Trees) -> None:
        super().__init__()
        self.seen = seen
        for name, part in vars(trees).items():
            self.register_buffer(name, part.clone())
        self.requires_grad_(False)

    @property
    def of_user(self) -> nn.Linear:
        return self.seen.of_user

    @property
    def bias(self) -> Tensor:
        return self.seen.bias

    @property
    def log_rate(self) -> Tensor:
        return self.seen.log_rate

    @property
    def source(self) -> Tensor:
        return self.seen.source

    @property
    def groups(self) -> Tensor:
        return self.seen.groups

    @property
    def group_offset(self) -> Tensor:
        return self.seen.group_offset

    @property
    def trees(self) -> Trees:
        return Trees(self.feature, self.threshold, self.value)

    def describe(
        self, profile: Tensor, past: Tensor, count: Tensor, age: Tensor, time: Tensor
    ) -> dict[str, Tensor]:
        """All the model needs of B households at `time` (B,) days, as (B, ...) tensors."""
        state = self.seen.describe(profile, past, count, age, time)
        del state["user"]
        # What is a sum or a logarithm again in float64: see the top of the file.
        real = state["past"] != EMPTY  # (B, H)
        row, often, days = torch.where(real, state["past"], 0), real.double(), state["age"].double()
        recent = torch.exp(-days / RECENT) * often  # (B, H)
        table = self.seen.source.double()  # (N, R)
        for name, weight in (("often", often), ("recent", recent)):
            state[name] = embedding_bag(row, table, per_sample_weights=weight, mode="sum")
        newest = torch.where(real, days, 365.0).amin(dim=1)  # (B,)
        total = (state["count"].double() * often).sum(dim=1)  # (B,)
        scalars = torch.stack([newest, total, often.sum(dim=1)], dim=1).log1p()  # (B, 3)
        first = profile.shape[1]
        state["features"][:, first : first + 3] = scalars.float()
        return state

    def renew(self, facts: ItemFacts) -> None:
        """Take over what is known of the items at a later moment; what was learnt stays."""
        self.seen.renew(facts)

    def own_board(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """How often and how many days ago each item was bought, (B, N) each."""
        return self.seen.own_board(state)

    def affinities(self, state: dict[str, Tensor]) -> Tensor:
        """(B, N, 3) as `Preference` has them, float64."""
        target = self.seen.target.double()
        tastes = [state["often"] @ target.T, state["recent"] @ target.T]
        return torch.stack([*tastes, self.seen.trend[state["week"]].double()], dim=2)

    def pair_features(self, items: Tensor, *known: Tensor) -> Tensor:
        """Features (..., F) float32 of aligned pairs, as `Preference` has them."""
        return self.seen.pair_features(items, *(part.double() for part in known)).float()

    def columns(self, user: Tensor, pair: Tensor, items: Tensor) -> Tensor:
        """What trees look at, (..., U + F + 2): user (..., U), pair (..., F) and item (...)."""
        known = torch.stack([self.seen.log_rate, self.seen.gap], dim=1)[items]  # (..., 2)
        return torch.cat([user.expand(*items.shape, -1), pair, known], dim=-1)

    def logit(self, state: dict[str, Tensor], items: Tensor) -> Tensor:
        """theta (B, K) of items (B, K); EMPTY gives -inf."""
        empty = items == EMPTY
        items = torch.where(empty, 0, items)
        target = self.seen.target[items].double()  # (B, K, R)
        tastes = torch.stack([state["often"], state["recent"]], dim=2)  # (B, R, 2)
        trend = self.seen.trend[state["week"][:, None], items].double()  # (B, K)
        affinity = torch.cat([target @ tastes, trend[..., None]], dim=2)  # (B, K, 3)
        theta = self._theta(state, items, *self.seen.own(state, items), affinity)
        return theta.masked_fill(empty, -torch.inf)

    def opinions(self, state: dict[str, Tensor], items: Tensor) -> Tensor:
        """theta (B, K, 1): trees are of one opinion."""
        return self.logit(state, items)[:, :, None]

    agreed = staticmethod(Preference.agreed)

    def logits(self, state: dict[str, Tensor], rows: int = 16) -> Tensor:
        """theta (B, N) of the whole catalogue, `rows` households at a time."""
        items = torch.arange(len(self.log_rate), device=self.log_rate.device)
        parts = []
        for start in range(0, len(state["past"]), rows):
            some = {k: v[start : start + rows] for k, v in state.items()}
            every = items.expand(len(some["past"]), -1)
            parts.append(self._theta(some, every, *self.own_board(some), self.affinities(some)))
        return torch.cat(parts)

    def _theta(
        self, state: dict[str, Tensor], items: Tensor, count: Tensor, age: Tensor, affinity: Tensor
    ) -> Tensor:
        """theta of items (B, K) given own count and age (B, K) and affinity (B, K, 3)."""
        same = self.seen.same_group(state, items)
        scalars = state["scalars"][:, None].expand(-1, items.shape[1], -1)
        pair = self.pair_features(items, count, age, affinity, same, scalars)
        x = self.columns(state["features"][:, None], pair, items)  # (B, K, F)
        return walk(x.flatten(0, 1), self.trees).float().view(items.shape)


def boost_preference(
    trips: Trips, weight: np.ndarray, before: ItemFacts, *, trees: int = 150, seed: int = 0
) -> BoostedPreference:
    """Learn from the trips of a window, weighted (n,), with item facts from before it."""
    model = BoostedPreference(Preference(before, trips.profile.shape[1], hidden=1), NO_TREES)
    rng = np.random.default_rng(seed)
    if len(trips) > MOST:
        some = np.sort(rng.choice(len(trips), MOST, replace=False))
        trips, weight = trips[some], weight[some]
    generator = torch.Generator().manual_seed(seed)
    # `sample_pairs` asks for features only, by the names they have in `Preference`
    sampled = sample_pairs(cast(Preference, model), trips, weight, generator)
    features, pair, trip, items, label, stands = sampled
    x = model.columns(features[trip], pair, items)  # (m, F)
    if not torch.isfinite(x).all():
        raise ValueError(
            "features of users or items that are not finite: "
            "look for NaN or extreme values in the users' profile"
        )
    held = torch.from_numpy(set_aside(trips.user, rng))[trip]  # (m,)
    grown = grow(x[~held], label[~held], stands[~held], trees, seed)
    return BoostedPreference(model.seen, enough(grown, x[held], label[held], stands[held]))


def set_aside(user: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which trips (n,) no tree is grown on: all of some households; of few households, some."""
    who = np.unique(user, return_inverse=True)[1]
    if who.max() < 10:
        who = np.arange(len(user))
    return np.asarray((rng.permutation(who.max() + 1) < HELD * (who.max() + 1))[who])


class BoostedSimulator:
    """Users like those of `FittedSimulator`, whose wishes are trees: it makes one of them."""

    @staticmethod
    def fit(
        spec: SimSpec,
        *,
        window: float = 150.0,
        trees: int = 150,
        offers: str | Path | None = None,
        **assumed: Any,
    ) -> FittedSimulator:
        """Fit to the `window` days before the catalogue's cut, or find such a fit again."""
        check_settings({"window": window, "trees": trees} | assumed)  # before the work
        if spec.logs is not None:
            check_display(Assumptions(**assumed).exposure, spec.logs.name)

        def learn(trips: Trips, weight: np.ndarray, before: ItemFacts) -> Preference:
            model = boost_preference(trips, weight, before, trees=trees, seed=spec.seed)
            return cast(Preference, model)  # asked for `describe`, `logits` and `renew`

        about = f"boosted {FORMAT} {trees}"
        key, state = fit_once(spec, learn, about, window=window, what="the boosted users")
        preference, habits = restore(state)
        parts = preference, with_display(habits, spec, Assumptions(**assumed))
        users = spec.users if spec.users is not None else user_table(state["users"])
        assert spec.catalog is not None
        return FittedSimulator(
            spec.catalog, *parts, users, device=spec.device, fit_key=key, offers=offers, **assumed
        )

    @staticmethod
    def load(path: str | Path, catalog: Catalog, **assumed: Any) -> FittedSimulator:
        """Read what `save` of such users wrote; the catalogue must be the one of the fit."""
        state = load_state(Path(path))
        if state["catalog"] != catalog.fingerprint():
            raise ValueError(
                f"{path} was fitted on another catalogue than the {len(catalog)} items given: "
                "load the catalogue of that fit, or fit again"
            )
        return FittedSimulator(catalog, *restore(state), user_table(state["users"]), **assumed)


def restore(state: dict[str, Any]) -> tuple[Preference, Habits]:
    """The model and habits of a stored fit; to `FittedSimulator` one model is like the other."""
    weights: dict[str, Tensor] = state["preference"]
    if "feature" not in weights:
        raise ValueError(
            "a fit without trees: FittedSimulator.load reads what was fitted with a net"
        )
    named = {field.name: weights[f"seen.{field.name}"] for field in fields(ItemFacts)}
    features, hidden, members = state["sizes"]
    seen = Preference(ItemFacts(**named), features - Preference.extra, hidden, members)
    trees = Trees(*(weights[name] for name in ("feature", "threshold", "value")))
    model = BoostedPreference(seen, trees)
    model.load_state_dict(weights)
    return cast(Preference, model), Habits.of(state["habits"])
