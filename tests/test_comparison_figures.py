"""What a comparison concludes and draws: its verdict, flips of sign, levels and labels."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from comparison_reports import NAN, STATICS, gap_row, made, read
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.comparison_figures import differences, levels, near, placed, spread
from evaluation.comparison_page import comparison_page
from evaluation.comparison_wording import flips, verdict


def only(**parts: Any) -> str:
    """Text of a page of a few parts of the report."""
    return read(comparison_page({"learners": ["dqn"], "statics": STATICS, "baseline": "buy_again",
                                 **parts})).text  # fmt: skip


@pytest.mark.parametrize(
    ("gap", "low", "high", "said"),
    [
        (0.031, 0.019, 0.043, "is better than buy_again."),
        (0.009, 0.005, 0.013, "is above buy_again by less than 1%: no win."),
        (0.031, -0.001, 0.063, "is not told apart from buy_again."),
        (-0.031, -0.04, -0.02, "is worse than buy_again."),
        (0.031, NAN, None, "is not told apart from buy_again."),
    ],
)
def test_a_claim_left_out_follows_from_the_interval(gap, low, high, said):
    report = made() | {"differences": [{"policy": "dqn", "difference": gap, "low": low,
                                        "high": high}]}  # fmt: skip
    assert verdict(report, "dqn").startswith(said)


def test_the_value_from_anothers_log_is_of_the_softened_policy_and_has_its_unit():
    report = made() | {"off_policy": {"notes": [], "baseline": "ease"}}
    of_dqn = next(row for row in report["policies"] if row["policy"] == "dqn")
    of_dqn["ope"]["unit"] = "a session"
    said = "Off-policy, its softened kin earns .94 (.86 to 1.02) a session."
    assert said in verdict(report, "dqn")


def test_flips_are_counted_from_the_first_row():
    assert flips(made(), "dqn") == (["satiation off", "exposure on (0.5)"], ["satiation off"], 10)
    assert flips(made(), "ease") == ([], [], 10)
    assert flips(made(), "nobody") == ([], [], 0)
    mirrored = made()
    for row in mirrored["sensitivity"]["rows"]:
        for gap in row["differences"].values():
            gap |= {"difference": -gap["difference"], "low": -gap["high"], "high": -gap["low"]}
    assert flips(mirrored, "dqn") == flips(made(), "dqn")
    said = "On the fewer sessions with changed assumptions its sign is − as it is."
    assert said in verdict(mirrored, "dqn")


def test_signs_are_framed_where_they_flip_and_faint_where_unsure():
    html = comparison_page({"baseline": "b", "sensitivity": made()["sensitivity"]})
    assert html.count('<span class="minus flip">−</span>') == 1
    assert html.count('<span class="faint flip">~ −</span>') == 1
    assert html.count('<span class="plus">+</span>') == 9
    assert "<td>2/10</td>" in html


def test_one_seed_has_no_band_and_says_so():
    curve = {"step": [1, 2, 3], "iqm": [0.1, 0.2, 0.3], "low": [NAN] * 3, "high": [NAN] * 3}
    assert "Fewer than 3 seeds of dqn: no band" in only(curves={"dqn": {**curve, "seeds": 1}})
    assert "no band" not in only(curves={"dqn": {**curve, "seeds": 3}})


def test_a_level_beyond_the_curves_is_named_in_words():
    report = made()
    drawn, left = levels(report)
    assert list(drawn) == ["buy_again", "sasrec", "ease", "als", "item_knn"]
    assert left == {"popularity": 0.462, "random": 0.051}
    assert "Not drawn: popularity .462, random .051." in only(
        curves=report["curves"], levels=report["levels"]
    )


def test_a_poor_static_policy_does_not_flatten_the_learner():
    axes = differences(made()).axes[0]
    low, high = axes.get_xlim()
    assert low == -high
    assert 0.043 < high < 0.15  # dqn ends at .043, random lies at -.88
    report = made() | {"differences": [gap_row("dqn", -0.7)]}
    assert differences(report).axes[0].get_xlim()[0] < -0.712
    assert near([], NAN) == 1.0


@given(
    st.lists(st.floats(0, 1), max_size=8).map(lambda xs: sorted(xs, reverse=True)),
    st.floats(0.01, 0.1),
)
def test_labels_of_levels_keep_order_and_distance(places, gap):
    moved = spread(places, gap, 0.0, 1.0)
    assert all(a - b >= gap - 1e-9 for a, b in pairwise(moved))
    assert all(-1e-9 <= x <= 1 + 1e-9 for x in moved)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=12, unique=True))
def test_labels_of_points_do_not_overlap(cells):
    points = np.array([(30.0 + 70 * x, 30.0 + 45 * y) for x, y in cells]).reshape(-1, 2)
    sizes = [(50.0, 11.0)] * len(points)
    middle = points + np.array(placed(points, sizes, (0.0, 0.0, 300.0, 290.0))).reshape(-1, 2)
    for i, (x, y) in enumerate(middle):
        assert 24.9 <= x <= 275.1
        assert 5.4 <= y <= 284.6
        for a, b in middle[:i]:
            assert abs(x - a) >= 49.9 or abs(y - b) >= 10.9
