"""Randomness as a function: (seed, user, episode, step, purpose, slot) to a uniform number.

A user's answers do not depend on batch size, order or device; two policies can be compared on
common random numbers; resuming needs no generator state. The hash is splitmix64
(Steele et al., 2014).
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def _signed(x: int) -> int:
    """An unsigned 64-bit constant as the int64 torch wants."""
    return x - (1 << 64) if x >= 1 << 63 else x


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX1, MIX2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
UNSIGNED = tuple(np.uint64(x % (1 << 64)) for x in (GOLDEN, MIX1, MIX2))


def splitmix64(x: Tensor) -> Tensor:
    """Mix int64 of any shape to int64 of the same shape; the arithmetic wraps around, as meant."""
    if x.device.type == "cpu":  # NumPy has unsigned integers, in place: 2.5 to 4 times faster
        return torch.from_numpy(_mixed(x.numpy()).view(np.int64))
    x = x + GOLDEN
    x = (x ^ _shift(x, 30)) * MIX1
    x = (x ^ _shift(x, 27)) * MIX2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right as if unsigned: torch copies the sign bit of int64, so the copies are cleared."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The same of int64 of any shape, as new uint64."""
    out = np.empty(x.shape, dtype=np.uint64)
    np.add(x.view(np.uint64), UNSIGNED[0], out=out)
    for bits, factor in zip((30, 27), UNSIGNED[1:], strict=True):
        out ^= out >> bits
        out *= factor
    out ^= out >> 31
    return out


@dataclass(frozen=True)
class Draws:
    """The draws of B users at one step. `Draws.root(seed).at(user, episode, step)`."""

    seed: int
    trip_key: Tensor  # (B,) int64: user and episode
    key: Tensor  # (B,) int64: user, episode and step

    @staticmethod
    def root(seed: int, device: torch.device | str = "cpu") -> "Draws":
        none = torch.zeros(1, dtype=torch.int64, device=device)
        return Draws(seed, none, none)

    def at(self, user: Tensor, episode: Tensor, step: Tensor) -> "Draws":
        """Draws for users (B,) in their episodes (B,) at their steps (B,)."""
        start = _signed(self.seed * GOLDEN % (1 << 64))  # seeds are far apart, whatever the users
        trip = splitmix64(splitmix64(user + start) ^ episode)
        return Draws(self.seed, trip, splitmix64(trip ^ (step + 1)))

    def uniform(self, purpose: str, slots: int = 1) -> Tensor:
        """(B, slots) in (0, 1): new at every step."""
        return self._hash(self.key[:, None], purpose, torch.arange(slots, device=self.key.device))

    def per_item(self, purpose: str, items: Tensor) -> Tensor:
        """One number per user, episode and item (B, K), at whatever step and slot it is shown."""
        return self._hash(self.trip_key[:, None], purpose, items)

    @staticmethod
    def _hash(key: Tensor, purpose: str, slot: Tensor) -> Tensor:
        salt = zlib.crc32(purpose.encode()) << 24  # not hash(): that differs between processes
        if key.device.type == "cpu":
            bits = _mixed(key.numpy() ^ (slot.numpy() + salt)) >> 41
            uniform = bits.view(np.int64).astype(np.float32)
            uniform += 0.5  # 23 bits: bits + .5 is exact in float32
            uniform /= 1 << 23  # never 0 or 1
            return torch.from_numpy(uniform)
        mixed = _shift(splitmix64(key ^ (slot + salt)), 41)
        return (mixed.float() + 0.5) / (1 << 23)
