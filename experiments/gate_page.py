"""The gate as one HTML page and one PNG: checks, calibration, real and simulated curves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.page import document, section, tabular, text
from experiments.run_folder import write_text
from simulators.gate import WORDS, Check
from simulators.verdicts import count_line

LOGS = ("spend", "gap", "repeat_age", "price")  # features that are logarithms
CURVES = ("size", "spend", "gap", "hour", "repeat_age", "price")
MARKS = {True: "● pass", False: "◆ FAIL", None: "■ too few"}
STYLE = "td:first-child { white-space: nowrap; } td:last-child { white-space: normal; }"
DECILES = {
    "observed_over_predicted_deciles": "bought / predicted, by decile of prediction",
    "activity_deciles": "bought / predicted, by decile of activity",
}


def write_page(folder: Path, env_name: str, checks: list[Check], more: dict[str, Any]) -> Path:
    """Write gate.html and gate.png; the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "gate.png", more)
    path = folder / "gate.html"
    write_text(path, page(env_name, checks, more))
    return path


def page(env_name: str, checks: list[Check], more: dict[str, Any]) -> str:
    """What passed, what failed, and what a judge looks at."""
    head = f"Are the users of {env_name} like those of its log?"
    rows = [
        [
            MARKS[c.passed], c.check, f"{c.value:.4f}",
            "" if c.low is None else f"{c.low:.4f} to {c.high:.4f}", f"{c.threshold:g}",
            text(c.said),
        ]
        for c in checks
    ]  # fmt: skip
    notes = "".join(f"<p class=faint>left out: {text(x)}</p>\n" for x in more.get("notes", ()))
    return document(
        head,
        f"<h1>{text(head)}</h1>\n<p>{count_line(checks)}.</p>\n"
        f"<p class=faint>{text(about(more))}</p>\n"
        + section("Checks", (tabular(["", "check", "value", "95 % interval", "limit", ""],
                                         rows, [0, 1, 5])) + notes)
        + section("Curves", '<figure><img src="gate.png" alt="real and simulated curves, and '
                            'calibration" style="max-width:100%"></figure>')
        + segments_section(more) + sensitivity_section(more) + judge_section(more),
        STYLE,
    )  # fmt: skip


def about(more: dict[str, Any]) -> str:
    """Who was compared with whom."""
    if "walked" not in more:
        size = more["about"]
        return (
            f"Fitted to half of the users before the cut; checked on {size['impressions']:,} "
            f"impressions of {size['users']:,} others after it, as they were shown. "
            "Intervals are over users."
        )
    found = more["walked"]
    return (
        f"Fitted to half of the households before the cut; checked on the other {found.users} over "
        f"the {found.days:.0f} days after it: {len(found.real):,} real visits, "
        f"{len(found.simulated):,} simulated ones. Simulated users shopped alone, from the cut to "
        "the end, on what they had bought themselves. Intervals are over households."
    )


def segments_section(more: dict[str, Any]) -> str:
    """Bought over predicted of each kind of users."""
    found = more.get("calibration", {}).get("segments")
    if not found:
        return ""
    rows = [
        [text(s["segment"]), f"{s['users']:,}", f"{s['bought']:,.0f}", f"{s['ratio']:.3f}",
         f"{1.96 * s['error']:.3f}"]
        for s in found
    ]  # fmt: skip
    head = ["kind of users", "users", "bought", "bought / predicted", "± share"]
    return section("Kinds of users", tabular(head, rows, [0]))


def sensitivity_section(more: dict[str, Any]) -> str:
    """Whether the order of the policies stands if an assumption is wrong."""
    if "sensitivity" not in more:
        return ""
    rows = [
        [text(r["assumption"]), text(r["value"]), f"{r['same']} of {r['clear']}",
         text(r["best"]), f"{r['mean'][r['best']]:.3f}", "" if r["best_is_clear"] else "no"]
        for r in more["sensitivity"]
    ]  # fmt: skip
    head = ["assumption", "value", "pairs in the order as configured", "best policy",
            "its reward", "clearly?"]  # fmt: skip
    said = (
        "<p class=faint>Purchases cannot tell these. Of the pairs of policies whose difference is "
        "clear as configured, how many are in the same order otherwise.</p>\n"
    )
    return section("If an assumption is wrong", said + tabular(head, rows, [0, 1, 3, 5]))


def judge_section(more: dict[str, Any]) -> str:
    """What a judge looks at."""
    if "looks" not in more:
        return ""
    looks = [[name, f"{loss:+.4f}"] for name, loss in more["looks"].items()]
    return section("What a judge tells them apart by",
                   (tabular(["feature", "AUC lost when it is shuffled"], looks, [0])))  # fmt: skip


Panel = Callable[[Any], None]  # draws on its axis


def draw(path: Path, more: dict[str, Any]) -> None:
    """Curves of real and simulated visits or sessions, and calibration."""
    from matplotlib.figure import Figure

    shown = panels(more)
    rows = -(-len(shown) // 3)
    figure = Figure(figsize=(11, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).ravel()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, shown, strict=False):
        panel(axis)
    figure.savefig(path, dpi=110)


def panels(more: dict[str, Any]) -> list[Panel]:
    """What there is to draw."""
    found: list[Panel] = []
    if "walked" in more:
        walked = more["walked"]
        for name in CURVES:
            pair = [t[name].to_numpy(dtype=float) for t in (walked.real, walked.simulated)]
            found += curve_panel(pair, f"{WORDS[name]}{', log' if name in LOGS else ''}")
        calibrated = more["calibration"]
        found += [decile_panel(calibrated[key], title) for key, title in DECILES.items()]
        found.append(reliability_panel(calibrated["reliability"], "reliability: bought"))
    if "lengths" in more:
        pair = [t["length"].to_numpy(dtype=float) for t in more["lengths"]]
        found += curve_panel(pair, "impressions of a session")
        found += [
            reliability_panel(curve, f"reliability: {name}")
            for name, curve in more["curves"].items()
        ]
    return found


def curve_panel(pair: list[np.ndarray], title: str) -> list[Panel]:
    """Real and simulated histograms; nothing where one has none."""
    pair = [x[np.isfinite(x)] for x in pair]
    if not all(len(x) for x in pair):
        return []
    low, high = np.percentile(np.concatenate(pair), [0.5, 99.5])
    edges = np.linspace(low, max(high, low + 1e-6), 25)

    def panel(axis: Any) -> None:
        for x, label, style in zip(pair, ("real", "simulated"), ("-", "--"), strict=True):
            axis.stairs(np.histogram(x, edges)[0] / len(x), edges, label=label, linestyle=style)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)

    return [panel]


def decile_panel(ratios: list[float], title: str) -> Panel:
    """Bought over predicted by decile."""

    def panel(axis: Any) -> None:
        axis.plot(range(1, len(ratios) + 1), ratios, "o-")
        axis.axhline(1.0, color="grey", linewidth=1)
        axis.set_ylim(0.5, 1.5)
        axis.set_title(title, fontsize=10)

    return panel


def reliability_panel(curve: list[dict[str, float]], title: str) -> Panel:
    """Share of events by predicted chance, both logarithmic, with intervals."""
    some = [point for point in curve if point["bought"] > 0]
    x, y, low, high = (
        np.array([p[k] for p in some]) for k in ("predicted", "bought", "low", "high")
    )

    def panel(axis: Any) -> None:
        axis.set_title(title, fontsize=10)
        if not len(x):
            return
        axis.errorbar(x, y, yerr=[y - np.maximum(low, y / 10), high - y], fmt="o", markersize=4)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color="grey", linewidth=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("predicted", fontsize=8)

    return panel
