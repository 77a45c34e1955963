"""Figures of a table; their colours are told apart by the colour-blind, and by shape besides."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from evaluation.wording import (
    IDENTIFIED,
    NOT,
    PARTIAL,
    Row,
    absent,
    label,
    legible,
    level,
    number,
    of_mean,
    of_model,
    present,
    quoted,
    shortened,
    span,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evaluation.report import Table

Draw = Callable[[Any], "Figure"]  # of a table, or of what another page is about
INK, FAINT = "#1b1f24", "#8b929a"
COLOUR = {IDENTIFIED: "#0072b2", PARTIAL: "#e69f00", NOT: "#d55e00"}  # (Okabe and Ito, 2008)
SHAPE = {IDENTIFIED: "o", PARTIAL: "s", NOT: "D"}
SERIES = ("#0072b3", "#d55e01", "#009e73", "#cc79a7", "#e69f01", "#56b4e9")  # of policies
DASHES = ("-", "--", ":", "-.")
VARIABLES = {  # what a page may colour anew in the dark
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    **{COLOUR[v]: f"var(--{v.split()[0]})" for v in COLOUR},
    SERIES[0]: f"var(--first, {SERIES[0]})",  # the one that is too dark for a dark page
}
MANY = 60  # lines of a forest, above which each policy keeps only the one to quote
WIDE = 6.0  # medians of the intervals' widths; what is wider is cut at the edge with an arrow
NAMED = 12  # curves, above which a legend helps nobody


@dataclass(frozen=True)
class Line:
    """One line of a forest; a heading has no verdict, bounds have no value."""

    label: str
    said: str = ""
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    verdict: str = ""
    hollow: bool = False

    @property
    def drawn(self) -> bool:
        """Whether there is anything to draw."""
        return present(self.value) or (present(self.low) and present(self.high))


def forest(table: "Table") -> "Figure":
    """Values with their intervals, one line per estimator, under a heading for each policy."""
    short = len(table.rows) > MANY
    lines: list[Line] = []
    for policy in table.policies:
        rows = [row for row in table.of(policy) if of_mean(row)]
        if short:
            best = quoted(table, policy)
            rows = [row for row in rows if row is best or row["estimator"] == "bounds"]
            rows = rows or table.of(policy)[:1]
        lines.append(Line(shortened(policy, 40)))
        lines += [estimate(row, table) for row in rows if present(row["value"]) or bounded(row)]
        held = [row for row in rows if not present(row["value"]) and not bounded(row)]
        for said in dict.fromkeys(absent(row) for row in held):
            names = dict.fromkeys(str(r["estimator"]) for r in held if absent(r) == said)
            lines.append(Line(shortened(", ".join(names), 40), said))
    logged = table.about.get("logging_value")
    return chart(lines, logged, f"value, {level(table)} intervals", "what the log itself earned")


def bounded(row: Row) -> bool:
    """Whether the row has the worst case's bounds."""
    return row["estimator"] == "bounds" and bool(span(row))


def estimate(row: Row, table: "Table") -> Line:
    """The line of one row."""
    several = len({r["interval"] for r in table.rows if r["estimator"] == row["estimator"]}) > 1
    name = "worst case" if row["estimator"] == "bounds" else label(row)
    name += f", {row['interval']}" if several and row["estimator"] != "bounds" else ""
    around = f" ({span(row)})" if span(row) and present(row["value"]) else span(row)
    said = f"{number(row['value'], 3)}{around}"
    low, high = (row["low"], row["high"]) if span(row) else (math.nan, math.nan)
    hollow = of_model(row)
    return Line(shortened(name, 40), said, row["value"], low, high, row["verdict"], hollow)


def differences(table: "Table") -> "Figure":
    """Paired differences from the baseline; hollow where Holm's p is not below alpha."""
    lines: list[Line] = []
    for policy in dict.fromkeys(row["policy"] for row in table.differences):
        lines.append(Line(shortened(policy, 40)))
        lines += [difference(r, table) for r in table.differences if r["policy"] == policy]
    return chart(lines, 0.0, f"difference, {level(table)} intervals", "no difference")


def difference(row: Row, table: "Table") -> Line:
    """The line of one paired difference."""
    p, gap = row["p_holm"], row["difference"]
    sure = present(p) and p < (table.about.get("alpha") or 0.05)
    around = f" ({span(row)})" if span(row) else ""
    adjusted = f", p {number(p, 2)}" if present(p) else ""
    said = f"{number(gap, 3)}{around}{adjusted}" if present(gap) else absent(row)
    low, high = (row["low"], row["high"]) if span(row) else (math.nan, math.nan)
    return Line(shortened(label(row), 40), said, gap, low, high, row["verdict"], not sure)


