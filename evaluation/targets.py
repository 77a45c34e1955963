"""A policy as the evaluator sees it: what it would have done on the rows of a log."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.rankers import ByContext, Ranker, tempered
from evaluation.target_kinds import AgentPolicy, Given, Kind, Lists, Logged, Matrix, OnSupport
from evaluation.target_rows import EMPTY, Distribution, blocks, check_numbers, check_rows
from evaluation.terms import Array

if TYPE_CHECKING:
    from evaluation.log import Batch, DecisionLog

__all__ = ["Logged", "Target"]

Column = Any  # (n,), anything NumPy reads, or the name of a column of the log
Scores = Any  # (A,), (n, A), or a function of context (b, d) -> (b, A)


@dataclass(frozen=True)
class Target:
    """A policy to be evaluated; made by one of the from_... below, which say what they need."""

    kind: Kind
    estimand: str = "value of the policy"
    curve: list[dict[str, float]] | None = None  # of softening: value over temperature

    @classmethod
    def from_probabilities(
        cls,
        pi_logged: Column,
        value: Column | None = None,
        q_logged: Column | None = None,
        marginal: Column | None = None,
    ) -> "Target":
        """Numbers (n,) of the logged rows: the action's probability given the items above it."""
        given = {"pi": pi_logged, "value": value, "q_logged": q_logged, "marginal": marginal}
        columns: dict[str, Array | str | None] = {}
        for name, x in given.items():
            columns[name] = x = x if x is None or isinstance(x, str) else floats(x, name, 1)
            if isinstance(x, np.ndarray):
                check_numbers(x, name)
        return cls(Given(columns))

    @classmethod
    def from_matrix(cls, pi: Any) -> "Target":
        """Probabilities (n, A) of all actions, or (n, A, L) where the log says the slot."""
        pi = numeric(pi)
        if pi.ndim not in (2, 3) or 0 in pi.shape:
            raise ValueError(f"pi must be (n, A) or (n, A, L), got shape {pi.shape}")
        check_rows(pi)
        return cls(Matrix(pi))

    @classmethod
    def from_lists(cls, items: Any, probs: Any) -> "Target":
        """All that the policy may show, (n, k) with -1 where there is less, and how likely."""
        items, probs = np.asarray(items), floats(probs, "probs", 2)
        if items.shape != probs.shape:
            raise ValueError(
                f"items are {items.shape} and probs {probs.shape}: give both as (n, k)"
            )
        if not np.issubdtype(items.dtype, np.integer):
            raise ValueError(f"items must be integers, rows of the catalogue, got {items.dtype}")
        check_lists(items, probs)
        return cls(Lists(items, probs))

    @classmethod
    def from_function(cls, f: Callable[[Array], Array] | Any) -> "Target":
        """Probabilities of context (b, d) -> (b, A), or (A,) for everybody."""
        if not callable(f):
            f = floats(f, "probabilities for everybody", 1)
            check_rows(f[None])
        return cls(ByContext(f))

    @classmethod
    def from_policy(
        cls, agent: Any, obs: Any = None, mask: Any = None, *, explore: bool = True
    ) -> "Target":
        """An agent (agents.base.Agent) on what it saw, as evaluation.decisions.seen_by gives it."""
        if not hasattr(agent, "action_probs") and not hasattr(agent, "slate_probs"):
            if callable(agent):
                return cls.from_function(agent)
            raise ValueError(
                f"a policy needs slate_probs or action_probs, {type(agent).__name__} has neither: "
                "pass an agents.base.Agent, or a function of the context"
            )
        if obs is None:
            raise ValueError(
                "an agent needs what it saw: Target.from_policy(agent, *seen_by(folder)) "
                "with evaluation.decisions.seen_by"
            )
        if mask is not None and len(mask) != len(obs):
            raise ValueError(f"obs has {len(obs)} decisions, mask {len(mask)}: give as many")
        return cls(AgentPolicy(agent, obs, mask, explore))

    @classmethod
    def from_ranker(cls, scores: Scores, k: int = 1, *, seed: int = 0) -> "Target":
        """The k best of scores (A,), (n, A) or context -> (b, A); `seed` decides between equals."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not callable(scores):
            scores = numeric(scores)
            if scores.ndim not in (1, 2) or 0 in scores.shape:
                raise ValueError(f"scores must be (A,) or (n, A), got shape {scores.shape}")
            if k > scores.shape[-1]:
                raise ValueError(f"k={k} of {scores.shape[-1]} items: ask for a shorter list")
        return cls(Ranker(scores, k, seed), "value of the deterministic ranker")

    def soften(
        self, *, ess: float | None = None, temperature: float | None = None, uniform: float = 0.0
    ) -> "Target":
        """Make a ranker stochastic: a changed policy, so that a log can say something of it.

        Softmax at a temperature in standard deviations of a row's scores, or at the lowest one
        at which the log's weights have this effective sample size; `uniform` alone is
        epsilon-greedy.
        """
        if not isinstance(self.kind, Ranker):
            raise ValueError("only a ranker can be softened: make it with Target.from_ranker")
        if ess is not None and temperature is not None:
            raise ValueError("give ess or temperature: the one follows from the other")
        if temperature is not None and not 0 < temperature < np.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
        if ess is not None and not 0 < ess < np.inf:
            raise ValueError(f"ess must be above 0, got {ess}")
        if not 0.0 <= uniform <= 1.0:
            raise ValueError(f"uniform must be in [0, 1], got {uniform}")
        if ess is None and temperature is None and not uniform:
            raise ValueError("give ess=500, a temperature, or uniform=0.1: nothing was softened")
        kind = replace(self.kind, temperature=temperature, ess=ess, uniform=uniform)
        how = [f"effective sample size {ess:g}"] if ess is not None else []
        how += [f"temperature {temperature:g}"] if temperature is not None else []
        how += [f"{uniform:g} uniform"] if uniform else []
        softened = "the softened ranker" + (", on the log's support" if kind.on_support else "")
        return replace(self, kind=kind, estimand=f"value of {softened} ({', '.join(how)})")

    def restricted(self) -> "Target":
        """The policy if it had only what the log could have shown: another estimand, which says so.

        A ranker ranks what is left; of others the probabilities are divided by their covered mass.
        """
        said = f"{self.estimand}, restricted to the log's support"
        if isinstance(self.kind, Ranker):
            return replace(self, kind=replace(self.kind, on_support=True), estimand=said)
        return replace(self, kind=OnSupport(self.kind), estimand=said)

    def resolved(self, log: "DecisionLog") -> "Target":
        """Itself, or, if softened to an effective sample size, with the temperature and curve."""
        if not isinstance(self.kind, Ranker) or self.kind.ess is None:
            return self
        kind, curve = tempered(self.kind, log)
        said = f"{self.estimand}, temperature {kind.temperature:.4g}"
        return replace(self, kind=kind, curve=curve, estimand=said)

    def logged(self, batch: "Batch") -> Logged:
        """What it says of the logged actions (n,)."""
        return self.kind.logged(batch)

    def distribution(self, batch: "Batch") -> Distribution | None:
        """Items (n, k) and probabilities (n, k) of each row, given the items above; if known."""
        return self.kind.distribution(batch)

    def covered(self, batch: "Batch") -> Array | None:
        """Mass (n,) on what the log could have shown; None where either side is not known whole."""
        if batch.supported(np.maximum(batch.action, 0)[:, None]) is None:
            return None
        whole = self.kind.distribution(batch)
        if whole is None:
            return None
        return (whole[1] * batch.supported(whole[0])).sum(axis=1)

    def check(self, log: "DecisionLog") -> None:
        """Refuse a log of other rows or actions."""
        self.kind.check(log)

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields and columns of a batch that it reads."""
        return self.kind.needs

    @property
    def deterministic(self) -> bool | None:
        """Whether it always does the same; None if that is not known."""
        return self.kind.deterministic


