"""Whether something got slower: ratios of headline rows beside those of the committed table."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.bench_rows import Row, short

MOST = 0.3  # share of a ratio that may be lost: windows on shared machines stray by a fifth
SIDES = ("peer", "limit")


@dataclass(frozen=True)
class Verdict:
    """One ratio of one row."""

    bench: str
    case: str
    side: str  # "peer" or "limit"
    said: str
    lost: bool
    absent: bool  # on one side: nothing to compare with

    def __str__(self) -> str:
        return f"{'LOST ' if self.lost else ''}{self.bench}: {self.case}: {self.said}"


def compared(committed: Sequence[Row], measured: Sequence[Row]) -> list[Verdict]:
    """Each ratio on either side, by benchmark and case; curves and absolute limits are left out."""
    before, now = by_case(committed), by_case(measured)
    found = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        for side in SIDES:
            then, today = ratio_of(old, side), ratio_of(new, side)
            name = next(row[f"{side}_name"] for row in (new, old) if row)
            if then is not None or today is not None:
                absent = then is None or today is None
                found.append(Verdict(*key, side, *judged(then, today, name), absent))
    return found


def judged(before: float | None, now: float | None, name: str) -> tuple[str, bool]:
    """What to say of a ratio then and now, and whether too much of it is lost."""
    if before is None or now is None:
        where, there = ("the committed table", now) if before is None else ("this run", before)
        return f"{short(there or 0.0)} x {name}, absent in {where}: not compared", False
    change = now / before - 1.0
    said = f"{short(now)} x {name}, {short(before)} in the committed table ({change:+.0%})"
    return said, change < -MOST


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """Rows that are no points of curves, by what they are known by."""
    return {(row["bench"], row["case"]): row for row in rows if row["curve"] is None}


def ratio_of(row: Row | None, side: str) -> float | None:
    """A ratio; None where there is none, or one to so many seconds, which differ by machine."""
    if row is None or (side == "limit" and row["absolute"]):
        return None
    ratio: float | None = row[f"ratio_to_{side}"]
    return ratio
