"""Parts of a comparison's page: its tables, and the sections after the main ones."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from evaluation import comparison_figures as drawn
from evaluation.comparison_wording import READING, Report, columns
from evaluation.page import drawing, section, tabular, text, told
from evaluation.wording import Row, number, percent, present


def dash(cell: str) -> str:
    """What stands where there is no number."""
    return cell or "-"


def share(x: Any) -> str:
    """`12 %`."""
    return percent(x) if present(x) else "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,),
          kind: str = "") -> str:  # fmt: skip
    """A table that scrolls in its own box."""
    named = [[f"<span class=who>{row[0]}</span>", *row[1:]] for row in rows]
    made = tabular(header, named, left)
    return f"<div class={kind}>\n{made}</div>\n" if kind else made


def pair(figure: str, beside: str) -> str:
    """A figure, and beside it on a wide page what belongs to it."""
    return f"<div class=pair>\n{figure}<div>\n{beside}</div>\n</div>\n"


def missing(heading: str, why: str) -> str:
    """A section that says why it is empty."""
    return section(heading, f"<p class=faint>{text(why)}</p>\n")


def folded(heading: str, content: str, *, unfolded: bool = False) -> str:
    """Content behind its heading; both are HTML."""
    return (
        f"<details{' open' if unfolded else ''}><summary>{heading}</summary>\n{content}</details>\n"
    )


def name(row: Row) -> str:
    """The policy of a row, as a cell."""
    return text(row.get("policy", ""))


def base(report: Report) -> str:
    """The policy compared with."""
    return str(report.get("baseline") or "the baseline")


def new_users(report: Report) -> str:
    """The same sessions with the past hidden from the policies."""
    rows, heading = report.get("new_users") or [], "New users"
    if not rows:
        return missing(heading, "No session was played with the past hidden.")
    header = ["policy", "reward", "low", "high", "with the past", "difference", "low", "high"]
    reward = columns(rows, "reward", "low", "high")
    gaps = columns(rows, "difference", "diff_low", "diff_high", plus=True)
    cells = [[name(row), *earned, dash(number(row.get("all_reward"))), *gap]
             for row, earned, gap in zip(rows, reward, gaps, strict=True)]  # fmt: skip
    how = ("Users whose past is hidden from the policy, as of somebody who comes for the first "
           f"time; the difference is from {base(report)}, as blind.")  # fmt: skip
    return section(heading, f"<p>{text(how)}</p>\n" + table(header, cells))


def new_items(report: Report) -> str:
    """What policies make of items that were first sold last."""
    found, heading = report.get("new_items") or {}, "New items"
    rows = found.get("rows") or []
    if not rows:
        return missing(heading, "No item could be called new: the log has no times.")
    parts = [f"{number(found['items'])} items" if present(found.get("items")) else "Items",
             *([str(found["what"])] if found.get("what") else [])]  # fmt: skip
    how = (f"{', '.join(parts)}: {share(found.get('catalogue_share'))} of the catalogue, "
           f"{share(found.get('sales_share'))} of sales.")  # fmt: skip
    cells = [[name(row), share(row.get("shown_share")), share(row.get("chosen_share")),
              dash(number(row.get("recall"), 3))] for row in rows]  # fmt: skip
    header = ["policy", "of what is shown", "of what is taken", "recall of new items"]
    return section(heading, f"<p>{text(how)}</p>\n" + table(header, cells))


def exposures(report: Report) -> str:
    """Who is shown: groups of items beside their share of sales."""
    kinds = [kind for kind in report.get("exposure") or [] if kind.get("groups")]
    names = drawn.picked(report)
    if not kinds or not names:
        return ""
    parts = []
    for i, found in enumerate(kinds):
        what = str(found.get("kind") or "group")
        caption = f"By {what}: a line to the right is shown more than it sells, to the left less."

        def draw(_: Any, found: Row = found) -> Any:
            return drawn.exposure(found, names)

        parts.append(drawing(report, draw, f"exposure-{i}", caption))
        every = list(dict.fromkeys(n for g in found["groups"] for n in g.get("shown") or {}))
        body = [[text(g.get("group", "")), share(g.get("catalogue_share")),
                 share(g.get("sales_share")),
                 *(share((g.get("shown") or {}).get(n)) for n in every)]
                for g in found["groups"]]  # fmt: skip
        header = [what, "catalogue", "sales", *every]
        parts.append(folded(f"All shares by {text(what)}", table(header, body)))
    figures = "".join(
        f"<div>\n{a}{b}</div>\n" for a, b in zip(parts[::2], parts[1::2], strict=True)
    )
    return section("Who is shown", f"<div class=pair>\n{figures}</div>\n")


def trade(report: Report) -> str:
    """Reward against coverage."""
    if len(drawn.spots(report)) < 2:
        return ""
    caption = "Up is more reward, to the right is more of the catalogue. Circles learned."
    return section("Reward and coverage", drawing(report, drawn.trade, "trade", caption))


def ab_test(report: Report) -> str:
    """Users that a test with real people would need."""
    found = report.get("ab") or {}
    rows = found.get("rows") or []
    if not rows:
        return ""
    sizes = ("per_arm", "per_arm_one_percent")
    how = (
        f"Users in each arm of a test with real people that would find the simulated difference "
        f"from {base(report)}, or one of 1 %: two-sided at {share(found.get('alpha'))}, power "
        f"{share(found.get('power'))}, a session each. The simulator's difference is a guess of "
        "theirs."
    )
    cells = [[name(row), gap[0], dash(number(row.get("sd"), 3)),
              *(dash(number(row.get(key))) for key in sizes)]
             for row, gap in zip(rows, columns(rows, "difference", "", "", plus=True),
                                 strict=True)]  # fmt: skip
    header = ["policy", "difference", "SD", "users an arm", "for 1 %"]
    return section("Size of an A/B test", f"<p>{text(how)}</p>\n" + table(header, cells))


def sessions(report: Report) -> str:
    """Some sessions, told step by step."""
    found = []
    for i, row in enumerate(report.get("sessions_told") or []):
        user = f"<span class=user>{text(row.get('user') or 'a user')}</span>"
        found.append(folded(f"{name(row)}: {user}", steps(row), unfolded=i == 0))
    return section("Sessions", "".join(found)) if found else ""


def steps(row: Row) -> str:
    """What was shown, what happened, why."""
    told = []
    for step in row.get("steps") or []:
        shown = step.get("shown") or []
        shown = [shown] if isinstance(shown, str) else shown
        happened = str(step.get("happened") or "-")
        bold = text(happened) if happened == "passed" else f"<b>{text(happened)}</b>"
        why = "; ".join(str(w) for w in step.get("why") or [])
        why = f"<br>\n<span class=faint>{text(why)}</span>" if why else ""
        told.append(f"<li>{text(' · '.join(map(str, shown)) or 'nothing')} → {bold}{why}</li>\n")
    end = f"<p>{text(row['end'])}.</p>\n" if row.get("end") else ""
    return f"<ol class=steps>\n{''.join(told)}</ol>\n{end}"


def assumptions(report: Report) -> str:
    """What the simulator was given, and what it learned from the log."""
    rows = report.get("assumptions") or []
    if not rows:
        return ""
    cells = [[text(row.get(key) or "-") for key in ("name", "value", "kind", "what")]
             for row in rows]  # fmt: skip
    header = ["name", "value", "kind", "what it is"]
    return section("Assumed and fitted", table(header, cells, range(4), "plain"))


def lists(report: Report) -> str:
    """How like the log the simulated users are, and what the data are."""
    parts = []
    for heading, key in (("Fidelity", "fidelity"), ("Data", "data")):
        lines = "".join(f"<li>{text(line)}</li>\n" for line in report.get(key) or [])
        parts.append(section(heading, f"<ul>\n{lines}</ul>\n") if lines else "")
    return "".join(parts)


def settings(report: Report) -> str:
    """What was asked, with what, and how to read the columns."""
    parts = []
    if report.get("command"):
        parts.append(f"<pre>{text(report['command'])}</pre>\n")
    headings = {"settings": "All settings", "versions": "Versions", "seconds": "Seconds it took"}
    for key, heading in headings.items():
        rows = [[text(name), text(told(x))] for name, x in flat(report.get(key) or {})]
        if rows:
            parts.append(folded(heading, table(["name", "value"], rows, (0, 1), "plain")))
    made = section("Settings", "".join(parts)) if parts else ""
    meaning = "".join(f"<dt>{text(a)}</dt><dd>{text(b)}.</dd>\n" for a, b in READING.items())
    return made + section("How to read this", f"<dl>\n{meaning}</dl>\n")


def flat(facts: Row, before: str = "") -> Iterator[tuple[str, Any]]:
    """Names with dots and values of nested settings."""
    for key, x in facts.items():
        if isinstance(x, dict) and x:
            yield from flat(x, f"{before}{key}.")
        else:
            yield f"{before}{key}", x
