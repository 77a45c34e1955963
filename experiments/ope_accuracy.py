"""How right the evaluator is where the truth is known: the evidence for what it does by default.

The rule, fixed before any figure was seen. A world counts if it identifies at least one target a
log on average. An estimator stands if, wherever it is shown in a world that counts, its interval
covers at least 93 %, or less by no more than two standard errors. Of those that stand the one with
the lowest mean rank of RMSE on identified targets wins. The interval: of the winner's that stand in
the same way and exist in every world that counts, the narrowest. Two things came after the first
figures: a tie in rank goes to the lower mean of RMSE over that of the world's best, and bootstraps
are measured on every log, not on a quarter, of the estimators named BOOTSTRAPPED.

Errors and widths are in standard deviations of what a unit earns under the logging policy.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evaluation import RewardModel, intervals
from evaluation.diagnostics import IDENTIFIED
from evaluation.fits import fitted
from evaluation.fqe import FittedQ
from evaluation.judge import INTERVALS, accumulated, asked
from evaluation.sequential import discounts
from evaluation.terms import Groups
from evaluation.verdicts import Judged, choose, empirical_likelihood, limits
from experiments.ope_worlds import OVERLAP, Drawn, World, bandit, sessions, slates

Array = np.ndarray
Row = dict[str, Any]
ALPHA, ENOUGH = 0.05, 0.93
UNITS = {
    "row": ("dm", "ips", "snips", "dr", "sndr", "switch_dr", "dros", "sg_ips", "sg_dr",
            "clipped_ips", "ls", "ix", "mips", "offcem", "cressie_read"),
    "slate": ("sips", "iips", "rips", "snsips", "sniips", "snrips", "pi", "cascade_dr"),
    "episode": ("fqe", "tis", "pdis", "wtis", "wpdis", "seq_dr", "seq_sndr", "mrdr", "magic",
                "mis", "drl"),
}  # fmt: skip
ALONE = ("mis",)  # where a model is there it takes it, and is drl
BOOTSTRAPPED = ("sndr", "snrips", "cascade_dr", "seq_dr", "drl")  # redraws cost more than all else
SCALE_SEED = 1_000_003  # a log that no repeat sees


@dataclass(frozen=True)
class Runs:
    """What one estimator said in R logs of one world of its P targets."""

    value: Array  # (R, P)
    shown: Array  # (R, P) bool: identified by the weights that this estimator uses
    ends: dict[str, Array]  # by interval, (R, P, 2), nan where there is none


def worlds(quick: bool = False) -> list[World]:
    """All that is logged: overlap from light to heavy, a support with holes, slates, sessions."""
    if quick:
        return [bandit(10, "light", 500, binary=True),
                bandit(10, "light", 500, binary=True, hidden=0.3),
                slates("cascade", 300), sessions(300)]  # fmt: skip
    bandits = [bandit(actions, overlap, n, binary=actions == 10)
               for overlap in OVERLAP for actions in (10, 100) for n in (500, 5000)]  # fmt: skip
    return [
        *bandits, bandit(10, "light", 5000, binary=True, hidden=0.3),
        *(slates(rewards, n) for rewards in ("independent", "cascade") for n in (500, 2000)),
        *(sessions(n) for n in (300, 1500)),
    ]  # fmt: skip


def accuracy(repeats: int, seed: int = 0, quick: bool = False) -> list[Row]:
    """One row a world, estimator and interval."""
    from tqdm import tqdm

    some = worlds(quick)
    rows: list[Row] = []
    with tqdm(total=len(some) * repeats, unit="log", disable=None) as bar:
        for world in some:
            bar.set_description(f"{world.name}, n={world.n}")
            runs, primary = measured(world, repeats, seed, bar.update)
            rows += summarised(world, runs, primary)
    return rows


def measured(
    world: World, repeats: int, seed: int, tick: Callable[[], Any] = lambda: None
) -> tuple[dict[str, Runs], Array]:
    """Runs of each estimator, and which targets (R, P) the world's primary weights identify."""
    names = [name for name in UNITS[world.unit] if allowed(world, name)]
    shape = (repeats, len(world.truth))
    runs = {
        name: Runs(np.full(shape, np.nan), np.zeros(shape, dtype=bool),
                   {interval: np.full((*shape, 2), np.nan) for interval in INTERVALS})
        for name in names
    }  # fmt: skip
    primary = np.zeros(shape, dtype=bool)
    for log in range(repeats):
        drawn = world.draw(seed * repeats + log)
        for group in ([n for n in names if n not in ALONE], *([n] for n in ALONE if n in names)):
            judged = looked_at(world, drawn, group)
            for place, policy in enumerate(world.truth):
                primary[log, place] = judged.primary(policy).verdict == IDENTIFIED
                for name in group:
                    record(runs[name], (log, place), judged, policy, name)
        tick()
    return runs, primary


