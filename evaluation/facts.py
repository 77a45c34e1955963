"""What a table says beside its numbers: of each policy's weights, of the log, of the settings."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evaluation import diagnostics
from evaluation.sequential import HorizonCap

if TYPE_CHECKING:
    from evaluation.verdicts import Judged

NAN = float("nan")
FEW_EPISODES = 10.0
FEW_REWARDS = 10.0  # effective number: below it a normal interval of a rate says little


def diagnosed(j: "Judged") -> dict[str, dict[str, Any]]:
    """By policy: its verdict, what its weights say, and curves for the figures."""
    out = {}
    for policy, target in j.targets.items():
        primary, found = j.primary(policy), {}
        for kind in j.acc.kinds:
            found[kind] = asdict(j.diagnostics(policy, kind))
            found[kind]["reasons"] = list(found[kind]["reasons"])
            found[kind]["reasons"] += few_rewards(j.acc.weights[policy, kind])
            if kind == "trajectory" and policy in j.fits.caps:
                found[kind]["reasons"] += short_of_breath(j.fits.caps[policy], j.log.horizon)
        weight, share = diagnostics.ccdf(j.acc.weights[policy, j.acc.kinds[0]])
        out[policy] = {
            "verdict": primary.verdict, "kinds": found, "estimand": target.estimand,
            "ccdf": {"weight": weight.tolist(), "share": share.tolist()},
            "curve": judgeable(target.curve),
            "dm_dr_gap": gap_to_model(j, policy),
            "horizon": asdict(j.fits.caps[policy]) if policy in j.fits.caps else None,
        }  # fmt: skip
    return out


def judgeable(curve: list[dict[str, float]] | None) -> list[dict[str, float]] | None:
    """Value over temperature, withheld at temperatures whose weights would not be identified."""
    if curve is None:
        return None
    return [
        {**point, "value": point["value"]
         if point["ess"] >= diagnostics.ESS
         and abs(point["mean_weight"] - 1.0) <= diagnostics.MEAN_OFF else NAN}
        for point in curve
    ]  # fmt: skip


def few_rewards(sums: diagnostics.WeightSums) -> list[str]:
    """How many units a value rests on, where rewards are rare and these are few."""
    if sums.reward_low < 0 or not sums.sw2r2 > 0:
        return []
    units = sums.swr**2 / sums.sw2r2
    if units >= FEW_REWARDS:
        return []
    return [f"the value rests on the rewards of about {units:.1f} units: intervals are narrower "
            "than they should be; soften the policy or collect more rows"]  # fmt: skip


def short_of_breath(cap: HorizonCap, longest: int) -> list[str]:
    """What products of ratios over many steps come to, where it is little."""
    said = []
    if cap.ess_implied < FEW_EPISODES:
        said.append(
            f"products of ratios vary by {cap.log_weight_variance:.1f} in logarithms, which "
            f"leaves about {cap.ess_implied:.1f} effective episodes: use mis or drl, or fewer steps"
        )
    if cap.horizon < longest:
        said.append(
            f"{diagnostics.ESS:.0f} effective episodes are left for {cap.horizon} of {longest} "
            f"steps; what comes later is worth at most {cap.bias_bound:.4g}"
        )
    return said


def gap_to_model(j: "Judged", policy: str) -> float | None:
    """What weighting adds to the model's value: large where the model is wrong."""
    pairs = (("dm", "dr"), ("dm", "seq_dr"), ("fqe", "seq_dr"))
    for model, robust in pairs:
        if (model, None) in j.acc.sums and (robust, None) in j.acc.sums:
            if j.withheld(policy, robust):
                return None
            values = [j.estimate(policy, name, None).value for name in (robust, model)]
            return values[0] - values[1]
    return None


def about(j: "Judged") -> dict[str, Any]:
    """Facts of the log and the settings, for the head of every rendering."""
    q, log = j.question, j.log
    notes = []
    if j.propensity is not None:
        notes.append(estimated(j.propensity.report))
    if log.adaptive:
        notes.append(
            "the log is adaptive: only confidence sequences of unclipped means are valid for it"
        )
    groups = {"slate": "slates", "episode": "episodes"}.get(log.unit)
    return {
        "rows": log.num_rows, "units": j.acc.groups or j.acc.rows, "unit": log.unit,
        "logging_value": logging_value(j), "adaptive": log.adaptive,
        "propensities": "estimated" if log.estimated else "logged",
        "reward_range": list(log.reward_range), "alpha": q.alpha, "baseline": q.baseline,
        "gamma": q.gamma, "seed": q.seed, "estimators": list(q.estimators),
        "intervals": list(q.intervals), "clustered": bool(j.acc.clustered), "grouped": groups,
        "notes": notes, "calibration": None if j.propensity is None else j.propensity.report,
        "reward_model": None if j.fits.reward is None else j.fits.reward.report(),
    }  # fmt: skip


def logging_value(j: "Judged") -> float:
    """What the logging policy earned a unit, undiscounted."""
    sums = j.acc.weights[j.acc.policies[0], j.acc.kinds[0]]
    return sums.sr / sums.n


def estimated(report: dict[str, Any]) -> str:
    """What every table says of fitted propensities."""
    return (
        f"propensities are estimated ({report['model']}, calibration error {report['ece']:.3g}, "
        f"Brier {report['brier']:.3g}): intervals are widened by refits, and what the model "
        "cannot see stays unseen"
    )
