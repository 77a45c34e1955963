"""Worlds in which the value of every policy is known, and logs of them: to judge the evaluator.

Contexts, slates and states are few, so that values are sums and not simulations. Each function
makes one world; `World.draw(seed)` logs it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from evaluation import DecisionLog, Target
from evaluation.slates import all_rankings, pseudo_inverse_weights, ranking_probs

Array = np.ndarray
OVERLAP = {"light": 3.0, "medium": 10.0, "heavy": 50.0}  # E[w^2], mean over the targets
CONTEXTS, DIMENSIONS = 200, 5  # of a bandit
EXPLORED = 0.02  # of its log shows anything: without, weights are larger than any log could tell
ITEMS, SLOTS, VISITORS = 6, 3, 40  # of slates; visitors are their contexts
STATES, MOVES, STEPS, GAMMA = 10, 3, 10, 0.9  # of sessions


@dataclass(frozen=True)
class Drawn:
    """A log, its targets, and what only a known world can say of the rows."""

    log: DecisionLog
    targets: dict[str, Target]
    rows: dict[str, dict[str, Array]] = field(default_factory=dict)  # policy -> column -> (n,)


@dataclass(frozen=True)
class World:
    """A logging policy, targets of known value, and how to log n units."""

    name: str
    n: int  # rows, slates or episodes
    unit: str
    truth: dict[str, float]
    draw: Callable[[int], Drawn]
    clusters: Array | None = None  # (A,)
    gamma: float = 1.0


@dataclass(frozen=True)
class Bandit:
    """Contexts (X, d), ascending in their first number, by which `policy` finds them again."""

    contexts: Array
    mean: Array  # (X, A) expected rewards
    logging: Array  # (X, A)
    targets: dict[str, Array]  # (X, A) each
    binary: bool

    def policy(self, probs: Array) -> Callable[[Array], Array]:
        """Probabilities (X, A) as a function of contexts (b, d)."""
        first = np.ascontiguousarray(self.contexts[:, 0])
        return lambda context: probs[np.searchsorted(first, context[:, 0])]

    def draw(self, n: int, seed: int) -> Drawn:
        """A log of n rows."""
        rng = np.random.default_rng([seed, 1])
        x = rng.integers(len(self.contexts), size=n)  # (n,)
        action = drawn_from(self.logging[x], rng)
        mean = self.mean[x, action]
        reward = rng.random(n) < mean if self.binary else rng.normal(mean, 0.5)
        log = DecisionLog.from_arrays(
            action=action, reward=reward, propensity=self.logging[x, action],
            context=self.contexts[x], num_actions=self.mean.shape[1],
            support=self.policy(self.logging), reward_range=(0.0, 1.0) if self.binary else None,
        )  # fmt: skip
        targets = {k: Target.from_function(self.policy(p)) for k, p in self.targets.items()}
        return Drawn(log, targets)


def bandit(
    actions: int, overlap: str, n: int, *, binary: bool, hidden: float = 0.0, seed: int = 0
) -> World:
    """Items in clusters, answers nearly linear in context x item, six targets.

    `hidden` is the share of items that the log never shows in a context.
    """
    rng = np.random.default_rng([seed, 0])
    x = rng.normal(size=(CONTEXTS, DIMENSIONS))
    x = x[np.argsort(x[:, 0])]
    groups = max(3, actions // 10)
    cluster = np.arange(actions) % groups
    vectors = rng.normal(size=(groups, DIMENSIONS))[cluster]  # (A, d)
    vectors = vectors + 0.4 * rng.normal(size=vectors.shape)
    taste = x @ vectors.T / np.sqrt(DIMENSIONS)  # (X, A)
    bent = np.sin(2.0 * x @ rng.normal(size=vectors.shape).T)  # no linear model has this
    score = taste + 0.4 * bent + 0.6 * rng.normal(size=actions)
    mean = sigmoid(score - 0.5) if binary else score  # (X, A)
    targets = bandit_targets(score, vectors, rng)
    view = score + 1.5 * rng.normal(size=score.shape)  # what the logging policy thinks of items
    shown = np.argsort(np.argsort(rng.random(score.shape))) >= round(hidden * actions)  # (X, A)
    logging = as_far_as(OVERLAP[overlap], np.where(shown, view, -np.inf), targets)
    world = Bandit(x, mean, logging, targets, binary)
    truth = {name: float((probs * mean).sum(axis=1).mean()) for name, probs in targets.items()}
    rewards, support = "binary" if binary else "gaussian", "deficient" if hidden else overlap
    name = f"bandit {support}, {actions} actions, {rewards}"
    return World(name, n, "row", truth, partial(world.draw, n), clusters=cluster)


def bandit_targets(score: Array, vectors: Array, rng: np.random.Generator) -> dict[str, Array]:
    """Six policies (X, A) for scores (X, A) and item vectors (A, d)."""
    blurred = score + 1.0 * rng.normal(size=score.shape)
    seen = drawn_from(np.repeat(softmax(2.0 * score), 3, axis=0), rng).reshape(-1, 3)  # (X, 3)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = (unit @ unit.T)[seen].sum(axis=1)  # (X, A) item-based neighbours of what was seen
    return {
        "optimal": softened(score, 2.5),
        "medium": softened(blurred, 1.8),
        "uniform": np.full(score.shape, 1.0 / score.shape[1]),
        "anti": softened(-score, 1.8),
        "popularity": softened(np.broadcast_to(score.mean(axis=0), score.shape), 2.0),
        "itemknn": softened(alike, 2.0),
    }


def softened(score: Array, peak: float) -> Array:
    """Softmax of (X, A) so sharp that E[w^2] on a uniform log would be `peak`."""
    size = score.shape[1]

    def spread(sharpness: float) -> float:
        return float(size * (softmax(sharpness * score) ** 2).sum(axis=1).mean())

    return softmax(bisected(spread, peak) * score)


def as_far_as(goal: float, view: Array, targets: Mapping[str, Array]) -> Array:
    """The logging policy by its view (X, A), -inf is never shown, whose E[w^2] is `goal`."""
    shown = np.isfinite(view)

    def logging(sharpness: float) -> Array:
        preferred = softmax(np.where(shown, sharpness * np.where(shown, view, 0.0), -np.inf))
        return (1.0 - EXPLORED) * preferred + EXPLORED * shown / shown.sum(axis=1, keepdims=True)

    return logging(bisected(lambda sharpness: far(logging(sharpness), targets), goal))


def far(logging: Array, targets: Mapping[str, Array]) -> float:
    """E[w^2] on what the log shows, mean over the targets."""
    odds = [np.divide(p**2, logging, out=np.zeros_like(p), where=logging > 0).sum(axis=1).mean()
            for p in targets.values()]  # fmt: skip
    return float(np.mean(odds))


def bisected(f: Callable[[float], float], goal: float) -> float:
    """Where a rising f over [0, 64] reaches the goal; 0 if it starts above."""
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if f(middle) < goal else (low, middle)
    return low


@dataclass(frozen=True)
class Ranking:
    """A policy over all m lists of one visitor after another, and a noisy model of its rewards.

    All but `whole` are (V, m, L): of the item at each place, given those above it.
    """

    whole: Array  # (V, m)
    given: Array  # probability
    marginal: Array  # probability at that place, whatever is above
    q: Array  # the model's reward from this place on
    value: Array  # the same before the item is drawn


def ranking(logits: Array, lists: Array, mean: Array, noise: Array) -> Ranking:
    """Of Plackett-Luce with logits (V, A); mean and noise (V, m, L)."""
    whole = ranking_probs(logits, lists)  # (V, m)
    places = np.arange(SLOTS)
    at = np.zeros((len(whole), SLOTS, ITEMS))
    for column in range(SLOTS):
        for item in range(ITEMS):
            at[:, column, item] = whole[:, lists[:, column] == item].sum(axis=1)
    heads = [np.unique(lists[:, :k], axis=0, return_inverse=True)[1] for k in range(SLOTS + 1)]
    reach = np.stack([sums_by(h, whole) for h in heads], axis=2)  # (V, m, L + 1) of its prefix
    q, value = np.zeros(mean.shape), np.zeros(mean.shape)
    later = np.zeros(whole.shape)
    for k in reversed(range(SLOTS)):
        q[..., k] = mean[..., k] + later + noise[..., k]
        later = value[..., k] = sums_by(heads[k], whole * q[..., k]) / reach[..., k]
    return Ranking(whole, reach[..., 1:] / reach[..., :-1], at[:, places, lists], q, value)


def sums_by(code: Array, x: Array) -> Array:
    """(V, m) to (V, m): each column's sum with those of its code (m,)."""
    return x @ (code[:, None] == code)


