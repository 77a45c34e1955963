"""One HTML page of a comparison of policies: what won, by how much, and how far that holds."""

from evaluation import comparison_figures as drawn
from evaluation.compared import LEAST_GAIN
from evaluation.comparison_sections import (
    ab_test,
    assumptions,
    base,
    dash,
    exposures,
    folded,
    lists,
    missing,
    name,
    new_items,
    new_users,
    pair,
    sessions,
    settings,
    share,
    table,
    trade,
)
from evaluation.comparison_wording import (
    ORACLE,
    Report,
    about,
    bar,
    claimed,
    columns,
    finite,
    flips,
    label,
    relative,
    reward_of,
    sign,
    verdict,
)
from evaluation.page import document, drawing, judged, section, text
from evaluation.wording import IDENTIFIED, NOT, PARTIAL, Row, number, percent, present

OUT = 6  # static policies left out of the curves that are named
STYLE = """
body { overflow-wrap: break-word; }
h1 { overflow-wrap: anywhere; }
figure svg { max-width: 27rem !important; }
.lead { font-size: 1.0625rem; }
.lead b { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--wash); padding: .5rem;
  margin: .5rem 0; font-size: .8125rem; }
.wide { margin: .5rem 0; }
.wide td:first-child, .wide th:first-child { position: sticky; left: 0; background: var(--paper); }
.who { display: inline-block; max-width: 11rem; overflow-wrap: break-word; }
.plain td:last-child { white-space: normal; overflow-wrap: anywhere; }
.said-so td:nth-child(2) { min-width: 7.5rem; }
.verdicts td:nth-child(2) { white-space: nowrap; }
.user { font-weight: normal; }
.signs th:not(:first-child) { writing-mode: vertical-rl; transform: rotate(180deg);
  text-align: left; max-height: 11rem; overflow-wrap: anywhere; vertical-align: top; }
.signs td:not(:first-child) { text-align: center; }
.plus, .minus { font-weight: 700; }
.plus { color: var(--identified); }
.minus { color: var(--not); }
.flip { outline: 2px solid var(--ink); outline-offset: 2px; }
.steps { padding-left: 1.5rem; margin: .4rem 0; }
.steps li { margin: .4rem 0; overflow-wrap: anywhere; }
details details { margin-left: .75rem; }
@media (min-width: 64rem) { .pair { display: grid; grid-template-columns: 27rem 1fr; gap: 2rem;
  align-items: start; } .pair > * { min-width: 0; } }
@media (max-width: 30rem) { body { padding: .75rem; } .said li { padding-left: 1.3rem;
  text-indent: -1.3rem; } .mark { width: 1.3rem; } dd { margin-left: .5rem; }
  .who { max-width: 7.5rem; } }
@media print { .wide td:first-child, .wide th:first-child { position: static; }
  .who { max-width: 5rem; } }
"""


def comparison_page(report: Report) -> str:
    """The whole page: who won first, then how it is known, then how far it holds."""
    report = finite(report)
    head = str(report.get("title") or "Comparison of recommendation policies")
    parts = (learning, policies, gaps, signs, off_policy, new_users, new_items, exposures, trade,
             ab_test, sessions, assumptions, lists, settings)  # fmt: skip
    body = "".join(part(report) for part in parts)
    return document(head, f"<h1>{text(head)}</h1>\n{opening(report)}{body}", STYLE)


def opening(report: Report) -> str:
    """The verdict in words, and what to know before any number."""
    names = report.get("learners") or []
    said = [f"<b>{text(name)}</b> {text(verdict(report, name))}" for name in names]
    said = said or ["Nothing learned here."]
    said[-1] += f" {text(bar(report))}"
    lead = "".join(f"<p class=lead>{line}</p>\n" for line in said)
    notes = "".join(f"<li>{text(note)}</li>\n" for note in report.get("notes") or [])
    notes = f"<ul class=caveats>\n{notes}</ul>\n" if notes else ""
    line = about(report)
    return (f"<p class=faint>{text(line)}.</p>\n" if line else "") + lead + notes


