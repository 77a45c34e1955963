"""Read the observations of any Gymnasium environment: numbers, items shown, their feedback."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from encoders.state import LIMIT
from envs.gym_actions import choices

Path = tuple[Any, ...]  # keys of Dict and places of Tuple that lead to a part
Where = Callable[[int], str]  # names the environment, row and step of the r-th observation
ONE_HOT = 1024  # columns up to which a choice is one-hot; beyond it is one scaled number
FAR = 1e6  # a bound beyond it is no bound: environments write float32's largest for infinity


@dataclass(frozen=True)
class Part:
    """One leaf of an observation space: how M raw numbers become `size` columns."""

    path: Path
    length: int  # M
    low: np.ndarray  # (M,) float64; -inf where unbounded
    high: np.ndarray  # (M,)
    one_hot: bool
    whole: bool  # only integers are possible
    size: int  # columns

    @property
    def name(self) -> str:
        return ".".join(str(key) for key in self.path) or "observation"

    def gather(self, observations: Sequence[Any], where: Where) -> np.ndarray:
        """The raw numbers (R, M) of R observations."""
        values = observations
        try:
            for key in self.path:
                values = [value[key] for value in values]
            return np.array(values, dtype=np.float64).reshape(len(values), self.length)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(self._misfit(observations, where)) from error

    def read(self, raw: np.ndarray, where: Where) -> np.ndarray:
        """Raw numbers (R, M) to columns (R, size), at most a few units in size."""
        ok = np.isfinite(raw)  # (R, M)
        if self.whole:
            ok &= (raw >= self.low) & (raw <= self.high) & (raw == np.floor(raw))
        if not ok.all():
            row, place = np.argwhere(~ok)[0]
            wanted = (
                f"an integer in {self.low[place]:g}..{self.high[place]:g}"
                if self.whole
                else "a finite number"
            )
            raise ValueError(
                f"{where(row)}: {self.name}[{place}] must be {wanted}, got {raw[row, place]}"
            )
        if not self.one_hot:
            return scale(raw, self.low, self.high)
        columns = np.zeros((len(raw), self.size))  # (R, size)
        counts = (self.high - self.low + 1).astype(np.int64)  # (M,)
        at = (raw - self.low).astype(np.int64) + counts.cumsum() - counts  # (R, M)
        columns[np.arange(len(raw))[:, None], at] = 1.0
        return columns

    def _misfit(self, observations: Sequence[Any], where: Where) -> str:
        """Say which observation does not hold the part."""
        for row, value in enumerate(observations):
            try:
                for key in self.path:
                    value = value[key]
                fits = np.asarray(value, dtype=np.float64).size == self.length
            except (KeyError, IndexError, TypeError, ValueError):
                return (
                    f"{where(row)}: the observation has no {self.name} of numbers, got "
                    f"{value!r:.80}: it must fit the observation_space"
                )
            if not fits:
                return (
                    f"{where(row)}: {self.name} must hold {self.length} numbers as the "
                    f"observation_space says, got shape {np.shape(value)}"
                )
        return f"{where(0)}: {self.name} of the observation cannot be read as numbers"


def scale(raw: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Numbers (R, M) with wide bounds (M,) to [-1, 1], without bounds to their signed log.

    Where bounds lie within +-10 numbers stay as they are. Nothing is learnt: a policy that was
    trained yesterday must read today's observations alike.
    """
    reach = np.maximum(np.abs(low), np.abs(high))  # (M,)
    open_, wide = reach > FAR, (reach > LIMIT) & (reach <= FAR)  # (M,) each
    out = raw.copy()
    if open_.any():
        out[:, open_] = np.sign(raw[:, open_]) * np.log1p(np.abs(raw[:, open_]))
    if wide.any():
        span = np.maximum((high - low)[wide], np.finfo(np.float64).tiny)
        out[:, wide] = 2.0 * (raw[:, wide] - low[wide]) / span - 1.0
    return out


def parts(space: spaces.Space[Any], env_id: str, path: Path = ()) -> list[Part]:
    """The leaves of an observation space, in its order."""
    if isinstance(space, spaces.Dict):
        return [p for key, s in space.spaces.items() for p in parts(s, env_id, (*path, key))]
    if isinstance(space, spaces.Tuple):
        return [p for i, s in enumerate(space.spaces) for p in parts(s, env_id, (*path, i))]
    if isinstance(space, spaces.Box):
        low, high = (np.ravel(x).astype(np.float64) for x in (space.low, space.high))  # (M,) each
        return [Part(path, len(low), low, high, one_hot=False, whole=False, size=len(low))]
    if isinstance(space, spaces.MultiBinary):
        m = math.prod(space.shape)
        return [Part(path, m, np.zeros(m), np.ones(m), one_hot=False, whole=True, size=m)]
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        start, count = choices(space)  # (M,) each
        low, high, length = (
            start.astype(np.float64),
            (start + count - 1).astype(np.float64),
            len(start),
        )
        total = int(count.sum())
        one_hot = total <= ONE_HOT
        return [Part(path, length, low, high, one_hot, True, total if one_hot else length)]
    raise ValueError(
        f"{env_id}: observations may be Box, Discrete, MultiBinary, MultiDiscrete and Dict or "
        f"Tuple of these, got {space} at {'.'.join(map(str, path)) or 'the top'}: wrap it"
    )


