"""Which log, and which policies can be judged on it: Open Bandit and Coat."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.interactions import FALLBACK
from agents.neighbours import item_similarity
from evaluation import DecisionLog, RewardModel, Target, evaluate
from sources.bandits import BanditLog
from sources.coat import coat
from sources.open_bandit import BEHAVIOURS, SLOTS, open_bandit

Array = np.ndarray
LEARN = 3  # one row in so many, the earliest ones, is for what learns
FOLDS = 3  # of Coat's users: what learns has not seen the fold that it serves
LIKED = 4  # least rating that says a coat was liked
TEMPERATURE = 1.0  # of a softened ranker where none gives an effective sample size
WEIGHTED = ("snips", "ips")  # estimators that need no model
LEAST_ESS = 100.0  # below it a verdict would be the same


@dataclass(frozen=True)
class Settings:
    """What was typed that concerns all logs."""

    reward_model: str | None = "linear"
    soften_ess: float = 500.0
    seed: int = 0
    adaptive: bool = False


@dataclass(frozen=True)
class Question:
    """A log, the policies to judge on it, and what a reader must know of both."""

    log: DecisionLog
    targets: dict[str, Target]
    notes: list[str]
    reward_model: Any = None
    estimators: tuple[str, ...] | None = None  # where none are typed; None: evaluate() chooses
    batch_rows: int = 65_536
    baseline: str = "popularity"  # what others are compared with where nothing is typed


def open_bandit_policies(
    settings: Settings, *, campaign: str, behaviour: str, path: str | None = None
) -> Question:
    """Policies of one slot of the shop's page; what learns saw the first third of the log."""
    logged = open_bandit(campaign, behaviour, path)
    other = open_bandit(campaign, BEHAVIOURS[behaviour == BEHAVIOURS[0]], path)
    early, late = split_by_time(logged)
    slot, a = slots(logged), logged.num_actions
    log = DecisionLog.from_arrays(
        action=logged.action[late], reward=logged.reward[late], slot=slot[late],
        propensity=logged.propensity[late], num_actions=a, adaptive=settings.adaptive,
        context=np.hstack([logged.context, np.eye(SLOTS)[slot]])[late],
        # what bts could show is not known: it was simulated until some chances were too small
        support=np.ones((len(late), a), dtype=bool) if behaviour == "random" else None,
    )  # fmt: skip
    features = [name.startswith("user_feature") for name in logged.context_names]
    cell = cells(logged.context[:, features])  # (n,) of the whole log
    learnt = (cell[early], logged.action[early], logged.reward[early], a)
    popular, similar = rankers(*learnt, cell[late])
    since = moments(logged)[late[0]].astype("datetime64[m]")
    notes = [
        f"{logged.name}: judged on {len(late):,} rows since {since}; popularity and item_knn "
        f"learned from the {int(logged.reward[early].sum())} clicks before",
        *logged.notes,
        "a user of item_knn is the cell of all who share the four user features",
    ]
    targets = {"logging": own(log), "random": Target.from_function(np.full(a, 1.0 / a))}
    if behaviour == "random":
        targets["bts"] = Target.from_matrix(by_slot(other)[slot[late]])
        notes.append(
            "bts is an approximation: how often it showed an item in a slot, whoever came when"
        )
    notes.append(own_mean(other, since))
    for name, scores in {"popularity": popular, "item_knn": similar}.items():
        targets[name] = softened(name, scores, log, settings, notes)
    if settings.adaptive:
        return Question(log, targets, notes, estimators=("ips",))
    return Question(log, targets, notes, *model(settings, logged))


def coat_policies(settings: Settings, *, path: str | None = None) -> Question:
    """Policies of which coat to have rated; a row is read as its user's choice of one coat."""
    if path is None:
        raise ValueError("log=coat needs the folder of the Coat files: log.path=FOLDER")
    if settings.adaptive:
        raise ValueError("log=coat was not written by a policy that learned: leave adaptive=true")
    logged, test = coat(path), coat(path, test=True)
    a, user, tested = logged.num_actions, clusters(logged), clusters(test)
    # a pair's chance to be rated, shared out over its user's ratings, is the chance of a choice
    choice = logged.propensity / (logged.uniform * a)  # (n,)
    log = DecisionLog.from_arrays(
        action=logged.action, reward=logged.reward, propensity=choice, context=logged.context,
        cluster=user, num_actions=a, reward_range=(1.0, 5.0),
    )  # fmt: skip
    random_log = DecisionLog.from_arrays(
        action=test.action, reward=test.reward, propensity=np.full(len(tested), 1.0 / a),
        cluster=tested, num_actions=a, support=np.ones((len(tested), a), dtype=bool),
    )  # fmt: skip
    profile = np.zeros((max(user.max(), tested.max()) + 1, logged.context.shape[1]))  # (U, d)
    profile[tested], profile[user] = test.context, logged.context
    fold = np.random.default_rng(settings.seed).permutation(len(profile)) % FOLDS  # (U,)
    scores = folded(logged, cells(profile), user, fold)
    notes, weight = [*logged.notes], logged.uniform / logged.propensity
    uniform = Target.from_function(np.full(a, 1.0 / a))
    targets, truths = {"logging": own(log), "uniform": uniform}, {"uniform": uniform}
    for name, of_user in scores.items():
        targets[name] = softened(name, of_user[user], log, settings, notes)
        again = Target.from_ranker(of_user[tested], seed=settings.seed)
        truths[name] = again.soften(temperature=getattr(targets[name].kind, "temperature", 1.0))
    notes += [
        f"mean ratings as published: of chosen coats {logged.reward.mean():.3f}, reweighted (ips) "
        f"{(weight * logged.reward).mean():.3f}, self-normalised (snips) "
        f"{(weight * logged.reward).sum() / weight.sum():.3f}; the truth, on random coats, "
        f"{test.reward.mean():.3f}",
        "popularity and item_knn learned from what other users rated 4 or 5 (three folds); a user "
        "of item_knn is the cell of all who share age, gender, place and interest",
        truth(random_log, truths),
    ]
    return Question(log, targets, notes, *model(settings, logged))