def allowed(world: World, name: str) -> bool:
    """Logarithmic smoothing has no answer to rewards below 0."""
    return name != "ls" or "gaussian" not in world.name


def looked_at(world: World, drawn: Drawn, names: Sequence[str]) -> Judged:
    """What evaluate() makes its table of, with nothing withheld yet."""
    model: Any = None
    if world.unit != "slate":
        model = RewardModel() if world.unit == "row" else FittedQ(gamma=world.gamma)
    log, targets = drawn.log, drawn.targets
    question = asked(log, targets, model, names, INTERVALS, None, ALPHA, world.gamma, 0, "slope",
                     "pooled")  # fmt: skip
    fits = fitted(log, targets, question.names, model, world.clusters, world.gamma, 0)
    known = {policy: {**fits.rows.get(policy, {}), **columns}
             for policy, columns in drawn.rows.items()}  # fmt: skip
    fits = replace(fits, rows={**fits.rows, **known})
    parts = accumulated(log, targets, question, fits)
    return Judged(parts, question, log, targets, fits, {}, None)


def record(runs: Runs, place: tuple[int, int], judged: Judged, policy: str, name: str) -> None:
    """Note an estimate, whether it would be shown, and its intervals."""
    if name == "cressie_read":
        sums = judged.acc.weights[policy, judged.acc.kinds[0]]
        runs.value[place] = intervals.cressie_read_estimate(sums)
        runs.shown[place] = judged.primary(policy).verdict == IDENTIFIED
        runs.ends["cressie_read"][place] = empirical_likelihood(judged, policy)
        return
    key = choose(judged, policy, name)
    runs.value[place] = judged.estimate(policy, *key).value
    runs.shown[place] = not judged.withheld(policy, name)
    for interval in judged.question.intervals:
        if interval != "bootstrap" or name in BOOTSTRAPPED:
            runs.ends[interval][place] = limits(judged, policy, key, interval)


def scale(world: World) -> float:
    """Standard deviation of what a unit earns under the logging policy."""
    (batch,) = world.draw(SCALE_SEED).log.batches(10**9)
    if world.unit == "row":
        return float(batch.reward.std())
    groups = Groups(batch.episode if world.unit == "episode" else batch.decision)
    return float(groups.sum(discounts(groups, world.gamma) * batch.reward).std())


def summarised(world: World, runs: dict[str, Runs], primary: Array) -> Iterator[Row]:
    """Rows of one world."""
    unit, truth = scale(world), np.array(list(world.truth.values()))  # (P,)
    for name, run in runs.items():
        error = (run.value - truth) / unit  # (R, P)
        about = {
            "bench": "ope_accuracy", "world": world.name, "unit": world.unit, "n": world.n,
            "repeats": len(error), "targets": len(truth), "estimator": name,
            **errors(error, primary), "withheld": 1.0 - run.shown.mean(),
            "identified": int(primary.sum()), **ranked(run.value, truth, unit),
        }  # fmt: skip
        for interval, ends in run.ends.items():
            if np.isfinite(ends).any():
                yield {**about, "interval": interval, **covered(ends, truth, unit, run.shown)}


def errors(error: Array, primary: Array) -> Row:
    """Of errors (R, P): bias is the mean over targets of its size, z that of the worst target."""
    mean, spread = np.nanmean(error, axis=0), np.nanstd(error, axis=0)  # (P,)
    z = np.abs(mean) / np.maximum(spread / np.sqrt(len(error)), 1e-12)
    return {
        "bias": np.abs(mean).mean(), "bias_z": z.max(), "rmse": root_mean_square(error),
        "rmse_identified": root_mean_square(error[primary]),
    }  # fmt: skip


