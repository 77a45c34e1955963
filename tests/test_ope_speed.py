"""The benchmark of speed compares like with like; what made the evaluator fast kept it right."""

import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.diagnostics import EXPONENTS, WeightSums, tail_shape
from evaluation.moments import FEW, Moments
from experiments import ope_speed
from experiments.bench_rows import alone

ESTIMATORS = """
from ..utils import one


class InverseProbabilityWeighting:
    def estimate_policy_value(self, reward, action, pscore, action_dist):
        rows = range(len(action))
        return one * (reward * action_dist[rows, action, 0] / pscore).mean()

    def estimate_interval(self, n_bootstrap_samples, random_state, **given):
        return sum(self.estimate_policy_value(**given) for _ in range(n_bootstrap_samples))


class SelfNormalizedInverseProbabilityWeighting(InverseProbabilityWeighting):
    def estimate_policy_value(self, reward, action, pscore, action_dist):
        weight = action_dist[range(len(action)), action, 0] / pscore
        return (reward * weight).mean() / weight.mean()
"""


@pytest.fixture
def wheel(tmp_path: Path) -> str:
    """A wheel like obp's, whose packages cannot be imported as they are."""
    path = tmp_path / "obp-0.4.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("obp/__init__.py", "import not_there")
        file.writestr("obp/ope/__init__.py", "import not_there")
        file.writestr("obp/utils.py", "one = 1.0")
        file.writestr("obp/ope/estimators.py", ESTIMATORS)
    return str(path)


@pytest.fixture(autouse=True)
def _forget() -> "object":
    yield
    for name in [n for n in sys.modules if n == "obp" or n.startswith("obp.")]:
        del sys.modules[name]


def size(wheel: str) -> ope_speed.Row:
    return {**ope_speed.QUICK, "rows": 2000, "dense": 1000, "samples": 1200, "repeats": 1,
            "seed": 0, "wheel": wheel}  # fmt: skip


def test_without_a_wheel_a_line_says_how_to_get_it_and_ours_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for where in (None, "nowhere.whl"):
        assert ope_speed.found_wheel(where) is None
        assert "pip download --no-deps obp==0.4.1" in capsys.readouterr().out
    few = {**size("x"), "wheel": None}
    cases = (ope_speed.columns_case, ope_speed.shrinkage_case, ope_speed.bootstrap_case)
    for entry in [entry for case in cases for entry in case(few)]:
        assert entry["product"] > 0
        assert entry["peer"] is None
        assert entry["peer_name"].startswith("obp 0.4.1's")


def test_estimators_are_read_from_a_wheel_whose_packages_do_not_import(wheel: str) -> None:
    (row,) = ope_speed.columns_case(size(wheel))
    assert row["ratio_to_peer"] == pytest.approx(row["product"] / row["peer"])
    assert row["case"].endswith("2,000 rows")


def test_what_does_not_say_the_same_is_not_timed() -> None:
    with pytest.raises(ValueError, match="estimates differ"):
        ope_speed.agreed([0.1], [0.1 + 1e-8])


def test_both_numbers_of_resamples_are_shown(wheel: str) -> None:
    rows = ope_speed.bootstrap_case(size(wheel))
    assert [r["peer_name"] for r in rows][:2] == [
        "obp 0.4.1's IPW, bootstrap of 1,000",
        "obp 0.4.1's IPW, bootstrap of 1,200",
    ]
    assert [r["peer_goal"] for r in rows] == [1000, 1000, 5]
    assert len({(r["bench"], r["case"]) for r in rows}) == 3


@pytest.mark.parametrize(("start", "each"), [(0.5, 2e-7), (0.0, 1e-6)])
def test_a_line_is_extrapolated_with_its_error(start: float, each: float) -> None:
    n = np.repeat([1e5, 1e6, 1e7], 3)
    truth = start + each * n
    seconds, error = ope_speed.extrapolated(np.stack([n, truth], axis=1), 10**9)
    assert seconds == pytest.approx(start + each * 1e9, rel=1e-6)
    assert error < 1e-3 * seconds
    strayed = truth * np.tile([0.9, 1.0, 1.1], 3)
    seconds, error = ope_speed.extrapolated(np.stack([n, strayed], axis=1), 10**9)
    assert abs(seconds - (start + each * 1e9)) < error < 0.3 * seconds