def chart(lines: Sequence[Line], reference: float | None, what: str, meaning: str) -> "Figure":
    """Lines from top to bottom, their numbers in words at the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.3 + 0.25 * max(len(lines), 2)), layout="constrained")
    axes = figure.add_subplot()
    low, high = limits(lines, reference)
    axes.set_xlim(low, high)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    if reference is not None and present(reference):
        axes.axvline(reference, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
    for y, line in enumerate(lines):
        if line.drawn:
            draw(axes, y, line, low, high)
    axes.set_yticks(range(len(lines)), [line.label for line in lines])
    for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("normal" if line.said else "bold")
    words = axes.twinx()
    words.set_ylim(axes.get_ylim())
    words.set_yticks(range(len(lines)), [line.said for line in lines])
    for side in (axes, words):
        bare(side)
        side.spines["left"].set_visible(False)
        side.tick_params(axis="y", length=0, pad=9)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(what)
    legend(figure, lines, meaning if reference is not None and present(reference) else "")
    return figure


def draw(axes: "Axes", y: int, line: Line, low: float, high: float) -> None:
    """An interval, cut at the edges with arrows, and the value's mark."""
    colour, bounds = COLOUR[line.verdict], not present(line.value)
    if present(line.low) and present(line.high):
        ends = np.clip([line.low, line.high], low, high)
        style: Any = (0, (2, 2)) if bounds else "-"
        axes.plot(ends, [y, y], color=colour, linewidth=1.8, linestyle=style, solid_capstyle="butt")
        outside = ((low, "<", line.low < low), (high, ">", line.high > high))
        for end, arrow, cut in outside:
            if cut:
                axes.plot(end, y, arrow, color=colour, markersize=7, clip_on=False)
            elif bounds:
                axes.plot(
                    line.low if arrow == "<" else line.high, y, "|", color=colour, markersize=7
                )
    if not bounds and low <= line.value <= high:
        fill = "none" if line.hollow else colour
        axes.plot(line.value, y, SHAPE[line.verdict], markersize=7, markeredgecolor=colour,
                  markerfacecolor=fill, markeredgewidth=1.5)  # fmt: skip


