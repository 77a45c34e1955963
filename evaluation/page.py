"""One HTML page of a table: no script, no other file, for the screen by day and night and paper."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation import figures
from evaluation.wording import (
    IDENTIFIED,
    NOT,
    PARTIAL,
    Row,
    absent,
    assumes,
    assumptions,
    caveats,
    interval_name,
    label,
    legible,
    level,
    lined_up,
    number,
    present,
    sentence,
    span,
    title,
)

if TYPE_CHECKING:
    from evaluation.report import Table

MARK = {IDENTIFIED: "●", PARTIAL: "■", NOT: "◆"}
FEW = 12  # policies whose diagnostics are unfolded
LIGHT = """color-scheme: light; --ink: #1b1f24; --paper: #ffffff; --faint: #6a737d; --line: #d9dee3;
--wash: #f4f6f8; --identified: #0072b2; --partially: #c77700; --not: #d55e00;"""
DARK = """color-scheme: dark; --ink: #e6e9ec; --paper: #14181c; --faint: #98a2ac; --line: #343b42;
--wash: #1d2329; --identified: #56b4e9; --partially: #e69f00; --not: #ff8a4c; --first: #3d9be0;"""
STYLE = f"""
:root {{ {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
@media print {{ :root {{ {LIGHT} }} details::details-content {{ content-visibility: visible; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.15rem; margin: 2.25rem 0 .5rem; }}
p {{ margin: .4rem 0; }}
.faint {{ color: var(--faint); }}
.caveats {{ border-left: 4px solid var(--partially); background: var(--wash); margin: 1rem 0;
  padding: .5rem 1rem; list-style: none; }}
.said {{ list-style: none; padding: 0; margin: .5rem 0; }}
.said li {{ padding: .3rem 0 .3rem 1.6rem; text-indent: -1.6rem; overflow-wrap: anywhere; }}
.mark {{ display: inline-block; width: 1.6rem; text-indent: 0; }}
.identified {{ color: var(--identified); }}
.partially {{ color: var(--partially); }}
.not {{ color: var(--not); }}
figure {{ margin: .5rem 0; break-inside: avoid; }}
figure svg {{ display: block; width: 100%; height: auto; }}
figure svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
figure svg text {{ font-family: inherit !important; }}
figcaption {{ color: var(--faint); font-size: .875rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .45rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }}
th {{ font-weight: 600; vertical-align: bottom; }}
th.n, td.n {{ text-align: right; }}
td.n, td:last-child {{ white-space: nowrap; }}
.facts td:last-child {{ white-space: normal; }}
td .mark {{ width: 1.1rem; }}
tr.first td {{ border-top: 2px solid var(--faint); }}
details {{ border-top: 1px solid var(--line); padding: .4rem 0; }}
summary {{ cursor: pointer; font-weight: 600; }}
dt {{ font-weight: 600; }}
dd {{ margin: 0 0 .4rem 1rem; }}
@media print {{ body {{ max-width: none; padding: 0; font-size: 10pt; }}
  table {{ font-size: 6.5pt; }} th, td {{ padding: .1rem .2rem; }} .wide {{ overflow: visible; }} }}
"""
READING = {
    "value": "mean reward of a row, slate or episode, had the policy decided in place of the log's",
    "withheld": "the log does not support the number, so it is not shown, not even with a warning",
    "covered mass": "share of what the policy would show that the log had a chance to show",
    "mean weight": "1 on average where the log covers the policy and its propensities are right",
    "ESS": "effective sample size: as many rows of the policy itself would say as much",
    "largest share": "part of all the weight that lies on one row",
    "Pareto k": "heaviness of the weights' tail; above .7 no error or interval is to be relied on",
    "worst case": "the value if all that was never shown earned the least, or the most, possible",
    "model only": "what a fitted model predicts; no logged reward checks it where it was not shown",
}  # fmt: skip


VALUES = (
    "Marks are values, bars {} intervals; arrows go on beyond the edge; hollow is a model only."
)
DIFFERENCES = (
    "Paired on the same rows against {}, {} intervals; filled where p, adjusted for all "
    "comparisons (Holm), is below alpha."
)
WEIGHTS = "A straight or rising tail to the right: a few rows decide the estimate."
SOFTENING = (
    "Each temperature is its own policy: colder is nearer the ranker and rests on fewer rows."
)
PROPENSITY = "On the diagonal, actions were logged as often as the fitted propensities say."


def page(table: "Table") -> str:
    """The whole page: what the log can say first, then how it is known."""
    told = [sections(table), body_of_settings(table)]
    head = title(table)
    return document(
        head,
        f"<h1>What the log can say</h1>\n<p class=faint>{text(head)}.</p>\n"
        f"{answers(table)}{''.join(told)}",
    )


