"""Figures of a comparison, narrow and tall: a phone still shows their letters at a size to read."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.compared import LEAST_GAIN
from evaluation.comparison_wording import ORACLE, Report, columns, real, reward_of
from evaluation.figures import FAINT, INK, SERIES, Line, bare, limits, readable, series
from evaluation.wording import Row, legible, number, percent, present

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Box = tuple[float, float, float, float]  # left, bottom, right, top
WIDE = 4.1  # inches of every figure
SHAPES = "osD^vP"
LEVELS = 8  # static policies drawn among the curves; more would be a comb
PICKED = 6  # policies in a figure of exposure, as many as there are colours
NEAR = 3.0  # times the learners' differences; what lies beyond is cut, or it would flatten them
RINGS = ((7.0, 8), (16.0, 12), (28.0, 16), (42.0, 16), (60.0, 20))  # points off, directions tried


@dataclass(frozen=True)
class Bar:
    """One policy of a forest."""

    name: str
    said: str
    value: float
    low: float
    high: float
    learns: bool
    hollow: bool = False


def numbers(values: Iterable[Any] | None) -> np.ndarray:
    """Numbers (n,), NaN where there are none."""
    return np.array([real(x) for x in ([] if values is None else values)], dtype=float)


def clipped(name: Any, length: int) -> str:
    """A legible name of at most so many characters: its beginning and its end."""
    told = legible(name)
    tail = (length - 2) // 2
    return told if len(told) <= length else f"{told[: length - 2 - tail]}..{told[-tail:]}"


def canvas(height: float, left: float, bottom: float, right: float = 0.12) -> "tuple[Figure, Axes]":
    """A figure of one pair of axes; margins in inches."""
    from matplotlib.figure import Figure

    figure, top = Figure(figsize=(WIDE, height)), 0.1
    axes = figure.add_axes(
        (left / WIDE, bottom / height,
         (WIDE - left - right) / WIDE, (height - bottom - top) / height)
    )  # fmt: skip
    bare(axes)
    return figure, axes


def key(names: Sequence[str]) -> tuple[int, float]:
    """Columns and height in inches of a legend."""
    ncols = 2 if max(map(len, names), default=0) <= 14 else 1
    return ncols, 0.24 * math.ceil(len(names) / ncols)


def plain(x: float, _: Any = None) -> str:
    """A tick of an axis."""
    return number(round(x, 9), 3)


def rewards(report: Report) -> "Figure":
    """Mean rewards with their intervals, the best static policy and the truth as lines."""
    rows = [row for row in report.get("policies") or [] if row.get("policy") != ORACLE]
    learns = [bool(row.get("learns")) for row in rows]
    bars = barred(rows, ("reward", "reward_low", "reward_high"), learns)
    lines = {"--": reward_of(report, report.get("baseline")), ":": reward_of(report, ORACLE)}
    known = [Line("", value=b.value, low=b.low, high=b.high) for b in bars]
    known += [Line("", value=x) for x in lines.values()]
    return forest(bars, limits(known, None), lines, "mean reward a session")


def differences(report: Report) -> "Figure":
    """Paired differences; the band is 1 % of the baseline, hollow marks have 0 in the interval."""
    rows = [row for row in report.get("differences") or [] if row.get("policy") != ORACLE]
    learns = [row.get("policy") in (report.get("learners") or []) for row in rows]
    bars = barred(rows, ("difference", "low", "high"), learns, gap=True)
    base = report.get("baseline")
    zone = LEAST_GAIN * abs(reward_of(report, base))
    edge = near(bars, zone)
    what = f"difference from {clipped(base, 24)}"
    return forest(bars, (-edge, edge), {"-": 0.0}, what, zone)


def barred(
    rows: Sequence[Row], keys: tuple[str, str, str], learns: Sequence[bool], *, gap: bool = False
) -> list[Bar]:
    """Bars of values and intervals; of a `gap` with its sign, hollow where that is not sure."""
    bars = []
    for row, does, cells in zip(rows, learns, columns(rows, *keys, plus=gap), strict=True):
        value, low, high = (real(row.get(key)) for key in keys)
        around = f" ({cells[1]} to {cells[2]})" if present(low) and present(high) else ""
        hollow = gap and not (low > 0 or high < 0)
        name = legible(row.get("policy", ""))
        bars.append(Bar(name, cells[0] + around, value, low, high, does, hollow))
    return bars


def near(bars: Sequence[Bar], zone: float) -> float:
    """Where an axis around 0 ends: beyond all learners, though a static policy may lie far off."""
    far = {b: max(abs(x) for x in (b.value, b.low, b.high) if present(x))
           for b in bars if present(b.value)}  # fmt: skip
    focus = [x for b, x in far.items() if b.learns] or [float(np.median([*far.values(), 0.0]))]
    edge = max([*focus, 3 * zone if present(zone) else 0.0])
    return 1.08 * max([edge, *(x for x in far.values() if x <= NEAR * edge)]) or 1.0


def forest(bars: Sequence[Bar], edges: tuple[float, float], lines: dict[str, float], what: str,
           zone: float = math.nan) -> "Figure":  # fmt: skip
    """Intervals from top to bottom, each under its name and numbers; circles for what learns."""
    figure, axes = canvas(0.62 + 0.44 * max(len(bars), 1), left=0.12, bottom=0.52)
    axes.set_xlim(*edges)
    axes.set_ylim(len(bars) - 0.6, -0.8)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    if present(zone):
        axes.axvspan(-zone, zone, color=FAINT, alpha=0.25, linewidth=0, zorder=0)
    for y, bar in enumerate(bars):
        for dash, x in lines.items():
            if present(x):  # broken where names are
                axes.plot([x, x], [y - 0.14, y + 0.26], color=FAINT, linestyle=dash, linewidth=1.2)
        across = axes.get_yaxis_transform()
        weight = "bold" if bar.learns else "normal"
        axes.text(0, y - 0.32, clipped(bar.name, 21), transform=across, weight=weight)
        axes.text(1, y - 0.32, bar.said, transform=across, ha="right")
        interval(axes, y + 0.06, bar, edges)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(plain)
    axes.set_xlabel(what)
    return figure


def interval(axes: "Axes", y: float, bar: Bar, edges: tuple[float, float]) -> None:
    """An interval and its value's mark; arrows where they go on beyond the edge."""
    colour, shape = (SERIES[0], "o") if bar.learns else (INK, "s")
    low, high = edges
    ends = [x for x in (bar.low, bar.high, bar.value) if present(x)]
    if not ends:
        return
    first, last = min(ends), max(ends)
    if last > low and first < high:
        shown = np.clip([first, last], low, high)
        axes.plot(shown, [y, y], color=colour, linewidth=2.0, solid_capstyle="butt")
    for end, arrow, cut in ((low, "<", first < low), (high, ">", last > high)):
        if cut:
            axes.plot(end, y, arrow, color=colour, markersize=7, clip_on=False)
    if low <= bar.value <= high:
        fill = "none" if bar.hollow else colour
        axes.plot(bar.value, y, shape, markersize=7, markeredgecolor=colour, markerfacecolor=fill,
                  markeredgewidth=1.5)  # fmt: skip