def learning(report: Report) -> str:
    """Learning curves and where they end."""
    heading, curves = "Learning", report.get("curves") or {}
    ends = {name: drawn.trace(curve) for name, curve in curves.items()}
    ends = {name: end for name, end in ends.items() if len(end[0])}
    if not ends:
        none = "No learning curve was kept." if report.get("learners") else "Nothing learned here."
        return missing(heading, none)
    single = [name for name in ends if (curves[name].get("seeds") or 3) < 3]
    caption = ("Mean reward a session on held-out users while training: interquartile mean over "
               "seeds; the band is a bootstrap over them, too narrow where they are few. "
               "Dashed across: static policies.")  # fmt: skip
    if single:
        caption += f" Fewer than 3 seeds of {', '.join(single)}: no band, another could differ."
    out = drawn.levels(report)[1]
    if out:
        named = [f"{drawn.clipped(n, 24)} {number(x, 3)}" for n, x in list(out.items())[:OUT]]
        named += [f"{len(out) - OUT} more"] if len(out) > OUT else []
        caption += f" Not drawn: {', '.join(named)}."
    rows = [{"policy": name, "seeds": curves[name].get("seeds"), "step": end[0][-1],
             "iqm": end[1][-1], "low": end[2][-1], "high": end[3][-1]}
            for name, end in ends.items()]  # fmt: skip
    around = columns(rows, "iqm", "low", "high")
    cells = [[name(row), number(int(row["step"])), *cell, dash(number(row["seeds"]))]
             for row, cell in zip(rows, around, strict=True)]  # fmt: skip
    last = table(["policy", "last step", "reward", "low", "high", "seeds"], cells)
    return section(heading, pair(drawing(report, drawn.curves, "curves", caption), last))


def policies(report: Report) -> str:
    """Rewards as a forest, and every measure of every policy."""
    rows = report.get("policies") or []
    if not rows:
        return missing("Policies", "No policy was played.")
    caption = f"95 % intervals. Circles learned, squares are static. Dashed: {base(report)}"
    if present(reward_of(report, ORACLE)):
        caption += "; dotted: greedy on the simulator's truth, a line to measure against"
    ranking = report.get("ranking") or {}
    at = f"@{number(ranking['k'])}" if present(ranking.get("k")) else ""
    reward = columns(rows, "reward", "reward_low", "reward_high")
    revenue = columns(rows, "revenue", "revenue_low", "revenue_high")
    measures = ("gini", "novelty", "diversity", "recall", "ndcg", "hit", "replay")
    header = ["policy", "kind", "seeds", "reward", "low", "high", "length", "revenue", "low",
              "high", "coverage", "Gini", "novelty", "diversity", f"recall{at}", f"NDCG{at}",
              f"hit{at}", "replay"]  # fmt: skip
    cells = [
        [name(row), kind(row), dash(number(row.get("seeds"))), *earned,
         dash(number(row.get("length"), 3)), *spent, share(row.get("coverage")),
         *(dash(number(row.get(key), 3)) for key in measures)]
        for row, earned, spent in zip(rows, reward, revenue, strict=True)
    ]  # fmt: skip
    kept = [j for j in range(len(header)) if j < 4 or any(row[j] != "-" for row in cells)]
    full = table([header[j] for j in kept], [[row[j] for j in kept] for row in cells], (0, 1))
    what = ranking.get("what")
    after = f"<p class=faint>Recall, NDCG and hit: {text(what)}.</p>\n" if what else ""
    known = any(present(row.get("reward")) for row in rows)
    figure = drawing(report, drawn.rewards, "rewards", f"{caption}.") if known else ""
    return section("Policies", figure + full + after)


def kind(row: Row) -> str:
    """Whether it learns, as a cell."""
    return "truth" if row.get("policy") == ORACLE else "learned" if row.get("learns") else "static"


def gaps(report: Report) -> str:
    """Paired differences to the best static policy."""
    rows, heading = report.get("differences") or [], f"Differences from {base(report)}"
    if not rows:
        return missing(heading, "Fewer than two policies were played: nothing to compare.")
    caption = (
        "Session by session on the same random numbers, 95 % intervals. Shaded: within "
        f"{percent(LEAST_GAIN)} of {base(report)}, where nothing counts as a win. Hollow: the "
        "interval holds 0. Arrows go on beyond the edge."
    )
    header = ["policy", "said", "difference", "low", "high", "relative"]
    around = columns(rows, "difference", "low", "high", plus=True)
    cells = [[name(row), text(claimed(report, row)), *cell, dash(relative(row.get("relative")))]
             for row, cell in zip(rows, around, strict=True)]  # fmt: skip
    beside = table(header, cells, (0, 1), "said-so")
    if not any(present(row.get("difference")) for row in rows):
        return section(heading, beside)
    return section(
        heading, pair(drawing(report, drawn.differences, "differences", caption), beside)
    )


