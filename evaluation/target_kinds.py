"""The kinds of policy that come with numbers: given probabilities, matrices, lists, agents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evaluation.target_rows import (
    EMPTY,
    Distribution,
    certain,
    check_actions,
    check_length,
    check_numbers,
    closest,
    every_item,
    items_above,
    pick,
    real_actions,
    remaining,
    supported,
    take,
)
from evaluation.terms import Array, Groups

if TYPE_CHECKING:
    from evaluation.log import Batch, DecisionLog

DECISIONS = 1024  # that an agent answers at once


@dataclass(frozen=True)
class Logged:
    """What a target says of n logged rows."""

    pi: Array  # (n,) probability of the logged action, given the items above it
    value: Array | None = None  # (n,) E_pi[q(x, .)]
    q_logged: Array | None = None  # (n,) q(x, a) of the logged action
    marginal: Array | None = None  # (n,) probability of the item at that slot, whatever is above


class Kind(Protocol):
    """How a target knows its probabilities; `needs` are the fields of a batch that it reads."""

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def deterministic(self) -> bool | None: ...

    def logged(self, batch: "Batch") -> Logged: ...

    def distribution(self, batch: "Batch") -> Distribution | None: ...

    def check(self, log: "DecisionLog") -> None: ...


@dataclass(frozen=True)
class Given:
    """Numbers of the logged rows only: arrays (n,) in the order of the log, or its columns."""

    columns: dict[str, Array | str | None]  # by field of `Logged`

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(x for x in self.columns.values() if isinstance(x, str))

    @property
    def deterministic(self) -> bool | None:
        pi = self.columns["pi"]
        return None if isinstance(pi, str) or pi is None else certain(pi)

    def logged(self, batch: "Batch") -> Logged:
        found = {name: self._of(x, batch) for name, x in self.columns.items()}
        for name, x in found.items():
            if x is not None and isinstance(self.columns[name], str):
                check_numbers(x, name, batch.rows)
        return Logged(**found)  # type: ignore[arg-type]

    def distribution(self, batch: "Batch") -> Distribution | None:
        return None

    def check(self, log: "DecisionLog") -> None:
        for name, x in self.columns.items():
            if isinstance(x, np.ndarray):
                check_length(x, log, name)
            elif x is not None and not log.has(x):
                others = sorted(next(iter(log.batches(rows=1))).columns)
                raise ValueError(
                    f"the log has no column '{x}', other than its own fields it has {others}: "
                    f"name it when the log is made.{closest(x, others)}"
                )

    def _of(self, x: Array | str | None, batch: "Batch") -> Array | None:
        if not isinstance(x, str):
            return None if x is None else take(x, batch.rows)
        found = batch.columns[x] if x in batch.columns else getattr(batch, x)
        return np.asarray(found, dtype=np.float64)


@dataclass(frozen=True)
class Matrix:
    """All probabilities of every row, (n, A), or (n, A, L) for a logged slot out of L."""

    pi: Array

    @property
    def needs(self) -> tuple[str, ...]:
        return ("action", "slot") if self.pi.ndim == 3 else ("action",)

    @property
    def deterministic(self) -> bool | None:
        return certain(self.pi)

    def logged(self, batch: "Batch") -> Logged:
        action, empty = real_actions(batch, self.pi.shape[1])  # (n,) each
        if self.pi.ndim == 2:
            return Logged(np.where(empty, 1.0, self.pi[batch.rows, action]))
        pi = np.where(empty, 1.0, self.pi[batch.rows, action, self._slot(batch)])  # (n,)
        return Logged(pi, marginal=pi)

    def distribution(self, batch: "Batch") -> Distribution | None:
        if self.pi.ndim == 2:
            return every_item(take(self.pi, batch.rows))
        return every_item(self.pi[batch.rows, :, self._slot(batch)])

    def check(self, log: "DecisionLog") -> None:
        check_length(self.pi, log, "pi")
        check_actions(self.pi.shape[1], log)

    def _slot(self, batch: "Batch") -> Array:
        slots = self.pi.shape[2]
        if batch.slot is None:
            raise ValueError(
                f"pi has {slots} slots, the log says no slot: make the log with slot=, "
                "or give pi as (n, A)"
            )
        if len(batch.slot) and batch.slot.max() >= slots:
            row = batch.rows[batch.slot.argmax()]
            raise ValueError(
                f"pi has {slots} slots, row {row} of the log shows slot {batch.slot.max()}: "
                "give pi for every slot"
            )
        return batch.slot


@dataclass(frozen=True)
class Lists:
    """The items that a policy may show, (n, k) with EMPTY padding, and their probabilities."""

    items: Array
    probs: Array

    needs = ("action",)

    @property
    def deterministic(self) -> bool | None:
        return certain(self.probs)

    def logged(self, batch: "Batch") -> Logged:
        items, probs = take(self.items, batch.rows), take(self.probs, batch.rows)  # (n, k)
        pi = (probs * (items == batch.action[:, None])).sum(axis=1)  # (n,)
        return Logged(np.where(batch.action == EMPTY, 1.0, pi))

    def distribution(self, batch: "Batch") -> Distribution | None:
        return take(self.items, batch.rows), take(self.probs, batch.rows)

    def check(self, log: "DecisionLog") -> None:
        check_length(self.items, log, "items")
        bad = self.items.max(axis=1) >= log.num_actions  # (n,)
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"items must be in 0..{log.num_actions - 1}, the catalogue of the log, row {row} "
                f"has {self.items[row].max()}: drop the item, or make the log with num_actions="
            )


@dataclass(frozen=True)
class AgentPolicy:
    """An agent, and what it saw (torch tensors) at each of the log's decisions."""

    agent: Any
    obs: Any
    mask: Any
    explore: bool = True

    needs = ("action", "decision", "slot")
    deterministic = None

    def logged(self, batch: "Batch") -> Logged:
        import torch

        groups, seen = self._decisions(batch)
        slate = groups.padded(groups.sort(batch.action), int(groups.lengths.max()), EMPTY)  # (G, K)
        shown = torch.from_numpy(slate.astype(np.int64))
        if hasattr(self.agent, "slate_probs"):
            per_slot = self._ask(self.agent.slate_probs, seen, shown)  # (G, K)
        elif shown.shape[1] == 1:
            probs = self._ask(self.agent.action_probs, seen)  # (G, N)
            per_slot = np.take_along_axis(probs, np.maximum(slate, 0).astype(int), axis=1)
        else:
            raise ValueError(
                f"the log shows slates of {shown.shape[1]}, the agent has action_probs only: "
                "give it slate_probs (agents.base.Agent)"
            )
        pi = np.empty(len(batch.action))  # (n,)
        pi[groups.order] = per_slot[groups.index, groups.place]
        first = np.empty(len(pi), dtype=bool)
        first[groups.order] = groups.place == 0
        pi = np.where(batch.action == EMPTY, 1.0, pi)
        return Logged(pi, marginal=pi if first.all() else None)

    def distribution(self, batch: "Batch") -> Distribution | None:
        """Whole if every row is a first slot, or the agent draws further ones by Plackett-Luce.

        Others (epsilon-greedy lists) tell the probability of a slate's items only: None.
        """
        groups, seen = self._decisions(batch)
        probs = self._ask(self.agent.action_probs, seen)  # (G, N)
        row = np.empty(len(batch.action), dtype=int)  # (n,)
        row[groups.order] = groups.index
        above = items_above(batch)
        if above is None:
            return every_item(take(probs, row))
        left = remaining(probs[row], above)  # (n, N)
        action, empty = real_actions(batch, left.shape[1])
        same = np.isclose(pick(left, action), self.logged(batch).pi, rtol=1e-4, atol=1e-7)
        told = (same | empty).all() and (left.sum(axis=1) > 0).all()
        return every_item(left) if told else None

    def check(self, log: "DecisionLog") -> None:
        if not log.has("decision") and len(self.obs) != log.num_rows:
            raise ValueError(
                f"the agent saw {len(self.obs)} decisions, the log has {log.num_rows} rows: "
                "say what it saw at every row, or make the log with decision="
            )

    def _decisions(self, batch: "Batch") -> tuple[Groups, Array]:
        """The decisions of a batch, and which rows (G,) of `obs` they are."""
        named = batch.decision is not None
        groups = Groups(batch.decision if named else batch.rows, batch.slot if named else None)
        seen = groups.first(groups.sort(batch.decision if named else batch.rows))  # (G,)
        bad = (seen < 0) | (seen >= len(self.obs))
        if bad.any():
            raise ValueError(
                f"the agent saw decisions 0..{len(self.obs) - 1}, the log has decision "
                f"{seen[bad][0]}: number decisions in the order of obs (evaluation.decisions)"
            )
        return groups, seen

    def _ask(self, probs: Callable[..., Any], seen: Array, slate: Any = None) -> Array:
        """Answers of the agent to the decisions `seen` (G,), as (G, N) or (G, K) float64."""
        import torch

        found = []
        with torch.no_grad():
            for start in range(0, len(seen), DECISIONS):
                rows = torch.from_numpy(seen[start : start + DECISIONS].astype(np.int64))
                obs, mask = self.obs[rows], None if self.mask is None else self.mask[rows]
                more = () if slate is None else (slate[start : start + DECISIONS].to(obs.past),)
                answer = probs(obs, mask, *more, explore=self.explore)
                found.append(answer.double().cpu().numpy())
        return np.concatenate(found)