def levels(report: Report) -> tuple[dict[str, float], dict[str, float]]:
    """Static policies drawn among the curves, the best first, and those left out."""
    found = {name: real(x) for name, x in (report.get("levels") or {}).items() if present(x)}
    ordered = dict(sorted(found.items(), key=lambda pair: -pair[1]))
    low, high = heights(report)
    kept = [name for name, x in ordered.items() if low <= x <= high][:LEVELS]
    return ({name: ordered[name] for name in kept},
            {name: x for name, x in ordered.items() if name not in kept})  # fmt: skip


def heights(report: Report) -> tuple[float, float]:
    """Of the vertical axis of the curves: all of them and the baseline."""
    found = [numbers(curve.get(key)) for curve in (report.get("curves") or {}).values()
             for key in ("iqm", "low", "high")]  # fmt: skip
    base = real((report.get("levels") or {}).get(report.get("baseline")))
    every = np.concatenate([*found, [base]])
    every = every[np.isfinite(every)]
    if not len(every):
        return 0.0, 1.0
    margin = 0.06 * (every.max() - every.min()) or 0.1 * abs(every.max()) or 1.0
    return float(every.min() - margin), float(every.max() + margin)


def curves(report: Report) -> "Figure":
    """Held-out reward against steps, with bands over seeds, and static policies as lines."""
    drawn, _ = levels(report)
    learned = {name: curve for name, curve in report["curves"].items() if len(trace(curve)[0])}
    ncols, below = key(list(learned))
    figure, axes = canvas(3.5 + below, left=0.5, bottom=0.55 + below, right=1.25 if drawn else 0.2)
    for i, (name, curve) in enumerate(learned.items()):
        step, middle, low, high = trace(curve)
        mark: Any = SHAPES[i % len(SHAPES)] if len(step) <= 12 else None
        axes.plot(step, middle, linewidth=2.0, marker=mark, markersize=4, label=clipped(name, 30),
                  zorder=3, **series(i))  # fmt: skip
        axes.fill_between(step, low, high, color=series(i)["color"], alpha=0.2, linewidth=0)
    bottom, top = heights(report)
    axes.set_ylim(bottom, top)
    axes.margins(x=0)
    gap = (top - bottom) * 0.155 / 2.85  # a line of letters
    places = spread(list(drawn.values()), gap, bottom, top)
    across = axes.get_yaxis_transform()
    for (name, x), place in zip(drawn.items(), places, strict=True):
        best = name == report.get("baseline")
        colour = INK if best else FAINT
        axes.axhline(x, color=colour, linewidth=1.2, linestyle=(0, (5, 2)), zorder=1)
        axes.plot([1, 1.05], [x, place], color=FAINT, linewidth=0.7, transform=across,
                  clip_on=False)  # fmt: skip
        axes.text(1.06, place, clipped(name, 14), transform=across, va="center", fontsize=9,
                  weight="bold" if best else "normal")  # fmt: skip
    axes.locator_params(axis="both", nbins=5)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.set_xlabel("steps of training")
    if learned:
        figure.legend(loc="lower left", ncols=ncols, frameon=False, handlelength=3.2,
                      borderaxespad=0.2)  # fmt: skip
    return figure


