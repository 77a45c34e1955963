"""Feedback that comes late, in any order: decisions that wait for their rewards, by id."""

from typing import Any

import torch
from torch import Tensor


class Pending:
    """A ring of decisions that wait; the oldest fall out when `keep` newer ones have come.

    Ids count up from 0. A reward for what has fallen out is counted as late and not learnt from.
    """

    def __init__(self, keep: int, device: torch.device | str = "cpu") -> None:
        if keep < 1:
            raise ValueError(f"pending must be at least 1 decision, got {keep}")
        self.keep, self.device, self.next = keep, device, 0
        self.data: dict[str, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Expect nothing; ids go on counting, so that old ones stay unknown."""
        self.key = torch.full((self.keep,), -1, dtype=torch.int64, device=self.device)
        self.lost = self.late = 0  # fell out unanswered; answered after that

    def __len__(self) -> int:
        """Decisions that still wait."""
        return int((self.key >= 0).sum())

    def add(self, fields: dict[str, Tensor]) -> Tensor:
        """Keep the rows of `fields`, (B, ...) each; their ids (B,)."""
        users = len(next(iter(fields.values())))
        if users > self.keep:
            raise ValueError(
                f"pending keeps {self.keep} decisions, got {users} at once: raise pending"
            )
        ids = torch.arange(self.next, self.next + users, device=self.device)  # (B,)
        place = ids % self.keep
        if not self.data:
            self.data = {
                name: torch.empty(
                    self.keep, *value.shape[1:], dtype=value.dtype, device=self.device
                )
                for name, value in fields.items()
            }  # pages are only taken when written
        self.lost += int((self.key[place] >= 0).sum())
        for name, value in fields.items():
            self.data[name][place] = value.detach()
        self.key[place] = ids
        self.next += users
        return ids

    def take(self, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Rows that waited for `ids` (n,), each once, and which of the ids they are (n,) bool."""
        self._check(ids)
        ids = ids.to(self.device)
        place = ids % self.keep  # (n,)
        here = self.key[place] == ids
        old = ids < self.next - self.keep
        if not (here | old).all():
            known = int(ids[~(here | old)][0])
            raise ValueError(
                f"decision {known} has had its feedback, or was forgotten by load_state_dict: "
                "give each decision's feedback once, all slots together"
            )
        self.late += int((~here).sum())
        rows = place[here]
        taken = {name: value[rows] for name, value in self.data.items()}
        self.key[rows] = -1
        return taken, here

    def _check(self, ids: Tensor) -> None:
        """Refuse what is no list of ids that were given out, each at most once."""
        if ids.ndim != 1 or ids.dtype != torch.int64:
            raise ValueError(
                f"ids must be (n,) int64 as expect() gave them, got {tuple(ids.shape)} {ids.dtype}"
            )
        unknown = (ids < 0) | (ids >= self.next)
        if unknown.any():
            raise ValueError(
                f"decision {int(ids[unknown][0])} is unknown: ids are 0..{self.next - 1}, those "
                "that expect() gave"
            )
        ordered = ids.sort().values
        twice = ordered[1:] == ordered[:-1]
        if twice.any():
            raise ValueError(
                f"decision {int(ordered[1:][twice][0])} is given twice in one call: give each "
                "decision's feedback once, all slots together"
            )

    def state_dict(self) -> dict[str, Any]:
        """What waits, as plain tensors and numbers."""
        rows = (self.key >= 0).nonzero().squeeze(1)  # (R,)
        return {
            "keep": self.keep,
            "next": self.next,
            "lost": self.lost,
            "late": self.late,
            "ids": self.key[rows].clone(),
            "data": {name: value[rows].clone() for name, value in self.data.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["keep"] != self.keep:
            raise ValueError(
                f"pending feedback was saved with pending={state['keep']}, here it is {self.keep}: "
                "use the same, or load without the experience"
            )
        self.clear()
        self.next, self.lost, self.late = state["next"], state["lost"], state["late"]
        place = state["ids"].to(self.device) % self.keep
        self.key[place] = state["ids"].to(self.device)
        for name, rows in state["data"].items():
            kept = torch.empty(self.keep, *rows.shape[1:], dtype=rows.dtype, device=self.device)
            kept[place] = rows.to(self.device)
            self.data[name] = kept


def check_slots(slot_reward: Tensor, ids: Tensor, k: int) -> Tensor:
    """Rewards of slots (n, K) as they must be for these ids (n,)."""
    if tuple(slot_reward.shape) != (len(ids), k):
        raise ValueError(
            f"slot_reward must be ({len(ids)}, {k}), a reward for each slot of each decision, "
            f"got {tuple(slot_reward.shape)}"
        )
    bad = ~slot_reward.isfinite().all(dim=1)  # (n,)
    if bad.any():
        raise ValueError(f"slot_reward must be finite, row {int(bad.nonzero()[0])} is not")
    return slot_reward
