"""What a comparison of policies says in words."""

import math
from collections.abc import Sequence
from statistics import median_low
from typing import Any

import numpy as np

from evaluation.compared import LEAST_GAIN, Gap, claim
from evaluation.wording import IDENTIFIED, Row, legible, number, present, short, span

Report = dict[str, Any]
ORACLE = "oracle"  # greedy on the simulator's truth: a line, no policy
READING = {
    "reward": "mean reward of a session on simulators that no learner was trained on; the interval "
    "covers households, simulators and the training seeds of learners, where there are several",
    "length": "slates shown in a session",
    "revenue": "money spent in a session",
    "coverage": "share of the catalogue that is shown at all",
    "Gini": "how unequally items are shown: 0 is all the same, 1 is one item only",
    "novelty": "bits of surprise at a shown item, given how often it was sold: one bit more is "
    "half as popular",
    "diversity": "mean distance between items of one session: 0 is all alike",
    "recall": "share of what a held-out trip bought that is among the first k",
    "NDCG": "the same where higher ranks count more: 1 is the best order",
    "hit": "share of held-out trips with at least one such item",
    "replay": "items really bought among those shown on a replayed held-out trip",
    "difference": "to the best static policy, session by session on the same random numbers",
    "SD": "standard deviation of the reward of a session",
    "better": f"the interval is above 0 and the difference at least {LEAST_GAIN * 100:g} % of the "
    "best static policy's reward; less is no win, as enough simulated sessions make any "
    "difference significant",
    "withheld": "the log does not support the number, so it is not shown, not even with a warning",
    "oracle": "shows what the simulator itself holds most likely to be taken: a line to measure "
    "against, no policy, and not the most that planning could reach",
    "-": "not measured",
}  # fmt: skip


def of(rows: Sequence[Row] | None, policy: Any) -> Row:
    """The row of a policy, or nothing."""
    return next((row for row in rows or [] if row.get("policy") == policy), {})


def real(x: Any) -> float:
    """A finite number, NaN where there is none."""
    return float(x) if present(x) and math.isfinite(x) else math.nan


