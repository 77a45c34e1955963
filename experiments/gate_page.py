"""The gate as one HTML page and one PNG: checks, calibration, real and simulated curves."""

from pathlib import Path
from typing import Any

import numpy as np

from evaluation.page import document, section, tabular, text
from experiments.run_folder import write_text
from simulators.gate import WORDS, Check

LOGS = ("spend", "gap", "repeat_age", "price")  # features that are logarithms
CURVES = ("size", "spend", "gap", "hour", "repeat_age", "price")


def write_page(folder: Path, env_name: str, checks: list[Check], more: dict[str, Any]) -> Path:
    """Write gate.html and gate.png; the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / "gate.png", more)
    path = folder / "gate.html"
    write_text(path, page(env_name, checks, more))
    return path


def page(env_name: str, checks: list[Check], more: dict[str, Any]) -> str:
    """What passed, what failed, and what a judge looks at."""
    failed = sum(not check.passed for check in checks)
    head = f"Are the users of {env_name} like those of its log?"
    rows = [
        [
            "● pass" if c.passed else "◆ FAIL", c.check, f"{c.value:.4f}",
            "" if c.low is None else f"{c.low:.4f} to {c.high:.4f}", f"{c.threshold:g}",
            text(c.said),
        ]
        for c in checks
    ]  # fmt: skip
    found = more["walked"]
    said = (
        f"Fitted to half of the households before the cut; checked on the other {found.users} over "
        f"the {found.days:.0f} days after it: {len(found.real):,} real visits, "
        f"{len(found.simulated):,} simulated ones. Simulated users shopped alone, from the cut to "
        "the end, on what they had bought themselves. Intervals are over households."
    )
    looks = [[name, f"{loss:+.4f}"] for name, loss in more["looks"].items()]
    return document(
        head,
        f"<h1>{text(head)}</h1>\n<p>{len(checks) - failed} of {len(checks)} checks passed.</p>\n"
        f"<p class=faint>{text(said)}</p>\n"
        + section("Checks", (tabular(["", "check", "value", "95 % interval", "limit", ""],
                                         rows, [0, 1, 5])))
        + section("Curves", '<figure><img src="gate.png" alt="real and simulated curves, and '
                            'calibration" style="max-width:100%"></figure>')
        + section("What a judge tells them apart by",
                  (tabular(["feature", "AUC lost when it is shuffled"], looks, [0]))),
    )  # fmt: skip


def draw(path: Path, more: dict[str, Any]) -> None:
    """Curves of real and simulated visits, and calibration by decile."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(3, 3).ravel()
    found = more["walked"]
    for axis, name in zip(axes, CURVES, strict=False):
        pair = [t[name].to_numpy(dtype=float) for t in (found.real, found.simulated)]
        pair = [x[np.isfinite(x)] for x in pair]
        if not all(len(x) for x in pair):
            axis.set_axis_off()
            continue
        low, high = np.percentile(np.concatenate(pair), [0.5, 99.5])
        edges = np.linspace(low, max(high, low + 1e-6), 25)
        for x, label, style in zip(pair, ("real", "simulated"), ("-", "--"), strict=True):
            axis.stairs(np.histogram(x, edges)[0] / len(x), edges, label=label, linestyle=style)
        axis.set_title(f"{WORDS[name]}{', log' if name in LOGS else ''}", fontsize=10)
    axes[0].legend(fontsize=9)
    calibrated = more["calibration"]
    for axis, (key, title) in zip(
        axes[6:8],
        (("observed_over_predicted_deciles", "bought / predicted, by decile of prediction"),
         ("activity_deciles", "bought / predicted, by decile of activity")),
        strict=True,
    ):  # fmt: skip
        axis.plot(range(1, 11), calibrated[key], "o-")
        axis.axhline(1.0, color="grey", linewidth=1)
        axis.set_ylim(0.5, 1.5)
        axis.set_title(title, fontsize=10)
    axes[8].set_axis_off()
    figure.savefig(path, dpi=110)
