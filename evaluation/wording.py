"""Tables, numbers and sentences as a person reads them in a terminal."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from statistics import median_low
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from evaluation.report import Table

Row = dict[str, Any]
IDENTIFIED, PARTIAL, NOT = "identified", "partially identified", "not identified"
MODELS = ("dm", "fqe")  # answer without weights, so of any policy, as well as their model does
# first to be quoted where there are several: in the order in which bench=ope_accuracy has them
HEADLINE = ("sndr", "dr", "snrips", "cascade_dr", "drl", "seq_sndr", "seq_dr")
DISTRIBUTION = ("cdf", "quantile", "cvar")
WIDTH = 110  # of the text


def in_text(table: "Table") -> str:
    """The whole table: caveats, a block for each policy, differences, assumptions."""
    lines = [title(table), *wrapped(caveats(table), "! "), ""]
    for policy in table.policies:
        lines += [*block(table, policy), ""]
    if table.differences:
        lines += [*compared(table), ""]
    if assumptions(table):
        lines += ["Assumptions", *wrapped(assumptions(table), "  - ")]
    return "\n".join(lines).rstrip()


def of_model(row: Row) -> bool:
    """Whether the row's number comes from a model alone, which no verdict withholds."""
    return row["estimator"].partition("(")[0] in MODELS or "model only" in (row.get("note") or "")


def present(x: Any) -> bool:
    """Whether there is a number."""
    return x is not None and not math.isnan(x)


def number(x: Any, digits: int = 4) -> str:
    """`.0123`, `20,000`, or nothing where there is no number."""
    if not present(x):
        return ""
    if x == 0 or math.isinf(x):
        return f"{x:.0f}"
    if isinstance(x, int | np.integer) or abs(x) >= 10**digits:
        return f"{x:,.0f}" if abs(x) < 1e9 else f"{x:.{digits - 1}e}"
    return short(f"{x:.{digits}g}")


def short(text: str) -> str:
    """A number without the zero before its point."""
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def lined_up(rows: list[Row], name: str = "value") -> list[list[str]]:
    """Of each row `name`, low and high, with as many decimals as a usual one of them calls for."""
    cells = [[row[key] for key in (name, "low", "high")] for row in rows]
    sizes = [abs(x) for row in cells for x in row if present(x) and x != 0 and math.isfinite(x)]
    usual = median_low(sizes) if sizes else 1.0
    places = min(max(3 - math.floor(math.log10(usual)), 0), 9)

    def cell(x: Any) -> str:
        told = number(x)
        if not told or abs(x) >= 1e9 or not float(f"{x:.{places}f}"):
            return told  # what rounds to nothing keeps its own digits
        return short(f"{x:,.{places}f}")

    return [[cell(x) for x in row] for row in cells]


def percent(share: float) -> str:
    """`1.2 %`; only nothing is 0 %, and only everything is 100 %."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.4g} %"


def span(row: Row, digits: int = 3) -> str:
    """`.0101 to .0145`, or nothing."""
    if not (present(row.get("low")) and present(row.get("high"))):
        return ""
    return f"{number(row['low'], digits)} to {number(row['high'], digits)}"


def legible(name: Any) -> str:
    """A name on one line, without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(name))


def shortened(name: Any, length: int) -> str:
    """A legible name of at most so many characters."""
    text = legible(name)
    return text if len(text) <= length else f"{text[: length - 2]}.."


def label(row: Row) -> str:
    """An estimator, its lambda, and whether it is a model alone."""
    lam = f" (lam {number(row['lam'], 3)})" if present(row.get("lam")) else ""
    only = ", model only" if of_model(row) else ""
    return f"{row['estimator']}{lam}{only}{each(row)}"


def of_mean(row: Row) -> bool:
    """Whether the row is of the policy's mean reward, not of the distribution around it."""
    return not row["estimator"].startswith(DISTRIBUTION)


def absent(row: Row) -> str:
    """What stands where a number should: the verdict withholds it, or there was none."""
    if row["estimator"] == "bounds":
        return ""
    return "none" if row["verdict"] == IDENTIFIED or of_model(row) else "withheld"


def interval_name(row: Row) -> str:
    """The kind of interval, if there is one."""
    return legible(row["interval"] or "") if span(row) else ""


