"""What bandits know of a user and an item: one vector per user, or one per user and item.

`UserVectors` are contexts x(s) for models that keep weights of their own for every item.
`PairVectors` are phi(s, a) for one model of all items: what a user is like times what an item is
like, how near the item is to what the user bought and was shown, and what the user did with this
very item. They are a fixed map for each user applied to a few numbers of each item, so that means
and variances of all (B, N) need no (B, N, d).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.base import AgentSpec
from agents.nets import TRACES, Reader, Seen
from encoders.state import EMPTY, Observation

BOUND = 10.0  # of a user's numbers: one wild profile must not outweigh a thousand others


class UserVectors:
    """Observations to contexts x (B, size): 1, profile and context, and the rest projected.

    At most `dim` numbers: what does not fit is projected by a fixed matrix that `seed` draws;
    profile and context are kept as they are where they fit.
    """

    def __init__(self, spec: AgentSpec, read: Reader, *, dim: int, seed: int = 0) -> None:
        direct = spec.profile_size + spec.context_size
        self.read = read
        self.direct = direct if direct < dim else 0
        rest = read.size - self.direct
        room = min(dim - 1 - self.direct, rest)
        self.size = 1 + self.direct + room
        generator = torch.Generator().manual_seed(seed)
        project = torch.eye(rest)  # where nothing has to be squeezed all stays as it is
        if room < rest:
            project = torch.randn(rest, room, generator=generator) / math.sqrt(max(room, 1))
        self.project = project.to(spec.device)  # (U - direct, room)

    def __call__(self, obs: Observation, seen: Seen | None = None) -> Tensor:
        one = torch.ones(len(obs), 1, device=obs.profile.device)
        if not self.project.shape[1]:  # nothing but the profile was asked for: read nothing else
            parts = [one, obs.profile, obs.context] if self.direct else [one]
            return torch.cat(parts, dim=1).clamp(-BOUND, BOUND)
        state = (self.read(obs) if seen is None else seen).state.clamp(-BOUND, BOUND)  # (B, U)
        squeezed = state[:, self.direct :] @ self.project  # (B, room)
        return torch.cat([one, state[:, : self.direct], squeezed], dim=1)


@dataclass(frozen=True)
class Pairs:
    """B users and all items, in factors: phi(s, a) = (user x items[:Q], items[Q:], traces)."""

    user: Tensor  # (B, P)
    items: Tensor  # (B, Q + J, N): Q numbers of the item alone, J of both
    places: Tensor  # (B, S) int64: items with traces, distinct in a row; N where none
    traces: Tensor  # (B, S, T)


class PairVectors:
    """Observations and items to phi(s, a) of `size` numbers, whole or in factors."""

    def __init__(self, spec: AgentSpec, *, dim: int, axes: int = 12, seed: int = 0) -> None:
        self.read = Reader(spec, memory=True)
        self.users = UserVectors(spec, self.read, dim=dim, seed=seed)
        self.num_items = spec.num_items
        table = self.read.items  # (N + 1, R + 1)
        self.axes = min(axes, table.shape[1] - 1)
        known = F.pad(table.new_ones(spec.num_items, 1), (0, 0, 0, 1))  # EMPTY has no 1 either
        self.alone = torch.cat([known, self.read.fame, table[:, : self.axes]], dim=1)  # (N + 1, Q)
        self.apart = self.alone.shape[1]  # Q
        self.first = spec.profile_size + spec.context_size  # where the means of a state begin
        self.means = 3 + spec.feedback_size  # J
        self.traced = TRACES + 1 + spec.feedback_size  # T
        self.size = self.users.size * self.alone.shape[1] + self.means + self.traced

    def factors(self, obs: Observation) -> Pairs:
        """Everything of B users, without a (B, N, size)."""
        seen = self.read(obs)
        near = self._means(seen.state) @ self.read.items[:-1].T  # (B, J, N)
        alone = self.alone[:-1].T.expand(len(obs), -1, -1)  # (B, Q, N)
        places, traces = self.traces(obs, seen)
        return Pairs(self.users(obs, seen), torch.cat([alone, near], dim=1), places, traces)

    def of(self, obs: Observation, slate: Tensor) -> Tensor:
        """phi (B, K, size) of a slate (B, K) with EMPTY."""
        seen = self.read(obs)
        index = torch.where(slate == EMPTY, self.num_items, slate)  # (B, K)
        both = self.users(obs, seen)[:, None, :, None] * self.alone[index][:, :, None, :]
        near = self.read.items[index] @ self._means(seen.state).transpose(1, 2)  # (B, K, J)
        return torch.cat([both.flatten(2), near, self.traces_of(obs, seen, slate)], dim=2)

    def traces_of(self, obs: Observation, seen: Seen, slate: Tensor) -> Tensor:
        """What users did with the items of a slate (B, K) before, (B, K, T)."""
        places, traces = self.traces(obs, seen)
        match = (slate[:, :, None] == places[:, None, :]).to(traces.dtype)  # (B, K, S)
        return match @ traces

    def _means(self, state: Tensor) -> Tensor:
        """The means (B, J, R + 1) of item features that are in a state."""
        wide = self.read.items.shape[1]
        part = state[:, self.first : self.first + self.means * wide]
        return part.reshape(len(state), self.means, wide)

    def traces(self, obs: Observation, seen: Seen) -> tuple[Tensor, Tensor]:
        """Places (B, S) and what is known there (B, S, T): the past, then what the trip added."""
        none, filled = self.num_items, (obs.past != EMPTY).any(dim=0).nonzero()
        width = int(filled.max()) + 1 if len(filled) else 0  # most pasts are far from full
        past = obs.past[:, :width]  # (B, H)
        shown = obs.history != EMPTY  # (B, L)
        trip = torch.cat([shown[:, :, None].float(), obs.feedback * shown[:, :, None]], dim=2)
        again = (obs.history[:, :, None] == obs.history[:, None, :]).to(trip.dtype)  # (B, L, L)
        old = (past[:, :, None] == obs.history[:, None, :]) & shown[:, None, :]  # (B, H, L)
        memory = seen.traces[:, :, :width].transpose(1, 2)  # (B, H, TRACES)
        first = torch.cat([memory, old.to(trip.dtype) @ trip], dim=2)  # (B, H, T)
        second = F.pad(again @ trip, (TRACES, 0))  # (B, L, T)
        repeat = (again.tril(-1) > 0).any(dim=2) | old.any(dim=1) | ~shown  # (B, L)
        places = torch.cat(
            [
                torch.where(past == EMPTY, none, past),
                torch.where(repeat, none, obs.history),
            ],
            dim=1,
        )
        traces = torch.cat([first, second], dim=1)
        return places, traces * (places != none)[:, :, None]


def pair_form(pairs: Pairs, weight: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """Weights (M, d) of phi to those of each user's items (B, M, Q + J) and of traces (M, T)."""
    p, wide = pairs.user.shape[1], pairs.items.shape[1]
    both = weight[:, : p * q].reshape(-1, p, q)  # (M, P, Q)
    user = torch.einsum("bp,mpq->bmq", pairs.user.to(weight.dtype), both)  # (B, M, Q)
    near = weight[:, p * q : p * q + wide - q].expand(len(user), -1, -1)  # (B, M, J)
    return torch.cat([user, near], dim=2).float(), weight[:, p * q + wide - q :].float()