def slates(rewards: str, n: int, *, seed: int = 0) -> World:
    """Lists of 3 out of 6 drawn by Plackett-Luce, answers `independent` or by `cascade`.

    In a cascade an item loses by each item above it that the visitor likes.
    """
    rng = np.random.default_rng([seed, 2])
    lists = all_rankings(ITEMS, SLOTS)  # (m, L)
    score = rng.normal(size=(VISITORS, ITEMS))
    mean = 0.3 * sigmoid(score[:, lists] - 0.4 * np.arange(SLOTS)) + 0.35  # (V, m, L)
    if rewards == "cascade":
        taken = 0.32 * (sigmoid(score[:, lists]) - 0.5)  # (V, m, L)
        mean[..., 1:] -= taken.cumsum(axis=2)[..., :-1]  # at most .32: between 0 and 1 still
    noises = [np.unique(lists[:, : k + 1], axis=0, return_inverse=True)[1] for k in range(SLOTS)]
    noise = np.stack([rng.normal(scale=0.1, size=(VISITORS, len(lists)))[:, code]
                      for code in noises], axis=2)  # fmt: skip
    logits = {
        "liked": 0.8 * score, "uniform": 0.0 * score, "disliked": -0.5 * score,
        "popularity": np.broadcast_to(0.8 * score.mean(axis=0) / score.mean(axis=0).std(),
                                      score.shape),
    }  # fmt: skip
    logging = ranking(0.4 * score + 0.3 * rng.normal(size=score.shape), lists, mean, noise)
    targets = {name: ranking(each, lists, mean, noise) for name, each in logits.items()}
    pseudo = {name: np.stack([pseudo_inverse_weights(lists, b, e, lists)
                              for b, e in zip(logging.whole, target.whole, strict=True)])
              for name, target in targets.items()}  # fmt: skip
    truth = {name: float((target.whole * mean.sum(axis=2)).sum(axis=1).mean())
             for name, target in targets.items()}  # fmt: skip

    def draw(seed: int) -> Drawn:
        rng = np.random.default_rng([seed, 3])
        x = rng.integers(VISITORS, size=n)  # (n,)
        shown = drawn_from(logging.whole[x], rng)  # (n,) of the lists
        log = DecisionLog.from_arrays(
            action=lists[shown].ravel(), reward=(rng.random((n, SLOTS)) < mean[x, shown]).ravel(),
            propensity=logging.given[x, shown].ravel(), marginal=logging.marginal[x, shown].ravel(),
            decision=np.repeat(np.arange(n), SLOTS), slot=np.tile(np.arange(SLOTS), n),
            num_actions=ITEMS, reward_range=(0.0, 1.0),
        )  # fmt: skip
        given = {
            name: Target.from_probabilities(
                t.given[x, shown].ravel(), marginal=t.marginal[x, shown].ravel(),
                value=t.value[x, shown].ravel(), q_logged=t.q[x, shown].ravel(),
            ) for name, t in targets.items()
        }  # fmt: skip
        rows = {name: {"pseudo_inverse_weight": np.repeat(w[x, shown], SLOTS)}
                for name, w in pseudo.items()}  # fmt: skip
        return Drawn(log, given, rows)

    return World(f"slates, {rewards} rewards", n, "slate", truth, draw)


