"""One line of the gate: a figure, its interval, what it must keep, and whether the log can tell.

A figure that does not keep its threshold fails, unless the log is too small to say so: its interval
reaches what is allowed, and is wider than the threshold or rests on fewer than FEWEST users. Then
`passed` is None.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from simulators.realism import Distance

FEWEST = 200  # users below whom an interval that reaches what is allowed tells nothing


@dataclass(frozen=True)
class Check:
    """One line of the gate."""

    check: str
    value: float
    low: float | None
    high: float | None
    threshold: float
    passed: bool | None  # None: too few users to tell
    said: str  # in words


def at_most(
    name: str, found: Distance | float, limits: Mapping[str, float], said: str, *,
    chance: float = 0.0, users: int | None = None,
) -> Check:  # fmt: skip
    """A distance that must not exceed its threshold.

    `chance` is what two samples of the real log differ by, in 95 of 100 draws.
    """
    value, low, high = spread_of(found)
    limit = limits[name]
    near = _nearest(value, low, high)
    wide = chance > limit or _small(users) or _half(low, high) > limit
    few = wide and near <= max(limit, chance)
    return Check(name, value, low, high, limit, verdict(abs(value) <= limit, few), said)


def within(
    name: str, found: Distance | float, limits: Mapping[str, float], said: str, *,
    users: int | None = None,
) -> Check:  # fmt: skip
    """A ratio that must not be further from 1 than its threshold or its inverse."""
    value, low, high = spread_of(found)
    bound, few = limits[name], False
    if low is not None and high is not None:
        wide = _small(users) or high > low * bound**2
        few = wide and low <= bound and high >= 1 / bound
    return Check(name, value, low, high, bound, verdict(1 / bound <= value <= bound, few), said)


def above(
    name: str, found: Distance, limits: Mapping[str, float], said: str, *, users: int | None = None
) -> Check:
    """A gain whose whole interval must lie above its threshold."""
    limit = limits[name]
    few = _small(users) and not found.high < limit
    passed = verdict(found.low > limit, few)
    return Check(name, found.value, found.low, found.high, limit, passed, said)


def at_least(
    name: str, found: Distance | float, limits: Mapping[str, float], said: str, *,
    nobody: bool = False,
) -> Check:  # fmt: skip
    """A share that must reach its threshold; `nobody`: it is a share of nothing."""
    value, low, high = spread_of(found)
    limit = limits[name]
    few = nobody or (high is not None and high >= limit and _half(low, high) > 1 - limit)
    return Check(name, value, low, high, limit, verdict(value >= limit, few), said)


def verdict(passed: bool, few: bool) -> bool | None:
    """True, False, or None where too few are there to tell."""
    return True if passed else None if few else False


def spread_of(found: Distance | float) -> tuple[float, float | None, float | None]:
    """Value, low and high; a plain number has no interval."""
    if isinstance(found, Distance):
        return found.value, found.low, found.high
    return float(found), None, None


def _small(users: int | None) -> bool:
    return users is not None and users < FEWEST


def _half(low: float | None, high: float | None) -> float:
    return 0.0 if low is None or high is None else (high - low) / 2


def _nearest(value: float, low: float | None, high: float | None) -> float:
    """The least distance inside the interval, or the distance itself."""
    if low is None or high is None:
        return abs(value)
    return 0.0 if low < 0 < high else min(abs(low), abs(high))


MARKS = {True: "PASS", False: "FAIL", None: "FEW "}


def lines(checks: list[Check]) -> list[str]:
    """The gate as aligned text, PASS, FAIL or FEW first."""
    name = max(len(c.check) for c in checks)
    said = []
    for c in checks:
        spread = "" if c.low is None else f"{c.low:.4f} to {c.high:.4f}"
        few = "; too few to tell" if c.passed is None else ""
        said.append(
            f"{MARKS[c.passed]}  {c.check:<{name}}  {c.value:>8.4f}  {spread:<18}  "
            f"limit {c.threshold:<6g}  {c.said}{few}"
        )
    return [*said, count_line(checks)]


def count_line(checks: list[Check]) -> str:
    """How many passed, and how many could not be told."""
    passed, few = (sum(c.passed is x for c in checks) for x in (True, None))
    more = f", of {few} the log has too few users to tell" if few else ""
    return f"{passed} of {len(checks)} checks passed{more}"