def root_mean_square(error: Array) -> float:
    """Nan without any."""
    return float(np.sqrt(np.nanmean(error**2))) if np.isfinite(error).any() else float("nan")


def ranked(value: Array, truth: Array, unit: float) -> Row:
    """Spearman's correlation with the truth, and what choosing the best by the estimate loses."""
    order = value.argsort(axis=1).argsort(axis=1)  # (R, P)
    right = truth.argsort().argsort()  # (P,)
    size = len(truth)
    correlation = 1.0 - 6.0 * ((order - right) ** 2).sum(axis=1) / (size * (size**2 - 1))
    chosen = truth[np.nan_to_num(value, nan=-np.inf).argmax(axis=1)]  # (R,)
    return {"rank_correlation": correlation.mean(),
            "regret": float((truth.max() - chosen).mean() / unit)}  # fmt: skip


def covered(ends: Array, truth: Array, unit: float, shown: Array) -> Row:
    """How often intervals (R, P, 2) hold the truth: all there are, and those shown."""
    there = np.isfinite(ends).all(axis=2)  # (R, P)
    hit = (ends[..., 0] <= truth) & (truth <= ends[..., 1])
    width = (ends[..., 1] - ends[..., 0]) / unit
    out: Row = {}
    for suffix, which in (("", there), ("_identified", there & shown)):
        count = which.sum()
        share = (hit & which).sum() / count if count else np.nan
        # targets of one log err together: the error is over logs
        gap = ((hit - share) * which).sum(axis=1)  # (R,)
        out[f"coverage{suffix}"] = share
        out[f"coverage_error{suffix}"] = np.sqrt((gap**2).sum()) / count if count else np.nan
        out[f"width{suffix}"] = width[which].mean() if count else np.nan
        out[f"intervals{suffix}"] = int(count)
    return out


def stands(rows: Sequence[Row]) -> bool:
    """Whether intervals cover where they are shown, in each of these worlds."""
    shown = [r for r in rows if r["intervals_identified"]]
    return bool(shown) and all(
        r["coverage_identified"] + 2.0 * r["coverage_error_identified"] >= ENOUGH for r in shown
    )


def counting(rows: Sequence[Row], unit: str) -> list[Row]:
    """Rows of the worlds that count."""
    return [r for r in rows if r["unit"] == unit and r["identified"] >= r["repeats"]]


def first_intervals(rows: Sequence[Row]) -> list[Row]:
    """One row a world and estimator, that of its first interval: clt, where there is one."""
    first: dict[tuple[str, int, str], Row] = {}
    for row in rows:
        first.setdefault((row["world"], row["n"], row["estimator"]), row)
    return list(first.values())


def standings(rows: Sequence[Row], unit: str) -> list[Row]:
    """Estimators of a unit by mean rank of RMSE over the worlds that count."""
    some = first_intervals(counting(rows, unit))
    cases: dict[tuple[str, int], list[Row]] = {}
    for row in some:
        cases.setdefault((row["world"], row["n"]), []).append(row)
    places: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    for case in cases.values():
        found = np.array([row["rmse_identified"] for row in case])
        for row, rmse in zip(case, found, strict=True):
            tied = (1.0 + (found == rmse).sum()) / 2.0
            places.setdefault(row["estimator"], []).append((found < rmse).sum() + tied)
            ratios.setdefault(row["estimator"], []).append(rmse / found.min())
    out = []
    for name in places:
        own = [row for row in some if row["estimator"] == name]
        shown = [r["coverage_identified"] for r in own if r["intervals_identified"]]
        average = {key: float(np.mean([r[key] for r in own]))
                   for key in ("bias", "withheld", "rank_correlation", "regret")}  # fmt: skip
        out.append({"estimator": name, "rank": float(np.mean(places[name])),
                    "times_best": float(np.mean(ratios[name])), "stands": stands(own),
                    "least_coverage": min(shown, default=np.nan), "worlds": len(own),
                    **average})  # fmt: skip
    return sorted(out, key=lambda row: (row["rank"], row["times_best"]))


