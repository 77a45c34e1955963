"""The page of all benchmarks: what was measured on which machine, goals, curves."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.figures import NAMED, bare, readable, saved, series
from experiments.bench_rows import INSTALL, ROOT, Row, reached, short
from experiments.run_folder import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Table = dict[str, Any]  # {"hardware": {bench: {...}}, "rows": [...]}, as the JSON has it
TICKS = 6  # points of a curve, above which its axis has ticks at the tens
TITLES = {
    "env": "Environment steps", "train": "Training", "encode": "Encoding texts",
    "fit": "Fitting users", "scoring": "Scoring whole catalogues", "ope": "Off-policy evaluation",
    "rank": "Ranking", "bandits": "Bandits", "startup": "Start-up",
}  # fmt: skip
HEAD = """# Performance

Made by `python experiments/bench.py bench=all out={name}`, from `{name}`; `bench=page out={name}`
makes this page again without running anything. `bench=check` compares ratios with it.

Figures are work per second of **CPU time of one process** (on a GPU: of time by the clock), medians
of windows; ours, the peer and the limit take turns within a run, so that only ratios speak across
machines. A peer that is not here is skipped: `{install}`. What was tried on the way:
[performance-notes.md](performance-notes.md).
"""


def hardware(threads: int, device: str) -> dict[str, Any]:
    """What machine this is."""
    import torch

    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "cpu": processor(), "cores": os.cpu_count(), "memory_gib": memory_gib(),
        "threads": threads, "torch": torch.__version__, "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }  # fmt: skip


def processor() -> str:
    """The CPU's name as its system tells it."""
    try:
        told = Path("/proc/cpuinfo").read_text().splitlines()
        names = [x.split(":", 1)[1].strip() for x in told if x.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def memory_gib() -> int | None:
    """Memory of the machine."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30))
    except (ValueError, OSError, AttributeError):
        return None


def write_page(path: Path, table: Table) -> Path:
    """Write PATH.md beside PATH.json, with its figures."""
    page = path.with_suffix(".md")
    figures = {}
    for bench, axis in curves(table["rows"]):
        figure = path.with_name(f"{path.stem}-{bench}-{axis.replace(' ', '-')}.png")
        points = [r for r in table["rows"] if r["bench"] == bench and axis_of(r) == axis]
        figure.parent.mkdir(parents=True, exist_ok=True)
        figure.write_bytes(saved(draw, points, "png"))
        figures[bench, axis] = figure.name
    home = path.resolve()
    name = home.relative_to(ROOT).as_posix() if home.is_relative_to(ROOT) else path.name
    write_text(page, text(name, table, figures))
    return page


def text(name: str, table: Table, figures: dict[tuple[str, str], str]) -> str:
    """The page."""
    parts = [HEAD.format(name=name, install=INSTALL), *machines(table["hardware"])]
    known = [*TITLES, *sorted({r["bench"] for r in table["rows"]} - set(TITLES))]
    for bench in known:
        rows = [r for r in table["rows"] if r["bench"] == bench]
        if not rows:
            continue
        parts += [
            f"## {TITLES.get(bench, bench)}",
            f"    python experiments/bench.py bench={bench}",
        ]
        if plain := [r for r in rows if r["curve"] is None]:
            parts.append(goals(plain))
        for (of, axis), figure in figures.items():
            if of == bench:
                points = [r for r in rows if axis_of(r) == axis]
                parts += [f"![{TITLES.get(bench, bench)}: {axis}]({figure})", pointwise(points)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def machines(found: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each machine, with what was measured on it."""
    lines: dict[str, list[str]] = {}
    for bench, about in found.items():
        gpu = f", {about['gpu']}" if about["gpu"] else ""
        said = (
            f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB{gpu}; "
            f"{about['threads']} thread{'s' * (about['threads'] > 1)}, torch {about['torch']}, "
            f"Python {about['python']}"
        )
        lines.setdefault(said, []).append(bench)
    if len(lines) == 1:
        return [f"Measured on: {next(iter(lines))}."]
    return [f"- {', '.join(benches)}: {said}" for said, benches in lines.items()]


def goals(rows: Sequence[Row]) -> str:
    """The rows that are no points of curves, with their ratios and goals."""
    lines = ["| what | measured | spread | by the clock | ratio | goal | |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        sides = [side for side in ("peer", "limit") if row[f"{side}_name"]]
        ratios, wanted = [], []
        for side in sides:
            name, ratio, goal = (row[f"{what}{side}{end}"] for what, end in
                                 (("", "_name"), ("ratio_to_", ""), ("", "_goal")))  # fmt: skip
            here = "" if ratio is None else f"{short(ratio)} x {name} ({short(row[side])})"
            ratios.append(here or f"{name}: not here")
            wanted.append("" if goal is None else f"{goal:g} x")
        verdict = reached(row)
        lines.append(
            f"| {row['case']} | {short(row['product'])} {row['unit']} "
            f"| {short(row['low'])} to {short(row['high'])} | {short(row['wall'])} "
            f"| {'<br>'.join(ratios)} "
            f"| {'<br>'.join(wanted)} "
            f"| {'' if verdict is None else 'reached' if verdict else '**not reached**'} |"
        )
    return "\n".join(lines)


def pointwise(rows: Sequence[Row]) -> str:
    """The points of a curve."""
    axis = axis_of(rows[0])
    several = len({series_of(r) for r in rows}) > 1
    lines = [f"| {axis} |{' of |' * several} {rows[0]['unit']} | spread | MiB |",
             f"|---|{'---|' * several}---|---|---|"]  # fmt: skip
    for row in rows:
        of = f" {series_of(row)} |" if several else ""
        memory = "" if row["memory_mib"] is None else f"{row['memory_mib']:,.0f}"
        lines.append(f"| {place(row['at'])} |{of} {short(row['product'])} "
                     f"| {short(row['low'])} to {short(row['high'])} | {memory} |")  # fmt: skip
    return "\n".join(lines)


def place(at: Any) -> str:
    """Where a point lies on its axis."""
    if not isinstance(at, int | float):
        return str(at)
    return f"{int(at):,}" if at == int(at) else f"{at:g}"


def curves(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Benchmarks and axes of all curves."""
    return list(dict.fromkeys((r["bench"], axis_of(r)) for r in rows if axis_of(r)))


def axis_of(row: Row) -> str:
    """What a curve goes along: "replay ratio" of "replay ratio, dot head"; "" of no curve."""
    return str(row["curve"] or "").partition(", ")[0].replace("_", " ")


def series_of(row: Row) -> str:
    """Which of several curves along an axis: "dot head" of "replay ratio, dot head"."""
    return str(row["curve"]).partition(", ")[2]


def draw(rows: Sequence[Row]) -> "Figure":
    """Rate with its spread, and memory where it was measured, along the curve's axis."""
    from matplotlib.figure import Figure

    measured = [r for r in rows if r["memory_mib"] is not None]
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = figure.subplots(1, 1 + bool(measured), squeeze=False)[0]
    names = list(dict.fromkeys(map(series_of, rows)))
    for panel, key, among in zip(panels, ("product", "memory_mib"), (rows, measured), strict=False):
        for i, name in enumerate(names):
            points = sorted(((r["at"], r) for r in among if series_of(r) == name),
                            key=lambda x: x[0])  # fmt: skip
            at = [x for x, _ in points]
            panel.plot(at, [r[key] for _, r in points], marker="o", markersize=4, linewidth=1.6,
                       label=name, **series(i))  # fmt: skip
            if key == "product":
                low, high = ([r[end] for _, r in points] for end in ("low", "high"))
                panel.fill_between(at, low, high, color=series(i)["color"], alpha=0.15, linewidth=0)
        scale(panel, [r["at"] for r in among], [r[key] for r in among])
        panel.set_xlabel(axis_of(rows[0]))
        panel.set_title(rows[0]["unit"] if key == "product" else "memory, MiB", fontsize=10)
        bare(panel)
    if 1 < len(names) <= NAMED:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def scale(panel: "Axes", at: Sequence[float], values: Sequence[float]) -> None:
    """Logarithmic axes where values span tens, else from zero; ticks where few points lie."""
    if min(at) > 0:
        panel.set_xscale("log")
        places = sorted(set(at))
        if len(places) <= TICKS:
            panel.set_xticks(places, [place(x) for x in places])
            panel.minorticks_off()
        else:
            readable(panel, "x")
    if min(values) > 0 and max(values) > 10 * min(values):
        panel.set_yscale("log")
        readable(panel, "y")
    else:
        panel.set_ylim(0.0, 1.05 * max(values))
        panel.yaxis.set_major_formatter(lambda y, _: place(y))