def document(head: str, body: str, style: str = "") -> str:
    """A page of its own, with the house's style and some more."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(head)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f"{body}</body>\n</html>\n"
    )


def text(x: Any) -> str:
    """Anything as text that HTML reads as text."""
    return escape(legible(x))


def answers(table: "Table") -> str:
    """A sentence for each policy, and the caveats that hold for all."""
    said = [
        f"<li>{mark(table.verdict(policy))}{text(sentence(table, policy))}</li>\n"
        for policy in table.policies
    ]
    notes = "".join(f"<li>{text(note)}</li>\n" for note in caveats(table))
    notes = f"<ul class=caveats>\n{notes}</ul>\n" if notes else ""
    return f"{notes}<ul class=said>\n{''.join(said)}</ul>\n"


def mark(verdict: str) -> str:
    """The verdict as a coloured shape."""
    return f'<span class="mark {verdict.split()[0]}" title="{text(verdict)}">{MARK[verdict]}</span>'


def sections(table: "Table") -> str:
    """Figures, the table, diagnostics."""
    caption = VALUES.format(level(table))
    parts = [section("Values", drawing(table, figures.forest, "forest", caption))]
    if table.differences:
        base = legible(table.about.get("baseline") or table.differences[0]["baseline"])
        caption = DIFFERENCES.format(base, level(table))
        parts.append(section(f"Differences from {base}",
                             drawing(table, figures.differences, "differences", caption)
                             + difference_table(table)))  # fmt: skip
    if any((facts.get("ccdf") or {}).get("weight") for facts in table.diagnosed.values()):
        parts.append(section("Weights", drawing(table, figures.weight_tails, "weights", WEIGHTS)))
    if any(facts.get("curve") for facts in table.diagnosed.values()):
        parts.append(section("Softening", drawing(table, figures.curves, "softening", SOFTENING)))
    if table.about.get("calibration"):
        parts.append(section("Estimated propensities", propensities(table)))
    parts.append(section("All numbers", full_table(table)))
    parts.append(section("Diagnostics", "".join(diagnosis(table, p) for p in table.policies)))
    return "".join(parts)


def propensities(table: "Table") -> str:
    """How well the fitted logging policy is calibrated."""
    fitted = table.about["calibration"]
    facts = listed({name: x for name, x in fitted.items() if name != "points"})
    if not fitted.get("points"):
        return facts
    return drawing(table, figures.reliability, "propensities", PROPENSITY) + facts


def section(heading: str, content: str) -> str:
    """A part of the page under a heading."""
    return f"<section>\n<h2>{text(heading)}</h2>\n{content}</section>\n"


def drawing(table: Any, draw: figures.Draw, name: str, caption: str) -> str:
    """A figure in the page."""
    return (
        f"<figure>\n{figures.inline(draw, table, name, caption)}\n"
        f"<figcaption>{text(caption)}</figcaption>\n</figure>\n"
    )


def tabular(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int],
            first: Sequence[int] = ()) -> str:  # fmt: skip
    """A table of escaped cells; those not `left` are numbers, rows in `first` begin a group."""
    kinds = ["" if j in left else " class=n" for j in range(len(header))]
    head = "".join(f"<th{kind}>{text(h)}</th>" for kind, h in zip(kinds, header, strict=True))
    body = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True))
        body.append(f"<tr{' class=first' if i in first else ''}>{cells}</tr>\n")
    return f"<div class=wide><table>\n<tr>{head}</tr>\n{''.join(body)}</table></div>\n"


def judged(verdict: str) -> str:
    """A verdict with its shape, as a cell."""
    return f"{mark(verdict)}{text(verdict)}"


def full_table(table: "Table") -> str:
    """Every row."""
    header = ["policy", "estimator", "value", "std error", "low", "high", "interval", "n", "ESS",
              "covered mass", "mean weight", "largest share", "Pareto k", "verdict"]  # fmt: skip
    ordered = [row for policy in table.policies for row in table.of(policy)]
    places = [cells for policy in table.policies for cells in lined_up(table.of(policy))]
    rows = [
        [text(row["policy"]), text(label(row)), value or absent(row), number(row["std_error"], 3),
         low, high, text(interval_name(row)), number(row["n"]), number(row["ess"], 3),
         number(row["covered_mass"]), number(row["mean_weight"], 3), number(row["max_share"], 3),
         number(row["pareto_k"], 3), judged(row["verdict"])]
        for row, (value, low, high) in zip(ordered, places, strict=True)
    ]  # fmt: skip
    first = [i for i in range(1, len(ordered)) if ordered[i]["policy"] != ordered[i - 1]["policy"]]
    return tabular(header, rows, left=(0, 1, 6, 13), first=first)


def difference_table(table: "Table") -> str:
    """Every paired difference."""
    header = ["policy", "estimator", "difference", "std error", "low", "high", "p", "p, Holm",
              "verdict"]  # fmt: skip
    cells = lined_up(table.differences, "difference")
    rows = [
        [text(row["policy"]), text(label(row)), gap or absent(row), number(row["std_error"], 3),
         low, high, number(row["p_value"], 2), number(row["p_holm"], 2), judged(row["verdict"])]
        for row, (gap, low, high) in zip(table.differences, cells, strict=True)
    ]  # fmt: skip
    return tabular(header, rows, left=(0, 1, 8))


def diagnosis(table: "Table", policy: str) -> str:
    """What the weights of a policy say, with the reasons of its verdict."""
    facts = table.diagnosed.get(policy, {"kinds": {}})
    verdict, parts = table.verdict(policy), []
    if facts.get("estimand"):
        parts.append(f"<p>What is estimated: {text(facts['estimand'])}.</p>\n")
    header = ["weights", "n", "ESS", "mean weight", "99.9 % interval", "z", "largest share",
              "largest weight", "Pareto k", "covered mass", "verdict"]  # fmt: skip
    rows = [kind_row(name, kind) for name, kind in facts["kinds"].items()]
    if rows:
        parts.append(tabular(header, rows, left=(0, 10)))
    reasons = [f"<li>{text(name)} weights: {text(reason)}</li>\n"
               for name, kind in facts["kinds"].items() for reason in kind["reasons"]]  # fmt: skip
    notes = {f"<li>{text(row['estimator'])}: {text(row['note'])}</li>\n": None
             for row in table.of(policy) if row.get("note") and not assumes(row)}  # fmt: skip
    if reasons or notes:
        parts.append(f"<ul>\n{''.join(reasons)}{''.join(notes)}</ul>\n")
    if present(facts.get("dm_dr_gap")):
        gap = number(facts["dm_dr_gap"], 3)
        parts.append(f"<p>Weighting moves the model's value by {gap}.</p>\n")
    unfolded = " open" if len(table.policies) <= FEW or verdict != IDENTIFIED else ""
    return (
        f"<details{unfolded}><summary>{mark(verdict)}{text(policy)}: {text(verdict)}</summary>\n"
        f"{''.join(parts)}</details>\n"
    )


def kind_row(name: str, kind: Row) -> list[str]:
    """One kind of weights as cells."""
    around = span({"low": kind.get("mean_weight_low"), "high": kind.get("mean_weight_high")})
    mass = number(kind["covered_mass"])
    covered = {"low": kind.get("covered_low"), "high": kind.get("covered_high")}
    how = "exact" if kind.get("covered_exact") else f"estimated, {span(covered)}".rstrip(", ")
    return [text(name), number(kind["n"]), number(kind["ess"], 3), number(kind["mean_weight"], 3),
            around, number(kind["z"], 3), number(kind["max_share"], 3),
            number(kind["max_weight"], 3), number(kind["pareto_k"], 3),
            f"{mass} ({how})" if mass else "", judged(kind["verdict"])]  # fmt: skip


def body_of_settings(table: "Table") -> str:
    """Assumptions, how to read the words, and what was asked."""
    about = table.about
    assumed = "".join(f"<li>{text(line)}</li>\n" for line in assumptions(table))
    where = ", ".join(str(number(x, 3)) for x in about.get("reward_range") or [])
    if where:
        assumed += f"<li>worst cases: rewards lie in [{where}]</li>\n"
    meaning = "".join(f"<dt>{text(a)}</dt><dd>{text(b)}.</dd>\n" for a, b in READING.items())
    parts = [section("What was assumed", f"<ul>\n{assumed}</ul>\n")] if assumed else []
    if about.get("reward_model"):
        parts.append(section("Reward model", listed(about["reward_model"])))
    shown = {name: x for name, x in about.items()
             if name not in ("notes", "calibration", "reward_model")}  # fmt: skip
    parts.append(section("Settings", listed(shown)))
    parts.append(section("How to read this", f"<dl>\n{meaning}</dl>\n"))
    return "".join(parts)


def listed(facts: Row) -> str:
    """Names and values as a table."""
    rows = [f"<tr><td>{text(name.replace('_', ' '))}</td><td>{text(told(x))}</td></tr>\n"
            for name, x in facts.items()]  # fmt: skip
    return f"<table class=facts>\n{''.join(rows)}</table>\n"


def told(x: Any) -> str:
    """A setting in words."""
    if isinstance(x, dict):
        return "; ".join(f"{name} {told(value)}" for name, value in x.items())
    if isinstance(x, list | tuple | np.ndarray):
        return ", ".join(told(value) for value in x) or "none"
    if isinstance(x, bool | np.bool_):
        return "yes" if x else "no"
    if isinstance(x, int | float | np.number):
        return number(x) or "none"
    return "none" if x is None else str(x)