@dataclass(frozen=True)
class OnSupport:
    """Another kind, its probabilities divided among the items that the log could have shown."""

    kind: Kind

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.kind.needs, "context", "support")

    @property
    def deterministic(self) -> bool | None:
        return self.kind.deterministic

    def logged(self, batch: "Batch") -> Logged:
        return Logged(self.kind.logged(batch).pi / self._mass(batch)[1])

    def distribution(self, batch: "Batch") -> Distribution | None:
        (items, probs), mass = self._mass(batch)
        return items, probs / mass[:, None]

    def check(self, log: "DecisionLog") -> None:
        self.kind.check(log)

    def _mass(self, batch: "Batch") -> tuple[Distribution, Array]:
        """What is left of the distribution on the support, and its mass (n,) in each row."""
        whole = self.kind.distribution(batch)
        if whole is None:
            raise ValueError(
                "of this target only the logged actions' probabilities are known: restrict one "
                "made by from_lists, from_matrix, from_function or from_ranker"
            )
        items, probs = whole
        probs = probs * supported(batch, items)
        mass = probs.sum(axis=1)  # (n,)
        if not (mass > 0).all():
            row = batch.rows[(mass <= 0).argmax()]
            raise ValueError(
                f"row {row}: the target shows nothing that the log could have shown, so that "
                "nothing is left to restrict it to: rank with Target.from_ranker, or soften it"
            )
        return (items, probs), mass