def trace(curve: Row) -> list[np.ndarray]:
    """Step, middle, low and high of a curve, (n,) each, where there is a middle."""
    step, middle = numbers(curve.get("step")), numbers(curve.get("iqm"))
    n = min(len(step), len(middle))
    edges = [numbers(curve.get(key)) for key in ("low", "high")]
    edges = [e[:n] if len(e) >= n else np.full(n, np.nan) for e in edges]
    known = np.isfinite(step[:n]) & np.isfinite(middle[:n])
    return [x[:n][known] for x in (step, middle, *edges)]


def spread(places: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """Places of labels at least `gap` apart, in their order from the highest down."""
    moved: list[float] = []
    for place in places:
        moved.append(min(place, moved[-1] - gap) if moved else min(place, top))
    floor = bottom
    for i in reversed(range(len(moved))):
        moved[i] = max(moved[i], floor)
        floor = moved[i] + gap
    return moved


def picked(report: Report) -> list[str]:
    """Policies of a crowded figure: the learners, the baseline, then the most rewarded."""
    ranked = [row.get("policy", "") for row in report.get("policies") or []]
    named = [*(report.get("learners") or [])[: PICKED - 1], report.get("baseline"), *ranked]
    kinds = report.get("exposure") or []
    shown = {name for kind in kinds for group in kind.get("groups") or []
             for name in group.get("shown") or {}}  # fmt: skip
    wanted = dict.fromkeys([*named, *sorted(shown)])
    return [str(name) for name in wanted if name in shown and name != ORACLE][:PICKED]


def exposure(kind: Row, names: Sequence[str]) -> "Figure":
    """Share of what policies show that a group gets, from a bar at its share of sales."""
    from matplotlib.lines import Line2D

    groups, (ncols, below) = kind["groups"], key([*names, "share of sales"])
    block = 0.4 + 0.15 * len(names)  # inches of a group
    figure, axes = canvas(0.65 + below + block * len(groups), left=0.15, bottom=0.55 + below)
    axes.set_ylim(block * len(groups), 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    across, most = axes.get_yaxis_transform(), 0.0
    for g, group in enumerate(groups):
        top, sold = g * block, real(group.get("sales_share"))
        axes.text(0, top + 0.2, clipped(group.get("group", ""), 34), transform=across)
        axes.text(1, top + 0.2, f"{percent(sold)} of sales" if present(sold) else "",
                  transform=across, ha="right", color=FAINT)  # fmt: skip
        first, last = top + 0.26, top + 0.26 + 0.15 * len(names)
        axes.plot([sold, sold], [first, last], color=INK, linewidth=2.5, solid_capstyle="butt")
        for i, name in enumerate(names):
            x, y = real((group.get("shown") or {}).get(name)), first + 0.15 * (i + 0.5)
            colour = SERIES[i % len(SERIES)]
            axes.plot([sold, x], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt")
            axes.plot(x, y, SHAPES[i % len(SHAPES)], color=colour, markersize=6)
            most = max(most, *(v for v in (x, sold, 0.0) if present(v)))
    axes.set_xlim(-0.015 * (most or 1.0), 1.04 * (most or 1.0))
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda x, _: f"{round(100 * x, 6):g} %")
    axes.set_xlabel("share of what is shown")
    looks = list(zip(SERIES, SHAPES, names, strict=False))
    marks = [Line2D([], [], color=colour, marker=shape, linewidth=1.4, label=clipped(name, 30))
             for colour, shape, name in looks]  # fmt: skip
    marks.append(Line2D([], [], color=INK, marker="|", markersize=10, markeredgewidth=2.5,
                        linestyle="", label="share of sales"))  # fmt: skip
    figure.legend(handles=marks, loc="lower left", ncols=ncols, frameon=False, borderaxespad=0.2)
    return figure


def spots(report: Report) -> list[Row]:
    """Policies with both a reward and a coverage."""
    rows = report.get("policies") or []
    return [
        row
        for row in rows
        if present(real(row.get("reward"))) and present(real(row.get("coverage")))
    ]


def trade(report: Report) -> "Figure":
    """Reward against coverage, a labelled point each policy."""
    figure, axes = canvas(4.3, left=0.55, bottom=0.55)
    rows = spots(report)
    cover, reward = (np.array([float(row[key]) for row in rows]) for key in ("coverage", "reward"))
    if len(cover) and cover.min() > 0 and cover.max() > 20 * cover.min():
        axes.set_xscale("log")
    axes.margins(0.1)
    for row in rows:
        truth = row.get("policy") == ORACLE
        colour, shape = (SERIES[0], "o") if row.get("learns") else (INK, "*" if truth else "s")
        axes.plot(row["coverage"], row["reward"], shape, color=colour, markersize=7)
    if axes.get_xscale() == "log":
        readable(axes, "x")
    else:
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.set_xlabel("coverage: share of the catalogue that is shown")
    axes.set_ylabel("mean reward a session")
    axes.autoscale_view()  # before places are asked for
    points = axes.transData.transform(np.column_stack([cover, reward])) * 72 / figure.dpi  # (n, 2)
    corners = axes.bbox.get_points() * 72 / figure.dpi
    names = [clipped(row.get("policy", ""), 22) for row in rows]
    wide = [6.0 if row.get("learns") else 5.2 for row in rows]  # of a letter at 9 points
    sizes = [(w * len(name), 11.0) for w, name in zip(wide, names, strict=True)]
    box = (float(corners[0, 0]), float(corners[0, 1]), 72 * WIDE, float(corners[1, 1]))
    for row, name, size, (dx, dy) in zip(
        rows, names, sizes, placed(points, sizes, box), strict=True
    ):
        arrow = {"arrowstyle": "-", "color": FAINT, "lw": 0.7, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            name, (row["coverage"], row["reward"]), (dx, dy), textcoords="offset points",
            fontsize=9, ha="center", va="center", weight="bold" if row.get("learns") else "normal",
            arrowprops=arrow if math.hypot(dx / size[0], dy / size[1]) > 1.2 else None,
        )  # fmt: skip
    return figure


def placed(
    points: np.ndarray, sizes: Sequence[tuple[float, float]], box: Box
) -> list[tuple[float, float]]:
    """Offsets of the centres of labels from points (n, 2), of least overlap, one after another."""
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in points.tolist()]
    offsets = []
    for (x, y), (width, height) in zip(points.tolist(), sizes, strict=True):
        best, least = (0.0, 0.0), math.inf
        for dx, dy in tries(width, height):
            label = (x + dx - width / 2, y + dy - height / 2,
                     x + dx + width / 2, y + dy + height / 2)  # fmt: skip
            inside = overlap(label, box)
            cost = sum(overlap(label, other) for other in taken) + 5 * (width * height - inside)
            if cost < least - 1e-6:
                best, least = (dx, dy), cost
            if least <= 1e-6:
                break
        offsets.append(best)
        left, bottom = x + best[0] - width / 2, y + best[1] - height / 2
        taken.append((left, bottom, left + width, bottom + height))
    return offsets


def tries(width: float, height: float) -> Iterable[tuple[float, float]]:
    """Offsets of a label's centre, the nearest first, from the right around the point."""
    for off, directions in RINGS:
        for k in range(directions):
            angle = 2 * math.pi * k / directions
            yield ((off + width / 2) * math.cos(angle), (off + height / 2) * math.sin(angle))


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(wide, 0.0) * max(tall, 0.0)