@dataclass(frozen=True)
class Reading:
    """Which parts of an observation are numbers, which the items shown, which their feedback."""

    numbers: tuple[Part, ...]
    shown: Part | None = None
    feedback: Part | None = None

    @property
    def size(self) -> int:
        return sum(part.size for part in self.numbers)

    def profile(self, observations: Sequence[Any], where: Where) -> np.ndarray:
        """All numbers, (R, P) float32."""
        read = [part.read(part.gather(observations, where), where) for part in self.numbers]
        if not read:
            return np.zeros((len(observations), 0), dtype=np.float32)
        return np.concatenate(read, axis=1).astype(np.float32)

    def slates(
        self, observations: Sequence[Any], where: Where
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Items shown last (R, K) int64 and their feedback (R, K), None where not told."""
        if self.shown is None:
            return None, None
        raw = self.shown.gather(observations, where)  # (R, K)
        inside = (raw >= self.shown.low) & (raw <= self.shown.high)  # (R, K): NaN is not
        outside = ~inside | (raw != np.floor(raw))  # (R, K)
        if outside.any():
            row, slot = np.argwhere(outside)[0]
            raise ValueError(
                f"{where(row)}: {self.shown.name}[{slot}] must be an item in "
                f"{self.shown.low[0]:g}..{self.shown.high[0]:g}, got {raw[row, slot]}"
            )
        shown = (raw - self.shown.low).astype(np.int64)  # (R, K)
        if self.feedback is None:
            return shown, None
        feedback = self.feedback.gather(observations, where)  # (R, K)
        if not np.isfinite(feedback).all():
            row, slot = np.argwhere(~np.isfinite(feedback))[0]
            raise ValueError(
                f"{where(row)}: {self.feedback.name}[{slot}] must be finite, got "
                f"{feedback[row, slot]}"
            )
        return shown, feedback


def read_space(
    space: spaces.Space[Any],
    env_id: str,
    *,
    num_items: int,
    slate_size: int,
    detect: bool,
    shown: str | None,
    feedback: str | None,
) -> Reading:
    """Find the items shown and their feedback, by name or by form; the rest is numbers."""
    leaves = parts(space, env_id)
    top = {leaf.path[0]: leaf for leaf in leaves if len(leaf.path) == 1}
    if not isinstance(space, spaces.Dict):
        top = {}
    items = {
        key: leaf
        for key, leaf in top.items()
        if isinstance(space, spaces.Dict)
        and isinstance(space[key], spaces.Discrete | spaces.MultiDiscrete)
        and leaf.length == slate_size
        and (leaf.high - leaf.low + 1 == num_items).all()
    }
    form = f"{slate_size} ids of {num_items} items"
    found = _named("shown", shown, items, top, form) if shown or detect else None
    if found is None:
        if feedback is not None:
            raise ValueError(f"feedback={feedback!r} needs the items it is about: set shown=KEY")
        return Reading(tuple(leaves))
    beside = {k: p for k, p in top.items() if p is not found and p.length == slate_size}
    binary = {k: p for k, p in beside.items() if p.whole and (p.high == 1).all() and not p.one_hot}
    boxes = {k: p for k, p in beside.items() if not p.whole}
    form = f"{slate_size} numbers, one for each item shown"
    wanted = {**binary, **boxes} if feedback is not None else binary or boxes
    answer = _named("feedback", feedback, wanted, top, form)
    rest = tuple(leaf for leaf in leaves if leaf is not found and leaf is not answer)
    return Reading(rest, found, answer)


def _named(
    what: str, name: str | None, fitting: dict[Any, Part], there: dict[Any, Part], form: str
) -> Part | None:
    """The part called `name`, or the only one that fits, or None."""
    if name is not None:
        if name not in fitting:
            known = ", ".join(str(key) for key in there) or "none: it is no Dict"
            raise ValueError(
                f"{what}={name!r} must be a part of the observation with {form}; parts: {known}; "
                f"fitting: {', '.join(map(str, fitting)) or 'none'}"
            )
        return fitting[name]
    if len(fitting) > 1:
        raise ValueError(
            f"several parts of the observation have {form}: {', '.join(map(str, fitting))}: "
            f"say which with {what}=KEY"
        )
    return next(iter(fitting.values()), None)