def limits(lines: Sequence[Line], reference: float | None) -> tuple[float, float]:
    """Of the horizontal axis: so that one wide interval does not hide all the others."""
    spans = [(line.low, line.high) for line in lines if present(line.value) and present(line.low)]
    spans += [(line.value, line.value) for line in lines if present(line.value)]
    if not spans:
        spans = [(line.low, line.high) for line in lines if line.drawn]
    if reference is not None and present(reference):
        spans.append((reference, reference))
    finite = np.array([s for s in spans if np.isfinite(s).all()]).reshape(-1, 2)  # (n, 2)
    width = finite[:, 1] - finite[:, 0]  # (n,)
    usual = float(np.median(width[width > 0])) if (width > 0).any() else math.inf
    kept = finite[width <= WIDE * usual]
    low, high = (float(kept.min()), float(kept.max())) if len(kept) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def legend(figure: "Figure", lines: Sequence[Line], reference: str) -> None:
    """What marks, colours and dashes mean, of those that occur."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=COLOUR[v], marker=SHAPE[v], linewidth=1.8, label=v)
        for v in COLOUR if any(line.verdict == v and present(line.value) for line in lines)
    ]  # fmt: skip
    for v in COLOUR:
        if any(line.verdict == v and line.drawn and not present(line.value) for line in lines):
            marks.append(Line2D([], [], color=COLOUR[v], linewidth=1.8, linestyle=(0, (2, 2)),
                                label=f"worst case, {v}"))  # fmt: skip
    if reference:
        marks.append(
            Line2D([], [], color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), label=reference)
        )
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)


def bare(axes: "Axes") -> None:
    """No box, no upper and right axis."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def weight_tails(table: "Table") -> "Figure":
    """Share of weights above each weight, both on a logarithmic scale, one curve per policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (policy, facts) in enumerate(table.diagnosed.items()):
        tail = facts.get("ccdf") or {"weight": [], "share": []}
        points = np.array([tail["weight"], tail["share"]], dtype=float)  # (2, m)
        points = points[:, (points > 0).all(axis=0)]
        if points.size:
            axes.plot(*points, label=shortened(policy, 30), linewidth=1.6, **series(i))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("weight")
    axes.set_ylabel("share of weights above it")
    readable(axes, "x")
    readable(axes, "y")
    bare(axes)
    if len(table.diagnosed) <= NAMED:
        figure.legend(loc="outside right upper", frameon=False)
    return figure


def series(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th policy."""
    return {"color": SERIES[i % len(SERIES)],
            "linestyle": DASHES[i // len(SERIES) % len(DASHES)]}  # fmt: skip


def readable(axes: "Axes", which: str) -> None:
    """Plain numbers on a logarithmic axis, between the tens as well where there are few tens."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())

    def between(x: float, _: Any) -> str:
        return number(x, 1) if high < 30 * low and f"{x:e}"[0] in "25" else ""

    axis.set_major_formatter(lambda x, _: number(x, 1))
    axis.set_minor_formatter(between)


def curves(table: "Table") -> "Figure":
    """Value, effective sample size and mean weight of softened policies against temperature."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    names = {"value": "value", "ess": "effective sample size", "mean_weight": "mean weight"}
    panels = figure.subplots(1, len(names))
    softened = {p: f["curve"] for p, f in table.diagnosed.items() if f.get("curve")}
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for i, (policy, curve) in enumerate(softened.items()):
            points = [
                (point["temperature"], point[name]) for point in curve if present(point[name])
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4,
                          label=shortened(policy, 30), **series(i))  # fmt: skip
        heat = [point["temperature"] for curve in softened.values() for point in curve]
        if min(heat) > 0 and max(heat) > 10 * min(heat):
            axes.set_xscale("log")
            axes.set_xlim(min(heat) / 1.2, max(heat) * 1.2)
            readable(axes, "x")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("temperature")
        axes.ticklabel_format(axis="y", useOffset=False)
        bare(axes)
        if not axes.lines:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "withheld", transform=axes.transAxes, ha="center")
    panels[-1].axhline(1.0, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
    if len(softened) <= NAMED:
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def reliability(table: "Table") -> "Figure":
    """How often an action was logged against its fitted propensity; the area is the rows' share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    points = np.array(table.about["calibration"]["points"], dtype=float).reshape(-1, 3)  # (m, 3)
    positive = points[(points[:, :2] > 0).all(axis=1)]
    spread = positive[:, :2].max() / positive[:, :2].min() if len(positive) else 1.0
    if spread > 20:
        axes.set_xscale("log")
        axes.set_yscale("log")
        points = positive
    if len(points):
        area = 20 + 180 * points[:, 2] / points[:, 2].max()
        axes.scatter(points[:, 0], points[:, 1], s=area, color=COLOUR[IDENTIFIED], alpha=0.7,
                     linewidths=0)  # fmt: skip
        low, high = points[:, :2].min(), points[:, :2].max()
        axes.plot([low, high], [low, high], color=FAINT, linestyle=(0, (4, 3)), zorder=0)
    if spread > 20:
        readable(axes, "x")
        readable(axes, "y")
    axes.set_xlabel("fitted propensity")
    axes.set_ylabel("how often it was logged")
    bare(axes)
    return figure


def saved(draw: Draw, table: Any, kind: str, *, page: bool = False) -> bytes:
    """PNG or SVG, the same bytes for the same table.

    Letters are outlines, which look alike everywhere; on a `page` they are text, in its font.
    """
    import matplotlib

    settings: Any = {
        "svg.hashsalt": "recplay",
        "svg.fonttype": "none" if page else "path",
        "text.parse_math": False,  # a name may have dollars
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    }
    out = io.BytesIO()
    metadata: Any = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(settings):
        draw(table).savefig(out, format=kind, dpi=150, metadata=metadata, transparent=page)
    return out.getvalue()


def inline(draw: Draw, table: Any, name: str, description: str) -> str:
    """The figure as part of a page: its colours from the page, its ids of its own."""
    root = ElementTree.fromstring(saved(draw, table, "svg", page=True))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("metadata", "style")):  # both would speak for the whole page
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {key.rpartition("}")[2]: owned(value, name) if key != "d" else value
                       for key, value in node.attrib.items()}  # fmt: skip
        if "id" in node.attrib:
            node.attrib["id"] = f"{name}-{node.attrib['id']}"
    width = root.attrib.pop("width")
    root.attrib.pop("height")
    said = {"role": "img", "aria-label": legible(description)}
    root.attrib |= {**said, "style": f"max-width: {width}"}
    return ElementTree.tostring(root, encoding="unicode")


def owned(value: str, name: str) -> str:
    """An attribute with references into the figure itself, and with the page's colours."""
    value = value.replace("url(#", f"url(#{name}-")
    value = f"#{name}-{value[1:]}" if value.startswith("#") and value[1:] else value
    for colour, variable in VARIABLES.items():
        value = value.replace(colour, variable)
    return value
