"""Policies made of scores or of a function of the context, on the way to lists and softened."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from evaluation.target_kinds import Logged
from evaluation.target_rows import (
    EMPTY,
    ENTRIES,
    Distribution,
    blocks,
    check_actions,
    check_length,
    check_rows,
    every_item,
    items_above,
    pick,
    real_actions,
    remaining,
    supported,
    take,
    without,
)
from evaluation.terms import Array, Groups

if TYPE_CHECKING:
    from evaluation.log import Batch, DecisionLog

COLDEST, HOTTEST, STEPS = 1e-2, 1e2, 33  # temperatures tried, in standard deviations of a score
SECTIONS = 16  # into which a pass over the log divides the interval that holds the answer
PASSES = 2
FIRST = 64  # rows that a function is asked for before the width of its answer is known

Function = Callable[[Array], Array]


@dataclass(frozen=True)
class Block:
    """Some rows of a batch with one number for each item."""

    part: slice
    dense: Array  # (b, A), or (1, A) where it is the same for all
    above: Array | None  # (b, K - 1) items shown above in the slate, EMPTY where none


@dataclass(frozen=True)
class ByContext:
    """Probabilities (b, A) as a function of context (b, d), or one (A,) for everybody.

    Further slots of a slate share out what is left without the items above (Plackett-Luce).
    """

    f: Function | Array

    needs = ("action", "context", "decision", "slot")

    @property
    def deterministic(self) -> bool | None:
        return None if callable(self.f) else bool(np.isin(self.f, (0.0, 1.0)).all())

    def logged(self, batch: "Batch") -> Logged:
        pi = np.empty(len(batch.action))  # (n,)
        for b in self._blocks(batch):
            action, empty = real_actions(batch, b.dense.shape[1], b.part)
            pi[b.part] = np.where(empty, 1.0, pick(remaining(b.dense, b.above), action))
        return Logged(pi)

    def distribution(self, batch: "Batch") -> Distribution | None:
        return every_item(
            gather(batch, ((b, remaining(b.dense, b.above)) for b in self._blocks(batch)))
        )

    def check(self, log: "DecisionLog") -> None:
        if isinstance(self.f, np.ndarray):
            check_actions(len(self.f), log)
        elif not log.has("context"):
            raise ValueError("a function of the context needs one: make the log with context=")

    def _blocks(self, batch: "Batch") -> Iterator[Block]:
        for block in dense_blocks(self.f, batch):
            if callable(self.f):
                check_rows(block.dense, batch.rows[block.part], "what the function returns")
            yield block


@dataclass(frozen=True)
class Ranker:
    """Scores (A,), (n, A) or of context -> (b, A): the best k items, the best first.

    Equal scores are ordered by a seeded permutation of the items. With a temperature, a softmax
    of the scores standardised in each row; further slots without the items above (Plackett, 1975;
    Luce, 1959). `uniform` of the probability is spread over all items.
    """

    scores: Function | Array
    k: int = 1
    seed: int = 0
    temperature: float | None = None  # None: the best item
    ess: float | None = None  # of the log's weights, from which the temperature follows
    uniform: float = 0.0
    on_support: bool = False  # rank only what the log could have shown

    @property
    def needs(self) -> tuple[str, ...]:
        always = ("action", "decision", "slot")
        context = ("context",) if callable(self.scores) or self.on_support else ()
        return always + context + (("support",) if self.on_support else ())

    @property
    def deterministic(self) -> bool | None:
        return self.temperature is None and self.ess is None and self.uniform == 0.0

    def logged(self, batch: "Batch") -> Logged:
        self._fits(batch)
        pi, marginal = np.empty(len(batch.action)), np.empty(len(batch.action))  # (n,)
        listed = self.k > 1 or batch.decision is not None  # else each slot is its own decision
        for b in self._blocks(batch, self.temperature is not None):
            action, empty = real_actions(batch, b.dense.shape[1], b.part)
            if self.temperature is None:
                first, rank = placed(b.dense, self._ties(b.dense), action, b.above)  # (b,) each
                slot = batch.slot[b.part] if listed and batch.slot is not None else 0
                marginal[b.part] = empty | (rank == slot)
                pi[b.part] = first if batch.decision is not None else marginal[b.part]
            if self.temperature is not None or self.uniform:
                mixed = pick(self._soft(b), action)  # (b,)
                if self.temperature is None:
                    mixed += (1.0 - self.uniform) * pi[b.part]
                pi[b.part] = mixed
            pi[b.part][empty] = 1.0
        return Logged(pi, marginal=marginal if self.deterministic else None)

    def distribution(self, batch: "Batch") -> Distribution | None:
        self._fits(batch)
        if self.temperature is not None:
            soft = ((b, self._soft(b)) for b in self._blocks(batch, True))
            return every_item(gather(batch, soft))
        best = np.empty((len(batch.action), 1), dtype=np.int64)  # (n, 1)
        for b in self._blocks(batch, False):
            order = np.argsort(self._ties(b.dense))  # (A,) who wins a tie first
            left = without(b.dense, b.above, -np.inf)[:, order]  # (b, A)
            if self.k > 1 and batch.decision is None and batch.slot is not None:
                ranked = np.argsort(-left, axis=1, kind="stable")[:, : self.k]  # (b, k)
                best[b.part, 0] = order[pick(ranked, batch.slot[b.part])]
            else:
                best[b.part, 0] = order[left.argmax(axis=1)]
        if self.deterministic:
            return best, np.ones(best.shape)
        even = gather(batch, ((b, self._soft(b)) for b in self._blocks(batch, False)))  # (n, A)
        mixed = even.copy()
        mixed[np.arange(len(mixed)), best[:, 0]] += 1.0 - self.uniform
        return every_item(mixed)

    def check(self, log: "DecisionLog") -> None:
        if isinstance(self.scores, np.ndarray):
            if self.scores.ndim == 2:
                check_length(self.scores, log, "scores")
            check_actions(self.scores.shape[-1], log)
        elif not log.has("context"):
            raise ValueError("scores of the context need one: make the log with context=")
        if self.ess is not None and self.ess > log.num_rows:
            raise ValueError(
                f"ess must be at most {log.num_rows}, the rows of the log, got {self.ess:g}: "
                "ask for less"
            )

    def ratios(self, batch: "Batch", temperatures: Array) -> Array:
        """Probability at each of M temperatures over the logged one, (n, M)."""
        kinds = [replace(self, temperature=float(t), ess=None) for t in temperatures]
        kinds[0]._fits(batch)
        out = np.empty((len(batch.action), len(kinds)))
        for b in self._blocks(batch, True):
            action, empty = real_actions(batch, b.dense.shape[1], b.part)
            for m, kind in enumerate(kinds):
                out[b.part, m] = np.where(empty, 1.0, pick(kind._soft(b), action))
        return out / batch.propensity[:, None]

    def _fits(self, batch: "Batch") -> None:
        """Refuse a log of other slates than the ranker makes."""
        if self.ess is not None:
            raise ValueError(
                "the temperature of this target follows from the log: use target.resolved(log)"
            )
        last = 0 if batch.slot is None or not len(batch.slot) else int(batch.slot.max())
        if last >= self.k and (self.k > 1 or batch.decision is not None):
            raise ValueError(
                f"the log shows slates of {last + 1} items, the ranker lists k={self.k}: "
                f"make it with Target.from_ranker(scores, k={last + 1})"
            )
        if self.k > 1 and last and batch.decision is None and not self.deterministic:
            raise ValueError(
                f"a softened list of k={self.k} needs the items above each slot: make the log "
                "with decision=, or rank with k=1 where each slot is a decision of its own"
            )

    def _blocks(self, batch: "Batch", soft: bool) -> Iterator[Block]:
        """Scores as they are, which keeps their order to the last bit, or standardised."""
        shown: Array | None = None  # (n, A)
        for block in dense_blocks(self.scores, batch):
            z = np.asarray(block.dense, dtype=np.float64)  # (b, A)
            if self.on_support:
                if shown is None:
                    every = np.broadcast_to(np.arange(z.shape[1]), (len(batch.action), z.shape[1]))
                    shown = supported(batch, every)
                z = np.where(shown[block.part], z, -np.inf)
            check_scores(z, batch.rows[block.part])
            yield replace(block, dense=standardised(z) if soft else z)

    def _soft(self, b: Block) -> Array:
        """The part of the probabilities that every item gets a share of, (b, A) or (1, A)."""
        even = np.isfinite(b.dense)  # (b, A)
        if self.temperature is None:  # the rest goes to the best item
            left = without(even.astype(float), b.above, 0.0)
            return self.uniform * left / np.maximum(left.sum(axis=1, keepdims=True), 1.0)
        if not self.uniform:
            return softmax(without(b.dense, b.above, -np.inf) / self.temperature)
        mixed = (1.0 - self.uniform) * softmax(b.dense / self.temperature)  # (b, A)
        return remaining(mixed + self.uniform * even / even.sum(axis=1, keepdims=True), b.above)

    def _ties(self, scores: Array) -> Array:
        """A place (A,) for every item, by which equal scores are ordered: 0 comes first."""
        return np.random.default_rng(self.seed).permutation(scores.shape[1])


def tempered(ranker: Ranker, log: "DecisionLog") -> tuple[Ranker, list[dict[str, float]]]:
    """The lowest temperature at which the log's weights have `ess`, by sectioning its logarithm.

    Also the curve over temperatures. Weights are of rows, of slates where the log has them.
    """
    wanted = float(ranker.ess or 0.0)
    ranker.check(log)
    curve = weighed(ranker, log, np.geomspace(COLDEST, HOTTEST, STEPS))
    best = max(curve, key=lambda point: point["ess"])
    if not best["ess"] >= wanted:
        raise ValueError(
            f"no temperature gives an effective sample size of {wanted:g}, the most is "
            f"{best['ess']:.4g} at temperature {best['temperature']:.3g}: ask for less, "
            "or add uniform="
        )
    found, tried = reached(curve, wanted), curve
    for _ in range(PASSES):
        if found == 0:
            break  # the coldest is soft enough
        low, high = tried[found - 1]["temperature"], tried[found]["temperature"]
        tried = weighed(ranker, log, np.geomspace(low, high, SECTIONS + 1))
        found = reached(tried, wanted)
    chosen = tried[found]
    if chosen not in curve:
        curve = sorted([*curve, chosen], key=lambda point: point["temperature"])
    return replace(ranker, temperature=chosen["temperature"], ess=None), curve


def reached(curve: list[dict[str, float]], wanted: float) -> int:
    """The first point with the effective sample size that is wanted."""
    return next((i for i, point in enumerate(curve) if point["ess"] >= wanted), len(curve) - 1)


def weighed(ranker: Ranker, log: "DecisionLog", temperatures: Array) -> list[dict[str, float]]:
    """Effective sample size, SNIPS value and mean weight at M temperatures, in one pass."""
    sums, n = np.zeros((3, len(temperatures))), 0
    fields = [name for name in (*ranker.needs, "reward", "propensity") if log.has(name)]
    for batch in log.batches(columns=fields):
        if batch.propensity is None:
            raise ValueError(
                "softening to an effective sample size needs propensities: fit them "
                "(evaluation.propensity), or give temperature="
            )
        weight, reward = ranker.ratios(batch, temperatures), batch.reward  # (n, M), (n,)
        if batch.decision is not None:
            groups = Groups(batch.decision, batch.slot)
            weight = np.multiply.reduceat(groups.sort(weight), groups.starts, axis=0)  # (G, M)
            reward = groups.sum(groups.sort(reward))  # (G,)
        sums += [weight.sum(axis=0), np.square(weight).sum(axis=0), reward @ weight]
        n += len(weight)
    mass, square, worth = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        ess = np.where(square > 0, mass**2 / square, 0.0)  # (M,)
        value = worth / mass
    names = ("temperature", "ess", "value", "mean_weight")
    points = zip(temperatures, ess, value, mass / n, strict=True)
    return [dict(zip(names, map(float, point), strict=True)) for point in points]


def dense_blocks(source: Function | Array, batch: "Batch") -> Iterator[Block]:
    """Numbers of all items for the rows of a batch: a function's, a matrix's, or one row's."""
    above = items_above(batch)  # (n, K - 1)
    n = len(batch.action)
    if not callable(source):
        for part in blocks(n, source.shape[-1]):
            dense = source[None] if source.ndim == 1 else take(source, batch.rows[part])
            yield Block(part, dense, None if above is None else above[part])
        return
    if batch.context is None:
        raise ValueError("a function of the context needs one: make the log with context=")
    start, width = 0, 0
    while start < n:  # the first rows tell how wide an answer is
        part = slice(start, min(n, start + (max(1, ENTRIES // width) if width else FIRST)))
        dense, rows = np.asarray(source(batch.context[part])), part.stop - start
        width = width or (dense.shape[1] if dense.ndim == 2 else 0)
        if dense.shape != (rows, width) or not width:
            raise ValueError(
                f"the function must return one row of all actions for each of {rows} contexts, "
                f"({rows}, A), got shape {dense.shape}: it is called with context (b, d)"
            )
        yield Block(part, dense, None if above is None else above[part])
        start = part.stop


def gather(batch: "Batch", found: Iterator[tuple[Block, Array]]) -> Array:
    """Blocks (b, A) or (1, A) to (n, A)."""
    n = len(batch.action)
    out: Array = np.empty((0, 0))
    for b, dense in found:
        if len(dense) == 1:
            return np.broadcast_to(dense, (n, dense.shape[1]))  # the same for all rows
        if not out.size:
            out = np.empty((n, dense.shape[1]))
        out[b.part] = dense
    return out


def softmax(logits: Array) -> Array:
    """Logits (b, A) to probabilities (b, A); a row of -inf alone to zeros."""
    top = logits.max(axis=1, keepdims=True)  # (b, 1)
    weights = np.exp(logits - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0)


def check_scores(scores: Array, rows: Array) -> None:
    """Refuse rows of scores (b, A) that rank nothing."""
    bad = np.isnan(scores).any(axis=1) | ~np.isfinite(scores.max(axis=1))  # (b,)
    if bad.any():
        raise ValueError(
            f"scores must be finite, or -inf for what is never shown, row {rows[bad.argmax()]} "
            "has nan, inf, or nothing to show: fill in a score"
        )


def standardised(scores: Array) -> Array:
    """Scores (b, A) less their mean, over their deviation in the row; -inf (never) stays."""
    known = np.isfinite(scores)
    count = known.sum(axis=1, keepdims=True)  # (b, 1)
    mean = np.where(known, scores, 0.0).sum(axis=1, keepdims=True) / count
    centred = scores - mean  # (b, A)
    square = np.where(known, centred, 0.0) ** 2
    deviation = np.sqrt(square.sum(axis=1, keepdims=True) / count)  # (b, 1)
    flat = deviation <= 1e-12 * np.abs(mean)  # rounding of equal scores is no preference
    return np.where(flat & known, 0.0, centred / np.where(flat, 1.0, deviation))


def placed(scores: Array, ties: Array, action: Array, above: Array | None) -> tuple[Array, Array]:
    """Whether `action` (b,) is the best left of scores (b, A), and its rank, (b,) each."""
    own = pick(scores, action)[:, None]  # (b, 1)
    better = (scores > own) | ((scores == own) & (ties < ties[action][:, None]))  # (b, A)
    rank = better.sum(axis=1)  # (b,)
    possible = np.isfinite(own[:, 0])
    if above is None:
        return possible & (rank == 0), np.where(possible, rank, EMPTY)
    gone = np.take_along_axis(better, np.maximum(above, 0), axis=1) & (above != EMPTY)  # (b, K - 1)
    fresh = possible & ~(above == action[:, None]).any(axis=1)
    return fresh & (rank == gone.sum(axis=1)), np.where(possible, rank, EMPTY)