def numeric(x: Any) -> Array:
    """An array of numbers, as wide as it came: (n, A) may be large."""
    x = np.asarray(x)
    return x if np.issubdtype(x.dtype, np.floating) else x.astype(np.float64)


def floats(x: Any, name: str, ndim: int) -> Array:
    """An array of `ndim` dimensions as float64."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != ndim:
        expected = "(n,)" if ndim == 1 else "(n, k)"
        raise ValueError(
            f"{'pi_logged' if name == 'pi' else name} must be {expected}, got {x.shape}"
        )
    return x


def check_lists(items: Array, probs: Array) -> None:
    """Refuse lists (n, k) that are no distributions."""
    check_rows(probs, what="probs")
    for part in blocks(*items.shape):
        row = np.sort(items[part], axis=1)  # (b, k)
        again = ((row[:, 1:] == row[:, :-1]) & (row[:, 1:] != EMPTY)).any(axis=1)  # (b,)
        below = (items[part] < EMPTY).any(axis=1)
        padded = ((items[part] == EMPTY) & (probs[part] > 0)).any(axis=1)
        for bad, said in (
            (again, "names an item twice: add its probabilities up"),
            (below, f"has an item below 0: items are rows of the catalogue, {EMPTY} is padding"),
            (padded, f"has a probability at {EMPTY}, which is padding: make it 0"),
        ):
            if bad.any():
                at = part.start + int(bad.argmax())
                raise ValueError(f"row {at} of items {said}, got {items[at][:20].tolist()}")
