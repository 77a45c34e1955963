"""The bare kernel of an environment's step: TinyWorld's arithmetic, in place, and nothing else.

It draws, gathers, answers and remembers what `RecommendVectorEnv` does, with the same numbers, for
one trip with the logit choice. It checks nothing, tells nothing (`info`), and overwrites what it
showed before: what a step costs on tensors at least, and no environment anybody could use.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from encoders.state import EMPTY, calendar
from envs.recommend import TURNS
from simulators.draws import GOLDEN, MIX1, MIX2, Draws
from simulators.worlds import BASKET, TinyWorld

BLOCK = 1024  # rows whose item vectors lie in the cache at once


@dataclass(frozen=True)
class Outcome:
    """What a step brings; overwritten by the next."""

    shown: Tensor  # (B, K)
    chosen: Tensor  # (B, K) bool
    organic: Tensor  # (B, K) bool
    value: Tensor  # (B, K)
    reward: Tensor  # (B,)
    terminated: Tensor  # (B,) bool
    truncated: Tensor  # (B,) bool


class BareStep:
    """B users of a `TinyWorld` of one trip who are shown slates (B, K) for up to `max_steps`."""

    def __init__(
        self, world: TinyWorld, *, num_envs: int, slate_size: int, max_steps: int, seed: int
    ) -> None:
        if world.trips > 1 or world.drift or world.satiation or world.choice != "logit":
            raise ValueError(
                "the bare kernel knows one trip, the logit choice, no drift and no satiation, got "
                f"trips={world.trips}, choice={world.choice!r}, drift={world.drift}, "
                f"satiation={world.satiation}"
            )
        if len(world.stop) > 1 or max_steps > BASKET:
            raise ValueError(
                f"the bare kernel knows one stop hazard and trips of at most "
                f"{BASKET} steps, got {len(world.stop)} and max_steps={max_steps}"
            )
        self.world, self.slate_size, self.max_steps = world, slate_size, max_steps
        self.num_items, device = len(world.catalog), world.stop.device
        self.draws = Draws.root(seed, device)
        self.rows = torch.arange(num_envs, device=device)  # (B,)
        self.slots = torch.arange(slate_size, device=device)  # (K,)
        self.turn = torch.zeros_like(self.rows)  # (B,)
        self.steps = torch.zeros_like(self.rows)  # (B,)
        self.board = torch.zeros(num_envs, self.num_items + 1, dtype=torch.bool, device=device)
        self.blank = torch.zeros_like(self.board[0])  # (N + 1,)
        self.history = torch.full((num_envs, slate_size * max_steps), EMPTY, device=device)
        self.feedback = torch.zeros(self.history.shape, device=device)  # (B, L)
        self.users = world.users
        self.user, self.trip = self.whom(self.rows, self.turn)  # (B,) each
        self.columns = (self.users.profile, self.users.past, self.users.past_count,
                        self.users.past_age, world.truth.taste, *world.memory)  # fmt: skip
        self.held = [column.index_select(0, self.user) for column in self.columns]  # (B, ...) each
        self.context = calendar(self.users.start[self.user])  # (B, C)
        salts = [zlib.crc32(word.encode()) << 24 for word in ("outside", "leave")]
        self.salts = torch.tensor(salts, device=device)  # (2,)
        self.salt = zlib.crc32(b"buy") << 24

    def whom(self, rows: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Users (R,) of rows at their turns, and the keys of their draws."""
        key = self.draws.at(rows, turn, torch.zeros_like(turn)).key  # (R,)
        user = (key & torch.iinfo(torch.int64).max) % len(self.users)
        return user, self.draws.at(user, rows * TURNS + turn, turn).trip_key

    def step(self, slate: Tensor) -> Outcome:
        """Show slates (B, K) of items of the catalogue."""
        world = self.world
        column = slate.T.contiguous()  # (K, B)
        again = torch.zeros_like(column, dtype=torch.bool)  # (K, B) higher up in the slate too
        for slot in range(1, self.slate_size):
            torch.any(column[:slot] == column[slot], dim=0, out=again[slot])
        hidden = self.board.gather(1, slate).logical_or_(again.T)  # (B, K)
        self.board.scatter_(1, slate, True)
        shown = slate.masked_fill(hidden, EMPTY)  # (B, K)
        taste, past, count, age = self.held[4:]  # (B, D), (B, H) each
        # what is bought: the same operations in the same order as TinyWorld's
        theta = torch.empty(slate.shape, device=slate.device)  # (B, K)
        for start in range(0, len(slate), BLOCK):
            block = slice(start, start + BLOCK)
            near = embedding(slate[block], world.catalog.vectors)  # (b, K, D)
            torch.sum(near.mul_(taste[block, None]), dim=2, out=theta[block])
        flat = slate.flatten()  # an index takes three times as long as `index_select`
        bias, gap, price = (
            x.index_select(0, flat).view_as(slate)
            for x in (world.truth.bias, world.truth.gap, world.catalog.price)
        )  # (B, K) each
        theta.mul_(world.taste).add_(bias)
        place = torch.searchsorted(past, slate).clamp_(max=past.shape[1] - 1)  # (B, K)
        times = count.gather(1, place).mul_(past.gather(1, place) == slate)  # (B, K)
        wanted = age.gather(1, place).div_(gap).clamp_(max=2.0)  # (B, K)
        wanted.add_(times.log1p()).sub_(1.0).mul_(times > 0)
        theta.add_(wanted, alpha=world.again).masked_fill_(hidden, -torch.inf)
        noise = gumbel(self.uniform(self.trip[:, None], slate + self.salt))  # (B, K)
        step_key = splitmix64(self.trip ^ (self.steps + 1))  # (B,)
        lone = self.uniform(step_key[:, None], self.salts.expand(len(slate), 2))  # (B, 2)
        outside = gumbel(lone[:, :1].clone())  # (B, 1)
        organic = theta + noise > outside  # (B, K)
        best, top = theta.add_(noise + world.exposure).max(dim=1, keepdim=True)  # (B, 1) each
        chosen = (self.slots == top) & (best > outside)  # (B, K)
        bought = chosen.any(dim=1)  # (B,)
        left = lone[:, 1] < torch.where(bought, world.stop, world.patience)  # (B,)
        value = price.mul_(chosen)  # (B, K)
        # what the next observation holds
        cell = self.steps[:, None] * self.slate_size + self.slots  # (B, K)
        self.history.scatter_(1, cell, shown)
        did = chosen.float()  # (B, K)
        self.feedback.scatter_(1, cell, did)
        self.steps += 1
        truncated = (self.steps >= self.max_steps).logical_and_(~left)  # (B,)
        rows = (left | truncated).nonzero().squeeze(1)  # (R,)
        if len(rows):
            self.restart(rows)
        return Outcome(shown, chosen, organic, value, did.sum(dim=1), left, truncated)

    def restart(self, rows: Tensor) -> None:
        """Let the next users into rows (R,)."""
        turn = self.turn[rows].add_(1)  # (R,)
        user, trip = self.whom(rows, turn)
        self.turn[rows], self.user[rows], self.trip[rows] = turn, user, trip
        self.steps[rows] = 0
        for held, column in zip(self.held, self.columns, strict=True):
            held.index_copy_(0, rows, column.index_select(0, user))
        self.context.index_copy_(0, rows, calendar(self.users.start[user]))
        self.history.index_fill_(0, rows, EMPTY)
        self.feedback.index_fill_(0, rows, 0.0)
        self.board[rows] = self.blank

    @staticmethod
    def uniform(key: Tensor, slot: Tensor) -> Tensor:
        """(B, K) in (0, 1) from keys (B, 1) and salted slots (B, K), as `Draws` has them."""
        bits = (
            splitmix64(slot.bitwise_xor(key)).bitwise_right_shift_(41).bitwise_and_((1 << 23) - 1)
        )
        return bits.float().add_(0.5).div_(1 << 23)


def splitmix64(x: Tensor) -> Tensor:
    """As `simulators.draws.splitmix64`, in place."""
    x.add_(GOLDEN)
    for bits, factor in ((30, MIX1), (27, MIX2), (31, 1)):
        x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))
        if factor != 1:
            x.mul_(factor)
    return x


def gumbel(uniform: Tensor) -> Tensor:
    """As `simulators.choice.gumbel`, in place."""
    return uniform.log_().neg_().log_().neg_()