def split_by_time(logged: BanditLog) -> tuple[Array, Array]:
    """Row numbers of the earliest third and of the rest, both in the order of time."""
    order = np.argsort(moments(logged), kind="stable")
    first = len(order) // LEARN
    if first == 0:
        raise ValueError(f"{logged.name} has {len(order)} rows: expected at least {LEARN}")
    return order[:first], order[first:]


def moments(logged: BanditLog) -> Array:
    """Times (n,); a log without them cannot be split."""
    if logged.time is None:
        raise ValueError(f"{logged.name} has no time: nothing tells before from after")
    return logged.time


def slots(logged: BanditLog) -> Array:
    """Slots (n,) from 0; one slot where the log knows none."""
    return np.zeros(len(logged.action), int) if logged.position is None else logged.position


def clusters(logged: BanditLog) -> Array:
    """Users (n,); a row is its own where the log knows none."""
    return np.arange(len(logged.action)) if logged.cluster is None else logged.cluster


def cells(features: Array) -> Array:
    """Number (n,) of the group of rows that share all features (n, d)."""
    return np.unique(features, axis=0, return_inverse=True)[1].reshape(-1)


def rankers(
    cell: Array, action: Array, liked: Array, num_actions: int, asked: Array
) -> tuple[Array, Array]:
    """Popularity (A,), and ItemKNN's scores (m, A) for the cells `asked` (m,), of rows (n,)."""
    from scipy.sparse import csr_matrix

    cells = int(max(cell.max(initial=0), asked.max(initial=0))) + 1
    counts = csr_matrix((liked, (cell, action)), shape=(cells, num_actions))
    counts.eliminate_zeros()
    popular = np.bincount(action, liked, minlength=num_actions)  # (A,)
    weight = counts.log1p()
    similar = (weight @ item_similarity(weight)).toarray()  # (cells, A)
    return popular, (similar + FALLBACK * popular / max(popular.max(), 1.0))[asked]


def folded(logged: BanditLog, cell: Array, user: Array, fold: Array) -> dict[str, Array]:
    """Scores (U, A) for every user by what the other folds' users liked."""
    shape = (len(cell), logged.num_actions)
    scores = {"popularity": np.empty(shape), "item_knn": np.empty(shape)}
    liked = (logged.reward >= LIKED).astype(float)  # (n,)
    for f in range(FOLDS):
        rows, served = fold[user] != f, fold == f
        seen = (cell[user[rows]], logged.action[rows], liked[rows], logged.num_actions)
        scores["popularity"][served], scores["item_knn"][served] = rankers(*seen, cell[served])
    return scores


def by_slot(logged: BanditLog) -> Array:
    """How often an item was shown in each slot, (SLOTS, A)."""
    shown = np.zeros((SLOTS, logged.num_actions))
    np.add.at(shown, (slots(logged), logged.action), 1.0)
    return shown / shown.sum(axis=1, keepdims=True)


def own(log: DecisionLog) -> Target:
    """The policy that wrote the log: weights are 1, and what it earned needs no model."""
    columns = np.empty((2, log.num_rows))
    for batch in log.batches():
        columns[:, batch.rows] = batch.propensity, batch.reward
    return Target.from_probabilities(columns[0], value=columns[1], q_logged=columns[1])


def softened(
    name: str, scores: Array, log: DecisionLog, settings: Settings, notes: list[str]
) -> Target:
    """A ranker made stochastic, as much as the effective sample size asks for."""
    ranker = Target.from_ranker(scores, seed=settings.seed)
    if settings.adaptive:  # a temperature chosen in view of the whole log would be none of before
        return ranker.soften(temperature=TEMPERATURE)
    ess = settings.soften_ess
    while True:
        try:
            target = ranker.soften(ess=ess).resolved(log)
            if ess < settings.soften_ess:
                notes.append(
                    f"{name} is softened to an effective sample size of {ess:g}: the log gives it "
                    f"no {settings.soften_ess:g}"
                )
            return target
        except ValueError as error:
            if ess / 2 < LEAST_ESS:
                notes.append(f"{name} is softened at temperature {TEMPERATURE:g}: {error}")
                return ranker.soften(temperature=TEMPERATURE)
            ess /= 2


def model(
    settings: Settings, logged: BanditLog
) -> tuple[RewardModel | None, tuple[str, ...] | None]:
    """The reward model that was asked for, which knows the items' features, and estimators."""
    if settings.reward_model is None:
        return None, WEIGHTED
    features = logged.item_features
    return RewardModel(settings.reward_model, item_features=features, seed=settings.seed), None


def own_mean(other: BanditLog, since: Any) -> str:
    """What another policy earned in its own log in the same days."""
    reward = other.reward[moments(other) >= since]
    error = reward.std() / np.sqrt(len(reward))
    return (
        f"for comparison, {other.name} itself has {reward.mean():.4f} ± {1.96 * error:.4f} clicks "
        "an impression since then"
    )


def truth(random_log: DecisionLog, targets: dict[str, Target]) -> str:
    """What a randomised test says of policies."""
    table = evaluate(random_log, targets, estimators=["snips"])
    told = [
        f"{row['policy']} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        if np.isfinite(row["value"])
        else f"{row['policy']} not told, too few of them are of its coats"
        for row in table.rows
        if row["estimator"] == "snips"
    ]
    return f"on the ratings of random coats (snips): {', '.join(told)}"
