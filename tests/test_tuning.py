"""SLOPE and MSE choose the lambda that the reference chose, and remember nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation import tuning

DATA = Path(__file__).parent / "data" / "ope"
BANDITS = ("bandit_binary", "bandit_continuous_reward", "bandit_position")
CLASSES = {
    "InverseProbabilityWeighting": ("clip", False),
    "DoublyRobust": ("clip", True),
    "SwitchDoublyRobust": ("switch", True),
    "DoublyRobustWithShrinkage": ("shrink", True),
    "SubGaussianInverseProbabilityWeighting": ("smooth", False),
    "SubGaussianDoublyRobust": ("smooth", True),
}


def changed(kind: str, w: np.ndarray, lam: float) -> np.ndarray:
    """Weights (n,) at lambda, by the formulae of the estimators."""
    if kind == "clip":
        return np.minimum(w, lam)
    if kind == "switch":
        return np.where(w <= lam, w, 0.0)
    if kind == "shrink":
        return w if np.isinf(lam) else lam * w / (w**2 + lam)
    return w / (1 - lam + lam * w)


def columns(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weight, reward, q of the logged action and value under q, (n,) each."""
    z = np.load(DATA / f"{name}.npz")
    rows = np.arange(len(z["action"]))
    slot = z["position"] if "position" in z else np.zeros(len(rows), dtype=int)
    pi, q = z["action_dist"][rows, :, slot], z["q_hat"][rows, :, slot]
    weight = pi[rows, z["action"]] / z["pscore"]
    return weight, z["reward"].astype(float), q[rows, z["action"]], (pi * q).sum(axis=1)


def moments(
    name: str, kind: str, model: bool, lambdas: list[float]
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Mean and variance at each lambda, the estimate with weights as they are, the weights."""
    w, r, q, v = columns(name)
    if not model:
        q, v = np.zeros_like(r), np.zeros_like(r)
    values = np.stack([v + changed(kind, w, lam) * (r - q) for lam in lambdas])
    return values.mean(axis=1), values.var(axis=1), float((v + w * (r - q)).mean()), w


@pytest.mark.parametrize("name", BANDITS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("method", ["slope", "mse"])
@pytest.mark.parametrize("bias_ub", [True, False])
def test_choices_and_scores_equal_the_reference(
    name: str, cls: str, method: str, bias_ub: bool
) -> None:
    if method == "slope" and not bias_ub:
        return  # SLOPE has no such setting
    stored = json.loads((DATA / f"{name}.json").read_text())["expected"]
    expected = stored[f"{cls}Tuning(method={method},bias_ub={bias_ub},delta=0.05)"]
    lambdas = [float(x) for x in expected["lambdas"]]
    means, variances, unclipped, w = moments(name, *CLASSES[cls], lambdas)
    if method == "slope":
        best = tuning.slope(means, variances, len(w))
    else:
        best, errors = tuning.mse(
            means, variances, len(w), unclipped, bias_ub=bias_ub,
            mean_square_weight=float((w**2).mean()), max_weight=float(w.max()),
        )  # fmt: skip
        scores = {float(lam): score for lam, score in expected["mse_scores"].items()}
        ours = dict(zip(lambdas, errors, strict=True))
        assert ours == pytest.approx(scores, rel=1e-9)
    assert means[best] == pytest.approx(expected["value"], rel=1e-9)
    tied = np.isclose(means, means[best], rtol=1e-12)
    assert float(expected["best_lambda"]) in np.array(lambdas)[tied]


@pytest.mark.parametrize("name", BANDITS)
def test_bias_of_clipping_equals_the_reference(name: str) -> None:
    stored = json.loads((DATA / f"{name}.json").read_text())["expected"]["helper"]
    means, _, unclipped, w = moments(name, "clip", False, [2.0])
    for bias_ub, key in ((False, "bias_direct_clip2"), (True, "bias_ub_clip2_d05")):
        _, errors = tuning.mse(
            means, np.zeros(1), len(w), unclipped, bias_ub=bias_ub,
            mean_square_weight=float((w**2).mean()), max_weight=float(w.max()),
        )  # fmt: skip
        assert np.sqrt(errors[0]) == pytest.approx(stored[key], rel=1e-9)


def test_slope_takes_the_narrowest_when_all_agree_and_the_widest_when_none_does() -> None:
    variances = np.array([1.0, 4.0, 9.0])
    assert tuning.slope(np.zeros(3), variances, 100) == 0
    assert tuning.slope(np.array([50.0, 25.0, 0.0]), variances, 100) == 2
    # the narrowest disagrees with the others, which agree
    assert tuning.slope(np.array([0.9, 0.05, 0.0]), np.array([1e-6, 0.04, 9.0]), 10_000) == 1


def test_slope_compares_with_all_wider_ones_not_the_last_alone() -> None:
    means, variances = np.array([0.0, 0.12, 0.24]), np.array([1.0, 0.9, 0.8])
    assert tuning.slope(means, variances, 1000) == 1


def test_a_second_log_is_tuned_anew() -> None:
    wide, clear = np.array([4.0, 1.0]), np.array([1.0, 0.0])
    assert tuning.slope(clear, wide, 20) == 1
    assert tuning.slope(clear, wide, 20_000) == 0
    assert tuning.slope(clear, wide, 20) == 1


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least one lambda"):
        tuning.slope(np.array([]), np.array([]), 10)
    with pytest.raises(ValueError, match="at least 2 units, got 1"):
        tuning.mse(np.ones(1), np.ones(1), 1, 0.0)
    with pytest.raises(ValueError, match="delta"):
        tuning.slope(np.ones(1), np.ones(1), 10, delta=1.0)