def pair_scores(pairs: Pairs, weight: Tensor, q: int, base: Tensor) -> Tensor:
    """phi theta of all items (B, M, N) for weights (M, d), plus `base` (M or 1, N)."""
    user, trace = pair_form(pairs, weight, q)  # (B, M, Q + J), (M, T)
    score = torch.baddbmm(base.float().expand(len(user), -1, -1), user, pairs.items)  # (B, M, N)
    extra = trace @ pairs.traces.transpose(1, 2)  # (B, M, S)
    real = pairs.places < score.shape[2]  # (B, S)
    place = torch.where(real, pairs.places, 0)[:, None, :].expand_as(extra)
    return score.scatter_add_(2, place, extra * real[:, None, :])


def pair_squares(pairs: Pairs, cov: Tensor, q: int) -> Tensor:
    """phi cov phi' of all items (B, N): a sum of squares, so that rounding cannot make it negative.

    For one user phi is a fixed map of Q + J + T numbers of the item, so cov becomes a small matrix
    of that user; its Cholesky factor does the rest.
    """
    b, p = pairs.user.shape
    user, wide = pairs.user.to(cov.dtype), pairs.items.shape[1]
    e, first = cov.shape[0] - p * q, cov[: p * q, : p * q]
    half = (user @ first.reshape(p, -1)).view(b, q, p, q)  # (B, Q, P, Q)
    own = torch.einsum("bjpq,bp->bjq", half, user)  # (B, Q, Q)
    cross = (user @ cov[: p * q, p * q :].reshape(p, -1)).view(b, q, e)  # (B, Q, J + T)
    rest = cov[p * q :, p * q :].expand(b, e, e)
    small = torch.cat(
        [torch.cat([own, cross], dim=2), torch.cat([cross.transpose(1, 2), rest], dim=2)], dim=1
    )  # (B, Q + J + T, Q + J + T)
    floor = 1e-12 * small.diagonal(dim1=1, dim2=2).amax(dim=1)[:, None]  # (B, 1) against rounding
    root = torch.linalg.cholesky(small + torch.diag_embed(floor.expand(b, q + e))).float()
    square = (root[:, :wide, :wide].transpose(1, 2) @ pairs.items).square_().sum(dim=1)  # (B, N)
    real = pairs.places < square.shape[1]  # (B, S)
    place = torch.where(real, pairs.places, 0)
    here = pairs.items.gather(2, place[:, None, :].expand(-1, wide, -1))  # (B, Q + J, S)
    here = torch.cat([here, pairs.traces.transpose(1, 2)], dim=1)  # (B, Q + J + T, S)
    traced = (root.transpose(1, 2) @ here).square_().sum(dim=1)  # (B, S)
    # one scatter of differences: empty places add nothing to item 0
    return square.scatter_add_(1, place, (traced - square.gather(1, place)) * real)


def pair_products(pairs: Pairs, weight: Tensor, alone: Tensor, q: int) -> Tensor:
    """phi of all items (B, N) times a weight of the item's own, (N, d)."""
    p, wide = pairs.user.shape[1], pairs.items.shape[1]
    both = weight[:, : p * q].reshape(-1, p, q)  # (N, P, Q)
    user = torch.einsum("npq,nq->np", both, alone.to(weight.dtype)).float()  # (N, P)
    near = weight[:, p * q : p * q + wide - q].T.float()  # (J, N)
    product = pairs.user @ user.T + (pairs.items[:, q:] * near).sum(dim=1)  # (B, N)
    real = pairs.places < product.shape[1]  # (B, S)
    place = torch.where(real, pairs.places, 0)
    trace = weight[:, p * q + wide - q :].float()[place]  # (B, S, T)
    return product.scatter_add_(1, place, (pairs.traces * trace).sum(dim=2) * real)