def test_a_curve_of_rows_says_where_each_point_lies_and_what_a_billion_would_take() -> None:
    few = {**size(""), "line": (3000, 6000, 12_000)}
    *points, far = ope_speed.line_rows(few)
    assert [(p["curve"], p["at"]) for p in points] == [
        ("rows", 3000), ("rows", 6000), ("rows", 12_000),
    ]  # fmt: skip
    assert all(p["memory_mib"] > 50 for p in points)
    assert "1,000,000,000 rows, extrapolated" in far["case"]
    assert far["low"] < far["product"] < far["high"]


def test_a_world_is_logged_by_a_distribution() -> None:
    world = ope_speed.dense_world(30_000, 4, 0)
    weight = world["pi"][np.arange(30_000), world["action"]] / world["pscore"]
    assert world["pi"].sum(axis=1) == pytest.approx(np.ones(30_000))
    assert abs(weight.mean() - 1) < 4 * weight.std() / 30_000**0.5


def test_dense_arrays_shrink_where_memory_is_short() -> None:
    assert ope_speed.affordable(10, 100) == 100
    assert ope_speed.affordable(10**12, 100) == 10


def test_files_are_evaluated_in_a_process_of_their_own_as_polars_adds_them_up(
    tmp_path: Path,
) -> None:
    ope_speed.write_files(tmp_path, 3, 5000, seed=0)
    ours = alone("ope_speed", "files", {"where": f"{tmp_path}/*.parquet"})
    bare = alone("ope_speed", "polars", {"where": f"{tmp_path}/*.parquet"})
    assert ours["value"] == pytest.approx(bare["value"], rel=1e-12)
    assert ours["seconds"] > 0
    assert 50 < ours["peak"] < 400


@given(st.lists(st.one_of(st.floats(0, 1e300), st.sampled_from(
    [0.0, 1.0, 2.0**-64, 2.0**-65, 2.0**-66, 2.0**62, 2.0**63, 2.0**64, np.nextafter(1, 0)])),
    min_size=1, max_size=40))  # fmt: skip
def test_the_histogram_is_that_of_exponents(weights: list[float]) -> None:
    w = np.array(weights)
    with np.errstate(over="ignore"):
        counts = WeightSums.of(w, np.zeros(len(w))).counts
    exponent = np.clip(np.frexp(w)[1] + 64, 0, EXPONENTS - 1)
    exponent[w == 0] = 0
    assert np.array_equal(counts, np.bincount(exponent, minlength=EXPONENTS))


def test_few_and_many_bins_are_counted_alike() -> None:
    rng = np.random.default_rng(0)
    for spread in (0.5, 1.0, 4.0):
        w = np.exp(spread * rng.normal(size=20_000))
        counts = WeightSums.of(w, np.zeros(len(w))).counts
        assert np.array_equal(counts, np.bincount(np.frexp(w)[1] + 64, minlength=EXPONENTS))


@pytest.mark.parametrize("width", [1, 2, FEW, FEW + 1])
@pytest.mark.parametrize("level", [0.0, 3.0, 1e4, 1e7])
def test_products_do_not_lose_what_is_small_beside_the_mean(width: int, level: float) -> None:
    x = np.random.default_rng(0).normal(size=(width, 5000))
    moments = Moments(width)
    for part in np.array_split(x + level, 3, axis=1):
        moments.add(list(np.ascontiguousarray(part)))
    exact = np.atleast_2d(np.cov((x + level).astype(np.longdouble)).astype(float))
    assert moments.covariance() == pytest.approx(exact, rel=1e-9, abs=1e-10)
    assert moments.high == pytest.approx((x + level).max(axis=1))


def test_the_tail_is_looked_at_once() -> None:
    sums = WeightSums.of(np.random.default_rng(0).exponential(size=3000), np.zeros(3000))
    assert sums.pareto_k == tail_shape(sums.n, sums.top)
    assert "pareto_k" in vars(sums)