def quoted(table: "Table", policy: str) -> Row | None:
    """The row to quote of a policy: an identified one, doubly robust rather than others."""
    rows = [row for row in table.of(policy) if row["verdict"] == IDENTIFIED and of_mean(row)]
    rows = [row for row in rows if present(row["value"])]
    weighted = [row for row in rows if not of_model(row)]
    first = [row for name in HEADLINE for row in weighted if row["estimator"] == name]
    # what is of the log's own units before what is of its rows
    return next(iter(sorted(first + weighted, key=lambda row: bool(row.get("per"))) + rows), None)


def each(row: Row) -> str:
    """Of what the value is, where it is not of the log's own units."""
    return f" per {row['per']}" if row.get("per") else ""


def sentence(table: "Table", policy: str) -> str:
    """What the log can say of a policy, in one sentence."""
    name, verdict, row = legible(policy), table.verdict(policy), quoted(table, policy)
    told = "" if row is None else number(row["value"], 3)
    if row is not None and span(row):
        told += f" ({span(row)})"
    if verdict == IDENTIFIED:
        if row is None:
            return f"The log could identify the value of {name}, no estimator gave a number."
        only = " alone, a model of the rewards" if of_model(row) else ""
        by = f"{row['estimator']}{only}{each(row)}"
        return f"The log identifies the value of {name}: {told} by {by}."
    begin = f"The log cannot tell the value of {name}"
    if verdict == PARTIAL:
        begin = f"The log tells the value of {name} only in part"
    parts = [why(table, policy)]
    others = [other for other in table.of(policy) if of_mean(other)]
    parts += [f"worst case {span(o)}" for o in others if o["estimator"] == "bounds" and span(o)]
    parts += [
        f"{o['estimator']}, a model alone, says {number(o['value'], 3)}"
        for o in others if of_model(o) and present(o["value"])
    ]  # fmt: skip
    if row is not None and not of_model(row):
        more = "" if row.get("per") else ", which assumes more,"
        parts.append(f"{row['estimator']}{more} gives {told}{each(row)}")
    said = "; ".join(dict.fromkeys(part for part in parts if part))
    return f"{begin}: {said}." if said else f"{begin}."


def why(table: "Table", policy: str) -> str:
    """The mass that the log covers where it is short of it, else the first reason given."""
    facts = table.diagnosed.get(policy, {"verdict": "", "kinds": {}})
    kinds = list(facts["kinds"].values())
    kind = next((k for k in kinds if k["verdict"] == facts["verdict"]), None)
    if kind is None:
        return ""
    mass = kind.get("covered_mass")
    most = kind.get("covered_high")
    if present(mass) and mass < 0.99 and (not present(most) or most < 0.99):
        about = "" if kind.get("covered_exact") else "about "
        return f"{about}{percent(mass)} of what it would show was ever shown"
    return legible(next(iter(kind["reasons"]), "")).rstrip(".")


def assumes(row: Row) -> bool:
    """Whether the row's note says what its estimator takes for granted."""
    return "assumes" in (row.get("note") or "")


def assumptions(table: "Table") -> list[str]:
    """What estimators take for granted, once each."""
    said = (f"{row['estimator']}: {row['note']}" for row in table.rows if assumes(row))
    return list(dict.fromkeys(map(legible, said)))


def caveats(table: "Table") -> list[str]:
    """Notes for the top of every rendering."""
    about = table.about
    notes = [legible(note) for note in about.get("notes") or []]
    said = " ".join(notes).lower()
    if about.get("adaptive") and "adaptive" not in said:
        notes.insert(0, "the log is adaptive: its policy learned while it was written")
    if about.get("propensities") == "estimated" and "estimated" not in said:
        notes.insert(0, "propensities are estimated: values hold only as far as they are right")
    return notes


def title(table: "Table") -> str:
    """What was evaluated on what."""
    about, count = table.about, len(table.policies)
    unit, units, rows = about.get("unit") or "row", about.get("units"), about.get("rows")
    grouped = f" in {number(units)} {unit}s" if unit != "row" and present(units) else ""
    logged = number(about.get("logging_value"))
    earned = f"; the log itself earned {logged}" if logged else ""
    what = "1 policy" if count == 1 else f"{count} policies"
    return f"Off-policy evaluation of {what} on {number(rows)} logged rows{grouped}{earned}"


def level(table: "Table") -> str:
    """`95 %`."""
    return percent(1 - (table.about.get("alpha") or 0.05))