def winner(rows: Sequence[Row], unit: str) -> tuple[str, str] | None:
    """Estimator and interval of a unit by the rule above."""
    standing = [row["estimator"] for row in standings(rows, unit) if row["stands"]]
    if not standing:
        return None
    own = [row for row in counting(rows, unit) if row["estimator"] == standing[0]]
    cases = {(row["world"], row["n"]) for row in own}
    widths = {}
    for interval in INTERVALS:
        some = [r for r in own if r["interval"] == interval and r["intervals_identified"]]
        if len(some) == len(cases) and stands(some):
            widths[interval] = np.mean([r["width_identified"] for r in some])
    return standing[0], min(widths, key=lambda name: widths[name])


def text(rows: Sequence[Row]) -> str:
    """Tables a world, the standings a unit, and who wins."""
    lines = [*(__doc__ or "").strip().splitlines(), ""]
    cases = dict.fromkeys((row["world"], row["n"], row["unit"]) for row in rows)
    for world, n, unit in cases:
        own = [row for row in rows if (row["world"], row["n"]) == (world, n)]
        share = own[0]["identified"] / (own[0]["repeats"] * own[0]["targets"])
        lines += [f"{world}, n = {n} {unit}s, {own[0]['repeats']} logs, {own[0]['targets']} "
                  f"targets, {100 * share:.0f} % identified"]  # fmt: skip
        lines += [HEAD.format("estimator", *ACCURACY.values()), *map(in_line, first_intervals(own))]
        lines += [""]
    for unit in UNITS:
        if any(row["unit"] == unit for row in rows):
            lines += [*standing_lines(rows, unit), ""]
    return "\n".join(lines).rstrip()


ACCURACY = {"bias": "bias", "bias_z": "z", "rmse": "rmse", "rmse_identified": "rmse id",
            "withheld": "withheld", "coverage": "cover", "coverage_identified": "cover id",
            "width": "width", "width_identified": "width id", "rank_correlation": "ranks",
            "regret": "regret@1"}  # fmt: skip
HEAD = "  {:13}" + " {:>8}" * len(ACCURACY)


def in_line(row: Row) -> str:
    """One estimator of one world."""
    return HEAD.format(row["estimator"], *(figure(row[key]) for key in ACCURACY))


def figure(x: float) -> str:
    """A number, or a dash."""
    return f"{x:.3f}" if np.isfinite(x) else "-"


def standing_lines(rows: Sequence[Row], unit: str) -> list[str]:
    """Standings of a unit, its intervals, and who wins."""
    names = ("rank", "times_best", "least_coverage", "bias", "withheld", "rank_correlation",
             "regret")  # fmt: skip
    head = ("mean rank", "rmse/best", "least cov", "bias", "withheld", "ranks", "regret@1")
    form = "  {:13} {:>6}" + " {:>9}" * len(names)
    lines = [f"Estimators of {unit}s over the worlds that count",
             form.format("estimator", "stands", *head)]  # fmt: skip
    for row in standings(rows, unit):
        said = "yes" if row["stands"] else "no"
        lines += [form.format(row["estimator"], said, *(figure(row[name]) for name in names))]
    won = winner(rows, unit)
    if won is None:
        return [*lines, f"  no estimator of {unit}s stands"]
    own = [row for row in counting(rows, unit) if row["estimator"] == won[0]]
    lines += [f"Intervals of {won[0]}: least coverage and mean width where identified"]
    for interval in INTERVALS:
        some = [r for r in own if r["interval"] == interval and r["intervals_identified"]]
        if some:
            least = min(r["coverage_identified"] for r in some)
            width = float(np.mean([r["width_identified"] for r in some]))
            lines += [f"  {interval:20} {'yes' if stands(some) else 'no':>3} {figure(least):>6} "
                      f"{figure(width):>8}  {len(some)} worlds"]  # fmt: skip
    return [*lines, f"Winner for {unit}s: {won[0]} with {won[1]} intervals"]