def signs(report: Report) -> str:
    """Signs of all differences under each changed assumption."""
    found, heading = report.get("sensitivity") or {}, "If assumptions are wrong"
    rows, names = found.get("rows") or [], found.get("policies") or []
    if not rows or not names:
        return missing(heading, "No assumption was changed: the order of policies may hang on one.")
    against = found.get("baseline") or base(report)
    how = (
        f"Sign of each difference from {against} when one assumption of the simulator is another "
        "than the policies were trained with. + and − in colour: the interval excludes 0; faint "
        "with ~: it does not; framed: the sign is another than as it is."
    )
    body = [[text(label(row)), *(cell(rows[0], row, policy) for policy in names)] for row in rows]
    turned = [flips(report, policy) for policy in names]
    body.append(["<b>signs that flip</b>", *(f"{len(f)}/{n}" for f, _, n in turned)])
    behind = [[text(label(row)), text(policy),
               *columns([(row.get("differences") or {}).get(policy) or {}],
                        "difference", "low", "high", plus=True)[0]]
              for row in rows for policy in names]  # fmt: skip
    numbers = table(["assumption", "policy", "difference", "low", "high"], behind, (0, 1))
    left = range(len(names) + 1)
    return section(heading, f"<p>{text(how)}</p>\n"
                   + table(["assumption", *names], body, left, "signs")
                   + folded("Numbers behind the signs", numbers))  # fmt: skip


def cell(first: Row, row: Row, policy: str) -> str:
    """A sign, in colour where it is sure, framed where it flips."""
    shown, sure = sign(row, policy)
    if not shown:
        return "-"
    look = ("plus" if shown == "+" else "minus") if sure else "faint"
    flip = " flip" if {shown, sign(first, policy)[0]} == {"+", "−"} else ""
    return f'<span class="{look}{flip}">{shown if sure else f"~ {shown}"}</span>'


def off_policy(report: Report) -> str:
    """What a decision log, of simulated users, says of the policies made stochastic."""
    heading, found = "Off-policy evaluation", report.get("off_policy") or {}
    rows = [row for row in report.get("policies") or [] if row.get("ope")]
    if not rows:
        return missing(heading, "No decision log was evaluated.")
    notes = "".join(f"<li>{text(note)}</li>\n" for note in found.get("notes") or [])
    notes = f"<ul class=caveats>\n{notes}</ul>\n" if notes else ""
    known = [row["ope"] if row["ope"].get("verdict") == IDENTIFIED else {} for row in rows]
    body = [
        [name(row), judge(row["ope"]), *(cells if ope else ["withheld", "-", "-"]),
         text((ope.get("estimator") if ope else "") or "-")]
        for row, ope, cells in zip(rows, known, columns(known, "value", "low", "high"), strict=True)
    ]  # fmt: skip
    reasons = [(str(row.get("policy")), str(row["ope"].get("why") or "")) for row in rows]
    why = "".join(f"<li>{text(reason if who in reason else f'{who}: {reason}')}</li>\n"
                  for who, reason in reasons if reason)  # fmt: skip
    why = folded("Why", f"<ul>\n{why}</ul>\n") if why else ""
    wrote = (
        f"<p>The log was written by {text(found['baseline'])}.</p>\n"
        if found.get("baseline")
        else ""
    )
    header = ["policy", "verdict", "value", "low", "high", "estimator"]
    return section(heading, wrote + notes + table(header, body, (0, 1, 5), "verdicts") + why)


def judge(ope: Row) -> str:
    """A verdict of the log with its shape, as a cell."""
    known = ope.get("verdict") in (IDENTIFIED, PARTIAL, NOT)
    return judged(ope["verdict"]) if known else text(ope.get("verdict") or "-")