def sessions(n: int, *, seed: int = 0) -> World:
    """A Markov decision process of 10 states, 3 actions and at most 10 steps, which users leave."""
    rng = np.random.default_rng([seed, 4])
    move = rng.dirichlet(np.full(STATES, 0.3), size=(STATES, MOVES))  # (S, A, S)
    leave = rng.uniform(0.02, 0.2, size=(STATES, MOVES))
    mean = rng.beta(1.0, 1.5, size=(STATES, MOVES))  # Bernoulli rewards
    best = np.zeros((STATES, MOVES))
    for _ in range(STEPS):
        best = mean + GAMMA * (1.0 - leave) * (move @ best.max(axis=1))
    logging = softmax(0.8 * best + 0.2 * rng.normal(size=best.shape))
    targets = {"optimal": softmax(1.6 * best), "medium": softmax(1.2 * best),
               "uniform": softmax(0.0 * best), "anti": softmax(-0.3 * best)}  # fmt: skip
    truth = {name: float(worth(pi, mean, move, leave).mean()) for name, pi in targets.items()}

    def draw(seed: int) -> Drawn:
        rng = np.random.default_rng([seed, 5])
        state, alive, seen = rng.integers(STATES, size=n), np.ones(n, dtype=bool), []
        for t in range(STEPS):
            action = drawn_from(logging[state], rng)
            reward = rng.random(n) < mean[state, action]
            episode = np.flatnonzero(alive)
            seen.append(np.stack([episode, np.full(len(episode), t), state[episode],
                                  action[episode], reward[episode]], axis=1))  # fmt: skip
            alive &= rng.random(n) >= leave[state, action]
            state = drawn_from(move[state, action], rng)
        rows = np.concatenate(seen)
        episode, step, state, action, reward = rows[np.lexsort((rows[:, 1], rows[:, 0]))].T
        log = DecisionLog.from_arrays(
            action=action, reward=reward, propensity=logging[state, action], episode=episode,
            step=step, context=np.eye(STATES)[state],
            num_actions=MOVES, reward_range=(0.0, 1.0),
        )  # fmt: skip
        return Drawn(log, {name: Target.from_matrix(pi[state]) for name, pi in targets.items()})

    return World("sessions", n, "episode", truth, draw, gamma=GAMMA)


def worth(pi: Array, mean: Array, move: Array, leave: Array) -> Array:
    """What a policy (S, A) earns from each state on with all steps before it, (S,)."""
    value = np.zeros(len(pi))
    for _ in range(STEPS):
        value = (pi * (mean + GAMMA * (1.0 - leave) * (move @ value))).sum(axis=1)
    return value


def drawn_from(probs: Array, rng: np.random.Generator) -> Array:
    """One of each row of (n, A), (n,)."""
    cumulative = probs.cumsum(axis=1)
    draw = rng.random(len(probs)) * cumulative[:, -1]  # below the last: rounding chooses nobody
    return (cumulative <= draw[:, None]).sum(axis=1)


def softmax(x: Array) -> Array:
    """(X, A) to probabilities (X, A)."""
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(x: Array) -> Array:
    """The logistic function."""
    return 1.0 / (1.0 + np.exp(-x))