def wrapped(lines: Iterable[str], bullet: str) -> list[str]:
    """Bullets, folded at WIDTH."""
    indent = " " * len(bullet)
    fold = textwrap.TextWrapper(WIDTH, initial_indent=bullet, subsequent_indent=indent)
    return [part for line in lines for part in fold.wrap(line)]


def aligned(header: Sequence[str], body: list[list[str]], left: Sequence[int]) -> list[str]:
    """A table of text, without empty columns, the first cut where all would be too wide."""
    keep = [j for j in range(len(header)) if any(row[j] for row in body)]
    width = {j: max(len(row[j]) for row in [list(header), *body]) for j in keep}
    over = sum(width.values()) + 2 * len(keep) - WIDTH
    width[keep[0]] = max(width[keep[0]] - max(over, 0), 8)
    lines = []
    for row in [list(header), *body]:
        cells = [shortened(row[j], width[keep[0]]) if j == keep[0] else row[j] for j in keep]
        padded = [f"{cell:<{width[j]}}" if j in left else f"{cell:>{width[j]}}"
                  for j, cell in zip(keep, cells, strict=True)]  # fmt: skip
        lines.append(f"  {'  '.join(padded)}".rstrip())
    return lines


def block(table: "Table", policy: str) -> list[str]:
    """One policy in text: its sentence, estimates, and reasons of the verdict."""
    lines = textwrap.wrap(sentence(table, policy), WIDTH)
    header = ["estimator", "value", "std error", "low", "high", "interval", "ESS", "verdict"]
    rows = table.of(policy)
    body = [
        [label(row), value or absent(row), number(row["std_error"], 3), low, high,
         interval_name(row), number(row["ess"], 3), row["verdict"]]
        for row, (value, low, high) in zip(rows, lined_up(rows), strict=True)
    ]  # fmt: skip
    if body:
        lines += aligned(header, body, left=(0, 5, 7))
    remarks = {f"{row['estimator']}: {row['note']}": None for row in table.of(policy)
               if row.get("note") and not assumes(row) and row["note"] != "model only"}  # fmt: skip
    lines += wrapped(map(legible, remarks), "  - ")
    facts = table.diagnosed.get(policy, {"kinds": {}})
    for name, kind in facts["kinds"].items():
        lines += wrapped([weights_line(name, kind)], "  ")
        lines += wrapped(map(legible, kind["reasons"]), "    - ")
    if present(facts.get("dm_dr_gap")):
        lines += wrapped([f"dr minus dm: {number(facts['dm_dr_gap'], 3)}"], "  ")
    if facts.get("estimand"):
        lines += wrapped([f"estimand: {legible(facts['estimand'])}"], "  ")
    return lines


def weights_line(name: str, kind: Row) -> str:
    """Diagnostics of one kind of weights in a line."""
    mean = {"low": kind.get("mean_weight_low"), "high": kind.get("mean_weight_high")}
    around = f" ({span(mean)})" if span(mean) else ""
    how = "exact" if kind.get("covered_exact") else "estimated"
    mass = number(kind["covered_mass"])
    facts = {
        "ESS": number(kind["ess"], 3),
        "mean": number(kind["mean_weight"], 3) + around,
        "largest share": number(kind["max_share"], 3),
        "Pareto k": number(kind["pareto_k"], 3),
        "covered mass": f"{mass} ({how})" if mass else "",
    }
    told = ", ".join(f"{what} {text}" for what, text in facts.items() if text)
    return f"{name} weights of {number(kind['n'])}: {kind['verdict']}; {told}"


def compared(table: "Table") -> list[str]:
    """Paired differences in text."""
    base = legible(table.about.get("baseline") or table.differences[0]["baseline"])
    header = ["policy", "estimator", "difference", "std error", "low", "high", "p", "p Holm",
              "verdict"]  # fmt: skip
    rows = table.differences
    body = [
        [legible(row["policy"]), label(row), gap or absent(row), number(row["std_error"], 3), low,
         high, number(row["p_value"], 2), number(row["p_holm"], 2), row["verdict"]]
        for row, (gap, low, high) in zip(rows, lined_up(rows, "difference"), strict=True)
    ]  # fmt: skip
    head = f"Paired differences from {base}, {level(table)} intervals, p adjusted by Holm's steps"
    return [*textwrap.wrap(head, WIDTH), *aligned(header, body, left=(0, 1, 8))]