def finite(x: Any) -> Any:
    """The same report with None for every number that is none, and lists for arrays."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple | np.ndarray):
        return [finite(value) for value in x]
    return None if isinstance(x, float | np.floating) and not math.isfinite(x) else x


def reward_of(report: Report, policy: Any) -> float:
    """Mean reward of a policy, NaN where it was not played."""
    rows = [row for row in report.get("policies") or [] if row.get("policy") == policy]
    return real(rows[0].get("reward")) if rows else math.nan


def about(report: Report) -> str:
    """What was compared on how much, when, and by which code."""
    base = ""
    if present(report.get("sessions")):
        base = f"{number(report['sessions'])} sessions"
        if present(report.get("simulators")):
            base += f" on each of {number(report['simulators'])} simulators"
    parts = [base]
    if present(report.get("households")):
        parts.append(f"{number(report['households'])} households")
    if report.get("learners") and present(report.get("seeds")):
        parts.append(seeds(report, ""))
    if present(report.get("slate_size")):
        parts.append(f"slates of {number(report['slate_size'])}")
    named = (("env", "env "), ("made", ""), ("commit", "commit "))
    parts += [f"{what}{report[key]}" for key, what in named if report.get(key)]
    return ", ".join(part for part in parts if part)


def bar(report: Report) -> str:
    """What the policy to beat earns, and the truth above it."""
    base = report.get("baseline")
    if not base:
        return "No policy to compare with is named."
    earned, truth = number(reward_of(report, base), 3), number(reward_of(report, ORACLE), 3)
    static = base in (report.get("statics") or [])
    role = "the best static policy" if static else "with which the others are compared"
    told = f"{base}, {role}, earns {earned or '-'} a session"
    return f"{told}; greedy on the simulator's own truth earns {truth}." if truth else f"{told}."


def verdict(report: Report, policy: str) -> str:
    """What to say of a learner after its name: difference, how far it holds, what a log says."""
    return f"{compared(report, policy)} {held(report, policy)}{logged(report, policy)}"


def compared(report: Report, policy: str) -> str:
    """How a learner compares with the best static policy."""
    base, row = report.get("baseline"), of(report.get("differences"), policy)
    if not present(row.get("difference")):
        return f"was not compared with {base}." if base else "was not compared with another."
    interval = f" (95 % interval {span(row)})" if span(row) else " (no interval)"
    part = f", {relative(row['relative'])}" if present(row.get("relative")) else ""
    said = claimed(report, row)
    return (f"is {said}. The difference is {signed(row['difference'])} a session{interval}{part}, "
            f"over {seeds(report, policy)}.")  # fmt: skip


def held(report: Report, policy: str) -> str:
    """Which changed assumptions turn its sign."""
    flipped, sure, among = flips(report, policy)
    if not among:
        return ""
    row = {"differences": {policy: of(report.get("differences"), policy)}}
    first, whole = sign(report["sensitivity"]["rows"][0], policy)[0], sign(row, policy)[0]
    if whole and first != whole:
        return f"On the fewer sessions with changed assumptions its sign is {first} as it is. "
    if not flipped:
        return f"None of {among} changed assumptions turns its sign. "
    doubt = f", {len(sure)} of them with an interval that excludes 0" if sure else ""
    verb = "turns" if len(flipped) == 1 else "turn"
    names = ", ".join(flipped)
    return f"{len(flipped)} of {among} changed assumptions {verb} its sign{doubt}: {names}. "


def logged(report: Report, policy: str) -> str:
    """What off-policy evaluation says of it."""
    ope = of(report.get("policies"), policy).get("ope") or {}
    if not ope.get("verdict"):
        return "Off-policy, nothing is known of it."
    if policy == (report.get("off_policy") or {}).get("baseline"):
        return "The decision log is its own: off-policy, it says nothing new of it."
    if ope["verdict"] == IDENTIFIED and present(ope.get("value")):
        around = f" ({span(ope)})" if span(ope) else ""
        unit = f" {ope['unit']}" if ope.get("unit") else ""
        return f"Off-policy, its softened kin earns {number(ope['value'], 3)}{around}{unit}."
    return f"Off-policy, the value of its softened kin is {ope['verdict']}."


def claimed(report: Report, row: Row) -> str:
    """What the difference allows to say."""
    if row.get("policy") == ORACLE:
        return "the truth, no policy"
    if row.get("claim"):
        return legible(row["claim"])
    gap = Gap(*(real(row.get(key)) for key in ("difference", "low", "high")))
    base = legible(report.get("baseline"))
    if not (present(gap.low) and present(gap.high)):
        return f"not told apart from {base}"
    return claim(gap, reward_of(report, report.get("baseline")), base)


def seeds(report: Report, policy: str) -> str:
    """`5 training seeds`."""
    count = of(report.get("policies"), policy).get("seeds") or report.get("seeds")
    if not present(count):
        return "training seeds not counted"
    return "one training seed" if count == 1 else f"{number(count)} training seeds"


def signed(x: Any) -> str:
    """`+.0123`, or nothing."""
    return f"+{number(x, 3)}" if present(x) and x > 0 else number(x, 3)


def relative(share: Any) -> str:
    """`+1.2 %`, or nothing."""
    return f"{100 * share:+.2g} %" if present(share) else ""


def label(row: Row) -> str:
    """A changed assumption."""
    return " ".join(legible(row[key]) for key in ("assumption", "label") if row.get(key))


def sign(row: Row, policy: str) -> tuple[str, bool]:
    """Sign of a difference, and whether its interval excludes 0."""
    gap = (row.get("differences") or {}).get(policy) or {}
    x, low, high = (real(gap.get(key)) for key in ("difference", "low", "high"))
    return "+" if x > 0 else "−" if x < 0 else "0" if x == 0 else "", low > 0 or high < 0


def flips(report: Report, policy: str) -> tuple[list[str], list[str], int]:
    """Assumptions that turn the sign of a difference, those that do so surely, of how many."""
    rows = (report.get("sensitivity") or {}).get("rows") or []
    first = sign(rows[0], policy)[0] if rows else ""
    told = [(label(row), *sign(row, policy)) for row in rows[1:]] if first else []
    told = [cell for cell in told if cell[1]]
    turned = [cell for cell in told if {cell[1], first} == {"+", "−"}]
    return [name for name, *_ in turned], [name for name, _, sure in turned if sure], len(told)


def columns(rows: Sequence[Row], *keys: str, plus: bool = False) -> list[list[str]]:
    """Cells of a value, low and high of each row, all with the same decimals."""
    values = [[real(row.get(key)) for key in keys] for row in rows]
    places = decimals(values)

    def cell(x: float) -> str:
        if not math.isfinite(x) or abs(x) >= 1e9:
            return number(x, 3) or "-"
        return ("+" if plus and x > 0 else "") + short(f"{x:,.{places}f}")

    return [[cell(x) for x in row] for row in values]


def decimals(values: Sequence[Sequence[float]]) -> int:
    """Decimals for two digits of a usual interval's width, or three of a usual number."""
    widths = [row[-1] - row[-2] for row in values if len(row) == 3 and row[-1] > row[-2]]
    sizes = [abs(x) for row in values for x in row if x and math.isfinite(x)]
    usual, digits = (widths, 2) if widths else (sizes, 3)
    return min(max(digits - 1 - math.floor(math.log10(median_low(usual))), 0), 9) if usual else 0
